"""A saved model is the same model, even where normfree is not installed."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from normfree.model import NormFreeForCausalLM
from tests.elsewhere import check_loading_elsewhere
from tests.small_model import CHOICES


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
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied


FORMS = [*CHOICES, {"position": "rotary", "rotary_share": 1.0, "rotary_base": 500.0}]


@pytest.mark.parametrize("form", FORMS)
def test_every_choice_survives_saving(build, ids, tmp_path, form):
    model = build(**form)
    model.save_pretrained(tmp_path)
    logits = model(ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(ids).logits, logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)(ids).logits
    assert half.dtype == torch.bfloat16
    if form is FORMS[-1]:
        torch.testing.assert_close(half.float(), logits, atol=0.5, rtol=0.1)


def test_a_saved_model_loads_where_normfree_cannot_be_imported(build, ids, tmp_path):
    model = build(activation="leaky_relu", learnable_slope="shared", **CHOICES[1])
    check_loading_elsewhere(model, "AutoModelForCausalLM", {"input_ids": ids}, tmp_path)
