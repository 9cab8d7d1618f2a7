import math
from dataclasses import replace
from typing import Any

import pytest

from normfree.spec.compose import compose_run
from normfree.spec.run import DataSpec, RunSpec

MINIMAL: dict[str, Any] = {"preset": "cpu", "variant": "sm-r", "label": "SM+R", "train": {"steps": 10}}


def spec(**changes: Any) -> RunSpec:
    return RunSpec.from_dict(MINIMAL | changes)


def test_a_spec_survives_its_own_json_and_names_of_digits() -> None:
    original = spec(data={"source": "files", "paths": ["a", "b"]}, model={"norm": "none"}, tag=100, study=2024)
    assert RunSpec.from_dict(original.to_dict()) == original
    assert (original.study, original.name) == ("2024", "sm-r-100-seed0")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"stepz": 1}}, "unknown key 'train.stepz'; did you mean train.steps"),
        ({"train": {"steps": 1, "epochs": 2}}, "train.steps and train.epochs"),
        ({"train": {}}, "train.steps and train.epochs"),
        ({"train": {"steps": 1, "peak_learning_rate": math.nan}}, "peak_learning_rate=nan: it should be a finite"),
        ({"train": {"steps": 1, "warmup_share": 1}}, "train.warmup_share=1: it should be less than 1"),
        ({"train": {"steps": 1, "final_learning_rate": 1.0}}, "must be at most train.peak_learning_rate"),
        ({"train": {"steps": 1, "batch_sequences": 10, "micro_batch_sequences": 4}}, "must be a multiple of"),
        ({"data": {"context": 1}}, "data.context=1: it should be greater than or equal to 2"),
        ({"data_seed": 2**32}, "data_seed=4294967296: it should be less than 4294967296"),
        ({"data": {"source": "files"}}, "data.paths"),
        ({"data": {"source": "hub"}}, "data.dataset"),
        ({"data": {"paths": ["a"]}}, "data.paths is not read with data=installed: leave it out, or give data=files"),
        ({"data": {"dataset": "a/b"}}, "not read with .*: leave it out, or give data=hub or data=hub_images or data"),
        ({"data": {"vocab_size": 100}}, "257 or more"),
        ({"study": "../elsewhere"}, "no slash"),
        ({"sed": 3}, "did you mean seed"),
    ],
)
def test_a_wrong_value_says_what_is_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec(**values)


def test_a_spec_built_without_a_command_is_checked_too() -> None:
    paths: Any = "corpus"
    with pytest.raises(ValueError, match="valid tuple"):
        DataSpec(source="files", paths=paths)
    with pytest.raises(ValueError, match="greater than 0"):
        replace(spec().train, steps=-1)


def test_variant_seed_and_logging_do_not_change_the_recipe() -> None:
    base = spec()
    ten: dict[str, Any] = {"steps": 10}
    same = [spec(variant="sm-g", label="SM+G", seed=3, tag="x", model={"norm": "none", "activation": "gelu"})]
    same += [spec(data_seed=1), spec(train=ten | {"decay_slopes": True, "log_every": 3, "threads": 1})]
    more: list[dict[str, Any]] = [{"peak_learning_rate": 0.5}, {"precision": "bf16"}, {"on_nonfinite": "skip:1"}]
    other = [spec(model={"hidden_size": 64}), *(spec(train=ten | each) for each in more)]
    assert {one.recipe() for one in same} == {base.recipe()}
    assert base.recipe() not in {one.recipe() for one in other}


def test_identity_changes_with_everything_that_decides_the_numbers() -> None:
    base = spec()
    passes = {"micro_batch_sequences": 2, "gradient_checkpointing": True}
    alike = replace(base, train=replace(base.train, log_every=99, threads=1, **passes))
    assert (alike.identity(), alike.recipe()) == (base.identity(), base.recipe())
    rarely = replace(base, train=replace(base.train, evaluate_every=7), probe=replace(base.probe, every_steps=7))
    assert (rarely.identity(), rarely.recipe() == base.recipe()) == (base.identity(), False)
    places = [{"paths": (path,), "tokenizer": path} for path in ("a.txt", "/b/a.txt")]
    here, there = (replace(base, data=DataSpec(source="files", **place)) for place in places)
    assert (here.identity(), here.recipe()) == (there.identity(), there.recipe())
    skips = replace(base, train=replace(base.train, on_nonfinite="skip:1"))
    for changed in (replace(base, seed=1), replace(base, tag="b"), replace(base, model={"norm": "none"}), skips):
        assert changed.identity() != base.identity()


def test_a_whole_number_is_the_same_model_as_its_float() -> None:
    words = ["variant=leaky-fixed", "model.position=rotary"]
    values = [("1", "500"), ("1.0", "500.0")]
    one, other = (compose_run([*words, f"model.negative_slope={a}", f"model.rotary_base={b}"]).spec for a, b in values)
    assert (one.identity(), one.recipe()) == (other.identity(), other.recipe())
    with pytest.raises(ValueError, match="negative_slope=True; allowed: float"):
        compose_run(["variant=leaky-fixed", "model.negative_slope=true"])
