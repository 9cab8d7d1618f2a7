"""How fast text becomes a corpus: MB of text a second by stage, with both encoders, from one run.

    python benchmarks/data.py                         # 20 MB of installed Python code; a minute or two on two cores
    python benchmarks/data.py quick=true              # 5 MB, twenty seconds
    python benchmarks/data.py output=results/benchmarks/data.json

Stages of preparing one corpus, each alone, then `prepare` from the first file to the manifest:
  read        list the files, read, filter, drop duplicates
  train BPE   train the tokenizer, once and apart: `prepare` below gets it ready-made
  tokenizers  encode with the tokenizers library, which uses every core
  tiktoken    encode with tiktoken: building it, proving its ids equal and comparing the sample are in the time
  pack        cut into blocks, count, hash, write Arrow
  prepare with tokenizers / prepare with tiktoken
Stages take turns within one process, so that a busy machine hurts all alike; a rate is the median over turns, a ratio
the median over turns of the ratio within a turn. Files are read once before, so the page cache holds them. The column
`a CPU second` divides by the processor time of the whole process: it says what an idle core would do. The corpora of
both encoders must have one fingerprint, and the run ends with an error if they do not.

Other keys: megabytes=20 vocab=4096 packing=windows|concatenate context=128 turns=3
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast
from unittest.mock import patch

from records import read_options, write_record

DEFAULTS = {
    "megabytes": "20",
    "vocab": "4096",
    "packing": "windows",
    "context": "128",
    "turns": "3",
    "quick": "false",
    "output": "",
}


def main(arguments: list[str]) -> None:
    """Run every stage, print the table, and write it as JSON if asked."""
    options = read_options(arguments, DEFAULTS)
    if options["quick"] == "true":
        options |= {"megabytes": "5"}
    conditions = machine_now()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(options, Path(folder))
    print_table(results, conditions)
    write_record(options["output"], options, results, conditions)


def machine_now() -> dict[str, Any]:
    """The libraries that do the work, the cores they have, and how many processes wanted a core as it began."""
    cores = {"cores": len(os.sched_getaffinity(0)), "load_before": os.getloadavg()[0]}
    return cores | {name: version(name) for name in ("tokenizers", "tiktoken")}


def measure(options: dict[str, str], folder: Path) -> dict[str, Any]:
    """Rates of every stage; `folder` is for files that nobody keeps."""
    from normfree.data.corpus import CHUNK_CHARACTERS
    from normfree.data.packing import BlockWriter, concatenated, in_groups, windows
    from normfree.data.tiktoken_encoder import FastEncoder
    from normfree.data.tokenizer import Encoder, train_tokenizer
    from normfree.spec.run import DataSpec

    spec = DataSpec(
        vocab_size=int(options["vocab"]),
        context=int(options["context"]),
        packing=cast(Literal["windows", "concatenate"], options["packing"]),
        max_bytes=int(float(options["megabytes"]) * 1e6),
        max_bytes_per_package=2_000_000,
        tokenizer=str(folder / "tokenizer"),
    )
    texts = read(spec)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    start = time.perf_counter()
    tokenizer = train_tokenizer(texts, spec.vocab_size)
    train_seconds = time.perf_counter() - start
    tokenizer.save_pretrained(folder / "tokenizer")

    def encode(kind: type[Encoder] | type[FastEncoder]) -> list[Any]:
        encoder = kind(tokenizer)
        return [document_SC for chunk in in_groups(texts, CHUNK_CHARACTERS) for document_SC in encoder.encode(chunk)]

    documents = encode(FastEncoder)

    def pack() -> None:
        end = cast(int, tokenizer.eos_token_id)
        whole = spec.packing == "concatenate"
        blocks = concatenated(documents, spec.context, end=end) if whole else windows(documents, spec.context)
        BlockWriter(folder / "blocks.arrow", vocab_size=len(tokenizer)).write_all(blocks)

    runs: dict[str, Callable[[], float]] = {
        "read": lambda: timed_megabytes(lambda: read(spec), megabytes),
        "tokenizers": lambda: timed_megabytes(lambda: encode(Encoder), megabytes),
        "tiktoken": lambda: timed_megabytes(lambda: encode(FastEncoder), megabytes),
        "pack": lambda: timed_megabytes(pack, megabytes),
        "prepare with tokenizers": lambda: prepare_megabytes(spec, fast=False),
        "prepare with tiktoken": lambda: prepare_megabytes(spec, fast=True),
    }
    rows = take_turns(runs, int(options["turns"]))
    return {
        "megabytes": megabytes,
        "documents": len(texts),
        "train_bpe_megabytes_per_second": megabytes / train_seconds,
        "rows": rows,
        "encode_ratio": ratio(rows, "tiktoken", "tokenizers"),
        "prepare_ratio": ratio(rows, "prepare with tiktoken", "prepare with tokenizers"),
    }


def read(spec: Any) -> list[str]:
    """The training texts of a fresh source, which has to list its files again."""
    from normfree.data.installed import InstalledSource
    from normfree.data.sources import limited

    documents = InstalledSource(spec).documents("train", Counter())
    return list(limited(documents, most_documents=None, most_bytes=spec.max_bytes))


def timed_megabytes(work: Callable[[], object], megabytes: float) -> float:
    """Do the work; returns the megabytes that went in."""
    work()
    return megabytes


FINGERPRINTS: set[str] = set()


def prepare_megabytes(spec: Any, *, fast: bool) -> float:
    """Prepare the corpus anew with one encoder; returns megabytes of text in both splits."""
    from normfree.data import corpus
    from normfree.data import tiktoken_encoder as fast_encoder

    error = None if fast else fast_encoder.NotReproducibleError("measured")
    encoder = patch.object(corpus, "FastEncoder", side_effect=error, wraps=fast_encoder.FastEncoder)
    with tempfile.TemporaryDirectory() as cache, encoder, patch.object(corpus.log, "warning"):
        facts = corpus.prepare(spec, cache=Path(cache), progress=False).facts()
    FINGERPRINTS.add(facts["fingerprint"])
    if len(FINGERPRINTS) > 1:
        raise SystemExit(f"the encoders made different corpora: {sorted(FINGERPRINTS)}")
    return (facts["train_bytes"] + facts["validation_bytes"]) / 1e6


def take_turns(runs: dict[str, Callable[[], float]], turns: int) -> list[dict[str, Any]]:
    """Megabytes a second, and a CPU second, of every stage in every turn."""
    rows: list[dict[str, Any]] = [
        {"stage": name, "megabytes_per_second": [], "megabytes_per_cpu_second": []} for name in runs
    ]
    for _ in range(turns):
        for row, run in zip(rows, runs.values(), strict=True):
            start, cpu_start = time.perf_counter(), time.process_time()
            megabytes = run()
            row["megabytes_per_second"].append(megabytes / (time.perf_counter() - start))
            row["megabytes_per_cpu_second"].append(megabytes / (time.process_time() - cpu_start))
    return rows


def ratio(rows: list[dict[str, Any]], above: str, below: str) -> float:
    """Median over turns of the ratio of two stages within a turn."""
    rates = {row["stage"]: row["megabytes_per_second"] for row in rows}
    return statistics.median(a / b for a, b in zip(rates[above], rates[below], strict=True))


def print_table(record: dict[str, Any], conditions: dict[str, Any]) -> None:
    """Stages in rows."""
    text = f"{record['megabytes']:.1f} MB in {record['documents']:,} documents"
    print(f"{text}; {conditions['cores']} cores, {conditions['load_before']:.1f} processes on them before")
    print(f"{'stage':24} {'MB/s':>8} {'MB a CPU second':>16}")
    print(f"{'train BPE (apart)':24} {record['train_bpe_megabytes_per_second']:8.1f}")
    for row in record["rows"]:
        wall, cpu = (statistics.median(row[f"megabytes_per_{unit}"]) for unit in ("second", "cpu_second"))
        print(f"{row['stage']:24} {wall:8.1f} {cpu:16.1f}")
    print(f"tiktoken over tokenizers: encode x{record['encode_ratio']:.1f}, prepare x{record['prepare_ratio']:.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
