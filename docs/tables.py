"""Fill the tables of README.md and docs/ from the records in results/: `make tables`.

A page holds a marker, and all between it and `<!-- end -->` is made from runs:

    <!-- table: perplexity of results/quick -->
    <!-- end -->

Tables: rates, seeds, unfinished, effects, confirm, lines, averaging, and every table of the report. Several folders may
be given, with the shell's wildcards. `mixed` before `-->` shows runs of different recipes side by side, which is
refused otherwise. A test fails when a page differs from what the records give.

`<!-- quantities -->` is the table of all that can be measured.

A figure of the report's main page is drawn the same way, without a test, since another matplotlib gives other bytes:

    <!-- figure: entropy_nats-heads of results/quick -->
    ![What it shows](docs/figures/NAME.png)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from normfree.analysis.confirm import primary, secondary
from normfree.analysis.entropy import probed_heads, shares_by_depth, top_quarter_share, trained_heads
from normfree.analysis.groups import Group, all_runs, group_runs
from normfree.analysis.seeds import paired_difference, summarise
from normfree.files import write_atomically
from normfree.measures import MEASURES
from normfree.report.plots.style import to_file
from normfree.report.sections import SECTIONS, figures_of
from normfree.report.tables.results import percent_with_interval, rate_table
from normfree.report.tables.table import Table, to_markdown, without_empty_columns
from normfree.store.quantities import QUANTITIES
from normfree.store.runs import Run, find_runs
from normfree.store.tasks import read_tasks

ROOT = Path(__file__).parents[1]
END = "<!-- end -->"
MARKER = re.compile(
    r"(<!-- table: (?P<name>\S+) of (?P<places>[^>]+?)(?P<mixed> mixed)? -->\n).*?<!-- end -->", re.DOTALL
)
QUANTITIES_MARKER = re.compile(r"(<!-- quantities -->\n).*?<!-- end -->", re.DOTALL)
FIGURE = re.compile(
    r"<!-- figure: (?P<name>\S+) of (?P<places>[^>]+?)(?P<mixed> mixed)? -->\n!\[[^\]]*\]\((?P<path>[^)\s]+)\)"
)


def seed_table(groups: Sequence[Group]) -> Table:
    """Heads near uniform and final validation perplexity: a row a seed, a column a variant."""
    cells: dict[int, dict[str, str]] = {}
    for group in groups:
        for run in group.runs:
            share = top_quarter_share(trained_heads(run))
            cells.setdefault(run.seed, {})[group.label] = f"{share:.0%}, {run.perplexity:.1f}".replace("%", " %")
    labels = [group.label for group in groups]
    rows = [(str(seed), *(of_seed.get(label, "-") for label in labels)) for seed, of_seed in sorted(cells.items())]
    return Table("seeds", "Share of heads near uniform, and perplexity, of each seed", ("Seed", *labels), rows)


def unfinished_table(groups: Sequence[Group]) -> Table:
    """Runs that never ended, at the last step at which all of them were evaluated; their heads at the newest probe by
    then."""
    curves = {
        group.label: {run.seed: dict(run.series("validation", "perplexity")) for run in group.members}
        for group in groups
    }
    step = max(set.intersection(*(set(curve) for of_seed in curves.values() for curve in of_seed.values())))
    reached = {label: {seed: curve[step] for seed, curve in of_seed.items()} for label, of_seed in curves.items()}
    rows = []
    for group in groups:
        newest = ([heads for heads in probed_heads(run) if heads.step <= step][-1] for run in group.members)
        near_uniform = summarise([100 * top_quarter_share(heads) for heads in newest])
        perplexity, against = summarise(list(reached[group.label].values())), "baseline"
        if group.label != "SM+G":
            against = percent_with_interval(paired_difference(reached[group.label], reached["SM+G"], relative=True))
        rows.append((group.label, perplexity.text(), against, near_uniform.text(1), str(len(group.members))))
    steps = max(run.facts["steps"] for run in all_runs(groups))
    titles = ("Variant", "Perplexity", "Against SM+G", "Heads near uniform (%)", "Seeds")
    caption = f"Validation perplexity at step {step:,} of {steps:,}, the last at which all of these runs were evaluated"
    return Table("unfinished", caption, titles, rows)


EFFECTS = {
    "ReLU for GELU, with LayerNorm": ("SM+LN+R", "SM+LN+G"),
    "ReLU for GELU, without": ("SM+R", "SM+G"),
    "LayerNorm left out, GELU": ("SM+G", "SM+LN+G"),
    "LayerNorm left out, ReLU": ("SM+R", "SM+LN+R"),
}


def effect_table(groups: Sequence[Group]) -> Table:
    """Effects of norm and activation on the margins of tasks, paired by item and seed.

    Raises ValueError unless all runs have the same items.
    """
    records = {group.label: {run.seed: read_tasks(run.folder) for run in group.runs} for group in groups}
    of_runs = [tasks for of_seed in records.values() for tasks in of_seed.values()]
    rows = []
    for task in of_runs[0]:
        if len({tasks[task]["items_sha256"] for tasks in of_runs}) > 1:
            raise ValueError(f"the runs have other items of {task}")
        margins = {
            label: {seed: fmean(tasks[task]["values"]["model"]) for seed, tasks in of_seed.items()}
            for label, of_seed in records.items()
        }
        effects = [paired_difference(margins[ours], margins[theirs]) for ours, theirs in EFFECTS.values()]
        rows.append((task, *(f"{e.mean:+.2f} ({e.low:+.2f} to {e.high:+.2f})" for e in effects)))
    caption = "Differences of margins in nats, with 95 % intervals over seeds"
    return Table("effects", caption, ("Task", *EFFECTS), rows, words=("Task",))


def confirm_table(groups: Sequence[Group]) -> Table:
    """The primary and the secondary comparisons of docs/study.md."""
    (cost, verdict), rows = primary(groups), []
    for each in (cost, *secondary(groups)):
        (low, high), (lowest, highest) = each.interval(), each.interval(0.9)
        holm = "-" if each is cost else f"{each.holm:.4f}"
        answer = verdict if each is cost else "differs" if each.holm < 0.05 else "open"
        numbers = (f"{each.mean:+.3f}", f"{low:+.3f} to {high:+.3f}", f"{lowest:+.3f} to {highest:+.3f}")
        kind = "paired" if each.paired else "Welch"
        rows.append((each.name, kind, *numbers, f"{each.p:.4f}", holm, str(each.n), str(each.dropped), answer))
    titles = ("Comparison", "Test", "Difference", "95 % interval", "90 % interval", "p", "p, Holm", "Seeds", "Diverged")
    caption = "The primary comparison, then the five secondary ones"
    return Table("confirm", caption, (*titles, "Verdict"), rows, words=("Comparison", "Test", "Verdict"))


def _percent_by_depth(run: Run, line: float) -> list[float]:
    return [math.nan if share is None else 100 * share for share in shares_by_depth(trained_heads(run), line)]


LINES = (0.5, 0.6, 0.75, 0.9)


def line_table(groups: Sequence[Group]) -> Table:
    """How claim (c) depends on the share of the ceiling from which a head counts as near uniform."""
    runs = {label: [run for run in all_runs(groups) if run.label == label] for label in ("SM+G", "SM+R")}
    rows = []
    for line in LINES:
        gelu, relu = ({run.seed: _percent_by_depth(run, line) for run in of_label} for of_label in runs.values())
        gaps = [
            paired_difference({seed: gelu[seed][part] for seed in gelu}, {seed: relu[seed][part] for seed in relu})
            for part in range(4)
        ]
        rows.append((f"{line:g}", *(f"{gap.mean:+.1f} ({gap.low:+.1f} to {gap.high:+.1f})" for gap in gaps)))
    caption = "SM+G less SM+R in heads near uniform (points), by the share of the ceiling at which this begins"
    titles = ("From", "First third", "Middle third", "Last third", "All layers")
    return Table("lines", caption, titles, rows)


def averaging_table(groups: Sequence[Group]) -> Table:
    """Rise of the loss if near-uniform heads are replaced by exact averages (docs/averaging.py), or random others."""
    rows = []
    for run in all_runs(groups):
        shares = json.loads((run.folder / "averaging.json").read_text())["shares"]
        for each in shares:
            low, high = np.quantile(each["control_nats"], [0.025, 0.975])
            control = f"{fmean(each['control_nats']):+.3f} ({low:+.3f} to {high:+.3f})"
            heads = f"{each['heads']} ({each['share']:.0%})".replace("%", " %")
            of_run = f"{run.label}, {run.spec['tag']}, seed {run.seed}" if each is shares[0] else ""
            rows.append((of_run, heads, f"{each['cost_nats']:+.3f}", str(each["control_heads"]), control))
    titles = ("Run", "Near-uniform heads", "Rise of the loss (nats)", "Other heads", "Rise with these")
    return Table("averaging", "Heads replaced by the exact mean of what they may see", titles, rows, words=("Run",))


TABLES: dict[str, Callable[[Sequence[Group]], Table]] = {
    "rates": rate_table,
    "seeds": seed_table,
    "unfinished": unfinished_table,
    "effects": effect_table,
    "confirm": confirm_table,
    "lines": line_table,
    "averaging": averaging_table,
    **{name: make for section in SECTIONS for name, make in section.tables.items()},
}


def quantity_table() -> Table:
    """Every quantity: the measure that gives it, axes, unit, ceiling and meaning."""
    given_by = {name: measure for measure, kind in MEASURES.items() for name in kind.gives}
    rows = tuple(
        (
            quantity.name,
            given_by.get(quantity.name, "every training run"),
            ", ".join(quantity.axes) or "-",
            quantity.unit or "-",
            "-" if quantity.ceiling is None else str(quantity.ceiling),
            quantity.meaning,
        )
        for quantity in QUANTITIES.values()
    )
    titles = ("Quantity", "Measure", "Axes", "Unit", "Ceiling", "Meaning")
    return Table("quantities", "Quantities", titles, rows, words=titles)


def pages() -> list[Path]:
    """Every page that may hold a marker."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """The text with every marked table made anew. Raises ValueError for an unknown table or a folder without runs."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"unknown table {name!r}; allowed: {', '.join(TABLES)}")
        groups = group_runs(find_runs(_folders(match["places"])), mix=bool(match["mixed"]))
        return f"{match[1]}\n{to_markdown(without_empty_columns(TABLES[name](groups)))}\n{END}"

    text = QUANTITIES_MARKER.sub(lambda match: f"{match[1]}\n{to_markdown(quantity_table())}\n{END}", text)
    return MARKER.sub(table, text)


def draw_figures(page: Path) -> None:
    """Write the figures that the page marks. Raises ValueError for a figure that its runs do not give."""
    for match in FIGURE.finditer(page.read_text()):
        groups = group_runs(find_runs(_folders(match["places"])), mix=bool(match["mixed"]))
        figures = {figure.name: figure for figure in figures_of(groups)}
        if match["name"] not in figures:
            raise ValueError(f"no figure {match['name']!r} of these runs; there are: {', '.join(figures)}")
        write_atomically(page.parent / match["path"], to_file(figures[match["name"]].whole(), "png"))


def _folders(places: str) -> list[Path]:
    """The folders behind names with wildcards. Raises ValueError for a name that matches nothing."""
    matches = {place: sorted(ROOT.glob(place)) for place in places.split()}
    if missing := [place for place, folders in matches.items() if not folders]:
        raise ValueError(f"no folder {', '.join(missing)}")
    return [folder for folders in matches.values() for folder in folders]


def main() -> None:
    """Rewrite the pages that changed, and draw the figures."""
    for page in pages():
        old = page.read_text()
        new = filled(old)
        if new != old:
            write_atomically(page, new)
            print(f"{page.relative_to(ROOT)} changed")
        draw_figures(page)


if __name__ == "__main__":
    main()
