"""The pages' text: facts, tables and figures into the templates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from normfree import __version__
from normfree.analysis.groups import Group, all_runs, recipes
from normfree.report.figure import PageFigure
from normfree.report.plots import COLOURS
from normfree.report.render import to_svg
from normfree.report.summary import sentences
from normfree.report.tables.runs import duration
from normfree.store.runs import Run

_PAGES = Environment(
    loader=PackageLoader("normfree.report"),
    autoescape=select_autoescape(default_for_string=True, default=True),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_PAGES.globals["colours"] = COLOURS
# Wider panels than this get a scroll area on narrow screens instead of letters nobody can read.
_NARROW_INCHES = 4.2
_PIXELS_PER_INCH = 96


def main_page(groups: Sequence[Group], sections: Sequence[dict[str, Any]], *, with_slopes: bool) -> str:
    """index.html: summary, sections (with their `figure_values` and tables as HTML), facts, runs."""
    runs = all_runs(groups)
    return _page(
        "index.html.j2",
        title=f"normfree: {', '.join(_distinct(runs, lambda run: run.spec['study']))}",
        sentences=sentences(groups),
        study_notes=[note for note in _distinct(runs, lambda run: run.facts.get("study_note") or "") if note],
        facts=_facts(groups),
        sections=sections,
        with_slopes=with_slopes,
    )


def slopes_page(groups: Sequence[Group], sections: Sequence[dict[str, Any]]) -> str:
    """slopes.html: slope against perplexity, and slopes over training."""
    studies = _distinct(all_runs(groups), lambda run: run.spec["study"])
    return _page("slopes.html.j2", title=f"normfree: slopes of {', '.join(studies)}", sections=sections)


def _page(name: str, **values: Any) -> str:
    return _PAGES.get_template(name).render(version=__version__, **values)


def figure_values(figure: PageFigure) -> dict[str, Any]:
    """What the macro `draw` needs of a figure."""
    width = figure.panel_inches[0]
    key = figure.key_part()
    return {
        "name": figure.name,
        "title": figure.title,
        "caption": figure.caption,
        "panels": [Markup(to_svg(part, f"{figure.name}-{i}")) for i, part in enumerate(figure.parts())],
        "key": None if key is None else Markup(to_svg(key, f"{figure.name}-key")),
        "wide": width > _NARROW_INCHES,
        "pixels": round(width * _PIXELS_PER_INCH),
    }


def _facts(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """What a reader needs to judge or repeat the runs: `(name, distinct values)`."""
    runs = all_runs(groups)
    trained = [run for run in runs if run.kind == "run"]
    measured = [run for run in runs if run.kind == "measurement"]
    apart = [f"{', '.join(names)}: {recipe}" for recipe, names in recipes(groups).items() if recipe]
    environments = _distinct(runs, lambda run: _environment(run.facts.get("environment") or {}))
    return [
        ("Command", _distinct(runs, lambda run: run.facts.get("command") or "not recorded")),
        *([("Measured", [_measured(run) for run in measured])] if measured else []),
        *(_trained(trained) if trained else []),
        ("Precision", _distinct(runs, lambda run: run.spec["train"]["precision"])),
        *([("Recipes", apart)] if apart else []),
        ("Model", _distinct(runs, lambda run: _model(run.facts.get("model") or {}))),
        *([("Corpus", _distinct(trained, lambda run: _corpus(run.facts["corpus"])))] if trained else []),
        ("Hardware", environments),
        ("Software", _distinct(runs, lambda run: _software(run.facts.get("environment") or {}))),
    ]


def _trained(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    seconds = sum(run.facts.get("wall_seconds") or 0.0 for run in runs)
    return [
        ("Runs", [f"{len(runs)}, trained in {duration(seconds)} altogether"]),
        ("Seeds", [", ".join(map(str, sorted({run.seed for run in runs})))]),
        ("Order of the data", [", ".join(map(str, sorted({run.spec.get("data_seed", 0) for run in runs})))]),
        ("Tokens a run", [f"{tokens:,}" for tokens in sorted({run.facts.get("tokens_seen", 0) for run in runs})]),
    ]


def _measured(run: Run) -> str:
    facts = run.facts["measurement"]
    windows = "1 window" if facts["sequences"] == 1 else f"{facts['sequences']} windows"
    first = f", each with {''.join(facts['leading_tokens'])} first" if facts["leading_tokens"] else ""
    later = "" if facts["causal"] else "; not causal: queries see later tokens; ceilings are means of ln(visible)"
    whose = "on the GPU" if facts["device"].startswith("cuda") else "of the process"
    return (
        f"{facts['name']}: {windows} of {facts['context']} tokens from {facts['text']}{first}{later}; "
        f"on {facts['device']}, {duration(run.facts['wall_seconds'])}, "
        f"peak memory {whose} {facts['peak_memory_mib']:.0f} MiB"
    )


def _environment(facts: dict[str, Any]) -> str:
    parts = [facts.get("processor"), _unit(facts, "cores", "cores"), _unit(facts, "threads", "threads")]
    parts += [_unit(facts, "processes", "processes")] if facts.get("processes", 1) > 1 else []
    parts += [_unit(facts, "memory_gib", "GiB"), facts.get("device"), facts.get("platform")]
    return ", ".join(str(part) for part in parts if part) or "not recorded"


def _software(facts: dict[str, Any]) -> str:
    names = ("normfree", "python", "torch", "transformers", "datasets")
    parts = [f"{name} {facts[name]}" for name in names if facts.get(name)]
    if facts.get("git_commit"):
        parts.append(f"commit {str(facts['git_commit'])[:12]}")
    return ", ".join(parts) or "not recorded"


def _model(facts: dict[str, Any]) -> str:
    if not facts:
        return "not recorded"
    sizes = f"{facts['layers']} layers of {facts['heads']} heads, width {facts['hidden_size']}, "
    return f"{facts['type'] + ': ' if 'type' in facts else ''}{sizes}{facts['parameters']:,} parameters"


def _corpus(facts: dict[str, Any]) -> str:
    parts = [
        f"source {facts['source']}",
        f"blocks of {facts['context']} tokens",
        f"vocabulary {facts['vocab_size']:,}",
    ]
    for name, words in (("train_tokens", "tokens to train on"), ("validation_tokens", "held-out tokens")):
        if facts.get(name) is not None:
            parts.append(f"{facts[name]:,} {words}")
    parts.append(f"unigram perplexity {facts['unigram_perplexity']:.1f}")
    return ", ".join([*parts, f"fingerprint {facts['fingerprint'][:12]}"])


def _unit(facts: dict[str, Any], name: str, unit: str) -> str | None:
    value = facts.get(name)
    return None if value is None else f"{value:g} {unit}"


def _distinct(runs: Sequence[Run], fact: Callable[[Run], str]) -> list[str]:
    return list(dict.fromkeys(fact(run) for run in runs))
