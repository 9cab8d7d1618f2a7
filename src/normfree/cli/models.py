"""The verbs `evaluate` and `measure`. Imports are local, so that --help stays fast."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict

from normfree.cli.runs import check_writable
from normfree.files import sha256_bytes
from normfree.store.runs import RUN_FILE

if TYPE_CHECKING:
    from torch import Tensor

    from normfree.measures.measurement import Measurement
    from normfree.measures.text_perplexity import Evaluation
    from normfree.store.runs import Run

logger = logging.getLogger("normfree")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Keys of `normfree evaluate`."""

    __pydantic_config__ = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    text: Path | None = None
    """UTF-8 text file; unless given, the held-out text of a run, and for other models Python code of this machine."""
    context: int | None = None
    """Tokens in a window; unless given, the model's own limit."""
    stride: int | None = None
    """Tokens by which windows advance; smaller gives each token more context and costs more."""
    bos: bool | None = None
    """Begin every window with the BOS token; empty does as the tokenizer with a text (our models: without)."""
    device: str | None = None
    """cpu, cuda, ...; unless given, the GPU if there is one."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the weights."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    cache_dir: Path | None = None
    """Of a run: where its corpus is kept; unless given, NORMFREE_CACHE, else ~/.cache/normfree."""


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """Keys of `normfree measure`."""

    __pydantic_config__ = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    measures: str = "heads"
    """What is measured: names with commas between them (docs/quantities.md)."""
    text: Path | None = None
    """UTF-8 text file; unless given, the held-out text of a run, and for other models Python code of this machine."""
    context: int | None = None
    """Tokens in a window of a text; unless given, the model's own limit, at most 1024. A run's own is cut already."""
    sequences: int = 16
    """At most this many windows, spread evenly over the text."""
    batch: int = 1
    """Windows per forward pass."""
    bos: bool | None = None
    """Begin every window with the BOS token; empty does as the tokenizer with a text (our models: without)."""
    method: Literal["auto", "eager"] = "auto"
    """eager asks the model for its attention matrices (O(T^2) memory): for families that do not route."""
    output: Path | None = None
    """Folder for the records and the page; unless given, measured/ and the model's name."""
    device: str | None = None
    """cpu, cuda, ...; unless given, the GPU if there is one."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the weights; measures compute in fp32."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    cache_dir: Path | None = None
    """Of a run: where its corpus is kept; unless given, NORMFREE_CACHE, else ~/.cache/normfree."""


def evaluate(name: str, options: EvaluateOptions) -> None:
    """Print token-weighted perplexity and bits per byte."""
    from normfree.measures.text_perplexity import checked_context, leading_ids, perplexity
    from normfree.measures.windows import evaluation_estimate
    from normfree.pretrained.load import load_pretrained, outline, usable_device
    from normfree.training.bf16 import products_for
    from normfree.training.process import prepare_process

    if _uses_own_text(name, options, "context", "stride", "bos"):
        evaluate_run(Path(name), options)
        return
    prepare_process()
    usable_device(options.device)
    text = read_text(options.text)
    loading: dict[str, Any] = {"dtype": options.dtype, "trust_remote_code": options.trust_remote_code}
    if model := outline(name, **loading):
        longest = min(checked_context(model, options.context), len(text.encode()))  # no text has more tokens than bytes
        _check_memory(evaluation_estimate(model, context=longest), options, longest, "a smaller context= needs less")
    model, tokenizer = load_pretrained(name, device=options.device, **loading)
    context = checked_context(model, options.context)
    with products_for(options.dtype, model.device):
        result = perplexity(
            model, tokenizer, text, context=context, stride=options.stride, bos=options.bos, progress=True
        )
    leading = tokenizer.convert_ids_to_tokens(leading_ids(model, tokenizer, options.bos))
    print(f"text           {options.text or 'held-out Python code of this machine (text=FILE takes another)'}")
    _print_evaluation(result, f", every window begins with {''.join(leading)}" if leading else "")


def evaluate_run(folder: Path, options: EvaluateOptions) -> None:
    """Print perplexity and bits per byte of a run on the blocks behind the numbers in its run.json.

    Raises ValueError where this machine gives another corpus.
    """
    import torch

    from normfree.measures.perplexity import evaluate_blocks
    from normfree.measures.windows import evaluation_estimate
    from normfree.pretrained.load import corpus_of_run, load_pretrained, outline
    from normfree.store.runs import read_run
    from normfree.training.bf16 import products_for
    from normfree.training.process import prepare_process

    prepare_process()
    run = read_run(folder)
    context = run.spec["data"]["context"]
    batch = max(1, 1024 // context)
    if model := outline(str(folder), dtype=options.dtype):
        needed = evaluation_estimate(model, context=batch * context)
        _check_memory(needed, options, context, "a text= with a smaller context= needs less")
    model, _ = load_pretrained(str(folder), dtype=options.dtype, device=options.device)
    corpus = corpus_of_run(run, options.cache_dir)
    with products_for(options.dtype, model.device):
        blocks_NT, size = torch.from_numpy(corpus.held_out_ids()), corpus.predicted_bytes()
        result = evaluate_blocks(model, blocks_NT, predicted_bytes=size, batch_sequences=batch, progress=True)
    print("text           the run's own held-out blocks (text=FILE takes another)")
    _print_evaluation(result, f"; run.json, in {run.spec['train']['precision']}, has {run.perplexity:.4f}")


def measure(name: str, options: MeasureOptions) -> None:
    """Measure a model on a text; write records that `normfree report` reads, and a page; print the main tables."""
    from normfree.entropy import EntropyProbe
    from normfree.measures import periods_of
    from normfree.measures.measurement import measure as measure_model
    from normfree.pretrained.load import load_pretrained, usable_device
    from normfree.report import build_report
    from normfree.store.measurements import check_output, write_measurement
    from normfree.training.bf16 import products_for
    from normfree.training.environment import command_line, environment
    from normfree.training.process import prepare_process

    own = _uses_own_text(name, options, "context", "bos")
    measures = list(periods_of([word.strip() for word in options.measures.split(",")], 1))
    if options.sequences < 1 or options.batch < 1:
        raise ValueError(f"sequences={options.sequences} and batch={options.batch} must be at least 1")
    prepare_process()
    usable_device(options.device)
    label = Path(name).name if Path(name).exists() else name
    output = options.output or Path("measured") / label.replace("/", "--")
    check_writable(output)  # before the work, not after it
    loading: dict[str, Any] = {"dtype": options.dtype, "trust_remote_code": options.trust_remote_code}
    loading["attention"] = "eager" if options.method == "eager" else None
    _check_memory_to_measure(name, options, loading, own=own)
    model, tokenizer = load_pretrained(name, device=options.device, **loading)
    method = {"heads": {"method": options.method}} if "heads" in measures else {}
    if method:
        EntropyProbe(model, options.method)  # refuses, before the text is read, a model that cannot be measured
    windows_NT, text, leading = _windows_of(name, model, tokenizer, options, own=own)
    facts = {"name": name, "label": label, "text": text, "leading_tokens": leading, "measures": measures}
    facts |= _measurement_facts(model, windows_NT, options)
    check_output(output, facts)
    with products_for(options.dtype, model.device):
        measured = measure_model(model, windows_NT, measures, batch=options.batch, progress=True, **method)
    run = write_measurement(
        output,
        facts | {"peak_memory_mib": measured.peak_memory_mib},
        model=_model_facts(model),
        values=measured.values,
        layers=measured.layers,
        command=command_line(),
        environment=environment(model.device),
        wall_seconds=measured.seconds,
    )
    page = build_report([run], output / "report")
    _print_measurement(run, measured)
    print(f"The page: {page}")


def _check_memory_to_measure(name: str, options: MeasureOptions, loading: dict[str, Any], *, own: bool) -> None:
    from normfree.measures.windows import default_context, memory_estimate
    from normfree.pretrained.load import outline
    from normfree.store.runs import read_run

    if not (model := outline(name, **loading)):
        return
    if own:
        longest = read_run(name).spec["data"]["context"]
    else:
        longest = min(default_context(model, options.context), len(read_text(options.text).encode()))
    batch = min(options.batch, options.sequences)
    needed = memory_estimate(model, batch=batch, context=longest, method=options.method)
    _check_memory(needed, options, longest, "a smaller context= or batch= needs less")


def _check_memory(needed: int, options: EvaluateOptions | MeasureOptions, longest: int, advice: str) -> None:
    from normfree.measures.windows import check_memory
    from normfree.pretrained.load import usable_device

    enough = check_memory(needed, usable_device(options.device), advice=advice)
    logger.info("windows of up to %d tokens: %s", longest, enough)


def _windows_of(
    name: str, model: Any, tokenizer: Any, options: MeasureOptions, *, own: bool
) -> tuple[Tensor, str, list[str]]:
    """(N, T) token ids, the text they are from, and the tokens that every window begins with. `own`: a run's blocks."""
    from normfree.measures.text_perplexity import leading_ids, spread
    from normfree.measures.windows import token_windows
    from normfree.pretrained.load import held_out_blocks

    if own:
        return (
            spread(held_out_blocks(name, cache=options.cache_dir), options.sequences),
            "the run's own held-out blocks",
            [],
        )
    windows_NT = token_windows(
        model, tokenizer, read_text(options.text), context=options.context, sequences=options.sequences, bos=options.bos
    )
    leading = tokenizer.convert_ids_to_tokens(leading_ids(model, tokenizer, options.bos))
    return windows_NT, str(options.text or "held-out Python code of this machine"), leading


