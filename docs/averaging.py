"""Do near-uniform heads do more than average what they see? `python docs/averaging.py RUN...` (docs/study.md).

Without training, the near-uniform heads of a finished run are replaced by the exact mean of the values that they may
see: the most uniform fifth of them, then two fifths, up to all. The control replaces as many of the other heads, drawn
at random from the same layers, and from other layers where these have too few (`in_same_layers` counts the former; the
first layers of models without LayerNorm have hardly any). The rise of the loss on held-out blocks goes into
averaging.json beside run.json; `make tables` knows the table `averaging`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from normfree import held_out_blocks, intervene, load_pretrained
from normfree.analysis.entropy import OVERLOAD_SHARE, trained_heads
from normfree.files import write_atomically
from normfree.measures.perplexity import evaluate_blocks
from normfree.measures.text_perplexity import spread_places
from normfree.store.runs import read_run

SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
DRAWS, SEQUENCES, SEED = 100, 64, 0
FILE = "averaging.json"

Head = tuple[int, int]


def average_heads(folder: Path) -> dict[str, Any]:
    """Measure how much averaging raises the loss of a run's model, in nats per token."""
    model, _ = load_pretrained(str(folder))
    blocks_NT = held_out_blocks(str(folder))
    blocks_NT = blocks_NT[spread_places(len(blocks_NT), SEQUENCES)]

    def cost(heads: list[Head]) -> float:
        if not heads:
            return 0.0
        with intervene(model, heads):
            return evaluate_blocks(model, blocks_NT).loss_nats - loss

    loss = evaluate_blocks(model, blocks_NT).loss_nats
    near_uniform, others = split_heads(folder)
    random, rows = np.random.default_rng(SEED), []
    for share in SHARES:
        chosen = near_uniform[: round(share * len(near_uniform))]
        draws = [draw_others(chosen, others, random) for _ in range(DRAWS)]
        controls = [cost(heads) for heads in tqdm(draws, desc=f"{folder.name} {share:.0%}", disable=None)]
        rows.append({"share": share, "heads": len(chosen), "cost_nats": cost(chosen)})
        rows[-1] |= {"control_heads": len(draws[0]), "in_same_layers": count_in_same_layers(chosen, others)}
        rows[-1]["control_nats"] = controls
    return {"loss_nats": loss, "sequences": SEQUENCES, "seed": SEED, "shares": rows}


def split_heads(folder: Path) -> tuple[list[Head], list[Head]]:
    """The heads at or above 3/4 of the ceiling, the most uniform first, and the others."""
    heads = trained_heads(read_run(folder))
    share_LH = heads.entropy_LH / heads.ceiling_L[:, None]
    ranked = [divmod(int(place), share_LH.shape[1]) for place in np.argsort(-share_LH, axis=None, kind="stable")]
    count = int((share_LH >= OVERLOAD_SHARE).sum())
    return ranked[:count], ranked[count:]


def count_in_same_layers(chosen: list[Head], others: list[Head]) -> int:
    """Count the controls that lie in the layers of the chosen heads, one for one."""
    wanted, available = (Counter(layer for layer, _ in heads) for heads in (chosen, others))
    return (wanted & available).total()


def draw_others(chosen: list[Head], others: list[Head], random: np.random.Generator) -> list[Head]:
    """As many of the other heads, from the layers of the chosen ones where these have enough."""
    shuffled = [others[place] for place in random.permutation(len(others))]
    wanted = Counter(layer for layer, _ in chosen)
    drawn = [head for layer, count in wanted.items() for head in [h for h in shuffled if h[0] == layer][:count]]
    elsewhere = [head for head in shuffled if head not in drawn]
    return [*drawn, *elsewhere[: len(chosen) - len(drawn)]]


def main() -> None:
    """Write averaging.json beside the run.json of each run named on the command line."""
    torch.set_num_threads(1)
    for folder in map(Path, sys.argv[1:]):
        path = folder / FILE
        write_atomically(path, json.dumps(average_heads(folder)).encode())
        print(path)


if __name__ == "__main__":
    main()
