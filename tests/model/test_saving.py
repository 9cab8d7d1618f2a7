"""A saved model is the same model, even where normfree is not installed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from normfree.model import NormFreeForCausalLM
from tests.elsewhere import WITHOUT_NORMFREE
from tests.small_model import CHOICES

ELSEWHERE = f"""{WITHOUT_NORMFREE}
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.tensor(json.loads(sys.argv[2]))
generated = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
model.save_pretrained(sys.argv[3])
assert not any(name.partition(".")[0] == "normfree" for name in sys.modules)
print(json.dumps({{"generated": generated.tolist(), "logits": model(ids).logits.tolist(),
                  "module": type(model).__module__}}))
"""


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("learnable", ["per_layer", "shared"])
def test_slopes_survive_saving(build, ids, tmp_path, tied, learnable):
    model = build(activation="leaky_relu", learnable_slope=learnable, tie_word_embeddings=tied)
    with torch.no_grad():
        for number, name in enumerate(model.negative_slopes()):
            model.get_parameter(name).fill_(0.123 + number)
    model.save_pretrained(tmp_path)
    loaded = NormFreeForCausalLM.from_pretrained(tmp_path)
    assert loaded.negative_slopes() == model.negative_slopes()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids, **options), model.generate(ids, **options))
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_rotary_frequencies_survive_loading(build, ids, tmp_path, share):
    model = build(position="rotary", rotary_share=share, rotary_base=500.0)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("form", CHOICES)
def test_every_choice_survives_saving(build, ids, tmp_path, form):
    model = build(**form)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16


def test_attention_and_dtype_can_be_chosen_when_loading(build, ids, tmp_path):
    model = build(position="rotary")
    model.save_pretrained(tmp_path)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(ids).logits, model(ids).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16
    torch.testing.assert_close(half(ids).logits.float(), model(ids).logits, atol=0.5, rtol=0.1)


def test_a_saved_model_loads_where_normfree_cannot_be_imported(build, ids, tmp_path):
    model = build(activation="leaky_relu", learnable_slope="shared", **CHOICES[1])
    saved, again = tmp_path / "saved", tmp_path / "again"
    model.save_pretrained(saved)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error", "-c", ELSEWHERE, str(saved), json.dumps(ids.tolist()), str(again)]
    finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    answer = json.loads(finished.stdout.strip().splitlines()[-1])
    assert answer["module"].startswith("transformers_modules.")
    torch.testing.assert_close(torch.tensor(answer["logits"]), model(ids).logits)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert answer["generated"] == expected.tolist()
    assert {path.name for path in saved.glob("*.py")} == {path.name for path in again.glob("*.py")}
