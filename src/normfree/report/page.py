"""The text of the page: facts, figures and tables in the template."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from normfree import __version__
from normfree.analysis.groups import Part, all_runs
from normfree.report.figure import PageFigure
from normfree.report.plots.style import COLOURS
from normfree.report.render import to_svg
from normfree.report.sections import Section
from normfree.report.summary import question, sentences
from normfree.report.tables.table import Table, to_html
from normfree.store.progress import duration
from normfree.store.runs import Run

_PAGES = Environment(
    loader=PackageLoader("normfree.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_PAGES.globals["colours"] = COLOURS
_NARROW_INCHES = 4.2
"""Wider panels scroll on narrow screens instead of shrinking."""
_PIXELS_PER_INCH = 96
_HARDWARE = {name: "{:g} " + name for name in ("cores", "threads", "processes")}
_HARDWARE = {"processor": "{}", **_HARDWARE, "memory_gib": "{:g} GiB", "device": "{}", "platform": "{}"}
_SOFTWARE = {name: name + " {}" for name in ("normfree", "python", "torch", "transformers", "datasets")}
_SOFTWARE |= {"git_commit": "commit {:.12}"}
_MODEL = "{type}: {layers} layers of {heads} heads, width {hidden_size}, {parameters:,} parameters"
_CORPUS = (
    "source {source}, blocks of {context} tokens, vocabulary {vocab_size:,}, {train_tokens:,} tokens to train on, "
    "{validation_tokens:,} held-out tokens, unigram perplexity {unigram_perplexity:.1f}, fingerprint {fingerprint:.12}"
)


def render_page(parts: Sequence[Part], sections: Sequence[Sequence[dict[str, Any]]]) -> str:
    """The text of index.html: for each part its question, answer and sections (their `section_values`); facts."""
    runs = [run for part in parts for run in all_runs(part.groups)]
    script = _PAGES.loader.get_source(_PAGES, "script.js")[0]  # pyright: ignore[reportOptionalMemberAccess]
    return _PAGES.get_template("index.html.j2").render(
        version=__version__,
        title=f"normfree: {', '.join(_distinct(runs, lambda run: run.spec['study']))}",
        parts=[
            {
                "title": part.title,
                "name": f"part{place + 1}",
                "question": question(part.groups),
                "sentences": sentences(part.groups),
                "notes": filter(None, _distinct(all_runs(part.groups), lambda run: run.facts.get("study_note") or "")),
                "open": [values for values in of_part if not values["section"].folded],
                "folded": [values for values in of_part if values["section"].folded],
            }
            for place, (part, of_part) in enumerate(zip(parts, sections, strict=True))
        ],
        facts=_facts(parts),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def section_values(section: Section, figures: Sequence[PageFigure], tables: Sequence[Table]) -> dict[str, Any]:
    """The values of a section for the template, with its figures as SVG and its tables as HTML."""
    drawn = []
    for figure in figures:
        key, width = figure.key_part(), figure.panel_inches[0]
        panels = figure.drawings
        if not panels:
            panels = [Markup(to_svg(part, f"{figure.name}-{place}")) for place, part in enumerate(figure.parts())]
        values = {"figure": figure, "panels": panels, "pixels": round(width * _PIXELS_PER_INCH)}
        values["key"] = key and Markup(to_svg(key, f"{figure.name}-key"))
        values["kind"] = "cells" if figure.drawings else "wide scroll" if width > _NARROW_INCHES else ""
        drawn.append(values)
    return {"section": section, "figures": drawn, "tables": [Markup(to_html(table)) for table in tables]}


def _facts(parts: Sequence[Part]) -> dict[str, list[str]]:
    """What a reader needs to judge or repeat the runs: distinct values by name."""
    runs = [run for part in parts for run in all_runs(part.groups)]
    trained = [run for run in runs if run.kind == "run"]
    seconds = sum(run.facts.get("wall_seconds") or 0.0 for run in trained)
    facts = {
        "Command": _distinct(runs, lambda run: run.facts.get("command") or "not recorded"),
        "Measured": [_measurement(run) for run in runs if run.kind == "measurement"],
        "Runs": [f"{len(trained)}, trained in {duration(seconds)} altogether"] if trained else [],
        "Seeds": [", ".join(map(str, sorted({run.seed for run in trained})))],
        "Order of the data": [", ".join(map(str, sorted({run.spec["data_seed"] for run in trained})))],
        "Tokens per run": [f"{tokens:,}" for tokens in sorted({run.facts.get("tokens_seen", 0) for run in trained})],
        "Precision": _distinct(runs, lambda run: run.spec["train"]["precision"]),
        "Recipes": [f"{part.title}: {part.recipe}" for part in parts if part.recipe],
        "Model": _distinct(
            [run for run in runs if run.facts.get("model")],
            lambda run: _MODEL.format(**{"type": "normfree"} | run.facts["model"]),
        ),
        "Corpus": _distinct(trained, lambda run: _CORPUS.format(**run.facts["corpus"])),
        "Hardware": _distinct(runs, lambda run: _environment(run, _HARDWARE)),
        "Software": _distinct(runs, lambda run: _environment(run, _SOFTWARE)),
    }
    return {name: values for name, values in facts.items() if any(values)}


def _measurement(run: Run) -> str:
    facts = run.facts["measurement"]
    windows = "1 window" if facts["sequences"] == 1 else f"{facts['sequences']} windows"
    first = f", each with {''.join(facts['leading_tokens'])} first" if facts["leading_tokens"] else ""
    causal = "" if facts["causal"] else "; not causal: queries see later tokens; ceilings are means of ln(visible)"
    memory = "GPU memory" if facts["device"].startswith("cuda") else "memory of the process"
    return (
        f"{facts['name']}: {windows} of {facts['context']} tokens from {facts['text']}{first}{causal}; on "
        f"{facts['device']}, {duration(run.facts['wall_seconds'])}, peak {memory} {facts['peak_memory_mib']:.0f} MiB"
    )


def _environment(run: Run, texts: Mapping[str, str]) -> str:
    facts = run.facts.get("environment") or {}
    return ", ".join(text.format(facts[name]) for name, text in texts.items() if facts.get(name)) or "not recorded"


def _distinct(runs: Sequence[Run], fact: Callable[[Run], str]) -> list[str]:
    return list(dict.fromkeys(map(fact, runs)))
