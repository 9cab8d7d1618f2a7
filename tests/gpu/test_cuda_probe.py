"""EntropyProbe on CUDA around our model and around those of transformers."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from normfree.entropy import EntropyProbe, HeadEntropy
from tests.entropy.families import tiny_model
from tests.entropy.test_probe import (  # noqa: F401 - collected here too, with the device of this folder
    test_a_nan_head_is_counted_apart_and_never_as_zero,
    test_agrees_with_eager_matrices_on_a_padded_batch,
    test_gradient_checkpointing_counts_once,
)

DEVICE = "cuda"
IDS = torch.arange(3, 59).view(2, 28)
MASK = torch.ones(2, 28, dtype=torch.long)
LEFT_PADDED = MASK.clone()
LEFT_PADDED[0, :9] = 0
FAMILIES = ("normfree", "gpt2", "llama")
MIB = 2**20


@pytest.fixture
def family(build: Callable[..., Any]) -> Callable[[str], Any]:
    """`family(name)`: a small model on the CPU in evaluation mode."""
    return lambda name: build(norm="none", spread=0.2) if name == "normfree" else tiny_model(name)


def measure(model: Any, mask: Tensor = MASK, *, dtype: torch.dtype | None = None, **options: Any) -> HeadEntropy:
    device = next(model.parameters()).device
    with (
        EntropyProbe(model, **options) as probe,
        torch.no_grad(),
        torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None),
    ):
        model(input_ids=IDS.to(device), attention_mask=mask.to(device), use_cache=False)
    return probe.statistics()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mask", [MASK, LEFT_PADDED], ids=["whole", "left padded"])
def test_a_probe_agrees_with_the_cpu(name, mask, family):
    model = family(name)
    on_cpu = measure(model, mask, patterns=True)
    heads = measure(model.to(DEVICE), mask, patterns=True)
    assert torch.equal(heads.rows, on_cpu.rows)
    assert int(heads.nonfinite_rows.sum()) == int(on_cpu.nonfinite_rows.sum()) == 0
    torch.testing.assert_close(heads.mean_nats(), on_cpu.mean_nats(), atol=2e-5, rtol=0)
    assert int(heads.rows[0, 0]) == int(mask.sum())
    torch.testing.assert_close(heads.ceiling_nats(), on_cpu.ceiling_nats(), atol=1e-9, rtol=0)
    torch.testing.assert_close(heads.mean_distance(), on_cpu.mean_distance(), atol=1e-3, rtol=0)
    torch.testing.assert_close(heads.mean_first_mass(), on_cpu.mean_first_mass(), atol=2e-5, rtol=0)
    assert on_cpu.mean_nats().std() > 1e-3, "heads that are all alike would hide a mixed-up order"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mask", [MASK, LEFT_PADDED], ids=["whole", "left padded"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 3e-5), (torch.bfloat16, 0.03), (torch.float16, 0.01)])
def test_a_probe_agrees_with_eager_matrices_in_the_same_precision(name, mask, dtype, tolerance, family):
    model = family(name).to(DEVICE)
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    ids, mask_BT = IDS.to(DEVICE), mask.to(DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        output = twin(input_ids=ids, attention_mask=mask_BT, output_attentions=True, use_cache=False)
    nats_LBHT = torch.stack([torch.special.entr(p.double()).sum(-1) for p in output.attentions]).cpu()
    expected = (nats_LBHT * mask[None, :, None]).sum((1, 3)) / mask.sum()
    heads = measure(model, mask, dtype=dtype)
    assert int(heads.nonfinite_rows.sum()) == 0
    error = (heads.mean_nats() - expected).abs().max()
    assert error < tolerance, f"largest difference {float(error):.2e} nats"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_inside_a_probe_are_bit_equal(name, dtype, family):
    model = family(name).to(DEVICE, dtype)
    ids = IDS.to(DEVICE)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with EntropyProbe(model):
            inside = model(input_ids=ids).logits
        after = model(input_ids=ids).logits
    assert torch.equal(plain, inside)
    assert torch.equal(plain, after)


def test_a_probe_adds_little_memory_to_a_long_context(build):
    model = build(hidden_size=512, num_attention_heads=8, max_position_embeddings=4096, norm="none").to(DEVICE)
    ids = torch.randint(0, 61, (1, 4096), device=DEVICE)

    def peak_mib(*, probed: bool) -> float:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad(), EntropyProbe(model, patterns=True) if probed else nullcontext():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB

    for probed in (False, True):  # workspaces of libraries
        peak_mib(probed=probed)
    plain, probed = peak_mib(probed=False), peak_mib(probed=True)
    matrices = 8 * 4096**2 * 4 / MIB
    assert probed - plain < matrices / 3, f"{plain:.0f} MiB without, {probed:.0f} with; matrices: {matrices:.0f}"
