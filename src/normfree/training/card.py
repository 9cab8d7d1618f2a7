"""The model card (README.md) of a saved model, from the records of its run."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from normfree.analysis.entropy import final_heads, top_quarter_share
from normfree.store.runs import Run

_TEXT = {"installed": "Python code of the packages on one machine", "files": "text files of the user"}
_CARD = """---
{metadata}
---

# {run.label}, seed {run.seed}

A causal language model of {model[parameters]:,} parameters: {model[layers]} layers of width {model[hidden_size]},
{model[heads]} heads each, norm `{model[norm]}`, activation `{model[activation]}`, at most {run.spec[data][context]}
tokens. normfree {run.facts[environment][normfree]} trained it from random weights, to measure its attention heads. It
is not meant for other use.

## Training

- **Text**: {source}, tokenized into {run.facts[corpus][vocab_size]:,} pieces; corpus fingerprint `{run.corpus}`.
- **Steps**: {run.facts[steps]:,} of {run.spec[train][batch_sequences]} sequences, {tokens:,} tokens, peak learning rate
  {run.spec[train][peak_learning_rate]:g}, precision {run.spec[train][precision]}.

## Results on held-out text

| | |
| --- | ---: |
{results}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

`trust_remote_code=True` runs the modelling files of this folder (`*.py`). They need torch and transformers, not
normfree.

## Licence

The modelling files are part of normfree: MIT, copyright (c) 2026 The normfree authors. The weights have no licence
until you choose one that fits the training text: set `license` above.
"""


def model_card(run: Run, final: dict[str, Any]) -> str:
    """Write the card of the model that a run saves, with the metadata that the hub reads.

    `final` is the evaluation after training, as run.json records it.
    """
    data, corpus = run.spec["data"], run.facts["corpus"]
    source = data.get("dataset") or corpus["source"]
    results = {"Perplexity": final["perplexity"], "Bits per byte": final["bits_per_byte"]}
    results["Perplexity of token frequencies alone"] = corpus["unigram_perplexity"]
    results["Heads near uniform (share)"] = top_quarter_share(final_heads(run))
    evaluation = EvalResult("text-generation", source, f"held-out text of {source}", "perplexity", final["perplexity"])
    metadata = ModelCardData(
        model_name=run.place,
        eval_results=[evaluation] if math.isfinite(final["perplexity"]) else None,
        datasets=[data["dataset"]] if data.get("dataset") else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        license="unknown",
        tags=["normfree", "custom_code"],
    )
    return _CARD.format(
        run=run,
        model={"norm": "layernorm", "activation": "gelu"} | run.spec["model"] | run.facts["model"],
        source=_TEXT.get(source, f"`{source}` of the Hugging Face hub"),
        tokens=run.facts["steps"] * run.spec["train"]["batch_sequences"] * data["context"],
        results="\n".join(f"| {name} | {value:.3f} |" for name, value in results.items() if math.isfinite(value)),
        metadata=metadata.to_yaml(),
    )
