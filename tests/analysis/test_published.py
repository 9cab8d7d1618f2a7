"""The paper's numbers, and the analysis of its heatmaps."""

from __future__ import annotations

import pytest

from normfree.analysis import published
from normfree.analysis.entropy import Heads, causal_ceiling, layer_means, range_counts
from normfree.analysis.verdicts import overload

OBSERVED_MAX_NATS = 3.87  # the highest published head; the paper's ranges are quarters of it
BINS = {"SM+LN+G": (6, 20, 106, 12), "SM+LN+R": (8, 24, 107, 5), "SM+G": (2, 26, 33, 83), "SM+R": (4, 29, 79, 32)}


@pytest.mark.parametrize("label", BINS)
def test_published_heatmaps_bin_as_stated(label: str) -> None:
    counts = range_counts(published.heatmaps()[label], OBSERVED_MAX_NATS)
    assert counts.finite_R == BINS[label]
    assert [100 * share for share in counts.shares] == pytest.approx(published.RANGE_PERCENT[label], abs=2)


def test_the_observed_maximum_is_the_highest_published_head() -> None:
    assert max(values.max() for values in published.heatmaps().values()) == OBSERVED_MAX_NATS


def test_layer_means_show_the_published_signature() -> None:
    expected = [3.16, 3.24, 3.23, 3.34, 3.50, 3.50, 3.32, 2.91, 1.81, 1.88, 1.96, 1.87]
    assert layer_means(published.heatmaps()["SM+G"]) == pytest.approx(expected, abs=0.006)


def test_only_gelu_without_layernorm_is_overloaded_in_the_paper() -> None:
    ceiling = causal_ceiling(published.HEATMAP_CONTEXT)
    verdicts = {
        label: overload(Heads(values, values[:, 0] * 0 + ceiling, 0, range(12))).holds
        for label, values in published.heatmaps().items()
    }
    assert verdicts == {"SM+LN+G": False, "SM+LN+R": False, "SM+G": True, "SM+R": False}


def test_the_headline_is_8_2_percent() -> None:
    difference = published.relative_difference("GPT-2 125M, T=128", "SM+R", "SM+G")
    assert difference == pytest.approx(-0.082, abs=5e-4)
    assert published.relative_difference("GPT-2 125M, T=128", "leaky", "SM+G") is None


@pytest.mark.parametrize(
    ("position", "context", "model"),
    [
        ("learned", 128, "GPT-2 125M, T=128"),
        ("rotary", 128, "Pythia-70M, T=128"),
        ("rotary", 256, "Pythia-70M, T=256"),
    ],
)
def test_a_run_stands_beside_the_published_model_of_its_shape(position: str, context: int, model: str) -> None:
    assert published.counterpart({"model": {"position": position}, "data": {"context": context}}) == model
