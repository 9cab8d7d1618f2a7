"""Tables of docs/ that no report has: each belongs to one study. docs/tables.py puts them into pages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import fmean

import numpy as np

from docs.cause import Ratio, average, judge_scores, reached, runs_by_arm
from docs.confirm import compare, log_score, primary, secondary
from docs.family_rules import judge
from docs.kept import kept_bytes
from normfree.analysis.entropy import OVERLOAD_SHARE, probed_heads, shares_by_depth, top_quarter_share, trained_heads
from normfree.analysis.groups import Group, all_runs
from normfree.analysis.seeds import Difference, paired_difference, summarise
from normfree.cost.families import NoPriceError
from normfree.cost.totals import of_run
from normfree.report.tables.results import percent_with_interval
from normfree.report.tables.table import Table
from normfree.store.runs import Run, find_runs
from normfree.store.tasks import read_tasks


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
    at_step = {label: {seed: curve[step] for seed, curve in of_seed.items()} for label, of_seed in curves.items()}
    rows = []
    for group in groups:
        newest = ([heads for heads in probed_heads(run) if heads.step <= step][-1] for run in group.members)
        near_uniform = summarise([100 * top_quarter_share(heads) for heads in newest])
        perplexity, against = summarise(list(at_step[group.label].values())), "baseline"
        if group.label != "SM+G":
            against = percent_with_interval(paired_difference(at_step[group.label], at_step["SM+G"], relative=True))
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
    paired = compare(cost.name, groups, ("SM+G", "SM+LN+G"), log_score, paired=True)
    for each in (cost, paired, *secondary(groups)):
        (low, high), (lowest, highest) = each.interval(), each.interval(0.9)
        answer = verdict if each is cost else "beside" if each is paired else "differs" if each.holm < 0.05 else "open"
        p_values = ("-", "-") if each is cost or each is paired else (f"{each.p:.4f}", f"{each.holm:.4f}")
        numbers = (f"{each.mean:+.3f}", f"{low:+.3f} to {high:+.3f}", f"{lowest:+.3f} to {highest:+.3f}")
        signs, kind = (f"{each.sign_p:.4f}", "paired") if each.paired else ("-", "Welch")
        rows.append((each.name, kind, *numbers, *p_values, signs, str(each.n), str(each.dropped), answer))
    titles = ("Comparison", "Test", "Difference", "95 % interval", "90 % interval", "p", "p, Holm", "p, exact")
    notes = [
        f"Intervals are not corrected. The pairs of the primary comparison correlate by {paired.correlation:+.2f}.",
        "p, exact: the share of all choices of signs of the differences whose mean is at least as far from 0.",
    ]
    caption = "The primary comparison, then the five secondary ones"
    titles += ("Seeds", "Diverged", "Verdict")
    return Table("confirm", caption, titles, rows, notes, words=("Comparison", "Test", "Verdict"))


def family_table(groups: Sequence[Group]) -> Table:
    """Overload and ReLU in vision transformers or encoder-decoders, by the rules of docs/study.md."""
    rows = []
    for each, verdict in judge(groups):
        interval = "{:+.3f} to {:+.3f}".format(*each.interval())
        rows.append((each.name, f"{each.mean:+.3f}", interval, str(each.n), str(each.dropped), verdict))
    titles = ("Comparison", "Difference", "95 % interval", "Seeds", "Diverged", "Verdict")
    return Table("families", "Is it a decoder's disease?", titles, rows, words=("Comparison", "Verdict"))


def _percent_of_part(run: Run, part: int, line: float = OVERLOAD_SHARE) -> float:
    """Heads near uniform in the first, middle or last third of the layers (0, 1, 2), or in all (3)."""
    share = shares_by_depth(trained_heads(run), line)[part]
    return math.nan if share is None else 100 * share


LINES = (0.5, 0.6, 0.75, 0.9)


def line_table(groups: Sequence[Group]) -> Table:
    """Claim (c) with other lines than 3/4 of the ceiling, from which on a head counts as near uniform."""
    gelu, relu = (group for label in ("SM+G", "SM+R") for group in groups if group.label == label)
    rows = []
    for line in LINES:
        gaps = [
            paired_difference(*(of.by_seed(partial(_percent_of_part, part=part, line=line)) for of in (gelu, relu)))
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
            of_run = f"{run.label}, seed {run.seed}" if each is shares[0] else ""
            others = f"{each['control_heads']} ({each['in_same_layers']})"
            rows.append((of_run, heads, f"{each['cost_nats']:+.3f}", others, control))
    titles = ("Run", "Near-uniform heads", "Rise of the loss (nats)", "Other heads", "Rise with these")
    notes = [
        "Other heads, in brackets: those in the layers of the near-uniform ones; the rest lie in other layers, mostly "
        "later ones. Rise with these: the mean, and 95 % of the draws of heads in one model; no confidence interval."
    ]
    caption = "Heads replaced by the exact mean of what they may see"
    return Table("averaging", caption, titles, rows, notes, words=("Run",))


def pilot_table(groups: Sequence[Group]) -> Table:
    """Distance of the heads from their target entropies under each weight of the entropy term (docs/study.md)."""
    rows = []
    runs = [run for group in groups for run in group.runs]  # finished or diverged
    for weight, of_weight in groupby(sorted(runs, key=_weight), _weight):
        distances = [(run, None if run.status == "diverged" else reached(run, _donors(run))) for run in of_weight]
        hits = sum(each is not None and each.is_target_hit for _, each in distances)
        for run, each in distances:
            name = f"{run.spec['label']} {run.spec['tag'].partition('-weight')[0]}, seed {run.seed}"
            numbers = ("diverged", "-", "-", "no")
            if each is not None:
                nearness = (f"{each.distance_L.mean():.3f}", f"{each.distance_L.max():.3f}", f"{each.points:+.1f}")
                numbers = (*nearness, "yes" if each.is_target_hit else "no")
            rows.append((f"{weight:g}", name, *numbers, f"{hits} of {len(distances)}", f"{run.score:.2f}"))
    titles = ("Weight", "Run", "Distance (nats)", "Largest layer", "Near uniform (points)", "Hit", "Of its weight")
    caption = "Distance from the target entropies, and heads near uniform less the donors'"
    return Table("pilot", caption, (*titles, "Perplexity"), rows, words=("Run", "Hit", "Of its weight"))


def _weight(run: Run) -> float:
    return run.spec["train"]["entropy_weight"]


def _donors(run: Run) -> list[Run]:
    """The records of its donors: as STUDY/NAME beside those of its own study, else where they were."""
    places = [Path(place) for place in run.spec["train"]["entropy_profile"]]
    beside = [run.folder.parents[1] / place.parent.name / place.name for place in places]
    return find_runs([kept if kept.exists() else place for kept, place in zip(beside, places, strict=True)])


CAUSE_ROWS = {
    "Gap of the shams": "gap",
    "Share of it that goes with the entropies of SM+R": "down",
    "Share of it that comes with those of SM+G": "up",
    "Gap of the shams as a share of the plain one": "kept",
    "Placebo, by the rule of layers": "specific",
}


def cause_table(groups: Sequence[Group]) -> Table:
    """The rule of docs/study.md: each arm's perplexity, its distance from its targets, the shares of the gap, the
    verdict."""
    arms, rows, missed = runs_by_arm(all_runs(groups)), [], []
    scores = {arm: {run.seed: log_score(run) for run in of_arm} for arm, of_arm in arms.items()}
    for arm, of_arm in arms.items():
        aimed = [run for run in of_arm if run.status == "finished" and run.spec["train"]["entropy_profile"]]
        words = ""
        if aimed:
            mean = average([reached(run, _donors(run)) for run in aimed])
            missed += [] if mean.is_target_hit else [arm]
            hit = "hit" if mean.is_target_hit else "missed"
            words = f"{hit}: {mean.distance_L.max():.3f} nats, {mean.points:+.1f} points"
        rows.append((f"ln perplexity of {arm}", summarise(list(scores[arm].values())).text(4), "", words))
    judged = judge_scores(scores, missed)
    rows += [(name, *_number_and_interval(getattr(judged, field)), "") for name, field in CAUSE_ROWS.items()]
    only = " (of models with the term)" if judged.kept is not None and judged.kept.value < 0.5 else ""
    rows.append(("Layers matter", "yes" if judged.is_specific else "open", "", ""))
    rows.append(("Verdict", judged.verdict + only, "", ""))
    titles = ("", "Value", "95 % interval", "Targets")
    notes = ["Targets: the largest distance of a layer, and heads near uniform less the donors'; means over seeds."]
    return Table("cause", "Does entropy cause the gap?", titles, rows, notes, words=("", "Targets"))


def _number_and_interval(value: Difference | Ratio | None) -> tuple[str, str]:
    if value is None:
        return "open", "-"
    number = value.value if isinstance(value, Ratio) else value.mean
    return f"{number:+.3f}", f"{value.low:+.3f} to {value.high:+.3f}"


def zoo_table(groups: Sequence[Group]) -> Table:
    """Perplexity against SM+LN+G, heads, activations and cost of each arm of the zoo (docs/study.md)."""
    rows = []
    for group in groups:
        cost = compare(group.label, groups, (group.label, "SM+LN+G"), log_score, paired=False)
        low, high = cost.interval()
        speeds = [np.median([v for _, v in run.series("train", "tokens_per_second")]) for run in group.runs]
        finished = [run for run in group.runs if run.status == "finished"]
        measured = ("-",) * 5
        if finished:
            thirds = [fmean(_percent_of_part(run, part) for run in finished) for part in range(3)]
            first_token = np.mean([run.last("final", "first_token_mass") for run in finished])
            largest = max(np.max(run.last("final", "largest_to_median")) for run in finished)
            measured = (*(f"{third:.0f}" for third in thirds), f"{first_token:.2f}", f"{largest:.0f}")
        rows.append((
            group.label,
            "baseline" if group.label == "SM+LN+G" else f"{cost.mean:+.3f} ({low:+.3f} to {high:+.3f})",
            *measured,
            f"{1000 * group.runs[0].tokens_per_step / fmean(speeds):.0f}",
            f"{kept_bytes(group.runs[0]) / 1e6:.1f}",
            _megabytes_sent(group.runs[0]),
            f"{cost.n}",
            f"{cost.dropped}",
        ))  # fmt: skip
    titles = ("Variant", "ln perplexity less SM+LN+G", "First third (%)", "Middle", "Last", "On the first token",
              "Largest activation", "Step (ms)", "Kept (MB)", "Sent (MB)", "Seeds", "Diverged")  # fmt: skip
    notes = [
        "Differences: 95 % interval (Welch). All share the runs of SM+LN+G, so they miss together. Thirds of the "
        "layers: heads near uniform. On the first token: mean attention to it. Largest activation: as a multiple of "
        "the median. Step: the median, beside whatever else the machine did. Kept: what autograd saves in a forward "
        "pass, without the head. Sent: private inference, CHEETAH.",
    ]
    return Table("zoo", "Norms and what stands in for them", titles, rows, notes)


def _megabytes_sent(run: Run) -> str:
    try:
        return f"{of_run(run).bytes / 1e6:,.0f}"
    except NoPriceError:
        return "-"


STUDY_TABLES: dict[str, Callable[[Sequence[Group]], Table]] = {
    "seeds": seed_table,
    "unfinished": unfinished_table,
    "effects": effect_table,
    "confirm": confirm_table,
    "families": family_table,
    "lines": line_table,
    "averaging": averaging_table,
    "pilot": pilot_table,
    "cause": cause_table,
    "zoo": zoo_table,
}
