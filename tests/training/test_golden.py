"""The first twenty losses of every preset, shrunk in width, against numbers that were committed.

A change of tests/golden/losses.json changes what the project computes: explain it in CHANGELOG.md.
`python -m tests.training.test_golden` writes the file anew. The text is fixed, independent of Python and packages.
"""

import json
import tempfile
from pathlib import Path

import pytest

from normfree import read_run, train
from normfree.spec.compose import compose_run, compose_unchecked, members
from normfree.spec.run import RunSpec
from tests.images import write_digits

GOLDEN = Path(__file__).parents[1] / "golden"
LOSSES = GOLDEN / "losses.json"
TOLERANCE = 5e-6  # 25 times what AVX512, AVX2 and a processor without vector units differ by
STEPS = 20
VARIANTS = {
    "cpu": "sm-g",
    "cpu-pythia": "sm-r",
    "cpu-quick": "sm-ln-g",
    "denoise": "sm-g",
    "fashion-vit": "sm-g",
    "gpt2-1.3b": "sm-ln-r",
    "gpt2-t128": "leaky-per-layer",
    "llama-1b-shape": "sm-rms-g",
    "pythia-1b": "sm-g",
    "pythia70m-t128": "sm-g",
    "pythia70m-t256": "sm-r",
}


def on_text(context: int) -> list[str]:
    paths = [f"data.paths=['{GOLDEN}/text/train.txt']", f"data.validation_paths=['{GOLDEN}/text/held_out']"]
    return ["data=files", *paths, f"data.context={min(context, 256)}", *WHOLE_TEXT.split()]


WHOLE_TEXT = """
    data.vocab_size=300 data.max_bytes=null data.max_bytes_per_package=null data.train_documents=null
    data.validation_documents=null
"""
SHRUNK = f"""
    model.hidden_size=32 model.num_attention_heads=2 train.steps={STEPS} train.epochs=null train.precision=fp32
    train.log_every=1 train.evaluate_every=1000 train.checkpoint_every=1000 train.threads=1 probe.every_steps=1000
    probe.sequences=2 probe.final_sequences=2
"""


def shrunk(preset: str, variant: str, digits: Path) -> RunSpec:
    """A preset at width 32 on the fixed text or digits, in fp32, a small batch, at most 12 layers and T = 256."""
    whole = compose_unchecked({"preset": preset, "variant": variant})
    images = ["data=images", f"data.paths=['{digits}']", "model.image_size=8", "model.patch_size=2"]
    is_vision = whole.model.get("family") == "vision"
    batch = 16 if is_vision else 2  # the losses of two images are too noisy to fall in twenty steps
    layers = min(whole.model["num_hidden_layers"], 12)
    overrides = [f"preset={preset}", f"variant={variant}", *(images if is_vision else on_text(whole.data.context))]
    overrides += [f"model.num_hidden_layers={layers}", f"train.batch_sequences={batch}"]
    return compose_run([*overrides, f"train.micro_batch_sequences={batch}", *SHRUNK.split()]).spec


def losses(preset: str, variant: str, runs: Path, cache: Path) -> list[float]:
    digits = write_digits(runs / "digits", 400)
    folder = train(shrunk(preset, variant, digits), runs_dir=runs / preset, cache=cache, progress=False)
    return [loss for _, loss in read_run(folder).series("train", "loss")]


@pytest.mark.parametrize(("preset", "variant"), [(preset, VARIANTS[preset]) for preset in members("preset")])
def test_the_first_losses_are_those_committed(preset: str, variant: str, tmp_path: Path, cache: Path) -> None:
    committed = json.loads(LOSSES.read_text())[f"{preset} {variant}"]
    measured = losses(preset, variant, tmp_path, cache)
    assert len(measured) == STEPS
    assert measured == pytest.approx(committed, rel=TOLERANCE)


def write() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        values = {" ".join(pair): losses(*pair, folder, folder / "cache") for pair in VARIANTS.items()}
    LOSSES.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    write()
