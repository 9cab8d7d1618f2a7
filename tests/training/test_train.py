from __future__ import annotations

import errno
import json
import logging
import math
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from normfree.data import prepare
from normfree.model import NormFreeConfig, NormFreeForCausalLM
from normfree.spec.run import RunSpec
from normfree.store.runs import Run, RunWriter, read_run
from normfree.training import InterruptedRunError, train
from normfree.training.trainer import parameter_groups
from tests.training.signals import terminate_in_step

Build = Callable[..., RunSpec]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path, tiny: list[str]) -> Run:
    """One uninterrupted run with per-layer slopes."""
    from normfree.spec.compose import compose_run

    spec = compose_run([*tiny, "variant=leaky-per-layer"]).spec
    return read_run(train(spec, runs_dir=tmp_path_factory.mktemp("runs"), cache=cache, note="a note", progress=False))


def test_a_run_says_what_it_was_and_how_it_ended(finished: Run) -> None:
    facts = finished.facts
    assert (facts["status"], facts["steps_done"], facts["tokens_seen"]) == ("finished", 6, 6 * 8 * 16)
    assert facts["study_note"] == "a note"
    assert facts["environment"]["threads"] == 1
    embeddings, per_layer, final_norm = (
        (300 + 16) * 32,
        12 * 32 * 32 + 2 * 32 + 1,
        2 * 32,
    )  # bias on Q and K, a slope
    assert facts["model"] == {
        "parameters": embeddings + 2 * per_layer + final_norm,
        "layers": 2,
        "heads": 2,
        "head_dim": 16,
        "hidden_size": 32,
        "slope_layers": [0, 1],
    }
    assert 1 < facts["final"]["perplexity"] < finished.series("validation", "perplexity")[0][1]
    assert facts["final"]["loss_nats"] == pytest.approx(math.log(facts["final"]["perplexity"]))


def test_every_metric_comes_at_its_steps_once(finished: Run) -> None:
    def steps(split: str, name: str) -> list[int]:
        return [step for step, _ in finished.series(split, name)]

    for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "tokens_seen"):
        assert steps("train", name) == [1, 2, 3, 4, 5, 6]
    for name in ("entropy_nats", "nonfinite_rows", "rows", "ceiling_nats", "negative_slope"):
        assert steps("probe", name) == [0, 2, 4, 6]
        assert steps("final", name) == [6]
    assert steps("validation", "perplexity") == [0, 3, 6]


def test_probes_cover_every_head_and_the_ceiling_is_that_of_a_causal_mask(finished: Run) -> None:
    entropy = torch.tensor(finished.last("probe", "entropy_nats"))
    ceiling = math.lgamma(17) / 16
    assert entropy.shape == (2, 2)
    assert entropy.min() > 0
    assert entropy.max() < ceiling - 0.05, "heads that attend evenly show nothing"
    assert finished.last("probe", "ceiling_nats") == pytest.approx([ceiling] * 2)
    assert finished.last("probe", "rows") == [[8 * 16] * 2] * 2
    assert finished.series("probe", "negative_slope")[0][1] == pytest.approx([0.01, 0.01])


def test_the_saved_model_has_the_recorded_perplexity_and_slopes(finished: Run, cache: Path) -> None:
    from normfree.data import prepare
    from normfree.measures.perplexity import evaluate_blocks
    from normfree.pretrained.load import load_pretrained

    model, tokenizer = load_pretrained(str(finished.folder))
    assert len(tokenizer) == 300
    held_out = prepare(RunSpec.from_dict(finished.spec).data, cache=cache, progress=False).validation
    blocks = held_out.with_format("torch")["input_ids"][:].long()
    assert evaluate_blocks(model, blocks).perplexity == pytest.approx(finished.perplexity, rel=1e-6)
    slopes = [slope.item() for slope in model.negative_slopes().values()]
    assert slopes == pytest.approx(finished.last("final", "negative_slope"))


def test_a_finished_run_is_left_alone(finished: Run, cache: Path) -> None:
    before = (finished.folder / "run.json").stat().st_mtime_ns
    spec = RunSpec.from_dict(finished.spec)
    assert train(spec, runs_dir=finished.folder.parents[1], cache=cache, progress=False) == finished.folder
    assert (finished.folder / "run.json").stat().st_mtime_ns == before


