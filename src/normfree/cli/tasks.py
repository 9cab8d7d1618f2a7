"""`normfree evaluate MODEL tasks=...`. Imports are local, so that --help stays fast."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfree.cli.options import read_text
from normfree.store.runs import RUN_FILE, Run, read_run

if TYPE_CHECKING:
    from normfree.cli.evaluate import EvaluateOptions


def evaluate_tasks(name: str, options: EvaluateOptions) -> None:
    """Score a model and its controls on tasks, write tasks.json beside its run.json, and print the table."""
    from normfree.pretrained.load import load_pretrained
    from normfree.report.tables.table import to_markdown, without_empty_columns
    from normfree.report.tables.tasks import tasks_table
    from normfree.store.tasks import write_tasks
    from normfree.tasks.evaluate import evaluate_items, make_items
    from normfree.tasks.export import export_pairs
    from normfree.training.precision import products_for
    from normfree.training.processes import prepare_process

    if unused := [key for key in ("stride", "sequences") if getattr(options, key) is not None]:
        raise ValueError(f"{unused[0]}= is for the windows of a text, and tasks have none: leave it out")
    names = [word.strip() for word in options.tasks.strip("[]").split(",")]
    items = make_items(names, partial(_documents, options.text), seed=options.item_seed, count=options.items)
    prepare_process()
    loading = {"dtype": options.dtype, "device": options.device, "trust_remote_code": options.trust_remote_code}
    model, tokenizer = load_pretrained(name, **loading)
    cut = {"context": options.context}
    if options.export:
        for file, count in export_pairs(options.export, items, model, tokenizer, **cut).items():
            print(f"{count} pairs in {file}")
    run = read_run(name) if (Path(name) / RUN_FILE).is_file() else None
    seed = run.seed if run else options.item_seed
    facts = {"item_seed": options.item_seed, "untrained_seed": seed, "precision": options.dtype}
    facts |= {"text": str(options.text or "held-out Python code of this machine")}
    controls = _controls(model, run, seed, options.cache_dir)
    with products_for(options.dtype, model.device):
        records = evaluate_items(model, tokenizer, items, controls, **cut, bos=options.bos)
    records = {task: facts | record for task, record in records.items()}
    label = run.place if run else Path(name).name if Path(name).exists() else name
    print(to_markdown(without_empty_columns(tasks_table({label: [records]}))))
    folder = run.folder if run else Path("measured") / label.replace("/", "--")
    if (folder / RUN_FILE).is_file():
        print(f"recorded in {write_tasks(folder, records)}; `normfree report` shows it")
    else:
        print(f"not recorded, as {folder} has no {RUN_FILE}: `normfree measure {name}` makes it")


def _documents(text: Path | None) -> list[str]:
    """text=, or the held-out Python files of this machine."""
    from normfree.data.installed import InstalledSource
    from normfree.spec.run import DataSpec

    return [read_text(text)] if text else list(InstalledSource(DataSpec()).documents("validation", Counter()))


def _controls(model: Any, run: Run | None, seed: int, cache: Path | None) -> dict[str, Any]:
    """Scorers of an untrained copy and, where a run's training tokens are on this machine, of a unigram."""
    from normfree.pretrained.load import corpus_of_run
    from normfree.tasks.evaluate import token_counts
    from normfree.tasks.score import log_likelihoods, unigram, untrained_copy

    controls: dict[str, Any] = {"untrained": partial(log_likelihoods, untrained_copy(model, seed))}
    try:
        if run is None:
            raise ValueError("only a run has training tokens on record")
        controls["unigram"] = unigram(token_counts(corpus_of_run(run, cache)))
    except ValueError as error:
        print(f"without a unigram: {str(error).removesuffix('give text=FILE').rstrip(' ;:')}")
    return controls
