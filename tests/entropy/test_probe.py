"""EntropyProbe on models of transformers: the numbers, and the world left as found. tests/gpu runs some of it."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from normfree.entropy import EntropyProbe, HeadEntropy, UnsupportedModel
from normfree.entropy.eager import entropy_of_probabilities
from tests.entropy.families import tiny_model
from tests.entropy.kinds import IDS, PADDED, matrices_of

MASK, LEFT_PADDED = torch.ones(2, 20, dtype=torch.long), PADDED


def measure(model, *, mask=MASK, **options):
    with EntropyProbe(model, **options) as probe, torch.no_grad():
        model(input_ids=IDS.to(model.device), attention_mask=mask.to(model.device))
    return probe.statistics()


def by_eager_matrices(model, mask):
    """(L, H) mean over real queries of -sum p ln p from output_attentions, in float64."""
    matrices = matrices_of(model, {"input_ids": IDS.to(model.device), "attention_mask": mask.to(model.device)})
    nats_LBHT = torch.stack([torch.special.entr(p_BHTS).sum(-1).cpu() for p_BHTS in matrices.values()])
    real_LBHT = mask.bool()[None, :, None].expand_as(nats_LBHT)
    return (nats_LBHT * real_LBHT).sum((1, 3)) / real_LBHT.sum((1, 3))


@pytest.mark.parametrize("padded", [LEFT_PADDED, LEFT_PADDED.flip(1)], ids=["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "gpt_oss", "deepseek_v3", "mistral"])
def test_agrees_with_eager_matrices_on_a_padded_batch(family, padded, device):
    model = tiny_model(family).to(device)
    heads = measure(model, mask=padded)
    assert (heads.mean_nats() - by_eager_matrices(model, padded)).abs().max() < 2e-5
    assert heads.rows.unique().tolist() == [34]
    assert heads.nonfinite_rows.sum() == 0
    model.set_attn_implementation("eager")
    eager = measure(model, mask=padded)
    torch.testing.assert_close(eager.mean_nats(), heads.mean_nats(), atol=1e-5, rtol=0)
    torch.testing.assert_close(eager.ceiling_nats(), heads.ceiling_nats(), atol=1e-9, rtol=0)


def test_batches_of_different_lengths_merge_by_sums_and_counts():
    model = tiny_model("gpt2")
    with EntropyProbe(model) as probe, torch.no_grad():
        model(input_ids=IDS)
        model(input_ids=IDS[:, :7])
    with EntropyProbe(model) as second, torch.no_grad():
        model(input_ids=IDS[:, :7])
    merged = measure(model) + second.statistics()
    assert merged.rows[0, 0] == 2 * 27
    torch.testing.assert_close(merged.mean_nats(), probe.statistics().mean_nats())


def test_a_nan_head_is_counted_apart_and_never_as_zero(device):
    model = tiny_model("gpt2").to(device)
    with torch.no_grad():
        model.get_parameter("transformer.h.1.attn.c_attn.bias")[8] = torch.nan  # head 1 of 4, a query coordinate
    heads = measure(model)
    assert heads.nonfinite_rows.nonzero().tolist() == [[1, 1]]
    assert heads.nonfinite_rows[1, 1] == 40
    assert heads.rows[1].tolist() == [40, 0, 40, 40]
    assert heads.mean_nats().isnan().nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_once(reentrant, device):
    """On CUDA the backward pass runs in a thread of its own."""
    model, ids = tiny_model("gpt2").train().to(device), IDS.to(device)
    plain = measure(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    with EntropyProbe(model) as probe:
        model(input_ids=ids, use_cache=False).logits.square().mean().backward()
    assert torch.equal(probe.statistics().rows, plain.rows)
    model = tiny_model("llama").to(device)
    with EntropyProbe(model) as probe:  # a model within a block that is computed again
        embedded = model.get_input_embeddings()(ids)
        checkpoint(lambda x: model(inputs_embeds=x).logits, embedded, use_reentrant=reentrant).sum().backward()
    assert torch.equal(probe.statistics().rows, plain.rows)


def test_training_goes_on_as_without_a_probe():
    plain, probed = (tiny_model("llama").train() for _ in range(2))
    plain(input_ids=IDS).logits.square().mean().backward()
    with EntropyProbe(probed):
        probed(input_ids=IDS).logits.square().mean().backward()
    for a, b in zip(plain.parameters(), probed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=0, rtol=0)


def test_compiled_model_stays_whole_and_compiles_once_for_all_probes():
    model = tiny_model("gpt2")
    plain = measure(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = cast(torch.nn.Module, torch.compile(model, backend=counter, fullgraph=True))
    compiled(input_ids=IDS)
    for _ in range(3):
        with EntropyProbe(compiled) as probe:
            compiled(input_ids=IDS).logits.sum().backward()
        compiled(input_ids=IDS)
        torch.testing.assert_close(probe.statistics().mean_nats(), plain.mean_nats(), atol=1e-6, rtol=0)
        assert probe.statistics().rows.unique().tolist() == [40]
    assert counter.frame_count == 2


def measure_one_sequence(rank: int, folder: str) -> None:
    """One of two processes: its own sequence through the wrapped model, then the sums of both.

    The wrapped model must be freed before the process group: otherwise PyTorch sometimes waits for gloo's thread with
    the interpreter's lock held, for ever.
    """
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    wrapped = torch.nn.parallel.DistributedDataParallel(tiny_model("llama").train())
    probe = EntropyProbe(wrapped)
    with probe:
        wrapped(input_ids=IDS[rank : rank + 1]).logits.sum().backward()
    heads = probe.statistics()
    heads.all_reduce()
    del wrapped, probe
    torch.distributed.destroy_process_group()
    torch.save(vars(heads), Path(folder, f"{rank}.pt"))


@pytest.mark.slow
def test_works_under_distributed_data_parallel_and_sums_over_ranks(tmp_path):
    torch.multiprocessing.spawn(measure_one_sequence, (str(tmp_path),), nprocs=2, daemon=True)
    whole = measure(tiny_model("llama"))
    for rank in (0, 1):
        both = HeadEntropy(**torch.load(tmp_path / f"{rank}.pt"))
        assert torch.equal(both.rows, whole.rows)
        torch.testing.assert_close(both.mean_nats(), whole.mean_nats(), atol=1e-6, rtol=0)
        torch.testing.assert_close(both.ceiling_nats(), whole.ceiling_nats())


def world(model):
    implementation = model.config._attn_implementation
    return {
        "config": model.config.to_dict() | {"attention": implementation},
        "entries": {name: id(ALL_ATTENTION_FUNCTIONS[name]) for name in ALL_ATTENTION_FUNCTIONS},
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


@pytest.mark.parametrize(("family", "method"), [("gpt2", "auto"), ("gpt_oss", "auto"), ("bloom", "eager")])
@pytest.mark.parametrize("fails", [False, True])
def test_leaves_the_world_as_found(family, method, fails):
    model = tiny_model(family)
    next(iter(model.children())).train()
    before = world(model)
    try:
        with EntropyProbe(model, method=method):
            assert world(model) != before
            model(input_ids=IDS)
            if fails:
                raise KeyError("stop")
    except KeyError:
        assert fails
    assert world(model) == before


def test_probes_nest_and_each_sees_its_own_model():
    student, teacher = tiny_model("gpt2"), tiny_model("llama")
    alone = measure(student), measure(teacher)
    before = world(student)
    with EntropyProbe(student) as outer, EntropyProbe(student) as second, torch.no_grad():
        with EntropyProbe(teacher) as inner:
            teacher(input_ids=IDS)
            student(input_ids=IDS)
        teacher(input_ids=IDS)
        student(input_ids=IDS)
    assert world(student) == before
    assert outer.statistics().rows.unique().tolist() == second.statistics().rows.unique().tolist() == [80]
    assert inner.statistics().rows.unique().tolist() == [40]
    torch.testing.assert_close(outer.statistics().mean_nats(), alone[0].mean_nats())
    torch.testing.assert_close(inner.statistics().mean_nats(), alone[1].mean_nats())


def test_a_nan_head_keeps_the_ceiling_of_the_others():
    uniform_TS = torch.ones(8, 8).tril() / torch.arange(1, 9)[:, None]
    p_BHTS = torch.stack([uniform_TS, torch.full((8, 8), torch.nan)])[None]
    entropies = entropy_of_probabilities(p_BHTS)
    assert entropies.visible[0].tolist() == [list(range(1, 9))] * 2
    assert entropies.counted.sum((0, 2)).tolist() == [8, 0]
    assert entropy_of_probabilities(p_BHTS[:, 1:]).visible.unique().tolist() == [8]  # no head shows what is visible


def test_eager_probes_refuse_dropout_and_keep_the_calls_form():
    model = tiny_model("bloom")
    expected = measure(model, mask=LEFT_PADDED, method="eager")
    with EntropyProbe(model, method="eager") as probe, torch.no_grad():
        output = model(IDS, None, LEFT_PADDED, return_dict=False)
    assert isinstance(output, tuple)
    torch.testing.assert_close(vars(probe.statistics()), vars(expected), atol=0, rtol=0)
    model.config.attention_dropout = 0.1
    with EntropyProbe(model.train(), method="eager"), pytest.raises(UnsupportedModel, match=r"call model\.eval"):
        model(input_ids=IDS)


def test_what_cannot_be_probed_is_refused():
    with pytest.raises(UnsupportedModel, match="holds 0 Hugging Face models"):
        EntropyProbe(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="allowed"):
        EntropyProbe(tiny_model("gpt2"), method=cast(Any, "flash"))
    pair = torch.nn.ModuleDict({"teacher": tiny_model("gpt2"), "student": tiny_model("gpt2")})
    with pytest.raises(ValueError, match="holds 2 Hugging Face models; use one probe for each"):
        EntropyProbe(pair)
    nothing_ran = r"^No forward pass ran inside the `with` block\..*attn_implementation='sdpa'"
    with EntropyProbe(pair["teacher"]) as probe, pytest.raises(ValueError, match=nothing_ran):
        probe.statistics()


@pytest.mark.parametrize(("family", "method"), [("gpt2", "auto"), ("bloom", "eager")])
def test_a_copy_made_inside_a_probe_is_a_plain_model(family, method):
    model = tiny_model(family, attn_implementation="eager")
    with EntropyProbe(model, method) as outer, torch.no_grad():
        twin = copy.deepcopy(model)
        model(input_ids=IDS)
    with torch.no_grad():
        assert twin(input_ids=IDS).attentions is None
    heads = outer.statistics()
    torch.testing.assert_close(measure(twin, method=method).mean_nats(), heads.mean_nats(), atol=1e-6, rtol=0)
    assert heads.rows.unique().tolist() == [40]


@pytest.mark.parametrize(("family", "method"), [("gpt2", "auto"), ("bloom", "eager")])
def test_eight_threads_on_one_probe_lose_nothing(family, method):
    model = tiny_model(family, attn_implementation="eager")
    whole = measure(model, method=method)

    def call_often(_thread: int) -> None:
        with torch.no_grad():
            for _ in range(25):
                model(input_ids=IDS)

    with EntropyProbe(model, method) as probe, ThreadPoolExecutor(8) as threads:
        list(threads.map(call_often, range(8)))
    heads = probe.statistics()
    assert heads.rows.unique().tolist() == [8 * 25 * 40]
    assert heads.ceiling_rows.unique().tolist() == [8 * 25 * 40 * 4]
    torch.testing.assert_close(heads.mean_nats(), whole.mean_nats(), atol=1e-6, rtol=0)


def example(*, layers=(0, 2), heads=(2, 2), patterns=False) -> HeadEntropy:
    rows = torch.tensor([[4, 0], [2, 4]])
    extra = {"sum_distance": rows.double() * 2, "sum_first_mass": rows.double() / 4} if patterns else {}
    nats, ceilings = torch.tensor([[2.0, 0.0], [1.0, 3.0]]).double(), torch.tensor([8.0, 6.0]).double()
    counts = {"rows": rows, "nonfinite_rows": 4 - rows, "ceiling_rows": torch.tensor([8, 8])}
    return HeadEntropy(list(layers), list(heads), sum_nats=nats, sum_ceiling_nats=ceilings, **counts, **extra)


def test_a_table_has_a_row_per_head_that_exists():
    frame = example(heads=(1, 2), patterns=True).to_frame()
    assert frame[["layer", "head"]].values.tolist() == [[0, 0], [2, 0], [2, 1]]
    assert frame["entropy_nats"].tolist() == [0.5, 0.5, 0.75]
    assert frame["ceiling_nats"].tolist() == [1.0, 0.75, 0.75]
    assert frame["distance_tokens"].tolist() == [2.0] * 3
    assert frame["first_token_mass"].tolist() == [0.25] * 3
    assert "first_token_mass" not in example().to_frame()
    with pytest.raises(ValueError, match="patterns=True"):
        example().mean_distance()
    assert repr(example()) == example().to_frame().to_string()


@pytest.mark.parametrize("other", [{"layers": (0, 1)}, {"patterns": True}])
def test_different_architectures_are_not_merged(other):
    with pytest.raises(ValueError, match="one architecture, with the same patterns="):
        _ = example() + example(**other)
