"""Sink rates against those of eager attention matrices, row by row."""

import numpy as np
import pytest
import torch
from torch import Tensor

from normfree import measure
from normfree.entropy import probe
from normfree.measures import scores
from tests.entropy.kinds import inputs_of, matrices_of, real_queries, tiny_kind
from tests.small_model import small_model

IDS = torch.arange(48).view(4, 12) % 20


def rates(p_BHTS: Tensor, real_BT: Tensor, first_row: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(H,) share of texts and share of rows, row by row."""
    texts, rows = [], []
    for p_HTS, real_T in zip(p_BHTS.numpy(), real_BT.numpy(), strict=True):
        p_HRS = p_HTS[:, real_T]  # eager rows of padding are even over all keys
        first = int(np.flatnonzero((p_HRS > 0).any((0, 1)))[0])
        mass_HT = p_HRS[:, first_row:, first]
        texts.append(mass_HT.mean(1) > 0.3)
        rows.append(mass_HT > 0.3)
    return np.mean(texts, axis=0), np.concatenate(rows, axis=1).mean(1)


@pytest.mark.parametrize("kind", ["bert", "vit", "t5", "bart", "gpt2", "llama"])
@pytest.mark.parametrize("first_row", [0, 3])
def test_rates_are_those_of_eager_matrices(kind: str, first_row: int) -> None:
    model = tiny_kind(kind)
    inputs = inputs_of(model)
    measured = measure(model, inputs, ["sinks", "heads"], sinks={"first_row": first_row})
    matrices = matrices_of(model, inputs)
    assert {str(layer) for layer in measured.layers["sink_row_rate"]} == matrices.keys()
    for row, layer in enumerate(measured.layers["sink_row_rate"]):
        p_BHTS = matrices[str(layer)]
        real_BT = real_queries(str(layer), p_BHTS, inputs)
        of_texts, of_rows = rates(p_BHTS, real_BT, first_row)
        assert measured["sink_text_rate"][row] == pytest.approx(of_texts)
        assert measured["sink_row_rate"][row] == pytest.approx(of_rows)
        assert measured["sink_rows"][row] == real_BT.sum(1).double().mean() - first_row


@pytest.mark.parametrize(
    ("module", "name", "names"), [(probe, "measure", ["sinks", "heads"]), (scores, "_scores", ["logits", "ranges"])]
)
def test_measures_of_one_attention_compute_it_once(module, name, names, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, once = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *call: calls.append(call) or once(*call))
    model = small_model()
    both = measure(model, IDS, names, batch=2)
    assert len(calls) == 3 * 2  # layers x batches
    for key, value in measure(model, IDS, names[1], batch=2).values.items():
        assert np.array_equal(both[key], value)
