"""train(spec): what a run records, when it resumes, and what it refuses."""

import json
import logging
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from normfree import NormFreeConfig, NormFreeForCausalLM, Run, compose_run, read_run
from normfree.spec.run import RunSpec
from normfree.training import InterruptedRunError, train
from normfree.training.trainer import NormFreeTrainer, parameter_groups
from tests.training.runs import act_in, check_equal_runs, send_in_step


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path, tiny: list[str]) -> Run:
    """An uninterrupted run with per-layer slopes."""
    spec = compose_run([*tiny, "variant=leaky-per-layer"]).spec
    return read_run(train(spec, runs_dir=tmp_path_factory.mktemp("runs"), cache=cache, note="a note", progress=False))


@pytest.fixture
def train_again(finished: Run, cache: Path) -> Callable[..., Path]:
    """`train_again(spec)`: train in the place of the finished run."""
    return lambda spec: train(spec, runs_dir=finished.folder.parents[1], cache=cache, progress=False)


def test_no_progress_table_of_transformers_in_a_notebook(train_tiny, monkeypatch) -> None:
    class Table(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            raise AssertionError("drawn")

    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", Table)
    assert train_tiny("train.steps=1").status == "finished"


def test_a_run_records_what_it_was(finished: Run) -> None:
    facts = finished.facts
    assert (facts["status"], facts["steps_done"], facts["tokens_seen"]) == ("finished", 6, 6 * 8 * 16)
    assert facts["study_note"] == "a note"
    assert facts["environment"]["threads"] == 1
    embeddings, final_norm = (300 + 16) * 32, 2 * 32
    per_layer = 12 * 32 * 32 + 2 * 32 + 1  # bias on Q and K, a slope
    sizes = {"layers": 2, "heads": 2, "head_dim": 16, "hidden_size": 32, "slope_layers": [0, 1]}
    assert facts["model"] == {"parameters": embeddings + 2 * per_layer + final_norm, **sizes}
    assert 1 < facts["final"]["perplexity"] < finished.series("validation", "perplexity")[0][1]
    assert facts["final"]["loss_nats"] == pytest.approx(math.log(facts["final"]["perplexity"]))


def test_every_metric_comes_once_at_its_steps(finished: Run) -> None:
    def steps(split: str, name: str) -> list[int]:
        return [step for step, _ in finished.series(split, name)]

    for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "tokens_seen"):
        assert steps("train", name) == [1, 2, 3, 4, 5, 6]
    for name in ("entropy_nats", "nonfinite_rows", "rows", "ceiling_nats", "negative_slope"):
        assert steps("probe", name) == [0, 2, 4, 6]
        assert steps("final", name) == [6]
    assert steps("validation", "perplexity") == [0, 3, 6]


def test_a_folder_holds_one_spec_only(finished: Run, tiny: list[str], train_again) -> None:
    other = compose_run([*tiny, "variant=leaky-per-layer", "train.peak_learning_rate=0.5"]).spec
    with pytest.raises(ValueError, match=r"train.peak_learning_rate is 0.001 there and 0.5 here.*tag="):
        train_again(other)
    with pytest.raises(ValueError, match=r"\(data_seed is 0 there and 1 here\).*study=NAME for another data_seed"):
        train_again(replace(RunSpec.from_dict(finished.spec), data_seed=1))
    assert read_run(finished.folder).status == "finished"


def test_the_same_text_elsewhere_is_the_same_run(finished: Run, train_again, tmp_path: Path) -> None:
    spec, record = RunSpec.from_dict(finished.spec), finished.folder / "run.json"
    shutil.copytree(Path(spec.data.paths[0]).parent, tmp_path / "text")
    data = replace(spec.data, paths=(f"{tmp_path}/text/*.py",), validation_paths=(f"{tmp_path}/text/held_out",))
    before = record.stat().st_mtime_ns
    assert train_again(spec) == train_again(replace(spec, data=data)) == finished.folder
    (tmp_path / "text" / "0.py").write_text("another = 'text'\n" * 500)
    with pytest.raises(ValueError, match=r"another text or tokenizer \(corpus .*give tag=NAME"):
        train_again(replace(spec, data=data))
    assert record.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("words", "shares"),
    [
        (["train.final_learning_rate=1e-3", "train.warmup_share=0.5"], [0, 1 / 3, 2 / 3, 1, 1, 1]),  # stays there
        (["train.warmup_share=0.95"], [0, 0.2, 0.4, 0.6, 0.8, 1]),  # of all steps, of which one is left to fall in
    ],
)
def test_the_rate_rises_to_its_peak(words, shares, train_tiny) -> None:
    rates = [rate for _, rate in train_tiny(*words).series("train", "learning_rate")]
    assert rates == pytest.approx([1e-3 * share for share in shares])


@pytest.mark.parametrize("more", [[], ["model.embedding_dropout=0.1", "model.residual_dropout=0.1"]], ids=str)
def test_a_resumed_run_equals_the_uninterrupted_one(more, train_tiny, tiny_folder, monkeypatch, caplog) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    words = ["train.steps=12", "train.checkpoint_every=100", *more]
    whole = train_tiny(*words, runs="whole")
    with monkeypatch.context() as patch:
        send_in_step(3, patch)
        with pytest.raises(InterruptedRunError, match="stopped by signal 15 and saved"):
            train_tiny(*words)
    assert (read_run(tiny_folder).status, read_run(tiny_folder).facts["steps_done"]) == ("interrupted", 4)
    resumed = train_tiny(*words)
    assert not [record for record in caplog.records if "missing keys" in record.getMessage()]  # tied weights
    first, second = resumed.facts["sessions"]
    assert (resumed.facts["resumed"], first["from_step"], second["from_step"]) == (1, 0, 4)
    assert first["began"] <= second["began"]
    assert second["environment"] == resumed.facts["environment"]
    check_equal_runs(resumed.folder, whole.folder)


