"""The verb `evaluate`. Imports are local, so that --help stays fast."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import field_validator

from normfree.cli.options import ModelOptions, read_text, uses_own_text

if TYPE_CHECKING:
    from normfree.measures.perplexity import Evaluation


class EvaluateOptions(ModelOptions):
    """Keys of `normfree evaluate`."""

    stride: int | None = None
    """Tokens by which windows advance; smaller gives each token more context and costs more."""
    sequences: int | None = None
    """At most this many windows or blocks, spread evenly over the text; unless given, all."""
    tasks: str = ""
    """Score instead: keyword, indentation, bracket, name, docstring, function_name, humaneval (docs/tasks.md)."""
    items: int = 500
    """Pairs of a task, at most."""
    item_seed: int = 0
    """Chooses the pairs; also the seed of the untrained model, unless MODEL is a run and has its own."""
    export: Path | None = None
    """Folder for the pairs as JSON lines and as tasks of lm-eval."""
    heads: list[tuple[int, int]] | None = None
    """[[LAYER,HEAD],...]: evaluate a second time with these heads changed, and print the difference."""
    how: str | float = "average"
    """What changed heads write: average (the mean of the visible values), zero, or a number that scales them."""

    @field_validator("heads", mode="before")
    @classmethod
    def _read_heads(cls, word: str) -> Any:
        try:
            pairs = [(layer, head) for layer, head in json.loads(word)]
        except (TypeError, ValueError):
            pairs = []
        if not pairs or not all(isinstance(number, int) for pair in pairs for number in pair):
            raise ValueError(f"heads={word!r}; give one or more pairs, e.g. heads=[[0,3],[1,2]]")
        return pairs

    @field_validator("how", mode="before")
    @classmethod
    def _read_how(cls, word: str) -> str | float:
        with suppress(ValueError):
            return float(word)
        return word  # `intervene` refuses other words


def evaluate(name: str, options: EvaluateOptions) -> None:
    """Print token-weighted perplexity and bits per byte, of changed heads too, or with tasks= what the model can do."""
    if options.tasks:
        from normfree.cli.tasks import evaluate_tasks

        evaluate_tasks(name, options)
        return
    if options.export:
        raise ValueError("export= writes the items of tasks: give tasks= too")
    from normfree.entropy import intervene
    from normfree.pretrained.load import load_pretrained
    from normfree.training.precision import products_for
    from normfree.training.processes import prepare_process

    own = uses_own_text(name, options)
    if options.sequences is not None and options.sequences < 1:
        raise ValueError(f"sequences={options.sequences} must be at least 1")
    if "how" in options.model_fields_set and not options.heads:
        raise ValueError("how= needs the heads to change, e.g. heads=[[0,3],[1,2]]")
    text = "" if own else read_text(options.text)
    prepare_process()
    loading = {"dtype": options.dtype, "device": options.device, "trust_remote_code": options.trust_remote_code}
    model, tokenizer = load_pretrained(name, **loading)
    changed = None
    with products_for(options.dtype, model.device):
        if options.heads:  # first, so that a wrong head is named at once
            with intervene(model, options.heads, cast(Any, options.how)):
                changed, _, _ = _evaluate(name, options, model, tokenizer, text)
        result, source, note = _evaluate(name, options, model, tokenizer, text)
    print(f"text           {source}")
    _print_evaluation(result, f"{result.tokens} predicted tokens{note}")
    if changed:
        difference, error = changed.minus(result)
        what = {"average": "averaged", "zero": "silenced"}.get(str(options.how), f"times {options.how}")
        print(
            f"\nheads          {', '.join(f'layer {layer} head {head}' for layer, head in options.heads or [])} {what}"
        )
        _print_evaluation(changed, "the same tokens")
        passes = len(result.passes)
        spread = f"standard error {error:.6f} over {passes} passes" if passes > 1 else "one pass, no standard error"
        print(f"difference     {difference:+.6f} nats per token ({spread})")


def _evaluate(
    name: str, options: EvaluateOptions, model: Any, tokenizer: Any, text: str
) -> tuple[Evaluation, str, str]:
    """The evaluation, the text it is of, and a remark on its tokens. Without a text: the run's own held-out blocks."""
    import torch

    from normfree.measures.perplexity import evaluate_blocks
    from normfree.measures.text_perplexity import leading_ids, perplexity, spread_places
    from normfree.pretrained.load import corpus_of_run
    from normfree.store.runs import read_run

    if not text:  # the blocks behind the numbers in run.json
        run = read_run(name)
        corpus = corpus_of_run(run, options.cache_dir)
        blocks_NT = torch.from_numpy(corpus.held_out_ids())
        chosen = spread_places(len(blocks_NT), options.sequences or len(blocks_NT))
        result = evaluate_blocks(
            model,
            blocks_NT[chosen],
            predicted_bytes=int(corpus.predicted_bytes()[chosen].sum()),
            batch_sequences=max(1, 1024 // run.spec["data"]["context"]),
            progress=True,
        )
        whole = len(chosen) == len(blocks_NT)
        note = f"; run.json, in {run.spec['train']['precision']}, has {run.perplexity:.4f}" if whole else ""
        source = "the run's own held-out blocks (text=FILE takes another)"
        return result, source if whole else f"{len(chosen)} of {len(blocks_NT)} of {source}", note
    cut = {"context": options.context, "stride": options.stride, "bos": options.bos, "sequences": options.sequences}
    result = perplexity(model, tokenizer, text, **cut, progress=True)
    leading = tokenizer.convert_ids_to_tokens(leading_ids(model, tokenizer, options.bos))
    note = f", every window begins with {''.join(leading)}" if leading else ""
    return result, str(options.text or "held-out Python code of this machine (text=FILE takes another)"), note


def _print_evaluation(result: Evaluation, tokens: str) -> None:
    print(f"perplexity     {result.perplexity:.4f} (over {tokens})")
    print(f"cross-entropy  {result.loss_nats:.4f} nats per token")
    if result.bytes:
        print(f"bits per byte  {result.bits_per_byte:.4f} (over {result.bytes} bytes of predicted tokens)")
    else:
        print("bits per byte  not known: this tokenizer does not say which bytes a token stands for")
