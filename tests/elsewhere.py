"""Another interpreter in which normfree is not installed, as with those who only load a saved model."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

WITHOUT_NORMFREE = """
import json, sys

sys.modules["normfree"] = None  # so that importing it fails
"""
LOADING = f"""{WITHOUT_NORMFREE}
import torch, transformers

saved, auto, tensors, again = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(saved, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
inputs = torch.load(tensors)
results = [model(**inputs).logits]
if model.can_generate():
    results.append(model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False, pad_token_id=0))
model.save_pretrained(again)
torch.save(results, tensors)
"""


def check_loading_elsewhere(model: Any, auto: str, inputs: dict[str, torch.Tensor], folder: Path) -> None:
    """The saved model gives the same logits and the same text there, and can be saved again."""
    saved, tensors, again = (str(folder / name) for name in ("saved", "tensors.pt", "again"))
    model.save_pretrained(saved)
    torch.save(inputs, tensors)
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error", "-c", LOADING, saved, auto, tensors, again]
    subprocess.run(command, env=environment, cwd=folder, check=True)
    logits, *text = torch.load(tensors)
    torch.testing.assert_close(logits, model(**inputs).logits)
    if text:
        expected = model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(*text, expected)
    assert {path.name for path in Path(saved).glob("*.py")} == {path.name for path in Path(again).glob("*.py")}
