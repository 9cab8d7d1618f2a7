"""Study files: the runs they stand for."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from normfree.spec.compose import Job, members
from normfree.spec.run import own_values
from normfree.spec.study import load_study


@pytest.mark.parametrize("name", sorted({*members("studies")} - {"fine-tune"}))  # it needs runs to begin with
def test_runs_of_a_shipped_study_all_differ(name: str) -> None:
    specs = [job.spec for job in load_study(name).jobs()]
    assert {spec.study for spec in specs} == {name}
    assert len({spec.name for spec in specs}) == len({spec.identity() for spec in specs}) == len(specs)


def test_names_that_look_like_numbers_stay_names(tmp_path: Path) -> None:
    (tmp_path / "2024_11.yaml").write_text(
        "preset: cpu\ngroups: [{variants: [sm], tag: 1e-3}, {variants: [sm], tag: 100}]\n"
    )
    specs = [job.spec for job in load_study(str(tmp_path / "2024_11.yaml")).jobs()]
    assert [(spec.study, spec.name) for spec in specs] == [("2024_11", "sm-1e-3-seed0"), ("2024_11", "sm-100-seed0")]


def test_special_characters_in_a_study_file_reach_the_run(tmp_path: Path) -> None:
    paths = ["my corpus/a=b, c.py", "it's \\ here/*.txt", "2023_01"]
    values = {"data": "files", "data.paths": paths, "train.peak_learning_rate": "1e-3", "data.tokenizer": "true"}
    file = {"preset": "cpu", "groups": [{"variants": ["sm"], "tag": "it's, mine"}], "set": values}
    (tmp_path / "dave's.yaml").write_text(yaml.safe_dump(file))
    (job,) = load_study(str(tmp_path / "dave's.yaml")).jobs()
    spec = job.spec
    assert (spec.study, spec.tag) == ("dave's", "it's, mine")
    assert list(spec.data.paths) == paths
    assert (spec.data.source, spec.data.tokenizer, spec.train.peak_learning_rate) == ("files", "true", 1e-3)


@pytest.mark.parametrize(("data_seed", "orders"), [("same", [100, 101]), (7, [7, 7]), (None, [3, 3])])
def test_a_group_says_the_order_of_its_data(data_seed: Any, orders: list[int], tmp_path: Path) -> None:
    group = {"variants": ["sm"], "seeds": [100, 101]} | ({"data_seed": data_seed} if data_seed else {})
    file = {"preset": "cpu", "groups": [group], "set": {"data_seed": 3}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(file))
    jobs = load_study(str(tmp_path / "s.yaml")).jobs()
    assert [job.spec.seed for job in jobs] == [100, 101]
    assert [job.spec.data_seed for job in jobs] == orders


def test_variants_of_a_study_may_have_rates_of_their_own(tmp_path: Path) -> None:
    """As a study that confirms a learning rate for each variant on fresh seeds."""
    seeds = {"seeds": [*range(100, 108)], "data_seed": "same"}
    rates = {"sm-g": "1.4e-3", "sm-r": "2.0e-3", "sm-ln-g": "2.8e-3", "sm-ln-r": "4.0e-3"}
    groups = [{"variants": [name], "set": {"train.peak_learning_rate": rates[name]}, **seeds} for name in rates]
    study = {"preset": "cpu", "compare_across": ["train.peak_learning_rate"], "groups": groups}

    def jobs(**changes: Any) -> list[Job]:
        (tmp_path / "confirm.yaml").write_text(yaml.safe_dump(study | changes))
        return load_study(str(tmp_path / "confirm.yaml")).jobs()

    specs = [job.spec for job in jobs()]
    assert len({spec.name for spec in specs}) == len(specs) == 32
    assert {(spec.seed, spec.data_seed) for spec in specs} == {(seed, seed) for seed in range(100, 108)}
    assert [spec.variant for spec in specs[:4]] == ["sm-g", "sm-r", "sm-ln-g", "sm-ln-r"]  # then the next seed
    assert len({spec.recipe() for spec in specs}) == 1
    assert own_values(specs[-1].to_dict()) == {"train.peak_learning_rate": 4e-3}
    undeclared = [job.spec for job in jobs(compare_across=[], mix=True)]
    assert [(spec.name, spec.identity()) for spec in undeclared] == [(spec.name, spec.identity()) for spec in specs]
    assert len({spec.recipe() for spec in (*specs, *undeclared)}) == 5
    with pytest.raises(ValueError, match="add mix: true"):
        jobs(compare_across=[])
    with pytest.raises(ValueError, match="add mix: true"):  # another tokenizer gives another corpus
        jobs(groups=[*groups[1:], {**groups[0], "set": groups[0]["set"] | {"data.tokenizer": "gpt2"}}])
    with pytest.raises(ValueError, match=r"compare_across=train\.lr is no setting of a run; did you mean train"):
        jobs(compare_across=["train.lr"])
    more = {"variants": ["sm-g"], "seeds": [9], "set": {"train.peak_learning_rate": 3e-3}}
    with pytest.raises(ValueError, match=r"sm-g-seed100 and sm-g-seed9 are .*rate.: 0\.0014} and {.*: 0\.003}"):
        jobs(groups=[*groups, more])
    assert len(jobs(groups=[*groups, more | {"tag": "lr3e-3"}])) == 33