def test_a_folder_holds_one_spec_only(finished: Run, tiny: list[str], cache: Path) -> None:
    from normfree.spec.compose import compose_run

    other = compose_run([*tiny, "variant=leaky-per-layer", "train.peak_learning_rate=0.5"]).spec
    with pytest.raises(ValueError, match=r"train.peak_learning_rate is 0.001 there and 0.5 here.*tag="):
        train(other, runs_dir=finished.folder.parents[1], cache=cache)
    assert read_run(finished.folder).status == "finished"


def test_a_second_order_of_the_data_is_sent_to_a_study_of_its_own(finished: Run, cache: Path) -> None:
    other = replace(RunSpec.from_dict(finished.spec), data_seed=1)
    with pytest.raises(ValueError, match=r"data_seed is 0 there and 1 here.*give study=NAME"):
        train(other, runs_dir=finished.folder.parents[1], cache=cache)


def test_the_same_text_elsewhere_is_the_same_run_and_another_text_is_not(
    finished: Run, cache: Path, tmp_path: Path
) -> None:
    spec = RunSpec.from_dict(finished.spec)
    shutil.copytree(Path(spec.data.paths[0]).parent, tmp_path / "text")
    data = replace(spec.data, paths=(f"{tmp_path}/text/*.py",), validation_paths=(f"{tmp_path}/text/held_out",))
    before = (finished.folder / "run.json").stat().st_mtime_ns
    assert train(replace(spec, data=data), runs_dir=finished.folder.parents[1], cache=cache) == finished.folder
    (tmp_path / "text" / "0.py").write_text("another = 'text'\n" * 500)
    with pytest.raises(ValueError, match=r"another text \(corpus .*give tag=NAME"):
        train(replace(spec, data=data), runs_dir=finished.folder.parents[1], cache=cache)
    assert (finished.folder / "run.json").stat().st_mtime_ns == before


def test_the_rate_stays_at_its_peak_where_that_is_the_last_one(tmp_path: Path, cache: Path, tiny_spec: Build) -> None:
    spec = tiny_spec("train.final_learning_rate=1e-3", "train.warmup_share=0.5")
    rates = [rate for _, rate in read_run(train(spec, runs_dir=tmp_path, cache=cache)).series("train", "learning_rate")]
    assert rates == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 1e-3])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("more", [[], ["model.embedding_dropout=0.1", "model.residual_dropout=0.1"]], ids=str)
def test_a_signal_saves_and_the_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    more: list[str],
    tmp_path: Path,
    cache: Path,
    tiny_spec: Build,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    spec = tiny_spec("train.steps=12", "train.checkpoint_every=100", *more)
    whole = train(spec, runs_dir=tmp_path / "whole", cache=cache, progress=False)
    with monkeypatch.context() as patch:
        terminate_in_step(3, patch)
        with pytest.raises(InterruptedRunError) as stopped:
            train(spec, runs_dir=tmp_path / "broken", cache=cache, progress=False)
    folder = stopped.value.folder
    assert stopped.value.signal_number == signal.SIGTERM
    assert read_run(folder).status == "interrupted"
    assert read_run(folder).facts["steps_done"] == 4
    assert train(spec, runs_dir=tmp_path / "broken", cache=cache, progress=False) == folder
    assert not [record for record in caplog.records if "missing keys" in record.getMessage()]  # tied: nothing is amiss
    assert read_run(folder).facts["resumed"] == 1
    first, second = read_run(folder).facts["sessions"]
    assert (first["from_step"], second["from_step"]) == (0, 4)
    assert first["began"] <= second["began"]
    assert second["environment"] == read_run(folder).facts["environment"]
    assert same_weights(whole, folder)
    for split, name in (("train", "loss"), ("probe", "entropy_nats"), ("validation", "loss")):
        assert read_run(folder).series(split, name) == read_run(whole).series(split, name)


