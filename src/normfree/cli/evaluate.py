"""The verb `evaluate`. Imports are local, so that --help stays fast."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import Field, StrictInt, StrictStr, TypeAdapter, ValidationError, field_validator

from normfree.cli.options import ModelOptions, measured_place, read_text, uses_own_text
from normfree.spec.run import Count
from normfree.store.runs import RUN_FILE, Run, read_run

if TYPE_CHECKING:
    from normfree.measures.perplexity import Evaluation

_OF_TEXT = {"stride", "sequences", "against", "heads", "how"}
_OF_TASKS = {"items", "item_seed", "export"}
_HEADS = TypeAdapter(Annotated[list[tuple[StrictInt | StrictStr, StrictInt]], Field(min_length=1)])


class EvaluateOptions(ModelOptions):
    stride: int | None = None
    """Tokens by which windows advance; smaller gives each token more context and costs more."""
    sequences: Count | None = None
    """At most this many windows or blocks, spread evenly over the text; unless given, all."""
    against: str = ""
    """Another run of the same corpus: evaluate it too, and print the difference with its interval over documents."""
    tasks: str = ""
    """Score instead: keyword, indentation, bracket, name, docstring, function_name, humaneval (docs/tasks.md)."""
    items: int = 500
    """Pairs of a task, at most."""
    item_seed: int = 0
    """Chooses the pairs; also the seed of the untrained model, unless MODEL is a run and has its own."""
    export: Path | None = None
    """Folder for the pairs as JSON lines and as tasks of lm-eval."""
    heads: list[tuple[int | str, int]] | None = None
    """[[LAYER,HEAD],...]: evaluate again with these heads changed, and print the difference. LAYER is a number, or a
    name such as "cross 0" in an encoder-decoder."""
    how: Annotated[float | str, Field(union_mode="left_to_right")] = "average"
    """What changed heads write: average (the mean of the visible values), zero, or a number that scales them."""

    @field_validator("heads", mode="before")
    @classmethod
    def _read_heads(cls, word: str) -> Any:
        try:
            return _HEADS.validate_json(word)
        except ValidationError:
            text = f'heads={word!r}; give one or more pairs, e.g. heads=[[0,3],[1,2]] or heads=[["cross 0",3]]'
            raise ValueError(text) from None


def evaluate(name: str, options: EvaluateOptions) -> None:
    """Print token-weighted perplexity and bits per byte, of changed heads too, or with tasks= what the model can do."""
    if unused := sorted(options.model_fields_set & (_OF_TEXT if options.tasks else _OF_TASKS)):
        rule = "not read with tasks=: leave one of them out" if options.tasks else "read with tasks= only: give it too"
        raise ValueError(f"{unused[0]}= is {rule}")
    if options.tasks:
        _evaluate_tasks(name, options)
        return
    from normfree.entropy import intervene
    from normfree.training.precision import products_for

    own = uses_own_text(name, options)
    if "how" in options.model_fields_set and not options.heads:
        raise ValueError("how= needs the heads to change, e.g. heads=[[0,3],[1,2]]")
    if options.against:
        _check_against(name, options, own)
    text = "" if own else read_text(options.text)
    model, tokenizer = _load(name, options)
    changed, how = None, cast(Any, options.how)  # `intervene` refuses other words
    with products_for(options.dtype, model.device):
        if options.heads:  # first, so that a wrong head is named at once
            with intervene(model, options.heads, how):
                changed, _, _ = _evaluate(name, options, model, tokenizer, text)
        result, source, note = _evaluate(name, options, model, tokenizer, text)
    print(f"{'text' if result.unit == 'token' else 'images':<15}{source}")
    _print_evaluation(result, f"{result.tokens} predicted {result.unit}s{note}")
    if changed:
        difference, error = changed.minus(result)
        what = {"average": "averaged", "zero": "silenced"}.get(str(how), f"times {how}")
        heads = [f"{'layer ' * isinstance(layer, int)}{layer} head {head}" for layer, head in options.heads or []]
        print(f"\nheads          {', '.join(heads)} {what}")
        _print_evaluation(changed, f"the same {result.unit}s")
        parts = f"over {len(result.parts)} {result.parts_are}"
        spread = f"standard error {error:.6f} {parts}" if len(result.parts) > 1 else "one pass, no standard error"
        print(f"difference     {difference:+.6f} nats per {result.unit} ({spread})")
    if options.against:
        model, _ = _load(options.against, options)
        with products_for(options.dtype, model.device):
            other, _, note = _evaluate(options.against, options, model, None, "")
        print(f"\nagainst        {options.against}")
        _print_evaluation(other, f"the same {result.unit}s{note}")
        spread = "one part, so no interval"
        if len(other.parts) > 1:
            low, high = result.interval(other)
            spread = f"95 % [{low:+.4f}, {high:+.4f}], bootstrap over {len(other.parts)} {other.parts_are}"
        print(f"difference     {result.minus(other)[0]:+.4f} nats per {result.unit} ({spread})")


def _check_against(name: str, options: EvaluateOptions, own: bool) -> None:
    if not own or options.heads:
        raise ValueError("against= compares two runs on their held-out text: MODEL is a run, without text= or heads=")
    ours, theirs = read_run(name).corpus[:12], read_run(options.against).corpus[:12]
    if ours != theirs:
        raise ValueError(f"{name} has corpus {ours}, and against= has {theirs}: give runs of one corpus")


def _load(name: str, options: EvaluateOptions, *, causal: bool = False) -> tuple[Any, Any]:
    from normfree.pretrained.load import load_measurable, load_pretrained
    from normfree.training.processes import prepare_process

    prepare_process()
    if not causal and uses_own_text(name, options):  # a run of any family
        model, tokenizer, _ = load_measurable(name, **options.loading)
        if model.main_input_name != "pixel_values" and model.get_output_embeddings() is None:
            raise ValueError(f"{name} has no language-model head: `normfree measure` measures its heads")
        return model, tokenizer
    return load_pretrained(name, **options.loading)


def _evaluate(
    name: str, options: EvaluateOptions, model: Any, tokenizer: Any, text: str
) -> tuple[Evaluation, str, str]:
    """The evaluation, the text it is of, and a remark on its tokens. Without a text: the run's own held-out blocks."""
    import torch

    from normfree.measures.perplexity import evaluate_blocks
    from normfree.measures.text_perplexity import leading_ids, perplexity, spread_places
    from normfree.pretrained.load import corpus_of_run

    if not text:  # the blocks behind the numbers in run.json
        run = read_run(name)
        corpus = corpus_of_run(run, options.cache_dir)
        blocks_NT = torch.from_numpy(corpus.held_out_ids())
        chosen = spread_places(len(blocks_NT), options.sequences or len(blocks_NT))
        of_spans = model.config.is_encoder_decoder and not model.config.target_tokens  # these have no bytes
        documents_NT = None if model.config.is_encoder_decoder else corpus.held_out_documents()
        result = evaluate_blocks(
            model,
            blocks_NT[chosen],
            predicted_bytes=0 if of_spans else int(corpus.predicted_bytes()[chosen].sum()),
            batch_sequences=max(1, 1024 // run.spec["data"]["context"]),
            documents_NT=None if documents_NT is None else documents_NT[chosen],
            progress=True,
        )
        whole = len(chosen) == len(blocks_NT)
        note = f"; run.json, in {run.spec['train']['precision']}, has {run.perplexity:.4f}" if whole else ""
        source = f"the run's own held-out {'blocks' if result.unit == 'token' else 'images'}"
        source += " (text=FILE takes another)" if run.family.causal else ""
        return result, source if whole else f"{len(chosen)} of {len(blocks_NT)} of {source}", note
    cut = {"context": options.context, "stride": options.stride, "bos": options.bos, "sequences": options.sequences}
    result = perplexity(model, tokenizer, text, **cut, progress=True)
    leading = tokenizer.convert_ids_to_tokens(leading_ids(model, tokenizer, options.bos))
    note = f", every window begins with {''.join(leading)}" if leading else ""
    return result, str(options.text or "held-out Python code of this machine (text=FILE takes another)"), note


def _print_evaluation(result: Evaluation, tokens: str) -> None:
    from normfree.measures.measure import exponential

    print(f"perplexity     {result.perplexity:.4f} (over {tokens})")
    if result.parts_are == "documents" and len(result.parts) > 1:
        low, high = (exponential(nats) for nats in result.interval())
        print(f"95 % interval  [{low:.4f}, {high:.4f}] (bootstrap over {len(result.parts)} documents)")
    print(f"cross-entropy  {result.loss_nats:.4f} nats per {result.unit}")
    if result.accuracy is not None:
        print(f"accuracy       {100 * result.accuracy:.2f} %")
    elif result.bytes:
        print(f"bits per byte  {result.bits_per_byte:.4f} (over {result.bytes} bytes of predicted tokens)")
    else:
        print("bits per byte  not known: nothing says which bytes a token stands for")


def _evaluate_tasks(name: str, options: EvaluateOptions) -> None:
    """Score a model and its controls on tasks, write tasks.json.gz beside its run.json, and print the table."""
    from normfree.report.tables.table import to_markdown, without_empty_columns
    from normfree.report.tables.tasks import tasks_table
    from normfree.store.tasks import write_tasks
    from normfree.tasks.evaluate import evaluate_items, export_pairs, make_items
    from normfree.training.precision import products_for

    names = [word.strip() for word in options.tasks.strip("[]").split(",")]
    items = make_items(names, partial(_documents, options.text), seed=options.item_seed, count=options.items)
    model, tokenizer = _load(name, options, causal=True)
    cut = {"context": options.context}
    if options.export:
        for file, count in export_pairs(options.export, items, model, tokenizer, **cut).items():
            print(f"{count} pairs in {file}")
    run = read_run(name) if (Path(name) / RUN_FILE).is_file() else None
    if run is None and options.cache_dir is not None:
        raise ValueError("cache_dir= is read for a run only: leave it out")
    seed = run.seed if run else options.item_seed
    facts = {"item_seed": options.item_seed, "untrained_seed": seed, "precision": options.dtype}
    facts |= {"text": str(options.text or "held-out Python code of this machine")}
    controls = _controls(model, run, seed, options.cache_dir)
    with products_for(options.dtype, model.device):
        records = evaluate_items(model, tokenizer, items, controls, **cut, bos=options.bos)
    records = {task: facts | record for task, record in records.items()}
    label, folder = (run.place, run.folder) if run else measured_place(name)
    print(to_markdown(without_empty_columns(tasks_table({label: [records]}))))
    if not (folder / RUN_FILE).is_file():
        print(f"not recorded, as {folder} has no {RUN_FILE}: `normfree measure {name}` makes it")
    elif not run and not _is_of(folder, name):
        print(f"not recorded, as {folder} is of another model: move it away, and `normfree measure {name}` makes it")
    else:
        print(f"recorded in {write_tasks(folder, records)}; `normfree report` shows it")


def _is_of(folder: Path, name: str) -> bool:
    """True if a folder holds a measurement of this model."""
    with suppress(ValueError, KeyError):
        return Path(read_run(folder).facts["measurement"]["name"]).resolve() == Path(name).resolve()
    return False


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
