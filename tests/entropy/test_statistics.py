"""HeadEntropy merges by sums and counts."""

from __future__ import annotations

import pytest
import torch

from normfree.entropy import HeadEntropy


def example(*, layers=(0, 2), heads=(2, 2), scale=1.0, patterns=False) -> HeadEntropy:
    rows = torch.tensor([[4, 0], [2, 4]])
    extra = {"sum_distance": rows.double() * 2, "sum_first_mass": rows.double() / 4} if patterns else {}
    return HeadEntropy(
        list(layers),
        list(heads),
        sum_nats=torch.tensor([[2.0, 0.0], [1.0, 3.0]], dtype=torch.float64) * scale,
        rows=rows,
        nonfinite_rows=4 - rows,
        sum_ceiling_nats=torch.tensor([8.0, 6.0], dtype=torch.float64),
        ceiling_rows=torch.tensor([8, 8]),
        **extra,
    )


def test_a_head_without_a_finite_row_has_no_mean():
    mean = example().mean_nats()
    assert mean[0, 1].isnan()
    assert mean[[0, 1, 1], [0, 0, 1]].tolist() == [0.5, 0.5, 0.75]
    assert example().ceiling_nats().tolist() == [1.0, 0.75]


def test_merging_weighs_by_rows_and_not_by_batches():
    small, large = example(), example(scale=3.0)
    merged = small + large + large
    assert merged.mean_nats()[0, 0] == pytest.approx((2 + 6 + 6) / 12)
    assert merged.rows[0, 0] == 12
    assert small.rows[0, 0] == 4


@pytest.mark.parametrize("patterns", [False, True])
def test_all_reduce_adds_up_two_processes_in_place(monkeypatch, patterns):
    heads, expected = example(patterns=patterns), example(patterns=patterns) + example(patterns=patterns)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, operation: tensor.mul_(2))
    heads.all_reduce()
    torch.testing.assert_close(vars(heads), vars(expected), atol=0, rtol=0)


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
