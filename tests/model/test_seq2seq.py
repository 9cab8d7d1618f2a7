"""The family encoder_decoder: T5's logits, what each stack sees, span corruption, and saving."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from normfree import measure
from normfree.measures import open_measures
from normfree.measures.held_out import measure_batches
from normfree.measures.measure import values_of
from normfree.model import HEADS
from normfree.model.conversion import convert
from normfree.model.spans import corrupt, masked_and_spans
from tests.elsewhere import check_loading_elsewhere
from tests.small_model import CHOICES, SMALL, family_model, with_noise

SOURCE = torch.randint(0, 50, (2, 19), generator=torch.Generator().manual_seed(3))
TARGET = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(4))
PAIR = {"input_ids": SOURCE, "decoder_input_ids": TARGET}


build = partial(family_model, "encoder_decoder", vocab_size=61, max_position_embeddings=32)


@pytest.mark.parametrize(("form", "tied"), [("relu", True), ("gated-gelu", False)], ids=["original", "v1.1"])
def test_a_t5_of_transformers_has_equal_logits(form: str, tied: bool) -> None:
    torch.manual_seed(0)
    sizes = {"num_decoder_layers": 3, "d_kv": 8, "d_ff": 48, "decoder_start_token_id": 0, "pad_token_id": 1}
    sizes |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "initializer_factor": 0.3}
    config = T5Config(**SMALL, vocab_size=61, **sizes, feed_forward_proj=form, tie_word_embeddings=tied)
    theirs = with_noise(T5ForConditionalGeneration(config))
    ours = convert(theirs)
    mask = torch.ones_like(SOURCE)
    mask[0, 11:] = 0
    for inputs in (PAIR, {**PAIR, "attention_mask": mask}):
        torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours(SOURCE, labels=TARGET).loss, theirs(SOURCE, labels=TARGET).loss, atol=1e-5, rtol=0)
    written = [each.generate(SOURCE, max_new_tokens=6, do_sample=False) for each in (ours, theirs)]
    assert torch.equal(*written)


@pytest.mark.parametrize("position", ["learned", "rotary", "relative"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_group_of_heads_has_its_own_ceiling(position: str, attention: str) -> None:
    model = build(position=position)
    model.set_attn_implementation("eager")
    seen = model(**PAIR, output_attentions=True)
    weights = [*seen.encoder_attentions, *seen.decoder_attentions, *seen.cross_attentions]
    model.set_attn_implementation(attention)
    measured = measure(model, PAIR, "heads")
    groups = ("encoder", "decoder", "cross")
    assert measured.layers["entropy_nats"] == [f"{group} {layer}" for group in groups for layer in range(3)]
    causal = sum(map(math.log, range(1, 8))) / 7
    np.testing.assert_allclose(measured["ceiling_nats"], np.repeat([math.log(19), causal, math.log(19)], 3))
    for entropies_H, weights_BHTS in zip(measured["entropy_nats"], weights, strict=True):
        shares_BHTS = (weights_BHTS / weights_BHTS.sum(-1, keepdim=True)).double()
        truth_H = torch.special.entr(shares_BHTS).sum(-1).mean((0, 2))
        np.testing.assert_allclose(entropies_H, truth_H.detach(), atol=2e-5)


def test_padding_changes_no_measure() -> None:
    model, rows_BT, alone, values = build(target_tokens=8, eos_token_id=60), torch.full((2, 32), 60), [], []
    for row_T, source, target in zip(rows_BT, (5, 17), (7, 2), strict=True):
        row_T[:source], row_T[24 : 24 + target] = SOURCE[0, :source], TARGET[0, :target]
        labels = row_T[None, 24 : 25 + target]
        before = torch.cat([row_T[None, -1:], labels[:, :-1]], dim=1)
        alone.append({"input_ids": row_T[None, : source + 1], "decoder_input_ids": before, "labels": labels})
    names = ["heads", "sinks", "logits", "residual", "ranges", "losses", "spectrum", "propagation", "perplexity"]
    for batches in ([model.batch_of(rows_BT)], alone):
        measures = open_measures(names, model)
        measure_batches(model, batches, measures)
        values.append(values_of(measures))
    assert values[0].keys() == values[1].keys()
    for quantity, expected in values[1].items():
        np.testing.assert_allclose(values[0][quantity], expected, rtol=2e-4, atol=1e-5, err_msg=quantity)


@pytest.mark.parametrize("position", ["rotary", "relative"])
def test_training_in_bf16_is_that_in_fp32(position: str) -> None:
    model = build(position=position, final_norm="rmsnorm").train()
    exact = model(SOURCE, labels=TARGET).loss
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(SOURCE, labels=TARGET).loss
    weight = model.model.encoder.layers[0].attention.qkv.weight
    gradients = [torch.autograd.grad(loss, weight)[0] for loss in (exact, rounded)]
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
    assert torch.nn.functional.cosine_similarity(*(each.flatten() for each in gradients), dim=0) > 0.99


@pytest.mark.parametrize("form", [*CHOICES, {"position": "relative", "feed_forward": "gated", "norm": "lns"}])
def test_every_parameter_of_every_choice_has_a_gradient(form, tmp_path) -> None:
    decoders = ("position", "taper", 8)  # what is refused below
    fields = {name: value for name, value in form.items() if value not in decoders}
    model = build(**fields).train()
    loss = model(SOURCE, labels=TARGET).loss
    torch.testing.assert_close(model(SOURCE, labels=TARGET, return_logits=False).loss, loss)
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    one = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": True})
    model(SOURCE, labels=TARGET).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, one[name])
    logits = model.eval()(**PAIR).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**PAIR).logits, logits)
    loaded.set_attn_implementation("eager")
    torch.testing.assert_close(loaded(**PAIR).logits, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("tokens", "masked", "spans"), [(32, 5, 2), (128, 19, 6), (2, 1, 1)])
def test_source_and_target_hold_the_block_once(tokens: int, masked: int, spans: int) -> None:
    config = HEADS["encoder_decoder"].config_class(vocab_size=61)
    blocks_BT = torch.randint(0, 50, (64, tokens), generator=torch.Generator().manual_seed(0))
    sources, targets = corrupt(blocks_BT, config)
    assert (masked, spans) == masked_and_spans(tokens, config)
    assert (sources.shape[1], targets.shape[1]) == (tokens - masked + spans, masked + spans + 1)
    first, end = 61 - spans - 1, 60
    for block, source, target in zip(blocks_BT.tolist(), sources.tolist(), targets.tolist(), strict=True):
        assert target[-1] == end
        filled = []
        for token in source:
            start = target.index(token) + 1 if token >= first else None
            stop = target.index(token + 1) if token >= first else None
            assert start is None or start < stop
            filled += [token] if start is None else target[start:stop]
        assert filled == block
    again = corrupt(blocks_BT[1:2], config)
    assert torch.equal(again[0], sources[1:2])
    other = HEADS["encoder_decoder"].config_class(vocab_size=61, span_seed=1)
    assert tokens == 2 or not torch.equal(corrupt(blocks_BT, other)[0], sources)


def test_spans_are_spread_evenly_over_a_block() -> None:
    config = HEADS["encoder_decoder"].config_class(vocab_size=2000)
    blocks_BT = torch.arange(20000)[:, None] * 7 % 1800 + torch.arange(32)
    masked_BT = ~(blocks_BT[:, :, None] == corrupt(blocks_BT, config)[0][:, None]).any(-1)
    lengths = masked_BT[:, -5:].flip(1).long().cumprod(1).sum(1)  # of the last span, 1 to 4 of 5 in two spans
    assert torch.bincount(lengths)[1:5] / 20000 == pytest.approx(torch.full((4,), 0.25), abs=0.015)
    assert (masked_BT.sum(1) == 5).all()


@pytest.mark.slow
def test_a_saved_model_loads_where_normfree_is_missing(tmp_path) -> None:
    check_loading_elsewhere(build(norm="none", position="relative"), "AutoModelForSeq2SeqLM", PAIR, tmp_path)
