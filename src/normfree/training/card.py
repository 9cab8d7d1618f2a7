"""The model card (README.md) of a saved model, from the records of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normfree.analysis.entropy import final_heads, top_quarter_share
from normfree.spec.run import CLASSIFICATIONS
from normfree.store.runs import Run

_TEXT = {"installed": "Python code of the packages on one machine", "files": "text files of the user"}


def model_card(run: Run, final: dict[str, Any]) -> str:
    """Write the card, with the metadata that the hub reads. `final` is the evaluation after training."""
    task, pipeline = CLASSIFICATIONS.get(run.spec["train"].get("objective", ""), ("CausalLM", "text-generation"))
    source = run.spec["data"].get("dataset") or run.facts["corpus"]["source"]
    return (Path(__file__).with_name("card.md").read_text(encoding="utf-8")).format(
        run=run,
        task=task,
        pipeline=pipeline,
        final=final,
        model={"norm": "layernorm", "activation": "gelu"} | run.spec["model"] | run.facts["model"],
        source=source,
        text_of_source=_TEXT.get(source, f"`{source}` of the Hugging Face hub"),
        tokens=run.facts["steps"] * run.spec["train"]["batch_sequences"] * run.spec["data"]["context"],
        near_uniform=top_quarter_share(final_heads(run)),
    )
