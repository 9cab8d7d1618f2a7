"""The verb `evaluate`. Imports are local, so that --help stays fast."""

from __future__ import annotations

from pathlib import Path

from normfree.cli.options import ModelOptions, read_text, uses_own_text


class EvaluateOptions(ModelOptions):
    """Keys of `normfree evaluate`."""

    stride: int | None = None
    """Tokens by which windows advance; smaller gives each token more context and costs more."""
    tasks: str = ""
    """Score instead: keyword, indentation, bracket, name, docstring, function_name, humaneval (docs/tasks.md)."""
    items: int = 500
    """Pairs of a task, at most."""
    item_seed: int = 0
    """Chooses the pairs; also the seed of the untrained model, unless MODEL is a run and has its own."""
    export: Path | None = None
    """Folder for the pairs as JSON lines and as tasks of lm-eval."""


def evaluate(name: str, options: EvaluateOptions) -> None:
    """Print token-weighted perplexity and bits per byte, or with tasks= what the model can do."""
    if options.tasks:
        from normfree.cli.tasks import evaluate_tasks

        evaluate_tasks(name, options)
        return
    if options.export:
        raise ValueError("export= writes the items of tasks: give tasks= too")
    import torch

    from normfree.measures.perplexity import evaluate_blocks
    from normfree.measures.text_perplexity import leading_ids, perplexity
    from normfree.pretrained.load import corpus_of_run, load_pretrained
    from normfree.store.runs import read_run
    from normfree.training.precision import products_for
    from normfree.training.processes import prepare_process

    own = uses_own_text(name, options)
    text = "" if own else read_text(options.text)
    prepare_process()
    loading = {"dtype": options.dtype, "device": options.device, "trust_remote_code": options.trust_remote_code}
    model, tokenizer = load_pretrained(name, **loading)
    with products_for(options.dtype, model.device):
        if own:  # the blocks behind the numbers in run.json
            run = read_run(name)
            corpus = corpus_of_run(run, options.cache_dir)
            result = evaluate_blocks(
                model,
                torch.from_numpy(corpus.held_out_ids()),
                predicted_bytes=corpus.predicted_bytes(),
                batch_sequences=max(1, 1024 // run.spec["data"]["context"]),
                progress=True,
            )
            source = "the run's own held-out blocks (text=FILE takes another)"
            note = f"; run.json, in {run.spec['train']['precision']}, has {run.perplexity:.4f}"
        else:
            cut = {"context": options.context, "stride": options.stride, "bos": options.bos}
            result = perplexity(model, tokenizer, text, **cut, progress=True)
            source = options.text or "held-out Python code of this machine (text=FILE takes another)"
            leading = tokenizer.convert_ids_to_tokens(leading_ids(model, tokenizer, options.bos))
            note = f", every window begins with {''.join(leading)}" if leading else ""
    print(f"text           {source}")
    print(f"perplexity     {result.perplexity:.4f} (over {result.tokens} predicted tokens{note})")
    print(f"cross-entropy  {result.loss_nats:.4f} nats per token")
    if result.bytes:
        print(f"bits per byte  {result.bits_per_byte:.4f} (over {result.bytes} bytes of predicted tokens)")
    else:
        print("bits per byte  not known: this tokenizer does not say which bytes a token stands for")
