"""Published communication of GPT-2 models, and the part of our prices that is fitted to it.

Totals: AERO (arXiv 2410.13060, tables 4-6), SecretFlow's CHEETAH. GELU is GPT-2's tanh form. SM+ScFFN keeps softmax
and a linear feed-forward part with scaling factors that fold into its weights: NormFreeConfig's norm=none,
activation=identity. SM+ScFuFFN fuses that part into one matrix, which NormFreeConfig cannot express.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from normfree.cost.constants import find_protocol
from normfree.cost.counts import Matmul, count
from normfree.cost.families import read_architecture
from normfree.cost.totals import of_config
from normfree.report.tables.table import Table


class Row(NamedTuple):
    """One published total."""

    label: str
    layers: int
    context: int
    gigabytes: float


VARIANTS: dict[str, dict[str, str]] = {
    "SM+LN+G": {"norm": "layernorm", "activation": "gelu_tanh"},
    "SM+LN+R": {"norm": "layernorm", "activation": "relu"},
    "SM+ScFFN": {"norm": "none", "activation": "identity"},
}
ROWS = (
    Row("SM+LN+G", 12, 128, 25.32),
    Row("SM+LN+R", 12, 128, 9.44),
    Row("SM+ScFFN", 12, 128, 6.95),
    Row("SM+LN+G", 12, 256, 58.51),
    Row("SM+LN+R", 12, 256, 26.73),
    Row("SM+ScFFN", 12, 256, 21.77),
    Row("SM+LN+G", 18, 128, 37.17),
    Row("SM+LN+R", 18, 128, 13.34),
    Row("SM+ScFFN", 18, 128, 9.62),
    Row("SM+LN+G", 12, 512, 145.24),
    Row("SM+LN+R", 12, 512, 81.71),
)
FITTED = tuple(row for row in ROWS if row.label == "SM+LN+R" and row.context < 512)
"""T = 512 is held out: its published total is below what softmax, norms and ReLU cost, with nothing left to fit."""


def config_of(row: Row) -> dict[str, Any]:
    """The config of a published row: GPT-2's sizes, our variants."""
    return {
        "model_type": "normfree",
        "num_hidden_layers": row.layers,
        "max_position_embeddings": row.context,
        **VARIANTS[row.label],
    }


def fit_matmul() -> tuple[float, float]:
    """(bytes per entry of the token table, bytes per element that enters or leaves a matrix product), CHEETAH.

    Least squares over what the totals `FITTED` leave once norms, activations and softmax are paid.
    """
    prices = find_protocol("cheetah")
    sizes, rests = [], []
    for row in FITTED:
        rest, entries, elements = row.gigabytes * 1e9, 0, 0
        for item in count(read_architecture(config_of(row)), row.context):
            if not isinstance(item, Matmul):
                rest -= prices.price(item)[0]
            elif item.operation == "embedding":
                entries += item.right
            else:
                operand = item.right if item.operation == "attention_product" else 0
                elements += item.left + operand + item.elements
        sizes.append((entries, elements))
        rests.append(rest)
    per_entry, per_element = np.linalg.lstsq(np.array(sizes, dtype=float), np.array(rests), rcond=None)[0]
    return float(per_entry), float(per_element)


PAPER_MODELS: dict[str, dict[str, Any]] = {
    "GPT-2 125M": {"gelu": "gelu_tanh", "vocab_size": 50257},
    "Pythia-70M": {
        "gelu": "gelu",
        "vocab_size": 50304,
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "position": "rotary",
        "rotary_share": 0.25,
    },
}
PAPER_VARIANTS = {
    "SM+LN+G": ("layernorm", "gelu"),
    "SM+LN+R": ("layernorm", "relu"),
    "SM+G": ("none", "gelu"),
    "SM+R": ("none", "relu"),
}


def paper_config(model: str, label: str, context: int) -> dict[str, Any]:
    """The paper's model and variant: GPT-2 has GELU's tanh form, Pythia its erf form."""
    shape = dict(PAPER_MODELS[model])
    gelu = shape.pop("gelu")
    norm, activation = PAPER_VARIANTS[label]
    activation = gelu if activation == "gelu" else activation
    limits = {"model_type": "normfree", "max_position_embeddings": context}
    return {**limits, **shape, "norm": norm, "activation": activation}


def paper_table() -> Table:
    """The paper's variants with the cost nobody published: `docs/private-inference.md` shows this table."""
    published = {(row.label, row.context): row.gigabytes for row in ROWS if row.layers == 12}
    rows = []
    for model, context in (("GPT-2 125M", 128), ("GPT-2 125M", 256), ("Pythia-70M", 128), ("Pythia-70M", 256)):
        for label in PAPER_VARIANTS:
            config = paper_config(model, label, context)
            known = published.get((label, context)) if model == "GPT-2 125M" else None
            cheetah, semi2k = (of_config(config, context=context, protocol=name) for name in ("cheetah", "semi2k"))
            values = (f"{cheetah.bytes / 1e9:.2f}", f"{semi2k.bytes / 1e9:.2f}", f"{cheetah.rounds}")
            rows.append((f"{model}, T={context}", label, f"{known:.2f}" if known else "-", *values))
    titles = ("Model", "Variant", "Published GB", "CHEETAH GB", "SEMI2K GB", "Rounds")
    caption = "Communication of one forward pass, both directions"
    return Table("paper-cost", caption, titles, rows, words=("Variant",))
