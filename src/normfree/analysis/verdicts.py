"""Verdicts on runs, and the only words for them: overload, collapse, slopes, claims, what was learned."""

# L layers, H heads, S slopes (one per layer that learns one, or a single shared one)

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from normfree.analysis.entropy import OVERLOAD_SHARE, Heads, group_and_number, shares_of_ceiling
from normfree.analysis.seeds import Difference
from normfree.store.runs import Run

WORDS = {True: "yes", False: "no", None: "undecided"}
CLAIM_WORDS = {True: "holds", False: "does not hold", None: "undecided"}
LEARNED_WORDS = {True: "learned", False: "did not learn", None: "too short to judge"}
COLLAPSE_NATS = 0.1  # a head below this many nats attends to a single token
SLOPE_SPREAD = 0.1  # per-layer slopes have moved apart if the highest is this far above the lowest
SLOPE_NEAR_ZERO = 0.05  # a slope that began farther from 0 than this has gone to zero if it ends within it
DEFAULT_SLOPE = 0.01  # slope of a leaky ReLU whose run does not name one: the default of torch and of NormFreeConfig

Rule = Callable[[Heads], tuple[bool | None, str]]  # whether it holds (None: NaN heads could change it), and evidence


@dataclass(frozen=True)
class Verdict:
    """Answer to a yes-or-no question about the end of a run, and the step since which it holds."""

    holds: bool | None
    evidence: str
    since_step: int | None = None  # start of the stretch of probes that lasts to the end, if it holds at the end

    def __str__(self) -> str:
        since = "" if self.since_step is None else f", since step {self.since_step}"
        return f"{WORDS[self.holds]}{self.evidence and ': '}{self.evidence}{since}"


@dataclass(frozen=True)
class Slopes:
    """Learnable slopes at the first and the last probe."""

    first_S: tuple[float, ...]
    final_S: tuple[float, ...]
    are_apart: bool  # the spread is at least 0.1 at the end, or a slope is not finite
    text: str  # the lowest and the highest at the end, and when they were first apart

    @property
    def gone_to_zero(self) -> bool:
        """Every slope ends within 0.05 of 0, or closer to 0 than it began if it began there; NaN does not."""
        ends = zip(np.abs(self.first_S), np.abs(self.final_S), strict=True)
        return all(end <= SLOPE_NEAR_ZERO if start > SLOPE_NEAR_ZERO else end < start for start, end in ends)


def overload(heads: Heads, probes: Sequence[Heads] = ()) -> Verdict:
    """At least half of the heads in the first third of the layers are nearly uniform; `probes` are its history."""
    return _judge(_is_overloaded, heads, probes)


def collapse(heads: Heads, probes: Sequence[Heads] = ()) -> Verdict:
    """A head has less than 0.1 nats; `probes` are its history."""
    return _judge(_is_collapsed, heads, probes)


def claim_holds(difference: Difference, *, above: bool) -> bool | None:
    """Whether the 95 % interval lies on the claimed side of 0, above or below; None if it contains 0 or is none."""
    low, high = (difference.low, difference.high) if above else (-difference.high, -difference.low)
    return True if low > 0 else False if high < 0 else None


_COUNTED = {"token_accuracy": "Class of each token", "majority_accuracy": "Majority"}


def yardsticks(run: Run) -> dict[str, float]:
    """Scores of what only counts tokens or classes, by title; older records have the unigram alone."""
    corpus = run.facts["corpus"]
    if run.headline.higher_is_better:
        counted = {**corpus, **(run.facts.get("final") or {})}
        return {title: 100 * counted[name] for name, title in _COUNTED.items() if name in counted}
    ngrams = {f"{order}-gram": value for order, value in corpus.get("ngram_perplexity", {}).items()}
    return {"Unigram": corpus["unigram_perplexity"], **ngrams}


def bar_to_learn(run: Run) -> tuple[str, float]:
    """The yardstick that a run must beat to have learned: the 2-gram, or the first."""
    known = yardsticks(run)
    name = "2-gram" if "2-gram" in known else next(iter(known))
    return name.lower(), known[name]


