"""The verb `measure`. Imports are local, so that --help stays fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from normfree.cli.options import ModelOptions, check_writable, read_text, uses_own_text
from normfree.files import sha256_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from normfree.measures.measurement import Measurement
    from normfree.store.runs import Run


class MeasureOptions(ModelOptions):
    """Keys of `normfree measure`."""

    measures: str = "heads"
    """What is measured: names with commas between them (docs/quantities.md)."""
    sequences: int = 16
    """At most this many windows, spread evenly over the text."""
    batch: int = 1
    """Windows per forward pass."""
    method: Literal["auto", "eager"] = "auto"
    """eager asks the model for its attention matrices (O(T^2) memory): for families that do not route."""
    output: Path | None = None
    """Folder for the records and the page; unless given, measured/ and the model's name."""


def measure(name: str, options: MeasureOptions) -> None:
    """Measure a model on a text; write records that `normfree report` reads, and a page; print the main tables."""
    from normfree.measures import periods_of
    from normfree.measures.measurement import measure as measure_model
    from normfree.pretrained.load import load_pretrained
    from normfree.report import build_report
    from normfree.store.measurements import check_output, write_measurement
    from normfree.training.machine import command_line, describe_environment
    from normfree.training.precision import products_for
    from normfree.training.processes import prepare_process

    own = uses_own_text(name, options)
    measures = list(periods_of([word.strip() for word in options.measures.split(",")], 1))
    if options.sequences < 1 or options.batch < 1:
        raise ValueError(f"sequences={options.sequences} and batch={options.batch} must be at least 1")
    label = Path(name).name if Path(name).exists() else name
    output = options.output or Path("measured") / label.replace("/", "--")
    check_writable(output)  # before the work, not after it
    prepare_process()
    model, tokenizer = load_pretrained(
        name,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        attention="eager" if options.method == "eager" else None,
    )
    windows_NT, facts = _read_windows(name, model, tokenizer, options, own=own)
    facts |= {"name": name, "label": label, "measures": measures} | _facts(model, windows_NT, options)
    check_output(output, facts)
    method = {"heads": {"method": options.method}} if "heads" in measures else {}
    with products_for(options.dtype, model.device):
        measured = measure_model(
            model, windows_NT, measures, batch=options.batch, tokenizer=tokenizer, progress=True, **method
        )
    run = write_measurement(
        output,
        facts | {"peak_memory_mib": measured.peak_memory_mib},
        measured.values,
        measured.layers,
        model=_model_facts(model),
        command=command_line(),
        environment=describe_environment(model.device),
        wall_seconds=measured.seconds,
    )
    page = build_report([run], output / "report")
    _print_measurement(run, measured)
    print(f"The page: {page}")


def _read_windows(
    name: str, model: Any, tokenizer: Any, options: MeasureOptions, *, own: bool
) -> tuple[Tensor, dict[str, Any]]:
    """(N, T) token ids; the text they are from and the tokens that every window begins with. `own`: a run's blocks."""
    from normfree.measures.text_perplexity import leading_ids, spread
    from normfree.measures.windows import token_windows
    from normfree.pretrained.load import held_out_blocks

    if own:
        windows_NT = spread(held_out_blocks(name, cache=options.cache_dir), options.sequences)
        return windows_NT, {"text": "the run's own held-out blocks", "leading_tokens": []}
    text, cut = read_text(options.text), {"context": options.context, "sequences": options.sequences}
    windows_NT = token_windows(model, tokenizer, text, **cut, bos=options.bos)
    leading = tokenizer.convert_ids_to_tokens(leading_ids(model, tokenizer, options.bos))
    source = str(options.text or "held-out Python code of this machine")
    return windows_NT, {"text": source, "leading_tokens": leading}


def _facts(model: Any, windows_NT: Tensor, options: MeasureOptions) -> dict[str, Any]:
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


def _print_measurement(run: Run, measured: Measurement) -> None:
    from normfree.analysis.groups import group_runs
    from normfree.report.tables.runs import layer_table, verdict_table
    from normfree.report.tables.table import to_markdown, without_empty_columns

    groups = group_runs([run])
    tables = [table for make in (layer_table, verdict_table) if (table := make(groups)).rows]
    print("\n".join(to_markdown(without_empty_columns(table)) for table in tables))
    for quantity, value in measured.values.items():
        if not value.ndim:
            print(f"{quantity}  {value:.4f}")
    if not run.facts["measurement"]["causal"]:
        print("not causal: queries see later tokens; ceilings are means of ln(visible)")
    print(f"{measured.seconds:.1f} s, peak memory {measured.peak_memory_mib:.0f} MiB")
