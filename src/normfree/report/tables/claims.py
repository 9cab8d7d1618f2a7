"""The paper's claims as paired differences over seeds, each with a verdict that its interval decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from normfree.analysis.entropy import top_quarter_share, trained_heads
from normfree.analysis.groups import Group
from normfree.analysis.seeds import Difference, paired_difference
from normfree.report.tables.results import comparable_pairs, comparison, mean_text, percent, perplexity_difference
from normfree.report.tables.table import Column, Table


@dataclass(frozen=True)
class Claim:
    """`ours` against `theirs`: the difference that `measure` takes is said to be above or below 0."""

    text: str
    ours: str
    theirs: str
    measure: Callable[[Group, Group], Difference]
    above: bool


def top_quarter_difference(ours: Group, theirs: Group) -> Difference:
    """Paired difference of the share of heads at or above 3/4 of the causal ceiling."""
    of_ours, of_theirs = (
        {seed: top_quarter_share(trained_heads(run)) for seed, run in zip(group.perplexities, group.runs, strict=True)}
        for group in (ours, theirs)
    )
    return paired_difference(of_ours, of_theirs)


CLAIMS = (
    Claim("(a) With LayerNorm, ReLU is worse than GELU", "SM+LN+R", "SM+LN+G", perplexity_difference, above=True),
    Claim("(b) Without it, ReLU is better", "SM+R", "SM+G", perplexity_difference, above=False),
    Claim("(c) GELU puts more heads into the top quarter", "SM+G", "SM+R", top_quarter_difference, above=True),
    Claim("(g) ReLU early, GELU late beats GELU", "SM+R/G", "SM+G", perplexity_difference, above=False),
    Claim("(g) GELU early, ReLU late beats GELU", "SM+G/R", "SM+G", perplexity_difference, above=False),
    Claim("(g) ReLU early, GELU late beats ReLU", "SM+R/G", "SM+R", perplexity_difference, above=False),
    Claim("(g) ReLU belongs into the early half", "SM+R/G", "SM+G/R", perplexity_difference, above=False),
)


def claim_table(groups: Sequence[Group]) -> Table:
    """One row a claim that the runs can speak to: difference, 95 % interval, pairs, verdict."""
    rows = []
    for claim in CLAIMS:
        is_perplexity = claim.measure is perplexity_difference
        measured, unit = ("perplexity", "%") if is_perplexity else ("share of heads", "points")
        for ours, theirs in comparable_pairs(groups, [(claim.ours, claim.theirs)]):
            found = claim.measure(ours, theirs)
            interval = f"{100 * found.low:+z.1f} to {percent(found.high, unit)}" if math.isfinite(found.low) else "-"
            names = (claim.text, verdict(found, above=claim.above), comparison(ours, theirs), measured)
            rows.append((*names, mean_text(found, unit), interval, str(found.n)))
    columns = (
        *(Column(title, numeric=False) for title in ("Claim", "Verdict", "Compared", "Measured")),
        *(Column(title) for title in ("Difference", "95 % interval", "Pairs")),
    )
    notes = (
        "Holds or does not hold: the 95 % Student-t interval over paired seeds lies wholly on one side of 0. "
        "Undecided: it contains 0, or there is one pair only, or a run diverged. The interval keeps its 95 % only if "
        "the number of seeds was fixed before looking, and for its own claim only: of twenty differences that are 0 in "
        "truth, one interval misses 0.",
        "Share of heads: those at or above 3/4 of the causal ceiling; the difference is in percentage points.",
    )
    return Table("claims", "The paper's claims at this scale", columns, tuple(rows), notes)


def verdict(found: Difference, *, above: bool) -> str:
    """`holds`, `does not hold` or `undecided` for the claim that the difference is above (or below) 0."""
    low, high = (found.low, found.high) if above else (-found.high, -found.low)
    if low > 0:
        return "holds"
    return "does not hold" if high < 0 else "undecided"
