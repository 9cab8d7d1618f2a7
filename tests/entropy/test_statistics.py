"""Tables of HeadEntropy, and what is not merged."""

from __future__ import annotations

import pytest
import torch

from normfree.entropy import HeadEntropy


def example(*, layers=(0, 2), heads=(2, 2), patterns=False) -> HeadEntropy:
    rows = torch.tensor([[4, 0], [2, 4]])
    extra = {"sum_distance": rows.double() * 2, "sum_first_mass": rows.double() / 4} if patterns else {}
    return HeadEntropy(
        list(layers),
        list(heads),
        sum_nats=torch.tensor([[2.0, 0.0], [1.0, 3.0]], dtype=torch.float64),
        rows=rows,
        nonfinite_rows=4 - rows,
        sum_ceiling_nats=torch.tensor([8.0, 6.0], dtype=torch.float64),
        ceiling_rows=torch.tensor([8, 8]),
        **extra,
    )


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


def test_different_architectures_are_not_merged():
    with pytest.raises(ValueError, match="one architecture"):
        _ = example() + example(layers=(0, 1))
    with pytest.raises(ValueError, match="patterns=True and one without"):
        _ = example() + example(patterns=True)
