"""Write pairs for other tools: JSON lines, and a task of lm-eval (0.4) that scores whole texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from normfree.files import write_atomically
from normfree.measures.text_perplexity import checked_context
from normfree.tasks.pairs import PAIR_TASKS


def export_pairs(
    folder: Path, items: Mapping[str, Sequence[Any]], model: PreTrainedModel, tokenizer: Any, context: int | None = None
) -> dict[Path, int]:
    """Write each task of pairs as TASK.jsonl (`{"choices": [good, bad], "pieces": [right, wrong]}`) and TASK.yaml.

    Only mirrored twos whose texts all fit the model, as lm-eval fails at longer ones. Returns the pairs in each file.
    """
    template = Path(__file__).with_name("lm_eval.yaml").read_text(encoding="utf-8")
    most, counts = checked_context(model, context), {}
    for task in [task for task in items if task in PAIR_TASKS]:
        lines = []
        for two in zip(items[task][::2], items[task][1::2], strict=True):
            texts = [text for pair in two for text in (pair.good, pair.bad)]
            if max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) <= most:
                lines += [json.dumps({"choices": pair[:2], "pieces": pair[2:]}) + "\n" for pair in two]
        counts[folder / f"{task}.jsonl"] = len(lines)
        write_atomically(folder / f"{task}.jsonl", "".join(lines))
        write_atomically(folder / f"{task}.yaml", template.format(task=task))
    return counts