def test_a_line_of_the_log_covers_the_same_steps_after_a_resume(tmp_path: Path, cache: Path, tiny_spec: Build) -> None:
    """Resumed at step 4, between the lines of steps 3 and 6: the latter is the mean of steps 4, 5 and 6."""
    long = ["train.steps=12", "train.log_every=3", "train.checkpoint_every=4", "train.checkpoints_kept=3"]
    whole = train(tiny_spec(*long), runs_dir=tmp_path / "whole", cache=cache, progress=False)
    broken = tmp_path / "broken" / "single" / whole.name
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "model")
    for step in (8, 12):
        shutil.rmtree(broken / "checkpoints" / f"checkpoint-{step}", ignore_errors=True)
    facts = json.loads((broken / "run.json").read_text()) | {"status": "running"}
    (broken / "run.json").write_text(json.dumps(facts))
    train(tiny_spec(*long), runs_dir=tmp_path / "broken", cache=cache, progress=False)
    assert read_run(broken).facts["sessions"][-1]["from_step"] == 4
    assert read_run(broken).series("train", "loss") == read_run(whole).series("train", "loss")
    assert [step for step, _ in read_run(broken).series("train", "loss")] == [1, 3, 6, 9, 12]


def test_a_damaged_checkpoint_is_named_and_the_older_one_leads_to_the_same_weights(
    tmp_path: Path, cache: Path, tiny_spec: Build, caplog: pytest.LogCaptureFixture
) -> None:
    spec = tiny_spec()
    folder = train(spec, runs_dir=tmp_path / "a", cache=cache, progress=False)
    before = weights(folder)
    optimizer = folder / "checkpoints" / "checkpoint-6" / "optimizer.pt"
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    facts = (folder / "run.json").read_text()
    (folder / "run.json").write_text(facts.replace('"finished"', '"running"'))
    with caplog.at_level(logging.WARNING, "normfree"):
        train(spec, runs_dir=tmp_path / "a", cache=cache, progress=False)
    assert "checkpoint-6" in caplog.text
    assert "optimizer.pt" in caplog.text
    after = weights(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_killed_after_its_last_step_is_finished_without_training(
    tmp_path: Path, cache: Path, tiny_spec: Build
) -> None:
    spec = tiny_spec()
    folder = train(spec, runs_dir=tmp_path, cache=cache, progress=False)
    before, losses = weights(folder), read_run(folder).series("train", "loss")
    facts = (folder / "run.json").read_text()
    (folder / "run.json").write_text(facts.replace('"finished"', '"running"'))
    train(spec, runs_dir=tmp_path, cache=cache, progress=False)
    after = weights(folder)
    assert read_run(folder).status == "finished"
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_run(folder).series("train", "loss") == losses


def test_a_run_that_diverges_is_a_result_and_stays_one(tmp_path: Path, cache: Path, tiny_spec: Build) -> None:
    spec = tiny_spec("variant=sm", "train.peak_learning_rate=1e30", "train.warmup_share=0.0")
    folder = train(spec, runs_dir=tmp_path, cache=cache, progress=False)
    run = read_run(folder)
    assert run.status == "diverged"
    assert run.facts["divergence"]["step"] == 2
    assert run.facts["divergence"]["kind"] in ("weight", "activation", "loss", "gradient")
    assert run.facts["steps_done"] == 1
    assert math.isnan(run.perplexity)
    assert train(spec, runs_dir=tmp_path, cache=cache, progress=False) == folder


def test_variants_start_from_the_same_weights_and_see_the_same_batches(
    tmp_path: Path, cache: Path, tiny_spec: Build
) -> None:
    runs = [
        read_run(
            train(
                tiny_spec(f"variant={variant}", "train.steps=1"),
                runs_dir=tmp_path,
                cache=cache,
                progress=False,
            )
        )
        for variant in ("sm-r", "leaky-shared")
    ]
    first, second = (run.series("probe", "entropy_nats")[0][1][0] for run in runs)
    assert first == second  # layer 0 before training: no activation has been passed yet
    losses = [run.series("train", "loss")[0][1] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_accumulated_micro_batches_are_one_batch(tmp_path: Path, cache: Path, tiny_spec: Build) -> None:
    whole = train(tiny_spec(), runs_dir=tmp_path / "a", cache=cache, progress=False)
    parts = train(tiny_spec("train.micro_batch_sequences=2"), runs_dir=tmp_path / "b", cache=cache, progress=False)
    for (_, one), (_, other) in zip(
        read_run(whole).series("train", "loss"), read_run(parts).series("train", "loss"), strict=True
    ):
        assert one == pytest.approx(other, rel=1e-5)
    assert read_run(whole).perplexity == pytest.approx(read_run(parts).perplexity, rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.steps=null", "train.epochs=0.001"],
            r"epochs=0.001 of \d+ training blocks do not fill one batch",
        ),
        (["train.steps=100000"], r"train.steps=100000 needs .* blocks, but the corpus has .*train.epochs="),
        (["model.max_position_embeddings=8"], "longer than model.max_position_embeddings=8"),
        (["model.vocab_size=10"], "model.vocab_size=10 is below the tokenizer's 300"),
        (["model.num_attention_heads=3"], "multiple of num_attention_heads"),
        (["train.batch_sequences=16", "train.micro_batch_sequences=5"], "must be a multiple"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_leaves_no_run(
    tmp_path: Path, cache: Path, tiny_spec: Build, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny_spec(*overrides), runs_dir=tmp_path, cache=cache, progress=False)
    assert not list(tmp_path.rglob("run.json"))


def test_epochs_repeat_the_corpus(tmp_path: Path, cache: Path, tiny_spec: Build) -> None:
    words = ["data.max_bytes=4000", "train.batch_sequences=32", "train.micro_batch_sequences=32"]
    one_pass = prepare(tiny_spec(*words).data, cache=cache, progress=False).facts()["train_blocks"] // 32
    with pytest.raises(ValueError, match="say how often to repeat it"):
        train(tiny_spec(*words, f"train.steps={one_pass + 1}"), runs_dir=tmp_path, cache=cache, progress=False)
    spec = tiny_spec(*words, "train.steps=null", "train.epochs=2.5")
    run = read_run(train(spec, runs_dir=tmp_path, cache=cache, progress=False))
    assert 2 * one_pass < run.facts["steps_done"] <= 3 * (one_pass + 1)
    assert run.facts["tokens_seen"] == run.facts["steps_done"] * 32 * 16


def test_a_record_that_cannot_be_written_is_not_a_checkpoint_that_could_not(
    tmp_path: Path, cache: Path, tiny_spec: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = RunWriter.update

    def full(self: RunWriter, **facts: Any) -> None:
        if facts.get("steps_done") == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(self, **facts)

    with monkeypatch.context() as patched:
        patched.setattr(RunWriter, "update", full)
        with pytest.raises(RuntimeError, match="the checkpoint of step 4 is whole"):
            train(tiny_spec(), runs_dir=tmp_path, cache=cache, progress=False)
    run = read_run(train(tiny_spec(), runs_dir=tmp_path, cache=cache, progress=False))
    assert (run.status, run.facts["sessions"][-1]["from_step"]) == ("finished", 4)


def test_a_process_that_sees_several_gpus_is_refused(
    tmp_path: Path, cache: Path, tiny_spec: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer would give each of them a batch, and no record would say so."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match=r"sees 4 GPUs.*CUDA_VISIBLE_DEVICES=0 .*torchrun"):
        train(tiny_spec(), runs_dir=tmp_path, cache=cache, progress=False)
    assert not list(tmp_path.rglob("run.json"))


def test_slopes_are_decayed_only_when_asked_and_biases_and_norms_never(tiny_spec: Build) -> None:
    model = NormFreeForCausalLM(
        NormFreeConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            bias="all",
            activation="leaky_relu",
            learnable_slope="per_layer",
        )
    )
    decays: dict[bool, dict[str, float]] = {}
    for asked in (False, True):
        words = [f"train.decay_slopes={str(asked).lower()}", "train.slope_learning_rate_factor=10"]
        train_spec = tiny_spec("variant=leaky-per-layer", *words).train
        groups = parameter_groups(model, train_spec)
        by_id = {id(p): group for group in groups for p in group["params"]}
        assert len(by_id) == len(list(model.parameters()))
        decays[asked] = {name: by_id[id(p)]["weight_decay"] for name, p in model.named_parameters()}
        slope_rates = [by_id[id(p)]["lr"] for name, p in model.named_parameters() if "slope" in name]
        assert slope_rates == [pytest.approx(10 * train_spec.peak_learning_rate)] * 2
    for name, p in model.named_parameters():
        assert decays[False][name] == (0.1 if p.ndim >= 2 else 0.0)
        assert decays[True][name] == (0.1 if p.ndim >= 2 or "slope" in name else 0.0)
