"""HeadEntropy merges by sums and counts."""

from __future__ import annotations

import json

import pytest
import torch

from normfree.entropy import HeadEntropy


def some(*, layers=(0, 2), heads=(2, 2), scale=1.0, patterns=False) -> HeadEntropy:
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
    mean = some().mean_nats()
    assert mean[0, 1].isnan()
    assert mean[[0, 1, 1], [0, 0, 1]].tolist() == [0.5, 0.5, 0.75]
    assert some().ceiling_nats().tolist() == [1.0, 0.75]


def test_merging_weighs_by_rows_and_not_by_batches():
    small, large = some(), some(scale=3.0)
    merged = small + large + large
    assert merged.mean_nats()[0, 0] == pytest.approx((2 + 6 + 6) / 12)
    assert merged.rows[0, 0] == 12
    assert small.rows[0, 0] == 4


def test_ranks_merge_by_adding_tensors_in_place():
    ranks = [some(), some(scale=3.0)]
    expected = ranks[0] + ranks[1]
    for mine, other in zip(ranks[0].tensors(), ranks[1].tensors(), strict=True):
        mine += other  # what torch.distributed.all_reduce does
    assert ranks[0].to_dict() == expected.to_dict()


@pytest.mark.parametrize("patterns", [False, True])
def test_json_round_trip_keeps_every_number_and_type(patterns):
    before = some(patterns=patterns)
    after = HeadEntropy.from_dict(json.loads(json.dumps(before.to_dict())))
    assert after.to_dict() == before.to_dict()
    assert [t.dtype for t in after.tensors()] == [t.dtype for t in (before + before).tensors()]


def test_patterns_divide_by_the_counted_rows():
    assert some(patterns=True).mean_distance()[1].tolist() == [2.0, 2.0]
    assert some(patterns=True).mean_first_mass()[1].tolist() == [0.25, 0.25]
    with pytest.raises(ValueError, match="patterns=True"):
        some().mean_distance()


def test_different_architectures_are_not_merged():
    with pytest.raises(ValueError, match="one architecture"):
        _ = some() + some(layers=(0, 1))
    with pytest.raises(ValueError, match="patterns=True and one without"):
        _ = some() + some(patterns=True)
    with pytest.raises(ValueError, match="has the fields"):
        HeadEntropy.from_dict({"layers": [0]})
