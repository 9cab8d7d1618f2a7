"""docs/averaging.py: what it costs to replace near-uniform heads by averages."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from docs import averaging
from normfree import held_out_blocks, intervene, load_pretrained, read_run
from normfree.analysis.entropy import trained_heads


def test_controls_come_from_the_same_layers_where_possible() -> None:
    chosen = [(0, 0), (0, 1), (0, 2), (1, 3)]
    others = [(0, 3), (1, 0), (1, 1), (1, 2), (2, 0)]
    for seed in range(20):
        drawn = averaging.draw_others(chosen, others, np.random.default_rng(seed))
        assert len(set(drawn)) == 4
        assert set(drawn) <= set(others)
        assert (0, 3) in drawn  # layer 0 has one other head, so two are from elsewhere
    assert averaging.count_in_same_layers(chosen, others) == 2
    assert sorted(averaging.draw_others([*chosen, (2, 1), (2, 2)], others, np.random.default_rng(0))) == others


def test_costs_of_averaging_are_those_of_the_intervention(trained: Path, cache: Path, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("NORMFREE_CACHE", str(cache))
    monkeypatch.setattr(averaging, "DRAWS", 3)
    folder = shutil.copytree(trained, tmp_path / "run")
    heads = trained_heads(read_run(folder))
    shares = heads.entropy_LH / heads.ceiling_L[:, None]
    line = float(np.median(shares))  # of this untrained model all heads are above 3/4
    monkeypatch.setattr(averaging, "OVERLOAD_SHARE", line)
    near_uniform, others = averaging.split_heads(folder)
    assert min(shares[head] for head in near_uniform) >= line > max(shares[head] for head in others)
    result = averaging.average_heads(folder)
    model, _ = load_pretrained(str(folder))
    blocks = held_out_blocks(str(folder))
    blocks = blocks[np.linspace(0, len(blocks) - 1, 64).round().astype(int)]
    with intervene(model, near_uniform):
        changed = model(blocks, labels=blocks).loss.item()
    assert result["loss_nats"] == pytest.approx(model(blocks, labels=blocks).loss.item(), abs=1e-5)
    last = result["shares"][-1]
    assert last["heads"] == len(near_uniform)
    assert last["cost_nats"] == pytest.approx(changed - result["loss_nats"], abs=1e-5)
    assert [len(each["control_nats"]) for each in result["shares"]] == 5 * [3]
    of_layers = [[sum(head[0] == layer for head in heads) for layer in range(2)] for heads in (near_uniform, others)]
    assert last["in_same_layers"] == sum(map(min, *of_layers))
