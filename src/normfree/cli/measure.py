"""The verb `measure`. Imports are local, so that --help stays fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from normfree.cli.options import ModelOptions, check_writable, measured_place, read_text, uses_own_text
from normfree.files import sha256_bytes
from normfree.spec.run import Count

if TYPE_CHECKING:
    from torch import Tensor

    from normfree.measures.measurement import Measurement
    from normfree.store.runs import Run


class MeasureOptions(ModelOptions):
    measures: str = "heads"
    """What is measured: names with commas between them (docs/quantities.md)."""
    sequences: Count = 16
    """At most this many windows, spread evenly over the text, or images."""
    images: Path | None = None
    """Folder of images, for a model that reads images; sorted by path."""
    target: Path | None = None
    """UTF-8 text file that the decoder of an encoder-decoder reads."""
    batch: Count = 1
    """Windows or images per forward pass."""
    method: Literal["auto", "eager"] = "auto"
    """eager asks the model for its attention matrices (O(T^2) memory): for families that do not route."""
    output: Path | None = None
    """Folder for the records and the page; unless given, measured/ and the model's name."""


def measure(name: str, options: MeasureOptions) -> None:
    """Measure a model on a text or images; write records for `normfree report` and a page; print the main tables."""
    from normfree.measures import periods_of
    from normfree.measures.measurement import measure as measure_model
    from normfree.pretrained.load import load_measurable
    from normfree.report import build_report
    from normfree.store.measurements import check_output, write_measurement
    from normfree.training.machine import command_line, describe_environment
    from normfree.training.precision import products_for
    from normfree.training.processes import prepare_process

    own = uses_own_text(name, options)
    measures = list(periods_of([word.strip() for word in options.measures.strip("[]").split(",")], 1))
    if ":" in options.measures:
        raise ValueError(f"measures={options.measures}: periods such as heads:100 are for probe.measures of a training")
    label, folder = measured_place(name)
    output = options.output or folder
    check_writable(output)  # before the work, not after it
    prepare_process()
    loaded = load_measurable(name, **options.loading, attention="eager" if options.method == "eager" else None)
    model = loaded[0]
    inputs, facts = _read_inputs(name, loaded, options, own=own)
    facts |= {"name": name, "label": label, "measures": measures} | _facts(model, inputs, options)
    check_output(output, facts)
    with products_for(options.dtype, model.device):
        batches = [
            {key: value[start : start + options.batch] for key, value in inputs.items()}
            for start in range(0, facts["sequences"], options.batch)
        ]
        of_heads: dict[str, Any] = {"heads": {"method": options.method}} if "heads" in measures else {}
        more = {"tokenizer": loaded[1], "progress": True, "skip_refused": True}
        measured = measure_model(model, batches, measures, **more, **of_heads)
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


def _read_inputs(
    name: str, loaded: tuple[Any, Any, Any], options: MeasureOptions, *, own: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs of N rows each, of a run's blocks if `own`, and facts about them. Raises ValueError for unfitting keys."""
    from normfree.measures.text_perplexity import leading_ids, spread, target_windows, token_windows
    from normfree.pretrained.inputs import check_kinds, kinds_read, read_images
    from normfree.pretrained.load import held_out_blocks

    (model, tokenizer, processor), kinds = loaded, kinds_read(loaded[0])
    chosen = {kind for kind in ("text", "images", "target") if getattr(options, kind) is not None}
    check_kinds(model, chosen | (kinds if own else {"text"} & kinds))  # a text has a default
    cut = {"context": options.context, "sequences": options.sequences, "bos": options.bos}
    if unused := [key for key in ("context", "bos") if cut[key] is not None and not kinds & {"text", "target"}]:
        raise ValueError(f"{unused[0]}= cuts a text, and {type(model).__name__} reads none: leave it out")
    if own:
        inputs = model.batch_of(spread(held_out_blocks(name, cache=options.cache_dir), options.sequences))
        text = f"the run's own held-out {'images' if 'images' in kinds else 'blocks'}"
        return inputs, {"text": text, "leading_tokens": []}
    inputs: dict[str, Tensor] = {}
    sources, leading = [], []
    if "text" in kinds:
        inputs["input_ids"] = token_windows(model, tokenizer, read_text(options.text), **cut)
        sources.append(str(options.text or "held-out Python code of this machine"))
        leading = tokenizer.convert_ids_to_tokens(leading_ids(model, tokenizer, options.bos))
    if options.images:
        channels = getattr(model.config, "num_channels", 3)
        inputs |= read_images(options.images, processor, options.sequences, channels)
        sources.append(str(options.images))
    if options.target:
        inputs["decoder_input_ids"] = target_windows(model, tokenizer, read_text(options.target, "target"), **cut)
        sources.append(str(options.target))
    count = min(map(len, inputs.values()))
    inputs = {key: value[:count] for key, value in inputs.items()}
    return inputs, {"text": " and ".join(sources), "leading_tokens": leading}


def _facts(model: Any, inputs: dict[str, Tensor], options: MeasureOptions) -> dict[str, Any]:
    from normfree.measures.perplexity import sees_later_tokens

    windows = [value.shape[1] for name, value in inputs.items() if name.endswith("input_ids")]
    config = model.config.get_text_config()
    return {
        "tokens_sha256": sha256_bytes(b"".join(value.numpy().tobytes() for value in inputs.values())),
        "context": max(windows, default=None),
        "inputs": [_describe_rows(name, value) for name, value in inputs.items() if name in _ROWS],
        "sequences": len(next(iter(inputs.values()))),
        "precision": options.dtype,
        "method": options.method,
        "causal": not sees_later_tokens(model, inputs["input_ids"]) if list(inputs) == ["input_ids"] else None,
        "device": str(model.device),
        "vocab_size": getattr(config, "vocab_size", None),
    }


_ROWS = {"input_ids": "window", "pixel_values": "image", "decoder_input_ids": "target window"}


def _describe_rows(name: str, rows: Tensor) -> str:
    size = f"{rows.shape[1]} tokens" if rows.dim() == 2 else " x ".join(map(str, rows.shape[1:]))
    return f"{len(rows)} {_ROWS[name]}{'s' * (len(rows) > 1)} of {size}"


def _model_facts(model: Any) -> dict[str, Any]:
    from normfree.pretrained.inputs import kinds_read

    config = model.config.get_text_config()
    names = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "hidden_size": "hidden_size"}
    several = len(kinds_read(model)) > 1  # stacks, which may differ
    sizes = {name: None if several else getattr(config, key, None) for name, key in names.items()}
    return {"parameters": model.num_parameters(), "type": model.config.model_type, **sizes}


def _print_measurement(run: Run, measured: Measurement) -> None:
    from normfree.analysis.groups import group_runs
    from normfree.report.build import causality_note
    from normfree.report.tables.runs import layer_table, verdict_table
    from normfree.report.tables.table import to_markdown, without_empty_columns

    groups = group_runs([run])
    tables = [table for make in (layer_table, verdict_table) if (table := make(groups)).rows]
    print("\n".join(to_markdown(without_empty_columns(table)) for table in tables))
    for quantity, value in measured.values.items():
        if not value.ndim:
            print(f"{quantity}  {value:.4f}")
    if note := causality_note(run.facts["measurement"]):
        print(note)
    print(f"{measured.seconds:.1f} s, peak memory {measured.peak_memory_mib:.0f} MiB")
