"""Pairs of variants that are compared: the paper's, those that it makes a claim about, and all others."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from normfree.analysis import published
from normfree.analysis.entropy import top_quarter_share, trained_heads
from normfree.analysis.groups import Group, counterparts
from normfree.analysis.seeds import Difference, paired_difference

_FEW = 12


@dataclass(frozen=True)
class Pair:
    """Two groups of one recipe, compared over the seeds that both have."""

    ours: Group
    theirs: Group

    @property
    def name(self) -> str:
        """`SM+R against SM+G`; a recipe or tag that both have is named once."""
        same = self.ours.name.removeprefix(self.ours.label) == self.theirs.name.removeprefix(self.theirs.label)
        return f"{self.ours.label if same else self.ours.name} against {self.theirs.name}"

    @property
    def labels(self) -> tuple[str, str]:
        return self.ours.label, self.theirs.label

    @property
    def seeds(self) -> list[Hashable]:
        """Seeds and orders of the data that both have."""
        return [seed for seed in self.ours.scores if seed in self.theirs.scores]

    @property
    def is_the_papers(self) -> bool:
        """True if the paper compares them or makes a claim about them; all other pairs are exploratory."""
        return self.labels in _OF_THE_PAPER or self.labels[::-1] in _OF_THE_PAPER

    @property
    def published(self) -> float | None:
        """The paper's relative difference of perplexity; None for other scores."""
        if not self.ours.score.relative:
            return None
        return published.relative_difference(published.counterpart(self.ours.runs[0].spec), *self.labels)

    def score(self) -> Difference:
        """Paired difference of the final score, as a share of `theirs` or, of shares, as it is."""
        score = self.ours.score
        ours, theirs = ({s: v / score.scale for s, v in group.scores.items()} for group in (self.ours, self.theirs))
        return paired_difference(ours, theirs, relative=score.relative)

    def top_quarter(self) -> Difference:
        """Paired difference of the share of heads at or above 3/4 of the causal ceiling."""
        ours, theirs = (g.by_seed(lambda run: top_quarter_share(trained_heads(run))) for g in (self.ours, self.theirs))
        return paired_difference(ours, theirs)


@dataclass(frozen=True)
class Claim:
    """A statement of the paper: the difference of two variants lies above or below 0, of scores the higher is worse."""

    text: str
    labels: tuple[str, str]
    measure: Callable[[Pair], Difference] = Pair.score
    above: bool = False


CLAIMS = (
    Claim("(a) With LayerNorm, ReLU is worse than GELU", ("SM+LN+R", "SM+LN+G"), above=True),
    Claim("(b) Without it, ReLU is better", ("SM+R", "SM+G")),
    Claim("(c) GELU puts more heads into the top quarter", ("SM+G", "SM+R"), Pair.top_quarter, above=True),
    Claim("(g) ReLU early, GELU late beats GELU", ("SM+R/G", "SM+G")),
    Claim("(g) GELU early, ReLU late beats GELU", ("SM+G/R", "SM+G")),
    Claim("(g) ReLU early, GELU late beats ReLU", ("SM+R/G", "SM+R")),
    Claim("(g) GELU early, ReLU late beats ReLU", ("SM+G/R", "SM+R")),
    Claim("(g) ReLU belongs into the early half", ("SM+R/G", "SM+G/R")),
)
_OF_THE_PAPER = (*published.COMPARISONS, *(claim.labels for claim in CLAIMS))


def pairs_of(groups: Sequence[Group], labels: Iterable[tuple[str, str]] = published.COMPARISONS) -> list[Pair]:
    """The groups behind each pair of labels, as `counterparts` pairs them."""
    ours_first = [(ours, other) for label, other in labels for ours in groups if ours.label == label]
    return [Pair(ours, theirs) for ours, other in ours_first for theirs in counterparts(ours, other, groups)]


def all_pairs(groups: Sequence[Group]) -> list[Pair]:
    """Every variant with the baseline if one was chosen; else the paper's pairs, then all others with a common seed."""
    if bases := dict.fromkeys(group.label for group in groups if group.is_baseline):
        labels = dict.fromkeys(group.label for group in groups)
        pairs = pairs_of(groups, [(label, base) for label in labels for base in bases])
        return [pair for pair in pairs if pair.theirs.is_baseline and not pair.ours.is_baseline]
    of_names: dict[Hashable, Pair] = {}
    for pair in (*pairs_of(groups, _OF_THE_PAPER), *(Pair(b, a) for a, b in combinations(groups, 2))):
        if pair.ours.comparison_key == pair.theirs.comparison_key and pair.seeds:
            of_names.setdefault(frozenset((pair.ours.name, pair.theirs.name)), pair)
    return list(of_names.values())


def main_pairs(groups: Sequence[Group]) -> list[Pair]:
    """The pairs for figures: all of them if they are few, else those with the baseline or in the paper."""
    pairs = all_pairs(groups)
    if len(pairs) <= _FEW or any(group.is_baseline for group in groups):
        return pairs
    return [pair for pair in pairs if pair.is_the_papers] or pairs[:_FEW]


def baseline_label(groups: Sequence[Group]) -> str:
    """The label of the chosen baseline, else the paper's."""
    return next((group.label for group in groups if group.is_baseline), published.BASELINE)