def _measurement_facts(model: Any, windows_NT: Tensor, options: MeasureOptions) -> dict[str, Any]:
    from normfree.measures.perplexity import sees_later_tokens

    sequences, context = windows_NT.shape
    return {
        "tokens_sha256": sha256_bytes(windows_NT.numpy().tobytes()),
        "context": context,
        "sequences": sequences,
        "precision": options.dtype,
        "method": options.method,
        "causal": not sees_later_tokens(model, windows_NT),
        "device": str(model.device),
        "vocab_size": model.config.get_text_config().vocab_size,
    }


def _model_facts(model: Any) -> dict[str, Any]:
    config = model.config.get_text_config()
    names = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "hidden_size": "hidden_size"}
    sizes = {name: getattr(config, key, None) for name, key in names.items()}
    return {"parameters": model.num_parameters(), "type": model.config.model_type, **sizes}


def _print_evaluation(result: Evaluation, after_tokens: str) -> None:
    print(f"perplexity     {result.perplexity:.4f} (over {result.tokens} predicted tokens{after_tokens})")
    print(f"cross-entropy  {result.loss_nats:.4f} nats per token")
    if result.bytes:
        print(f"bits per byte  {result.bits_per_byte:.4f} (over {result.bytes} bytes of predicted tokens)")
    else:
        print("bits per byte  not known: this tokenizer does not say which bytes a token stands for")


