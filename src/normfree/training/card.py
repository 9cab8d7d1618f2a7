"""The model card (README.md) of a saved model, from the records of its run."""

from pathlib import Path
from typing import Any

from normfree.analysis.entropy import final_heads, top_quarter_share
from normfree.spec.families import CLASSIFICATIONS
from normfree.store.runs import Run

_SOURCES = {"installed": "Python code of the packages on one machine", "files": "text files of the user"}
_SOURCES |= {"fashion_mnist": "Fashion-MNIST", "images": "images of the user"}
_OF_TEXT = {"reads": "text", "auto": "AutoTokenizer", "beside": "tokenizer"}
_OF_IMAGES = {"reads": "images", "auto": "AutoImageProcessor", "beside": "processor"}
_PIECES = "{origin}, tokenized into {vocab_size:,} pieces"
_PIXELS = "{origin}: {image_size} x {image_size} pixels, {num_channels} channel(s), {vocab_size:,} classes"
_SPANS = _PIECES + "; targets are {spans} masked spans of each block"
_DOCSTRINGS = _PIECES + "; sources are functions, targets first lines of docstrings"
_WORDS_OF_FAMILY = {
    "decoder": (_OF_TEXT, "decoder", "CausalLM", "text-generation", _PIECES),
    "vision": (_OF_IMAGES, "vision transformer", "ImageClassification", "image-classification", _PIXELS),
    "encoder_decoder": (_OF_TEXT, "encoder-decoder", "Seq2SeqLM", "text2text-generation", _SPANS),
}
"""Of each family: its words, kind, class of transformers, pipeline of the hub, and data."""


def model_card(run: Run, final: dict[str, Any]) -> str:
    """Write the card, with the metadata that the hub reads. `final` is the evaluation after training."""
    words, kind, *own, data = _WORDS_OF_FAMILY[run.spec["model"].get("family", "decoder")]
    if run.spec["data"].get("packing") == "docstring":
        data = _DOCSTRINGS
    corpus = run.facts["corpus"]
    task, pipeline = CLASSIFICATIONS.get(run.spec["train"].get("objective", ""), own)
    source = run.spec["data"].get("dataset") or corpus["source"]
    origin = _SOURCES.get(source, f"`{source}` of the Hugging Face hub")
    start = run.spec.get("start_name", "random")
    if run.headline.name == "accuracy":
        majority = {**corpus, **final}["majority_accuracy"]
        metrics = {"accuracy": final["accuracy"]}
        results = {"Accuracy": final["accuracy"], "Accuracy of the most frequent class": majority}
    else:
        beside, title = run.headline.beside
        metrics = {name: final[name] for name in ("perplexity", beside)}
        results = {"Perplexity": final["perplexity"], title: final[beside]}
        results["Perplexity of token frequencies alone"] = corpus["unigram_perplexity"]
    return (Path(__file__).with_name("card.md").read_text(encoding="utf-8")).format(
        run=run,
        weights="random weights" if start == "random" else f"the weights of {start}",
        model={"norm": "layernorm", "final_norm": "layernorm", "activation": "gelu"}
        | run.spec["model"]
        | (run.facts.get("folded") or {}).get("model", {})
        | run.facts["model"],
        source=source,
        tokens=run.facts["steps"] * run.spec["train"]["batch_sequences"] * run.spec["data"]["context"],
        near_uniform=top_quarter_share(final_heads(run)),
        metrics="\n".join(f"    - {{type: {name}, value: {value}}}" for name, value in metrics.items()),
        results="\n".join(f"| {name} | {value:.3f} |" for name, value in results.items()),
        Reads=words["reads"].capitalize(),
        **words | {"kind": kind, "task": task, "pipeline": pipeline, "data": data.format(origin=origin, **corpus)},
    )
