"""Padding counts in no measure, and a NaN reaches every value behind it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from normfree import measure
from tests.measures.families import IDS, random_model
from tests.small_model import small_model

OF_ANY = ["sinks", "logits", "residual", "propagation", "ranges", "units"]
OF_GPT2 = ["perplexity", "losses", "selectivity", "spectrum"]  # T5 is 2048 wide: 20 s for its spectra


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_padding_counts_nowhere(family: str) -> None:
    """Two texts of different lengths in one padded batch, against both alone."""
    model, lengths = random_model(family), (12, 7)
    model = model.base_model if family == "bert" else model
    measures = ["heads", *OF_ANY] + (OF_GPT2 if family == "gpt2" else [])
    names = ("input_ids", "decoder_input_ids") if family == "t5" else ("input_ids",)
    alone: list[Any] = [dict.fromkeys(names, IDS[:1, :length]) for length in lengths]
    padded = {name: torch.cat([IDS[:1], IDS[:1].where(torch.arange(12) < 7, 0)]) for name in names}
    masks = {name.replace("input_ids", "attention_mask"): torch.ones(2, 12, dtype=torch.long) for name in names}
    for mask in masks.values():
        mask[1, 7:] = 0
    options = {"selectivity": {"classes": torch.arange(96) % 3}} if family == "gpt2" else {}
    together, apart = (measure(model, inputs, measures, **options) for inputs in (padded | masks, alone))
    for name, values in apart.values.items():
        of_bins = name.endswith(("_low", "_high"))
        near: dict[str, Any] = {"rel": 2**-7 if of_bins else 1e-4, "abs": 1e-5, "nan_ok": True}
        assert "shuffled" in name or together[name] == pytest.approx(values, **near), name


def test_a_nan_in_one_token_reaches_all_behind_it() -> None:
    model = small_model(norm="layernorm")

    def spoil(_block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        stream_BTE: Tensor = inputs[0].clone()
        stream_BTE[-1, 3, 5] = torch.nan
        return stream_BTE, *inputs[1:]

    model.model.layers[1].register_forward_pre_hook(spoil)
    measured = measure(model, IDS, [*OF_ANY, *OF_GPT2], selectivity={"classes": torch.arange(61) % 2})
    counts = ("sink_rows", "unit_tokens", "tokens_per_feature")
    for name, value in measured.values.items():
        if name not in counts:
            by_layer = np.isnan(value).reshape(len(value) if value.ndim else 1, -1)
            expected = [False, True, True] if value.ndim else [True]
            assert by_layer.all(1).tolist() == by_layer.any(1).tolist() == expected