def _print_measurement(run: Run, measured: Measurement) -> None:
    from normfree.analysis.groups import group_runs
    from normfree.report.tables.runs import layer_table, verdict_table
    from normfree.report.tables.table import to_markdown

    groups = group_runs([run])
    tables = [table for make in (layer_table, verdict_table) if (table := make(groups)).rows]
    print("\n".join(map(to_markdown, tables)))
    for quantity, value in measured.values.items():
        if not value.ndim:
            print(f"{quantity}  {value:.4f}")
    if not run.facts["measurement"]["causal"]:
        print("not causal: queries see later tokens; ceilings are means of ln(visible)")
    print(f"{measured.seconds:.1f} s, peak memory {measured.peak_memory_mib:.0f} MiB")


def _uses_own_text(name: str, options: EvaluateOptions | MeasureOptions, *cutting: str) -> bool:
    """True if MODEL is a run and no text is given. Raises ValueError for keys that have no effect then."""
    own = options.text is None and (Path(name) / RUN_FILE).is_file()
    if not own and options.cache_dir is not None:
        raise ValueError("cache_dir= is read for the text of a run only: leave it out")
    if ignored := [key for key in cutting if own and getattr(options, key) is not None]:
        raise ValueError(f"{ignored[0]}= cuts a text, and a run's own is cut already: give text=FILE too")
    return own


def read_text(path: Path | None) -> str:
    """The content of text=, or held-out Python code of this machine. Raises ValueError for what cannot be read."""
    if path is None:
        from normfree.data import held_out_text

        return held_out_text()
    try:
        text = path.read_bytes().decode()  # as training reads it: line ends stay as they are
    except FileNotFoundError:
        raise ValueError(f"text={path} does not exist") from None
    except OSError as error:
        raise ValueError(f"text={path} cannot be read ({error.strerror}); give a UTF-8 text file") from None
    except UnicodeDecodeError:
        raise ValueError(f"text={path} is not UTF-8 text") from None
    if not text.strip():
        raise ValueError(f"text={path} is empty")
    return text