def slopes(run: Run) -> Slopes | None:
    """The learnable slopes of a run; None if it learns none."""
    history = [(step, np.array(value, dtype=float)) for step, value in run.series("probe", "negative_slope")]
    if not history:
        return None
    final_step, final_S = history[-1]
    # NaN is not below the spread, so slopes that are not finite are apart.
    apart = [(step, not np.ptp(slope_S) < SLOPE_SPREAD) for step, slope_S in history]
    when, layer_S = "" if run.status == "finished" else f" at step {final_step}", slope_layers(run)
    if not layer_S:
        text = f"one shared slope, {final_S[0]:.3f}{when or ' at the end'}"
    elif len(final_S) == 1:
        text = f"{final_S[0]:.3f} (layer {layer_S[0]}){when}, the only layer with one"
    else:
        low, high = layer_S[np.argmin(final_S)], layer_S[np.argmax(final_S)]
        ends = f"from {np.min(final_S):.3f} (layer {low}) to {np.max(final_S):.3f} (layer {high})"
        first_step = next((f", first at step {step}" for step, is_apart in apart if is_apart), "")
        text = f"{'apart' if apart[-1][1] else 'together'}{when}: {ends}{first_step}"
    return Slopes(tuple(history[0][1].tolist()), tuple(final_S.tolist()), apart[-1][1], text)


def slope_layers(run: Run) -> list[int]:
    """The layer of every learnable slope, in the order of the record; empty if all layers share one or learn none."""
    facts = run.facts["model"]
    per_layer = run.spec["model"].get("learnable_slope") == "per_layer"
    return list(facts.get("slope_layers", range(facts["layers"]) if per_layer else ()))  # older records lack them


def only_activation(run: Run) -> str | None:
    """The activation that all layers have, or None if they differ."""
    activation = run.spec["model"].get("activation")
    names = set(activation) if isinstance(activation, list) else {activation}
    return names.pop() if len(names) == 1 else None


def fixed_slope(run: Run) -> float | None:
    """The slope below 0 of a run that does not learn it: 0 for ReLU, 1 for the identity; else None."""
    model = run.spec["model"]
    if model.get("learnable_slope", "none") != "none":
        return None
    leaky = model.get("negative_slope", DEFAULT_SLOPE)
    slope_of: dict[str | None, float] = {"relu": 0.0, "identity": 1.0, "leaky_relu": leaky}
    return slope_of.get(only_activation(run))


def _judge(rule: Rule, heads: Heads, probes: Sequence[Heads]) -> Verdict:
    holds, evidence = rule(heads)
    lasting = list(takewhile(lambda probe: holds and rule(probe)[0], reversed(probes)))
    return Verdict(holds, evidence, lasting[-1].step if lasting else None)


def _is_overloaded(heads: Heads) -> tuple[bool | None, str]:
    """Whether one of the groups is, each by the first third of its own layers."""
    judged = [_is_group_overloaded(group) for group in heads.groups]
    answers = {holds for holds, _ in judged}
    return True if True in answers else None if None in answers else False, "; ".join(text for _, text in judged)


def _is_group_overloaded(heads: Heads) -> tuple[bool | None, str]:
    early = math.ceil(len(heads.entropy_LH) / 3)
    share_N = shares_of_ceiling(heads)[:early][heads.existing[:early]]
    high, unknown = int((share_N >= OVERLOAD_SHARE).sum()), int((~np.isfinite(share_N)).sum())
    holds = True if high >= share_N.size / 2 else None if high + unknown >= share_N.size / 2 else False
    first, last = heads.layers[0], heads.layers[early - 1]
    group, number = group_and_number(last)
    place = f"layer {first}" if first == last else f"layers {first}-{number}"
    place = place.partition(" ")[2] if group else place  # "encoder 0-1"
    return holds, f"{100 * high / share_N.size:.0f} % of the heads in {place}"


def _is_collapsed(heads: Heads) -> tuple[bool | None, str]:
    names = [layer if isinstance(layer, str) else f"layer {layer}" for layer in heads.layers]
    low = [f"{names[layer]} head {head}" for layer, head in np.argwhere(heads.entropy_LH < COLLAPSE_NATS)]
    if not low:
        return (False if np.isfinite(heads.entropy_LH[heads.existing]).all() else None), ""
    more = f" and {len(low) - 3} more" if len(low) > 3 else ""
    return True, f"{', '.join(low[:3])}{more} (lowest {np.nanmin(heads.entropy_LH):.3f} nats)"
