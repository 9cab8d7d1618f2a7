"""What a run tells while it trains, and to whom."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from normfree.model.activations import ACTIVATIONS
from normfree.spec.run import RunSpec
from normfree.store.runs import read_run
from normfree.training import train
from normfree.training.arguments import with_less_memory
from normfree.training.trainer import NormFreeTrainer
from tests.cli.commands import run

Build = Callable[..., RunSpec]


def test_a_log_file_sees_how_far_a_run_is(
    tmp_path: Path, cache: Path, tiny_spec: Build, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "normfree"):
        run = read_run(train(tiny_spec(), runs_dir=tmp_path, cache=cache))
    assert "sm-r-seed0: training on cpu, 1 process, 1 thread each, precision fp32" in caplog.messages
    (line,) = (record.message for record in caplog.records if "step 3 of 6" in record.message)
    perplexity = dict(run.series("validation", "perplexity"))[3]
    assert re.fullmatch(rf"sm-r-seed0: step 3 of 6, validation perplexity {perplexity:.2f}, about \d+ min left", line)


def test_an_activation_that_does_not_travel_with_the_model_is_named(
    tmp_path: Path, cache: Path, tiny_spec: Build, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_spec(), runs_dir=tmp_path / "ours", cache=cache)
    assert "under that name" not in caplog.text
    for name in ("tanh", "relu"):  # a new one, and another function under an old name
        monkeypatch.setitem(ACTIVATIONS, name, ACTIVATIONS["gelu"])
        spec = tiny_spec("variant=custom", f"tag={name}", "model.norm=none", f"model.activation={name}")
        train(spec, runs_dir=tmp_path, cache=cache)
        assert f"{name} is not what normfree.model.activations has under that name" in caplog.text


def test_a_tracker_that_fails_at_the_end_costs_no_result(
    tmp_path: Path, cache: Path, tiny_spec: Build, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = NormFreeTrainer.log

    def failing(trainer: NormFreeTrainer, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_final_perplexity" in logs:
            raise ConnectionError("no network")
        log(trainer, logs, start_time)

    monkeypatch.setattr(NormFreeTrainer, "log", failing)
    assert read_run(train(tiny_spec(), runs_dir=tmp_path, cache=cache)).status == "finished"
    assert "the trackers did not get the final perplexity: no network" in caplog.text


def test_a_run_that_needs_too_much_memory_says_what_it_goes_on_with(
    tmp_path: Path, cache: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", *tiny, "variant=sm-r", f"runs_dir={tmp_path}", f"cache_dir={cache}"]
    step = NormFreeTrainer.training_step

    def full(trainer: NormFreeTrainer, *rest: Any, **named: Any) -> Any:
        if trainer.state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return step(trainer, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(NormFreeTrainer, "training_step", full)
        status, _, told = run(*words, capsys=capsys)
    assert status == 1
    line = told.splitlines()[-1]
    assert re.match(r"normfree: \S+ ran out of memory on cpu: the same command goes on", line)
    advised = re.findall(r"train\.\S+", line)
    assert advised == ["train.micro_batch_sequences=4", "train.gradient_checkpointing=true"]
    assert read_run(tmp_path / "single" / "sm-r-seed0").status == "failed"
    assert run(*words, *advised, capsys=capsys)[0] == 0
    assert read_run(tmp_path / "single" / "sm-r-seed0").facts["sessions"][-1]["from_step"] == 2


def test_what_needs_little_memory_already_is_not_advised(tiny_spec: Build) -> None:
    words = ["train.batch_sequences=9", "train.micro_batch_sequences=9"]
    assert "train.micro_batch_sequences=3 or" in with_less_memory(tiny_spec(*words))  # 4 does not divide the batch
    told = with_less_memory(tiny_spec("train.micro_batch_sequences=1", "train.gradient_checkpointing=true"))
    assert "nothing is left to save" in told
