"""Every measure is recorded by a run, drawn by its report and listed in the docs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from normfree import Run, compose_run, read_run, train
from normfree.analysis.groups import group_runs
from normfree.measures import MEASURES, periods_of
from normfree.measures.heads import Heads
from normfree.measures.measure import Measure
from normfree.report.build import number_frames
from normfree.report.sections import figures_of
from normfree.store.quantities import QUANTITIES, Quantity

LAYERS, HEADS = 2, 2
FIGURES = {("layer", "head"): ("heads", "layers"), ("layer",): ("depth", "layers"), (): ("curves",)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, tiny: list[str], cache: Path) -> Run:
    """A run with every measure; it has norms and learnable slopes, so that it has all quantities."""
    words = [*tiny, "variant=custom", "tag=all", "model.norm=layernorm", "model.activation=leaky_relu"]
    words += ["model.learnable_slope=per_layer", f"probe.measures=[{','.join(MEASURES)}]"]
    return read_run(train(compose_run(words).spec, runs_dir=tmp_path_factory.mktemp("runs"), cache=cache))


@pytest.mark.parametrize("name", [name for kind in MEASURES.values() for name in kind.gives])
def test_a_run_records_every_quantity_with_its_description(measured: Run, name: str) -> None:
    quantity = QUANTITIES[name]
    assert measured.quantities[name] == quantity
    shape = tuple({"layer": LAYERS, "head": HEADS}[axis] for axis in quantity.axes)
    assert np.array(measured.last("final", name)).shape == shape
    first = 2 if name in MEASURES["gradients"].gives else 0  # no step was made before
    assert [step for step, _ in measured.series("probe", name)] == [*range(first, 7, 2)]


def test_every_quantity_is_in_the_numbers_and_drawn(measured: Run) -> None:
    """One figure of each kind is drawn, as drawing all takes minutes."""
    frames, figures = number_frames([measured]), {figure.name: figure for figure in figures_of(group_runs([measured]))}
    drawn: dict[str, str] = {}
    names = [name for kind in MEASURES.values() for name in kind.gives]
    assert len({*names}) == len(names)
    for quantity in (QUANTITIES[name] for name in names):
        if quantity.axes:
            values = np.array(measured.last("final", quantity.name))
            assert np.allclose(frames[f"{quantity.axes[-1]}s"][quantity.name], values.ravel())
        for kind in FIGURES[quantity.axes] if quantity.drawn != "no" else ():
            assert f"{quantity.name}-{kind}" in figures
            drawn.setdefault(kind, f"{quantity.name}-{kind}")
    assert drawn.keys() == {"heads", "layers", "depth", "curves"}
    assert all(figures[name].whole().axes for name in drawn.values())
    docs = (Path(__file__).parents[2] / "docs" / "quantities.md").read_text()
    assert all(quantity.meaning in docs for quantity in QUANTITIES.values())


def test_a_measure_may_have_a_period_of_its_own(tmp_path: Path, cache: Path, tiny: list[str]) -> None:
    """Slopes know their layers; a run without slopes has no quantity of them."""
    words = [*tiny, "variant=custom", "tag=late", "model.norm=none", "model.activation=[relu,leaky_relu]"]
    words += ["model.learnable_slope=per_layer", "probe.measures=[heads,slopes,perplexity:3]"]
    run = read_run(train(compose_run(words).spec, runs_dir=tmp_path, cache=cache))
    assert [step for step, _ in run.series("probe", "entropy_nats")] == [0, 2, 4, 6]
    assert [step for step, _ in run.series("probe", "perplexity")] == [0, 3, 6]
    assert run.layer_numbers("negative_slope", 1) == [1]
    assert "max_logit" not in run.quantities


class Unknown(Measure):
    gives = ("no_such_number",)


class Refusing(Heads):
    def __init__(self, model: torch.nn.Module) -> None:
        raise ValueError(f"{type(model).__name__} has no such thing")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Unknown, "the measure mine gives 'no_such_number', which has no description"),
        (Refusing, "measure mine: NormFreeForCausalLM has no such thing"),
    ],
)
def test_a_measure_that_does_not_fit_is_refused_before_training(kind, message, tmp_path, cache, tiny, monkeypatch):
    monkeypatch.setitem(MEASURES, "mine", kind)
    with pytest.raises(ValueError, match=message):
        train(compose_run([*tiny, "probe.measures=[mine]"]).spec, runs_dir=tmp_path, cache=cache)
    assert not list(tmp_path.rglob("checkpoint-*"))
    assert not any(path.read_text() for path in tmp_path.rglob("metrics.jsonl"))


def test_your_own_measure_needs_a_description_and_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUANTITIES, "no_such_number", Quantity(name="no_such_number", title="Mine", meaning="A test."))
    monkeypatch.setitem(MEASURES, "mine", Unknown)
    assert periods_of(["heads", "mine:7", "slopes:x3"], 2) == {"heads": 2, "mine": 7, "slopes": 6}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["hedas"], "unknown measure 'hedas'; did you mean heads?"),
        (["heads", "heads"], "heads stands twice"),
        (["heads:0"], "give NAME, NAME:STEPS or NAME:xTIMES"),
    ],
)
def test_wrong_entries_are_refused(entries: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        periods_of(entries, 2)
