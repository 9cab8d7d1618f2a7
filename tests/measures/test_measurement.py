"""`measure()` and `MeasureCallback`: the numbers, the table, the heatmap."""

import math

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from normfree.measures.measurement import MeasureCallback, measure
from tests.measures.byte_model import byte_tokenizer


def test_measures_agree_with_the_models_own_attention_matrices(model):
    ids_NT = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    measured = measure(model, ids_NT, batch=3)
    model.set_attn_implementation("eager")
    model.eval()
    with torch.no_grad():
        attentions = model(ids_NT, output_attentions=True).attentions
    for layer, p_BHTS in enumerate(attentions):
        expected_H = torch.special.entr(p_BHTS.double()).sum(-1).mean((0, 2))
        assert measured["entropy_nats"][layer] == pytest.approx(expected_H.tolist(), abs=2e-5)
        first_H = p_BHTS[..., 0].double().mean((0, 2))
        assert measured["first_token_mass"][layer] == pytest.approx(first_H.tolist(), abs=1e-5)
        back_TS = torch.arange(32)[:, None] - torch.arange(32)
        distance_H = (p_BHTS.double() * back_TS).sum(-1).mean((0, 2))
        assert measured["distance_tokens"][layer] == pytest.approx(distance_H.tolist(), abs=1e-4)
    assert measured["ceiling_nats"] == pytest.approx([math.lgamma(33) / 32] * 3)
    assert measured["rows"].tolist() == [[4 * 32] * 2] * 3


def test_a_measurement_is_a_table_a_heatmap_and_html(model):
    ids_T = torch.arange(20)
    measured = measure(model, ids_T, ["heads", "perplexity"])
    frame = measured.to_frame()
    assert list(frame.columns[:3]) == ["layer", "head", "entropy_nats"]
    assert len(frame) == 3 * 2
    row = frame[(frame.layer == 2) & (frame["head"] == 1)].iloc[0]
    assert row.entropy_nats == measured["entropy_nats"][2, 1]
    assert row.ceiling_nats == measured["ceiling_nats"][2]
    assert row.loss == measured["loss"]
    model.eval()
    with torch.no_grad():
        loss = model(input_ids=ids_T[None], labels=ids_T[None]).loss.item()
    assert float(measured["loss"]) == pytest.approx(loss, rel=1e-6)
    for name, rows in (("residual", 3), ("perplexity", 1)):  # one row a layer, or one
        assert len(measure(model, ids_T, name).to_frame()) == rows
    assert "entropy_nats" in measured._repr_html_()
    assert measured.plot("first_token_mass").figure.axes[1].get_ylabel() == "Attention on the first token"
    with pytest.raises(ValueError, match="'loss' was not measured for each head; there are: entropy_nats, rows"):
        measured.plot("loss")


def test_options_of_what_is_not_measured_are_refused(model):
    with pytest.raises(ValueError, match="method= is no chosen measure"):
        measure(model, torch.arange(8), "heads", method="eager")


def test_the_callback_measures_in_any_trainer(model, tmp_path):
    ids_NT = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": ids_T, "labels": ids_T} for ids_T in ids_NT]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, use_cpu=True, save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    before = measure(model, ids_NT)["entropy_nats"]
    callback = MeasureCallback("heads", inputs=ids_NT, every=3)
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback]).train()
    assert list(callback.history) == [0, 3, 4]
    assert np.allclose(callback.history[0]["entropy_nats"], before, atol=1e-6)
    assert np.allclose(callback.history[4]["entropy_nats"], measure(model, ids_NT)["entropy_nats"], atol=1e-6)
    assert len(callback.to_frame()) == 3 * 3 * 2
    early = MeasureCallback("heads", inputs=ids_NT.numpy(), every=100)
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[early, Stop()]).train()
    assert list(early.history) == [0, 1]


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = True


@pytest.mark.parametrize("inputs", ["", ["a", "b"], torch.zeros(0, 4, dtype=torch.long)], ids=["none", "list", "rows"])
def test_inputs_that_are_no_tokens_are_refused(model, inputs):
    with pytest.raises(ValueError, match=r"nothing to measure|give a text, token ids"):
        measure(model, inputs, tokenizer=byte_tokenizer())
