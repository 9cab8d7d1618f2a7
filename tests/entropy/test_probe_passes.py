"""A forward pass counts when it is whole, whatever cuts it off and however many threads call the model."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import tiny_model
from test_probe import IDS, measure

from normfree.entropy import EntropyProbe, UnsupportedModel


def fail_once(module: torch.nn.Module, error: BaseException) -> None:
    """Let the module's next forward call raise."""
    whole = module.forward

    def failing(*args, **kwargs):
        module.forward = whole
        raise error

    module.forward = failing


@pytest.mark.parametrize("failing", ["model.layers.0.input_layernorm", "model.layers.1.mlp", "lm_head"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), KeyboardInterrupt()])
def test_a_pass_cut_off_by_an_exception_leaves_no_rows(failing, error):
    model = tiny_model("llama", num_hidden_layers=3)
    whole = measure(model)
    with EntropyProbe(model) as probe, torch.no_grad():
        fail_once(model.get_submodule(failing), error)
        with contextlib.suppress(type(error)):
            model(input_ids=IDS)
        for half in IDS.split(1):
            model(input_ids=half)
    assert probe.statistics().rows.unique().tolist() == [40]
    torch.testing.assert_close(probe.statistics().mean_nats(), whole.mean_nats(), atol=1e-6, rtol=0)


def test_each_whole_step_of_a_generation_that_fails_counts():
    model = tiny_model("llama")
    steps = []

    def stop_at_the_third(_module, _args):
        steps.append(None)
        if len(steps) == 3:
            raise KeyboardInterrupt

    model.get_submodule("model.layers.1.mlp").register_forward_pre_hook(stop_at_the_third)
    with EntropyProbe(model) as probe, torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert probe.statistics().rows.unique().tolist() == [42]


@pytest.mark.slow
def test_a_compiled_pass_that_fails_leaves_no_rows():
    model = tiny_model("llama")
    compiled = torch.compile(model, backend="aot_eager")
    with EntropyProbe(compiled) as probe, torch.no_grad():
        compiled(input_ids=IDS)
        fail_once(model.get_submodule("model.layers.1.mlp"), KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            compiled(input_ids=IDS)
        compiled(input_ids=IDS)
    assert probe.statistics().rows.unique().tolist() == [80]


def test_matrices_of_a_pass_that_is_refused_leave_no_rows():
    model = tiny_model("bloom", attn_implementation="eager")
    cuts = [True]

    def cut_the_last(_model, _args, output):
        if cuts.pop() if cuts else False:
            output.attentions = (*output.attentions[:-1], output.attentions[-1][..., :-1])

    with EntropyProbe(model, "eager") as probe, torch.no_grad():
        model.register_forward_hook(cut_the_last)
        model._forward_hooks.move_to_end(next(iter(model._forward_hooks)))  # ours comes last
        with pytest.raises(UnsupportedModel, match="returns no probabilities"):
            model(input_ids=IDS)
        model(input_ids=IDS)
    assert probe.statistics().rows.unique().tolist() == [40]


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
