"""The model of a run, and the text behind its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfree.data import Corpus, prepare, prepared
from normfree.pretrained.load import load_pretrained
from normfree.spec.run import RunSpec
from normfree.store.runs import Run, read_run


def load_model(model: Run | Path | str, *, dtype: str = "fp32", device: str | None = None) -> tuple[Any, Any]:
    """Load (model, tokenizer) of a run, a saved model, a .gguf file or a name on the Hugging Face hub.

    `dtype` is fp32, bf16 or fp16; `device` is by default the GPU if there is one. Raises ValueError if there is no such
    model.
    """
    return load_pretrained(str(model.folder if isinstance(model, Run) else model), dtype=dtype, device=device)


def held_out_blocks(run: Run | Path | str, *, cache: Path | None = None) -> Tensor:
    """(N, T) token ids of the held-out text on which a run was evaluated.

    `cache` is the folder of corpora. Raises ValueError where this machine has no such text, or another.
    """
    run = run if isinstance(run, Run) else read_run(run)
    return torch.from_numpy(corpus_of_run(run, cache).held_out_ids())


def corpus_of_run(run: Run, cache: Path | None) -> Corpus:
    """The corpus behind a run's numbers. Raises ValueError where this machine has none, or gives another."""
    if corpus := prepared(run.facts["corpus"], cache=cache):
        return corpus
    try:
        corpus = prepare(RunSpec.from_dict(run.spec).data, cache=cache)
    except ValueError as error:
        raise ValueError(f"the text of {run.folder} is not here ({error}); give text=FILE") from error
    if corpus.fingerprint != run.corpus:
        raise ValueError(
            f"{run.folder} has corpus {run.corpus[:12]}, and its data settings give {corpus.fingerprint[:12]} here "
            "(another Python, other packages or files): give text=FILE"
        )
    return corpus