def test_a_log_line_covers_the_same_steps_after_resume(train_tiny, tiny_folder: Path) -> None:
    """Resumed at step 4, between the lines of steps 3 and 6: the latter is the mean of steps 4, 5 and 6."""
    words = ["train.steps=12", "train.log_every=3", "train.checkpoint_every=4", "train.checkpoints_kept=3"]
    whole = train_tiny(*words, runs="whole")
    shutil.copytree(whole.folder, tiny_folder)
    for step in (8, 12):
        shutil.rmtree(tiny_folder / "checkpoints" / f"checkpoint-{step}")
    (tiny_folder / "run.json").write_text(json.dumps(whole.facts | {"status": "running"}))
    resumed = train_tiny(*words)
    assert resumed.facts["sessions"][-1]["from_step"] == 4
    assert resumed.series("train", "loss") == whole.series("train", "loss")
    assert [step for step, _ in resumed.series("train", "loss")] == [1, 3, 6, 9, 12]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps=null", "train.epochs=0.001"], r"epochs=0.001 of \d+ training blocks do not fill one batch"),
        (["train.steps=100000"], r"train.steps=100000 needs .* blocks, but the corpus has .*train.epochs="),
        (["model.max_position_embeddings=8"], "longer than model.max_position_embeddings=8"),
        (["model.vocab_size=10"], "model.vocab_size=10 is below the 300 tokens of this corpus"),
    ],
)
def test_a_refused_run_leaves_no_record(tmp_path: Path, train_tiny, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_tiny(*overrides)
    assert not list(tmp_path.rglob("run.json"))


def test_only_slopes_choose_their_weight_decay(tiny_spec) -> None:
    """Biases and norms never decay, matrices always."""
    fields: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    leaky = {"bias": "all", "activation": "leaky_relu", "learnable_slope": "per_layer"}
    model = NormFreeForCausalLM(NormFreeConfig(**fields, **leaky))
    for decays, of_slopes in (("false", 0.0), ("true", 0.1), ("0.65", 0.65)):
        words = [f"train.decay_slopes={decays}", "train.slope_learning_rate_factor=10"]
        train_spec = tiny_spec("variant=leaky-per-layer", *words).train
        group_of = {id(p): group for group in parameter_groups(model, train_spec) for p in group["params"]}
        assert len(group_of) == len(list(model.parameters()))
        for name, p in model.named_parameters():
            expected = of_slopes if "slope" in name else 0.1 if p.ndim >= 2 else 0.0
            assert group_of[id(p)]["weight_decay"] == expected
            if "slope" in name:
                assert group_of[id(p)]["lr"] == pytest.approx(10 * train_spec.peak_learning_rate)


def test_a_log_file_shows_the_progress(train_tiny, caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr("normfree.training.callbacks.LINE_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "normfree"):
        run = train_tiny()
    assert "sm-r-seed0: training on cpu, 1 process, 1 thread each, precision fp32" in caplog.messages
    (line,) = (record.message for record in caplog.records if "step 3 of 6, validation" in record.message)
    perplexity = dict(run.series("validation", "perplexity"))[3]
    assert re.fullmatch(rf"sm-r-seed0: step 3 of 6, validation perplexity {perplexity:.2f}, about \d+ s left", line)
    assert len(re.findall(r"step \d of 6, loss \d\.\d+ nats, about \d+ s left", caplog.text)) == 6


def test_a_failing_tracker_costs_no_result(train_tiny, caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    log = NormFreeTrainer.log

    def failing(trainer: NormFreeTrainer, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_final_perplexity" in logs:
            raise ConnectionError("no network")
        log(trainer, logs, start_time)

    monkeypatch.setattr(NormFreeTrainer, "log", failing)
    assert train_tiny().status == "finished"
    assert "the trackers did not get the final perplexity: no network" in caplog.text


def test_a_run_out_of_memory_names_the_keys_to_resume(tmp_path, cache, tiny, monkeypatch, run) -> None:
    words = ["train", *tiny, "variant=sm-r", f"runs_dir={tmp_path}", f"cache_dir={cache}"]

    def fill(trainer: NormFreeTrainer) -> None:
        if trainer.state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    with monkeypatch.context() as patch:
        act_in("training_step", fill, patch)
        status, _, errors = run(*words)
    assert status == 1
    line = errors.splitlines()[-1]
    assert re.match(r"normfree: \S+ ran out of memory on cpu: the same command resumes with", line)
    assert re.findall(r"train\.\S+", line) == ["train.gradient_checkpointing=true", "train.micro_batch_sequences"]
    assert read_run(tmp_path / "single" / "sm-r-seed0").status == "failed"
    advised = ["train.gradient_checkpointing=true", "train.micro_batch_sequences=4"]
    assert run(*words, *advised)[0] == 0
    assert read_run(tmp_path / "single" / "sm-r-seed0").facts["sessions"][-1]["from_step"] == 2
