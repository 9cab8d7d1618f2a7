"""intervene() equals attention matrices edited by hand, and leaves the model as it was."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from normfree.entropy import EntropyProbe, UnsupportedModel
from normfree.entropy.interventions import How, intervene
from normfree.entropy.layers import attention_layers
from normfree.entropy.routing import global_named
from tests.entropy.families import tiny_model
from tests.entropy.test_probe import world
from tests.entropy.test_support import AGREE
from tests.small_model import CHOICES, small_model

# B batch, T query, S key, H query heads, G key heads, D value width

HEADS = [(0, 1), (0, 2), (1, 3)]
IDS = torch.arange(40).view(2, 20) * 7 % 60
PADDING = torch.ones_like(IDS)
PADDING[1, :6] = 0  # on the left
MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": partial(tiny_model, "gpt2"),
    "llama with grouped queries": partial(tiny_model, "llama"),
    "mistral with a window": partial(tiny_model, "mistral"),
    "gemma2 with a window and soft-capping": partial(tiny_model, "gemma2"),
    "gpt_oss with sinks": partial(tiny_model, "gpt_oss"),
    "deepseek_v3 with narrow values": partial(tiny_model, "deepseek_v3", v_head_dim=4, num_hidden_layers=2),
    "bert": partial(tiny_model, "bert", is_decoder=False),
    "ours": small_model,
    "ours with sinks and gates": partial(small_model, spread=0.1, **CHOICES[1]),
    "ours with rotary positions and softmax_1": partial(small_model, **CHOICES[2]),
}
HOWS: tuple[How, ...] = ("average", "zero", 2.5)


@contextmanager
def edited_by_hand(model: Any, how: object, heads: list[tuple[int, int]] = HEADS) -> Iterator[None]:
    """Explicit attention in which rows of the matrices of `heads` are uniform over visible keys, or scaled."""

    def attend(module, query_BHTD, key_BGSD, value_BGSD, attention_mask, **named):
        eager = global_named(type(module), "eager_attention_forward")
        _, weights_BHTS = eager(module, query_BHTD, key_BGSD, value_BGSD, attention_mask, **named)
        edited_BHTS = weights_BHTS.clone()
        for layer, head in heads:
            if layer == module.layer_idx and how == "average":
                seen_BTS = torch.ones_like(weights_BHTS[:, head])
                if attention_mask is not None:
                    seen_BTS = (attention_mask[:, 0] == 0).to(seen_BTS.dtype)
                seen_BTS[..., 0] *= "before_sink" not in named  # the first key of ours is then the sink
                edited_BHTS[:, head] = seen_BTS / seen_BTS.sum(-1, keepdim=True).clamp(min=1)
            elif layer == module.layer_idx:
                edited_BHTS[:, head] *= 0.0 if how == "zero" else how
        value_BHSD = value_BGSD.repeat_interleave(query_BHTD.shape[1] // value_BGSD.shape[1], dim=1)
        return (edited_BHTS @ value_BHSD).transpose(1, 2).contiguous(), weights_BHTS

    before = model.config._attn_implementation
    AttentionInterface.register("by_hand", attend)
    AttentionMaskInterface.register("by_hand", eager_mask)
    model.set_attn_implementation("by_hand")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        del AttentionInterface._global_mapping["by_hand"], AttentionMaskInterface._global_mapping["by_hand"]


@torch.no_grad()
def logits(model: Any, context: Any, ids: torch.Tensor = IDS, padding: torch.Tensor | None = PADDING) -> torch.Tensor:
    """Those of the real tokens."""
    ids, where = ids % model.config.vocab_size, torch.ones_like(ids) if padding is None else padding
    with context:
        return model(input_ids=ids, attention_mask=padding, use_cache=False).logits[where.bool()]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_heads_change_as_matrices_edited_by_hand(name, implementation):
    model = MODELS[name]()
    plain = logits(model, nullcontext())
    if implementation == "eager" or model._supports_sdpa:
        model.set_attn_implementation(implementation)
    for padding in (PADDING, None):
        for how in HOWS:
            truth = logits(model, edited_by_hand(model, how), padding=padding)
            changed = logits(model, intervene(model, HEADS, how), padding=padding)
            torch.testing.assert_close(changed, truth, atol=2e-5, rtol=1e-5)
            if padding is not None:
                assert (truth - plain).abs().max() > 1e-3
    torch.testing.assert_close(logits(model, nullcontext()), plain, atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", AGREE.split())
def test_families_change_as_matrices_edited_by_hand(family):
    model = tiny_model(family)
    modules: list[Any] = [module for module, layer in attention_layers(model).items() if not layer.is_cross]
    heads = [(module.layer_idx, 1) for module in modules]
    for how in HOWS:
        truth = logits(model, edited_by_hand(model, how, heads))
        torch.testing.assert_close(logits(model, intervene(model, heads, how)), truth, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_the_world_is_left_as_found(fails):
    models = [tiny_model("gpt2"), tiny_model("llama").train()]
    before = [world(model) for model in models]
    opened = (intervene(models[0], HEADS), intervene(models[1], HEADS, 0.5), intervene(models[0], [(0, 1)], "zero"))
    expected = pytest.raises(RuntimeError, match="stop") if fails else nullcontext()
    with expected, opened[0], opened[1], opened[2]:
        for model in models:
            model(IDS)
        if fails:
            raise RuntimeError("stop")
    assert [world(model) for model in models] == before


def test_nested_interventions_apply_from_outside_in():
    model = tiny_model("llama")
    with intervene(model, HEADS, 2.0):
        six = logits(model, intervene(model, HEADS, 3.0))
        average = logits(model, intervene(model, HEADS, "average"))
        double = logits(model, nullcontext())
    for value, how in ((six, 6.0), (average, "average"), (double, 2.0)):
        torch.testing.assert_close(value, logits(model, intervene(model, HEADS, how)), atol=1e-6, rtol=1e-5)


def test_other_models_and_copies_are_not_changed():
    model, other = tiny_model("gpt2"), tiny_model("gpt2")
    plain = logits(model, nullcontext())
    with intervene(model, HEADS):
        assert torch.equal(logits(other, nullcontext()), plain)
        assert torch.equal(logits(copy.deepcopy(model), nullcontext()), plain)
        assert not torch.allclose(logits(model, nullcontext()), plain, atol=1e-3)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_edited_matrices(how, checkpointing):
    model, truth = tiny_model("llama").train(), tiny_model("llama").train()
    if checkpointing:
        model.activation_checkpointing_enable()
    for trained, context in ((model, intervene(model, HEADS, how)), (truth, edited_by_hand(truth, how))):
        with context:
            trained(IDS, use_cache=False).logits.square().mean().backward()
    for (name, mine), theirs in zip(model.named_parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)
    if how == "average":  # of four query heads, 1 and 2 of layer 0 no longer matter
        query_HDE = model.get_submodule("model.layers.0.self_attn.q_proj").weight.grad.view(4, 8, 32)
        assert [bool(head.abs().max() == 0) for head in query_HDE] == [False, True, True, False]


@pytest.mark.parametrize("name", ["llama with grouped queries", "mistral with a window", "ours"])
def test_a_cache_gives_what_whole_texts_give(name):
    model = MODELS[name]()
    ids = IDS[:1] % model.config.vocab_size
    with torch.no_grad(), intervene(model, HEADS):
        whole = model(ids).logits
        first = model(ids[:, :9], use_cache=True)
        parts, cache = [first.logits], first.past_key_values
        for place in range(9, 20):
            step = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            parts, cache = [*parts, step.logits], step.past_key_values
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("probe_first", [True, False])
@pytest.mark.parametrize("method", ["auto", "eager"])
def test_a_probe_sees_what_changed_heads_compute(method, probe_first):
    model = tiny_model("llama")
    model.set_attn_implementation("sdpa" if method == "auto" else "eager")
    entropies = {}
    for when in ("plain", "intervention", "by hand"):
        probe = EntropyProbe(model, "auto" if when == "by hand" else method)
        contexts = {"plain": nullcontext(), "intervention": intervene(model, [(0, 1)]), "by hand": nullcontext()}
        by_hand = edited_by_hand(model, "average", [(0, 1)]) if when == "by hand" else nullcontext()
        first, second = (probe, contexts[when]) if probe_first else (contexts[when], probe)
        with by_hand, torch.no_grad(), first, second:
            model(IDS)
        entropies[when] = probe.statistics().mean_nats()
    torch.testing.assert_close(entropies["intervention"][0], entropies["plain"][0])  # what is discarded
    torch.testing.assert_close(entropies["intervention"], entropies["by hand"], atol=1e-5, rtol=0)
    assert (entropies["intervention"][1] - entropies["plain"][1]).abs().max() > 1e-3


def test_compiled_models_break_their_graph_or_refuse():
    model = tiny_model("gpt2", n_layer=1)
    plain, changed = (logits(model, context) for context in (nullcontext(), intervene(model, [(0, 1)])))
    compiled: Any = torch.compile(model, backend="eager")
    for context, truth in ((intervene(compiled, [(0, 1)]), changed), (nullcontext(), plain)):
        torch.testing.assert_close(logits(compiled, context), truth, atol=1e-6, rtol=1e-5)
    torch._dynamo.reset()  # else code that was compiled above serves this model too
    whole: Any = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph=True"):
        logits(whole, intervene(whole, [(0, 1)]))


def test_half_precision_averages_in_float32():
    model = tiny_model("llama").bfloat16()
    calls = []
    layer = next(iter(attention_layers(model)))
    handle = layer.v_proj.register_forward_hook(lambda *call: calls.append(call[-1]))
    handle_2 = layer.o_proj.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0]))
    logits(model, intervene(model, [(0, 1)]), padding=None)
    handle.remove(), handle_2.remove()
    values, written = calls[0][..., :8].double(), calls[1][..., 8:16]
    truth = values.cumsum(1) / torch.arange(1, 21)[:, None]
    torch.testing.assert_close(written, truth.bfloat16(), atol=0, rtol=2**-7)


@pytest.mark.parametrize(
    ("heads", "how", "message"),
    [
        ([], "average", r"heads=\[\]; give one or more pairs \(layer, head\)"),
        ((0, 3), "average", r"heads=\(0, 3\); give one or more pairs"),
        ([(2, 0)], "average", "layer 2 has no attention here; allowed: 0, 1$"),
        ([(1, 4)], "average", "layer 1 has no head 4; allowed: 0 to 3$"),
        ([(1, -1)], "zero", "layer 1 has no head -1"),
        ([(0, 0)], "mean", "how='mean'; allowed: 'average', 'zero' or a finite number"),
        ([(0, 0)], float("nan"), "how=nan; allowed"),
    ],
)
def test_wrong_heads_layers_and_ways_are_named(heads, how, message):
    model = tiny_model("gpt2")
    registry = dict(ALL_ATTENTION_FUNCTIONS)
    with pytest.raises(ValueError, match=message), intervene(model, heads, how):
        model(IDS)
    assert dict(ALL_ATTENTION_FUNCTIONS) == registry


@pytest.mark.parametrize("build", [partial(tiny_model, "bloom"), partial(torch.nn.Linear, 2, 2)])
def test_models_without_reachable_heads_are_refused(build):
    with pytest.raises(UnsupportedModel, match="does not route its attention"), intervene(build(), HEADS):
        pass
