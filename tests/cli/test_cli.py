"""The command line, at the door: what a user types, what comes out, how it fails."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import normfree
from normfree.cli import main as cli
from normfree.cli.main import VERBS, main
from normfree.files import folder_lock
from normfree.model.activations import ACTIVATIONS
from normfree.model.norms import NORMS
from normfree.spec.compose import allowed_keys, compose_run
from normfree.spec.keys import describe_keys
from normfree.spec.run import RunSpec
from normfree.store.runs import read_run
from tests.synthetic import write_run


def test_help_explains_each_verb_and_its_keys(run) -> None:
    status, overview, _ = run()
    assert status == 0
    for name, verb in VERBS.items():
        assert verb.example in overview
        status, out, _ = run(name, "--help")
        assert (status, verb.example in out) == (0, True)
        assert all(f"{key}=" in out for key in (describe_keys(verb.options) if verb.options else ()))


def test_a_sign_that_the_terminal_lacks_ends_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(cli, "overview", lambda: "25.6 \u00b1 0.6")
    assert main([]) == 0
    assert output.buffer.getvalue() == b"25.6 \\xb1 0.6\n"


def test_help_shows_defaults_and_explains_every_key(run) -> None:
    lines = run("train", "--help")[1].splitlines()
    matches = [re.fullmatch(r"  (\w+\.\w+)=(\S*)(?: +(\S.*))?", line) for line in lines]
    rows = {match[1]: match.groups()[1:] for match in matches if match}
    assert rows.keys() == {key for key in allowed_keys() if "." in key}
    assert [key for key, (_, meaning) in rows.items() if not meaning] == []
    assert all(name in rows["model.activation"][1] for name in ACTIVATIONS)
    assert all(name in rows["model.norm"][1] for name in NORMS)
    assert "[none | per_layer | shared]" in rows["model.learnable_slope"][1]
    assert "[wandb | tensorboard | trackio]" in rows["train.trackers"][1]
    spec = compose_run([]).spec.to_dict()
    parts = ("data", "train", "probe", "model")
    composed = {f"{part}.{key}": value for part in parts for key, value in spec[part].items() if key != "source"}
    shown = {key: "" if value is None else f"[{','.join(value)}]" if isinstance(value, list) else str(value)
             for key, value in composed.items()}  # fmt: skip
    assert shown.items() <= {key: value for key, (value, _) in rows.items()}.items()


def test_cfg_prints_the_composed_run_and_trains_nothing(output, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["preset=cpu-quick", "variant=sm-r", "train.steps=7"]
    out = output("train", *words, "--cfg", "job")
    assert RunSpec.from_dict(yaml.safe_load(out)) == compose_run(words).spec
    assert output("train", "-m", "--cfg", "submit=slurm", *words) == out
    out = output("train", "-m", "--cfg=job", "seed=3,5", *words)
    assert [RunSpec.from_dict(values).seed for values in yaml.safe_load_all(out)] == [3, 5]
    assert not list(tmp_path.iterdir())


MEASURED = str(Path(__file__).parents[2] / "results" / "smollm2" / "t8192")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown verb 'trian'; did you mean train"),
        (["train", "--fast"], "unknown flag '--fast'; the flags are --help, --version, --debug, -m (train), --cfg job"),
        (["train", "train.lr=1e-3"], "unknown key 'train.lr'; did you mean train.peak_learning_rate?"),
        (["train", "workers=2"], "unknown key 'workers'; it is a key of `normfree study` and `normfree train -m`"),
        (["train", "zzzzzz=2"], "unknown key 'zzzzzz'; `normfree train --help` lists all"),
        (["train", "-m", "data_seed=0,1"], "the study: 'study=order${data_seed}'"),
        (["train", "quick"], "normfree train takes key=value only, got quick"),
        (["study"], "normfree study takes STUDY, got nothing; example: normfree study quick"),
        (["study", "quik"], "unknown study 'quik'; did you mean quick"),
        (["study", "mine.yaml"], "mine.yaml does not exist; "),
        (["train", "model.nrom=none"], "unknown key 'model.nrom'; did you mean model.norm"),
        (["train", "model.norm=none", "model.activation=relu"], "would have the wrong label: use variant=sm-r"),
        (["train", "variant=custom", "tag=mine", "model.activation=relu"], "variant=custom needs model.norm, e.g."),
        (["train", "data.source=files"], "use data=NAME"),
        (["train", "data=files", "data.paths=[*.py]"], "data.paths=['...','...']"),
        (["train", "runs_dir=null"], "runs_dir=None: name a folder"),
        (["train", "-m", "train.steps=10,20"], "more than one run would be runs/single/sm-ln-g-seed0: put what"),
        (["train", "-m", "seed=range(0,3)"], "seed='range(0': it should be a valid integer"),
        (["train", "-m", "workers=0", "seed=0,1"], "workers=0: this machine has"),
        (["study", "quick", "submit.timeout_min=5"], "submit.timeout_min= is read with submit=slurm or"),
        (["evaluate", "m", "text=README.md", "cache_dir=c"], "cache_dir= is read for the text of a run only"),
        (["train", "seed=0,1"], "'seed=0,1' has several values: `normfree train -m` trains one run for each"),
        (["data", "files", "data.paths=[nowhere/*.py]"], "nowhere"),
        (["evaluate", "m", "text=nowhere.txt"], "text=nowhere.txt cannot be read ("),
        (["evaluate", "m", "device=gpu", "text=README.md"], "device=gpu cannot be used here"),
        (["train", "data=files", "data.paths=corpus"], "data.paths='corpus' must be a list, e.g. data.paths=[corpus]"),
        (["measure", "m", "text=README.md", "output=README.md"], "README.md is a file; name a folder"),
        (["report", "nowhere"], "nowhere does not exist"),
        (["status", "."], "holds no run"),
        (["status", "a", "watch=yes please"], "watch='yes please'"),
        (["cost", "cpu", "variant="], "unknown variant ''"),
        (["cost", "cpu", "variant=sm-r", "activation="], "activation='' has no known cost"),
        (["cost", "gpt2-t18"], "presets and shapes: did you mean gpt2-t128"),
        (["cost", "gpt2", "activation=relu"], "activation=relu is for a preset, and gpt2 is none of"),
        (["cost", "cpu", "output=cost.txt"], "output=cost.txt: name a file that ends in .json or .csv"),
        (["cost", "gpt2", "protocol=shaft"], "protocol=shaft has no prices: no bytes per element"),
        (["cost", "gpt2", "protocol=bumblebee"], "allowed: cheetah, semi2k"),
        (["cost", "cpu", "activation=[relu]"], "activation lists 1 names, but num_hidden_layers is 12"),
        (["cost", MEASURED], "holds a measurement of SmolLM2-135M-Instruct, not the model: give that model itself"),
        (["estimate", "gpu=l40"], "gpu=l40; did you mean l40s?"),
        (["estimate", "preset=gpt2-t128", "gpus=8"], "must be a multiple of 1024, which is gpus=8 times"),
        (["estimate", "preset=cpu", "tokens=2e9"], "tokens= is for runs that count epochs"),
        (["measure", MEASURED, "target=README.md"], "target= needs its source: give text=FILE too"),
        (["estimate", "utilisation=2"], "utilisation=2: it should be less than or equal to 1"),
        (["estimate", "model.hidden_size=wide"], "model.hidden_size='wide' must be a whole number above 0"),
        (["estimate", "model.bias=some"], "model.bias='some'; allowed: none, qk, all"),
    ],
)
def test_wrong_input_is_one_line_that_says_what_to_do(words, message, tmp_path, run, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("text")
    monkeypatch.setenv("NORMFREE_CACHE", str(tmp_path / "cache"))
    status, out, err = run(*words)
    last = err.strip().splitlines()[-1]
    assert status != 0
    assert message in last
    assert out == ""
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_a_path_may_hold_an_equals_sign(tmp_path: Path, output) -> None:
    written = write_run(tmp_path / "lr=1e-3", "SM+R", tag="a=b")
    out = output("verify", str(written.folder))
    assert out.startswith("sound   run.json          SM+R (a=b), seed 0: finished, 200 steps")


def test_a_mistyped_run_is_not_looked_up_on_the_hub(tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs"), "SM+R")
    (name,) = [path.name for path in Path("runs/quick").iterdir()]
    for folder in ("runs/quick", "./runs/quick", "quick"):
        monkeypatch.chdir(tmp_path / "runs" if folder == "quick" else tmp_path)
        _, _, err = run("measure", f"{folder}/{name}x", f"text={tmp_path}/runs/quick/{name}/run.json")
        assert f"{folder}/{name}x does not exist; did you mean {name}?" in err
    (tmp_path / "somebody" / "downloaded").mkdir(parents=True)
    (tmp_path / "somebody" / "downloaded" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _, _, err = run("measure", "somebody/another", f"text={tmp_path}/runs/quick/{name}/run.json")
    assert "cannot load 'somebody/another'" in err  # it may be on the hub


def test_debug_shows_the_stack_trace() -> None:
    with pytest.raises(ValueError, match="did you mean train"):
        main(["trian", "--debug"])


def test_train_makes_a_run_folder_and_says_where(trained: Path, tiny: list[str], cache: Path, output) -> None:
    assert read_run(trained).status == "finished"
    out = output("train", *tiny, "variant=sm-r", f"runs_dir={trained.parents[1]}", f"cache_dir={cache}")
    assert "SM+R, seed 0, finished, perplexity" in out
    assert str(trained) in out


def test_data_describes_a_corpus(tiny: list[str], tmp_path: Path, cache: Path, output) -> None:
    overrides = [text for text in tiny if text.startswith("data.")]
    out = output("data", "files", "preset=cpu-quick", *overrides, f"cache_dir={cache}")
    assert "fingerprint" in out
    assert "unigram perplexity" in out


@pytest.mark.slow
@pytest.mark.parametrize("launch", [[], ["workers=2"], ["submit=local", "submit.timeout_min=5"]], ids=" ".join)
def test_many_runs_leave_run_folders_wherever_they_are_trained(launch, tiny, cache, tmp_path) -> None:
    words = ["train", "-m", *launch, *tiny, "variant=sm-r,sm-g", "seed=0,1", f"cache_dir={cache}"]
    command = [sys.executable, "-m", "normfree", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    runs = sorted(path.parent.name for path in tmp_path.glob("runs/single/*/run.json"))
    assert runs == ["sm-g-seed0", "sm-g-seed1", "sm-r-seed0", "sm-r-seed1"]
    run_json = json.loads((tmp_path / "runs/single/sm-g-seed1/run.json").read_text())
    verb, *keys = shlex.split(run_json["command"])[1:]
    assert verb == "train"
    assert compose_run(keys).spec == RunSpec.from_dict(run_json["spec"])
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_verify_says_what_is_sound_and_fails_on_damage(trained: Path, cache: Path, tmp_path: Path, run, output) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    out = output("verify", str(copy), f"cache_dir={cache}")
    assert "damaged" not in out
    weights = copy / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    status, out, err = run("verify", str(copy), f"cache_dir={cache}")
    assert status == 1
    assert "model.safetensors" in out
    assert "is damaged: model" in err


@pytest.mark.parametrize("words", [["train", "--help"], ["--version"]], ids=" ".join)  # more than the buffer, and less
def test_a_reader_that_has_read_enough_is_no_error(words: list[str]) -> None:
    reads, writes = os.pipe()
    os.close(reads)  # beforehand: the help would fit into a pipe that is read
    command = [sys.executable, "-m", "normfree", *words]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, env=buffered, text=True, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_usual_flags_are_understood(run) -> None:
    assert run("--version")[1].strip() == normfree.__version__
    assert run("-h")[1] == run("--help")[1] == run()[1]
    shown = [run(*words) for words in (["verify", "-h"], ["-h", "verify"], ["help", "verify"])]
    assert shown[0] == shown[1] == shown[2]
    assert (shown[0][0], shown[0][1].split()[:2]) == (0, ["normfree", "verify"])


def test_a_study_is_shown_run_by_run_and_not_trained(tmp_path: Path, output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = output("study", "quick", "train.steps=3", "workers=2", "--cfg", "job")
    shown = [(values["variant"], values["train"]["steps"]) for values in yaml.safe_load_all(out)]
    assert shown == [("sm-g", 3), ("sm-r", 3), ("sm-ln-g", 3), ("sm-ln-r", 3)]
    assert not list(tmp_path.iterdir())
    assert out.startswith("# 4 runs, ")
    assert "GPU-hours" in output("study", "paper-gpt2", "--cfg", "job").splitlines()[0]


@pytest.mark.parametrize("words", [["study", "quick"], ["train", "-m", "seed=0,1"]])
def test_torchrun_is_for_one_run(words: list[str], run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    status, _, err = run(*words)
    assert status == 2
    assert "torchrun starts one run; start a study" in err


def unfinished(folder: Path) -> Path:
    """A run at step 100 of 200, as a process leaves it that is training or was killed."""
    return write_run(folder, "SM+R", status="running", facts={"steps_done": 30, "sessions": [{"from_step": 20}]}).folder


def test_a_run_under_way_shows_speed_and_time_left(tmp_path: Path, run) -> None:
    place = unfinished(tmp_path)
    with folder_lock(place):
        out = run("status", str(place))[1]
    assert "running      step    100 of 200  loss 4.036 nats  21,100 tokens/s" in out
    assert f"  {round(100 * read_run(place).tokens_per_step / 21_100)} s left" in out
    assert "resumed at step 20" in out
    record = place / "run.json"
    record.write_text(record.read_text().replace('"steps": 200', '"steps": 100'))
    with folder_lock(place):
        assert "tokens/s  measuring the trained model  last line" in run("status", str(place))[1]


def test_finished_and_killed_runs_say_how_far_they_came(tmp_path: Path, output) -> None:
    written = write_run(tmp_path / "finished", "SM+R")
    words = f"{written.place} finished step 200 of 200 perplexity {written.perplexity:.2f}".split()
    assert output("status", str(tmp_path / "finished")).split() == words
    out = output("status", str(unfinished(tmp_path)))
    assert "stopped      step    100 of 200" in out
    assert "left" not in out
    assert "the same command resumes it" in out


def test_a_folder_held_without_a_record_is_preparing_its_text(tmp_path: Path, run) -> None:
    with folder_lock(tmp_path / "runs" / "quick"):
        status, out, err = run("status", str(tmp_path / "runs"))
        assert (status, out, err) == (0, f"{tmp_path / 'runs' / 'quick'}  preparing the text\n", "")
        place = unfinished(tmp_path / "runs" / "quick")
        assert run("status", str(tmp_path / "runs"))[1].splitlines()[1].startswith(f"quick/{place.name}  stopped")
    assert "preparing" not in run("status", str(tmp_path / "runs"))[1]


@pytest.mark.parametrize("verb", ["study", "train"])
def test_status_says_preparing_while_a_text_is_prepared(verb, tiny, cache, tmp_path, run, monkeypatch, capsys) -> None:
    study = tmp_path / "small.yaml"
    study.write_text("preset: cpu-quick\ngroups:\n  - {variants: [sm], seeds: [0]}\n")
    words = ["study", str(study)] if verb == "study" else ["train", "variant=sm", "study=small"]
    words += [*(word for word in tiny if verb == "train" or not word.startswith("preset=")), f"runs_dir={tmp_path}"]
    lines = []

    def watch(*_: object, **__: object) -> None:
        main(["status", str(tmp_path / "small")])
        lines.extend(capsys.readouterr().out.splitlines())
        raise ValueError("no text")

    module = import_module(f"normfree.training.{'jobs' if verb == 'study' else 'train'}")
    monkeypatch.setattr(module, "prepare", watch)
    assert run(*words, f"cache_dir={cache}")[0] == 1
    place = tmp_path / "small" if verb == "study" else tmp_path / "small" / "sm-seed0"
    assert lines == [f"{place}  preparing the text"]
