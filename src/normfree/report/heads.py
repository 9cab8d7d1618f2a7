"""A folder and a page on the heads of one model, from plain values."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from normfree import __version__, plots, tables
from normfree.analysis import COLLAPSE_NATS, Heads, causal_ceiling, collapse, overload
from normfree.manifest import write_atomically
from normfree.records import encode
from normfree.report.build import write_figure, write_tables
from normfree.report.figures import PageFigure
from normfree.report.page import figure_values, template
from normfree.tables import Table

_LOWER_NATS = 0.01


def build_heads_report(facts: dict[str, Any], output: Path) -> Path:
    """Write `output`/entropy.json, figures, tables and index.html, which comes last; returns its path.

    `facts` holds model, text, context, sequences, leading_tokens, dtype, device, command, seconds, peak_memory_mib,
    software and what `normfree.measure.measure` returns.
    """
    heads = heads_of(facts)
    written = heads_tables(facts)
    figure = heatmap(heads, context=facts["context"], layers=facts["layer_indices"])
    write_atomically(output / "entropy.json", json.dumps(encode(facts), indent=1, allow_nan=False) + "\n")
    write_tables(written, output)
    write_figure(figure, output)
    page = template("heads.html.j2").render(
        title=f"normfree: heads of {facts['model']}",
        version=__version__,
        sentences=verdict_sentences(heads, facts["layer_indices"]),
        figure=figure_values(figure),
        tables=[Markup(tables.to_html(table)) for table in written],
        facts=_facts(facts),
    )
    write_atomically(output / "index.html", page)
    return output / "index.html"


def heads_of(facts: dict[str, Any]) -> Heads:
    """The measured values as analysis takes them."""
    entropy_LH = np.array(facts["entropy_nats"], dtype=float)
    return Heads(entropy_LH, np.array(facts["ceiling_nats"], dtype=float), step=0, split="final")


def heads_tables(facts: dict[str, Any]) -> list[Table]:
    """Layers, ranges and the most extreme heads."""
    heads, layers = heads_of(facts), facts["layer_indices"]
    distance, first_mass = facts.get("distance_tokens"), facts.get("first_token_mass")
    return [
        tables.layer_table(heads, layers=layers, nonfinite_rows=facts["nonfinite_rows"]),
        tables.head_range_table(heads, context=facts["context"]),
        tables.extreme_head_table(heads, layers=layers, distance=distance, first_mass=first_mass),
    ]


def verdict_sentences(heads: Heads, layers: list[int]) -> list[str]:
    """Overload, collapse and non-finite heads, in words."""
    loaded, collapsed = overload(heads), collapse(heads)
    words = {True: "Entropic overload", False: "No entropic overload", None: "Overload undecided (NaN heads)"}
    early = layers[: loaded.early_layers]
    named = f"{early[0]}-{early[-1]}" if len(early) > 1 and early[-1] - early[0] == len(early) - 1 else str(early)[1:-1]
    found = [
        f"{words[loaded.holds]}: {100 * loaded.share:.0f} % of the heads in the first third of the layers ({named}) "
        "are at or above three quarters of the causal ceiling."
    ]
    if collapsed.holds:
        places = ", ".join(f"layer {layers[layer]} head {head}" for layer, head in collapsed.heads[:5])
        more = f" and {len(collapsed.heads) - 5} more" if len(collapsed.heads) > 5 else ""
        count = "1 head" if len(collapsed.heads) == 1 else f"{len(collapsed.heads)} heads"
        found.append(f"Entropy collapse: {count} below {COLLAPSE_NATS} nats ({places}{more}).")
    elif np.isfinite(collapsed.lowest_nats):
        words = "Entropy collapse undecided (NaN heads)" if collapsed.holds is None else "No entropy collapse"
        found.append(f"{words}: the lowest finite head has {collapsed.lowest_nats:.3f} nats.")
    else:
        found.append("Entropy collapse undecided: no head is finite.")
    broken = int((~np.isfinite(heads.entropy_LH)).sum())
    if broken:
        found.append(f"Heads without a finite row: {broken}. They are in no range and in no mean.")
    return found


def heatmap(heads: Heads, *, context: int, layers: list[int]) -> PageFigure:
    """One cell a head, up to the highest causal ceiling of a layer, or that of `context` tokens if no layer has one."""
    ceiling = float(np.fmax.reduce(heads.ceiling_L))  # NaN in a layer without a finite row
    ceiling = causal_ceiling(context) if np.isnan(ceiling) else ceiling
    lower = [str(layer) for layer, one in zip(layers, heads.ceiling_L, strict=True) if one < ceiling - _LOWER_NATS]
    note = f" Layers that see less have a lower one, in the table below: {', '.join(lower)}." if lower else ""
    return PageFigure(
        name="heatmap",
        title="Entropy of every head",
        caption="One cell a head, layers downwards: bright cells attend almost evenly to all they may see, dark cells "
        f"to few tokens. The brightest colour is the causal ceiling, {ceiling:.2f} nats; from the mark on, 3/4 of it, "
        f"a head counts as near uniform.{note}",
        panels=(partial(plots.entropy_heatmap, heads.entropy_LH, ceiling=ceiling, layers=layers),),
        panel_inches=plots.heatmap_size(*heads.entropy_LH.shape),
        columns=1,
        key=plots.entropy_key(ceiling),
    )


def _facts(facts: dict[str, Any]) -> list[tuple[str, list[str]]]:
    size = f"{facts['sequences']} windows of {facts['context']} tokens from {facts['text']}"
    if facts["leading_tokens"]:
        size += f", each with {''.join(facts['leading_tokens'])} first"
    whose = "on the GPU" if facts["device"].startswith("cuda") else "of the process"
    cost = f"{facts['seconds']:.1f} s, peak memory {whose} {facts['peak_memory_mib']:.0f} MiB"
    return [
        ("Command", [facts["command"]]),
        ("Model", [f"{facts['model']}, {facts['dtype']} on {facts['device']}"]),
        ("Text", [size]),
        ("Cost", [cost]),
        ("Software", [facts["software"]]),
    ]
