"""Build a report: one page with its facts, and figures, tables and numbers as files."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from tqdm import tqdm

from normfree import __version__
from normfree.analysis.entropy import ceiling_words, recorded_quantities, shares_of_ceiling, trained_heads
from normfree.analysis.groups import Part, all_runs, parts_of, tell_apart
from normfree.files import write_atomically
from normfree.report.figures import PageFigure
from normfree.report.plots.style import COLOURS, to_file, to_svg
from normfree.report.sections import Section, sections_of
from normfree.report.summary import question, sentences
from normfree.report.tables.results import rate_table
from normfree.report.tables.table import Table, to_csv, to_html, to_latex, to_markdown
from normfree.spec.run import own_values
from normfree.store.progress import duration
from normfree.store.runs import Run, run_frame

WRITTEN = "report.json"  # lists the files of a report, so that the next one can remove those that it does not replace
_FOLDERS = {"figures", "tables", "numbers"}
_PAGES = Environment(
    loader=PackageLoader("normfree.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
_PAGES.globals["colours"] = COLOURS
_HARDWARE = {name: "{:g} " + name for name in ("cores", "threads", "processes")}
_HARDWARE = {"processor": "{}", **_HARDWARE, "memory_gib": "{:g} GiB", "device": "{}", "platform": "{}"}
_SOFTWARE = {name: name + " {}" for name in ("normfree", "python", "torch", "transformers", "datasets")}
_SOFTWARE |= {"git_commit": "commit {:.12}"}


def build_report(
    runs: Sequence[Run],
    output: Path,
    *,
    mix: bool = False,
    baseline: str = "",
    all_figures: bool = False,
    progress: bool = False,
) -> Path:
    """Write `output`/index.html, figures/*.pdf|png, tables/*.md|tex|csv and numbers/*.csv; returns the page's path.

    With `mix`, each recipe has its own part of the page. `baseline` is the label or variant to compare all others with,
    by default every pair is. Figures of folded sections, and all of a page with several parts, are files only with
    `all_figures`: files take most of the time. The same runs give the same bytes; files are replaced atomically, and
    those of an earlier report removed. Raises ValueError for no run, for runs of several recipes without `mix`, for a
    baseline that no run has, and for an output folder that contains anything but a report.
    """
    parts = parts_of(runs, mix=mix, baseline=baseline)
    earlier = _earlier_files(output)
    written = []

    def write(name: str, content: str | bytes) -> None:
        write_atomically(output / name, content)
        written.append(name)

    groups = [group for part in parts for group in part.groups]
    for name, frame in number_frames(all_runs(groups)).items():
        write(f"numbers/{name}.csv", frame.to_csv(index=False, na_rep="NaN", lineterminator="\n"))
    scores = dict.fromkeys(group.score for group in groups)
    rates = [rate_table([group for group in groups if group.score == score]) for score in scores]
    rates = [table for table in rates if table.rows]
    rates = [replace(table, name=f"rates-{place}" if place > 1 else "rates") for place, table in enumerate(rates, 1)]
    every_table = list(rates)
    shown: list[list[dict[str, Any]]] = [[] for _ in parts]
    steps = [(place, section) for place, part in enumerate(parts) for section in sections_of(part.groups)]
    for place, section in tqdm(steps, desc="report", disable=None if progress else True, leave=False):
        prefix = f"part{place + 1}-" if len(parts) > 1 else ""
        figures, tables = section.contents(parts[place].groups, prefix)
        for figure in figures if all_figures or (len(parts) == 1 and not section.folded) else ():
            whole = figure.whole()
            for suffix in ("pdf", "png"):
                write(f"figures/{figure.name}.{suffix}", to_file(whole, suffix))
        every_table += tables
        if figures or tables:
            shown[place].append(section_values(replace(section, name=prefix + section.name), figures, tables))
    for table in every_table:
        for suffix, convert in (("md", to_markdown), ("tex", to_latex), ("csv", to_csv)):
            write(f"tables/{table.name}.{suffix}", convert(table))
    write("index.html", render_page(parts, shown, rates))
    for name in earlier - set(written):
        (output / name).unlink(missing_ok=True)
    write_atomically(output / WRITTEN, json.dumps(sorted(written), indent=1) + "\n")
    return output / "index.html"


def number_frames(runs: Sequence[Run]) -> dict[str, pd.DataFrame]:
    """Frames `runs`, `layers` and `heads`, with a row for each of them."""
    of_runs = run_frame(runs).drop(columns="folder")  # a path of this machine
    of_runs.insert(0, "run", tell_apart([run.place for run in runs], runs))
    scalars = {name for run in runs for name, quantity in run.quantities.items() if not quantity.axes}
    for name in sorted(scalars - set(of_runs.columns)):
        if any(run.last("final", name) is not None for run in runs):
            of_runs[name] = [run.last("final", name) for run in runs]
    return {"runs": of_runs, "layers": quantity_frame(runs, "layer"), "heads": quantity_frame(runs, "layer", "head")}


def quantity_frame(runs: Sequence[Run], *axes: str) -> pd.DataFrame:
    """Every quantity with these axes, one per column, of runs that were measured at their end.

    One row per layer (axes `layer`) or head (`layer`, `head`). Layers have the model's own numbers, heads count from 0.
    NaN is a value that is not finite; a missing value was not recorded.
    """
    rows: dict[Any, dict[str, float]] = {}
    for run, label in zip(runs, tell_apart([run.place for run in runs], runs), strict=True):
        finals = {name: run.last("final", name) for name, quantity in run.quantities.items() if quantity.axes == axes}
        columns = {name: np.array(value) for name, value in finals.items() if run.status == "finished" and value}
        if axes == ("layer", "head") and (heads := trained_heads(run)) is not None:
            columns["share_of_ceiling"] = shares_of_ceiling(heads)
        for name, values in columns.items():
            numbers = run.layer_numbers("entropy_nats" if name == "share_of_ceiling" else name, len(values))
            for index, value in np.ndenumerate(values):
                place = (label, run.label, run.seed, numbers[index[0]], *index[1:])
                rows.setdefault((values.shape, place), {})[name] = float(value)  # a shared slope has its own row
    keys = ["run", "label", "seed", *axes]
    records = [
        {**dict(zip(keys, place, strict=True)), **values}
        for (_, place), values in rows.items()
        if values.get("rows") != 0 or values["nonfinite_rows"]  # else the layer has fewer heads than others
    ]
    return pd.DataFrame(records, columns=None if records else keys)


def _earlier_files(output: Path) -> set[str]:
    """Names of the files of an earlier report. Raises ValueError if the folder contains anything else."""
    if (output / WRITTEN).is_file():
        return set(json.loads((output / WRITTEN).read_text(encoding="utf-8")))
    names = {path.name for path in output.glob("[!.]*")}
    if foreign := sorted(names - _FOLDERS):  # these exist if an earlier report was interrupted
        raise ValueError(f"output={output} holds {foreign[0]}, so it is no report; name a new or empty folder")
    return set()


def render_page(parts: Sequence[Part], sections: Sequence[Sequence[dict[str, Any]]], rates: Sequence[Table]) -> str:
    """The text of index.html: for each part its question, answer and sections (their `section_values`); facts."""
    runs = [run for part in parts for run in all_runs(part.groups)]
    names = _distinct(runs, lambda run: run.spec["study"] if run.kind == "run" else run.label)
    return _PAGES.get_template("index.html.j2").render(
        version=__version__,
        is_causal=ceiling_words(runs) == "causal ceiling",
        headlines={run.headline.name for run in runs},
        title=f"normfree: {', '.join(names)}",
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
        rates=[Markup(to_html(table)) for table in rates],
        trained=any(run.kind == "run" for run in runs),
        facts=_facts(parts),
    )


def section_values(section: Section, figures: Sequence[PageFigure], tables: Sequence[Table]) -> dict[str, Any]:
    """The values of a section for the template, with its figures as SVG and its tables as HTML."""
    drawn = []
    for figure in figures:
        key, panels = figure.key_part(), figure.drawings
        if not panels:
            panels = [Markup(to_svg(part, f"{figure.name}-{place}")) for place, part in enumerate(figure.parts())]
        values = {"figure": figure, "panels": panels, "kind": "cells" if figure.drawings else ""}
        values["key"] = key and Markup(to_svg(key, f"{figure.name}-key"))
        drawn.append(values)
    return {"section": section, "figures": drawn, "tables": [Markup(to_html(table)) for table in tables]}


def _facts(parts: Sequence[Part]) -> dict[str, list[str]]:
    """What a reader needs to judge or repeat the runs: distinct values by name."""
    runs = [run for part in parts for run in all_runs(part.groups)]
    trained = [run for run in runs if run.kind == "run"]
    across = dict.fromkeys(key for run in trained for key in own_values(run.spec))
    groups = [group for part in parts for group in part.groups]
    undrawn = [quantity.title for quantity in recorded_quantities(groups, drawn="no")]
    seconds = sum(run.facts.get("wall_seconds") or 0.0 for run in trained)
    facts = {
        "Command": _distinct(runs, lambda run: run.facts.get("command") or "not recorded"),
        "Measured": [_measurement(run) for run in runs if run.kind == "measurement"],
        "Runs": [f"{len(trained)}, trained in {duration(seconds)} altogether"] if trained else [],
        "Weights at the start": [
            name for name in _distinct(trained, lambda run: run.spec.get("start_name", "random")) if name != "random"
        ],
        "Seeds": [", ".join(map(str, sorted({run.seed for run in trained})))],
        "Order of the data": [", ".join(map(str, sorted({run.spec["data_seed"] for run in trained})))],
        "Tokens per run": [f"{tokens:,}" for tokens in sorted({run.facts.get("tokens_seen", 0) for run in trained})],
        "Precision": _distinct(runs, lambda run: run.spec["train"]["precision"]),
        "Recorded, not drawn": ["; ".join(dict.fromkeys(undrawn)) + " (numbers/*.csv)"] if undrawn else [],
        "Recipes": [f"{part.title}: {part.recipe}" for part in parts if part.recipe]
        + [f"{key.split('.')[-1].replace('_', ' ')}s differ by variant" for key in across],
        "Model": _distinct([run for run in runs if run.facts.get("model")], _model_words),
        "Corpus": _distinct(trained, lambda run: run.family.corpus.format(**run.facts["corpus"])),
        "Hardware": _distinct(runs, lambda run: _environment(run, _HARDWARE)),
        "Software": _distinct(runs, lambda run: _environment(run, _SOFTWARE)),
    }
    return {name: values for name, values in facts.items() if any(values)}


def _model_words(run: Run) -> str:
    facts = {"type": "normfree"} | run.facts["model"]
    stacks = "{layers} + {layers}" if run.spec["model"].get("family") == "encoder_decoder" else "{layers}"
    sizes = f"{stacks} layers of {{heads}} heads, width {{hidden_size}}, " if facts["layers"] else ""
    return f"{{type}}: {sizes}{{parameters:,}} parameters".format(**facts)


def _measurement(run: Run) -> str:
    facts = run.facts["measurement"]
    windows = "1 window" if facts["sequences"] == 1 else f"{facts['sequences']} windows"
    rows = " and ".join(facts.get("inputs") or [f"{windows} of {facts['context']} tokens"])  # older records lack them
    first = f", each with {''.join(facts['leading_tokens'])} first" if facts["leading_tokens"] else ""
    causal = causality_note(facts)
    memory = "GPU memory" if facts["device"].startswith("cuda") else "memory of the process"
    return (
        f"{facts['name']}: {rows} from {facts['text']}{first}{causal and f'; {causal}'}; on "
        f"{facts['device']}, {duration(run.facts['wall_seconds'])}, peak {memory} {facts['peak_memory_mib']:.0f} MiB"
    )


def causality_note(facts: Mapping[str, Any]) -> str:
    """What the ceilings of a measurement mean, unless all its rows are causal."""
    note = "ceilings are means of ln(visible)"
    return {True: "", False: f"not causal: queries see later tokens; {note}"}.get(facts["causal"], note)


def _environment(run: Run, texts: Mapping[str, str]) -> str:
    facts = run.facts.get("environment") or {}
    return ", ".join(text.format(facts[name]) for name, text in texts.items() if facts.get(name)) or "not recorded"


def _distinct(runs: Sequence[Run], fact: Callable[[Run], str]) -> list[str]:
    return list(dict.fromkeys(map(fact, runs)))
