"""What a machine or a number of processes cannot train is refused with what would work."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from normfree.config import RunSpec
from normfree.training.arguments import check_machine


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "advice"),
    [
        (512, 128, 8, "train.micro_batch_sequences=64"),
        (8, 8, 2, "train.micro_batch_sequences=4"),
        (24, 8, 2, "train.micro_batch_sequences=6"),
        (8, 8, 3, "another number of processes or train.batch_sequences=6"),
        (2, 1, 4, "another number of processes or train.batch_sequences=4"),
    ],
)
def test_a_batch_that_the_processes_cannot_share_is_refused_with_one_that_they_can(
    batch: int,
    micro: int,
    processes: int,
    advice: str,
    tiny_spec: Callable[..., RunSpec],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "normfree.training.arguments.PartialState", lambda: SimpleNamespace(num_processes=processes)
    )  # what torchrun would start
    own = [f"train.batch_sequences={batch}", f"train.micro_batch_sequences={micro}"]
    with pytest.raises(ValueError, match=f"times the {processes} processes; give {advice}$"):
        check_machine(tiny_spec(*own), torch.device("cpu"))
    if "micro" in advice:
        check_machine(tiny_spec(own[0], advice), torch.device("cpu"))
