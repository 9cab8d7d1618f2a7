"""What a run tells while it trains, and to whom."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from normfree.config import RunSpec
from normfree.model.activations import ACTIVATIONS
from normfree.records import read_run
from normfree.training import train
from normfree.training.trainer import NormFreeTrainer

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
