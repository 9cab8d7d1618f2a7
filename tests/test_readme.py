"""README.md and docs/ keep their word: commands run, tables are what results/ give, and the README stays short."""

import re
import runpy
import shlex
import shutil
import statistics
from pathlib import Path

import pytest

from docs.tables import filled, pages
from normfree.cli.main import VERBS
from normfree.spec.compose import compose_runs
from normfree.spec.run import recipe_of
from normfree.spec.study import load_study
from normfree.store.runs import find_runs
from normfree.training.jobs import read_launch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = (ROOT / "docs" / "commands.md").read_text()
# The study of the docs takes minutes; these keep the same path and shrink it to seconds.
TINY = """
    data.max_bytes=400000 data.validation_documents=3 data.vocab_size=400 data.context=32 model.hidden_size=32
    model.num_hidden_layers=2 train.steps=3 train.batch_sequences=8 train.micro_batch_sequences=8 train.threads=1
    probe.final_sequences=8 probe.sequences=4
"""


def commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", COMMANDS, re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("normfree ")]


def test_the_docs_show_every_verb_and_the_readme_is_short() -> None:
    assert {words[0] for words in commands()} == set(VERBS)
    assert len(README.split()) < 900


def test_links_between_pages_and_to_files_exist() -> None:
    for page in pages():
        for path in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            assert (page.parent / path).exists(), f"{page.name}: {path}"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_tables_match_the_committed_records(page: Path) -> None:
    text = page.read_text()
    assert filled(text) == text, "run `make tables`"


def test_a_number_that_was_changed_by_hand_is_seen() -> None:
    page = (ROOT / "docs" / "study.md").read_text()
    changed = page.replace("| 71 %, 66.1 |", "| 71 %, 245.8 |")
    assert changed != page
    assert filled(changed) == page


def test_every_finished_committed_run_beats_token_frequencies() -> None:
    finished = [run for run in find_runs([ROOT / "results"]) if (run.kind, run.status) == ("run", "finished")]
    assert len(finished) > 50
    for run in finished:
        assert run.perplexity < 0.5 * run.facts["corpus"]["unigram_perplexity"], run.name


def test_headlines_hold_when_recomputed_without_the_package() -> None:
    numbers = runpy.run_path(str(ROOT / "results" / "recompute.py"))["headlines"]()

    def interval(name: str, digits: int, sign: int = 1) -> str:
        low, high = sorted(sign * numbers[name][end] for end in ("low", "high"))
        return f"{low:.{digits}f} to {high:.{digits}f}"

    relu, shape = numbers["cpu-lr1e-3: SM+R against SM+G"], numbers["cpu-pythia: SM+R against SM+G"]
    gelu_heads, relu_heads = (numbers[f"cpu-lr1e-3: near uniform, {label}"]["mean"] for label in ("SM+G", "SM+R"))
    readme, findings = (" ".join(text.split()) for text in (README, (ROOT / "docs" / "findings.md").read_text()))
    assert f"{-relu['mean']:.1f} % lower ({interval('cpu-lr1e-3: SM+R against SM+G', 1, -1)}" in readme
    assert f"{gelu_heads:.0f} %, ReLU {relu_heads:.0f} %" in readme
    assert f"(difference {interval('cpu-lr1e-3: near uniform, SM+G less SM+R', 0)} points)" in readme
    assert f"{-shape['mean']:.1f} % lower ({interval('cpu-pythia: SM+R against SM+G', 1, -1)}" in readme
    for study in ("cpu", "cpu-lr1e-3"):
        for name in ("SM+R against SM+G", "SM+LN+R against SM+LN+G"):
            low, high = (f"{numbers[f'{study}: {name}'][end]:+.1f}" for end in ("low", "high"))
            assert f"| {low} to {high} % |" in findings
        low, high = (numbers[f"{study}: SM+G against SM+LN+G"][end] for end in ("low", "high"))
        assert f"({low:.1f} to {high:+.1f})" in findings


@pytest.mark.parametrize(
    ("name", "folder", "original"),
    [("sm-r", "cpu-repeated", "cpu"), ("sm-r", "gpu-repeated", "cpu-lr1e-3"), ("sm-g", "gpu-repeated", "cpu-lr1e-3")],
)
def test_a_repeated_row_lies_within_its_seed_spread(name: str, folder: str, original: str) -> None:
    (again,) = find_runs([ROOT / "results" / folder / f"{name}-seed0"])
    seeds = {run.seed: run for run in find_runs(sorted((ROOT / "results" / original).glob(f"{name}-seed*")))}
    record = seeds[again.seed]
    assert recipe_of(again.spec) == recipe_of(record.spec)
    where = [[run.facts["environment"][key] for key in ("device", "instruction_set")] for run in (again, record)]
    assert where[0] != where[1]
    spread = statistics.stdev(run.perplexity for run in seeds.values())
    assert 0 < abs(again.perplexity - record.perplexity) < spread


TRAINING = (ROOT / "docs" / "training.md").read_text()


# A command with start= needs weights: tests/training/test_start.py has those.
@pytest.mark.parametrize("line", re.findall(r"^(?:normfree train|torchrun) (?!start=).*", TRAINING, re.MULTILINE))
def test_a_training_command_of_the_docs_composes_a_run(line: str) -> None:
    words = shlex.split(line)
    _, keys = read_launch([word for word in words[words.index("train") + 1 :] if word != "-m"])
    spec = compose_runs(keys)[0].spec
    if "--nproc_per_node" in words:
        processes = int(words[words.index("--nproc_per_node") + 1])
        assert spec.train.batch_sequences % (spec.train.micro_batch_sequences * processes) == 0


def test_the_study_of_the_docs_is_one(tmp_path: Path) -> None:
    (yaml,) = re.findall(r"```yaml\n(.*?)```", TRAINING, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(yaml)
    names = [job.spec.name for job in load_study(str(tmp_path / "mine.yaml")).jobs()]
    assert len(set(names)) == 7
    assert "leaky-per-layer-start0.25-seed0" in names


@pytest.mark.slow
def test_the_commands_of_the_docs_run_in_their_order(tmp_path: Path, monkeypatch, output) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NORMFREE_CACHE", str(tmp_path / "cache"))
    shutil.copy(ROOT / "README.md", tmp_path)
    for words in commands():
        trains = VERBS[words[0]].options is None and words[0] != "estimate"
        smaller = TINY.split() if trains or words[0] == "data" else []
        output(*words, *(word for word in smaller if trains or word.startswith("data.")))
    assert (tmp_path / "runs" / "quick" / "report" / "index.html").is_file()
    assert (tmp_path / "report" / "index.html").is_file()
