"""The decoder: causality, caching, padding, initial weights, gradients."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from normfree.model import NormFreeConfig, NormFreeForCausalLM
from tests.small_model import CHOICES, SIZES

FORMS = [
    pytest.param({"position": position, "residual": residual, "norm": norm}, id=f"{position}-{residual}-{norm}")
    for position in ("learned", "rotary")
    for residual in ("sequential", "parallel")
    for norm in ("layernorm", "none")
] + [pytest.param(form, id=f"choices-{number}") for number, form in enumerate(CHOICES)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_flows_from_a_position_to_later_tokens(build, ids, form, attention):
    model = build(attention=attention, **form)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    for position in (0, 5, 11):
        logits = model(inputs_embeds=embeddings).logits
        (gradient,) = torch.autograd.grad(logits[:, position].square().sum(), embeddings)
        reached = gradient.abs().sum(-1) > 0
        assert reached[:, : position + 1].all()
        assert not reached[:, position + 1 :].any()


def test_a_boolean_mask_hides_keys_in_sdpa_and_eager(build, ids):
    near = torch.ones(12, 12, dtype=torch.bool).tril().triu(-2).expand(2, 1, 12, 12)
    fused = build(norm="none")(ids, attention_mask=near)
    written = build(norm="none", attention="eager")(ids, attention_mask=near, output_attentions=True)
    torch.testing.assert_close(written.logits, fused.logits)
    assert not any(weights[~near.expand_as(weights)].any() for weights in written.attentions)


TWO_TEXTS = torch.cat([torch.arange(5), torch.arange(7)])[None].expand(2, -1)


def test_texts_in_one_row_are_separate(build, ids):
    model = build()
    alone = torch.cat([model(ids[:, :5]).logits, model(ids[:, 5:]).logits], dim=1)
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(ids, position_ids=TWO_TEXTS).logits, alone)


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_a_model_of_shapes_only_runs(build, ids, position):
    model = build(position=position).to("meta")
    for positions in (None, torch.arange(12, device="meta")[None]):
        assert model(ids.to("meta"), position_ids=positions).logits.shape == (2, 12, 61)
    with FakeTensorMode():
        fake = NormFreeForCausalLM(model.config).eval()(torch.zeros(2, 12, dtype=torch.long))
    assert fake.logits.shape == (2, 12, 61)


@pytest.mark.parametrize("form", FORMS[:2])
def test_an_exported_model_separates_texts_in_one_row(build, ids, form, monkeypatch):
    monkeypatch.setattr(torch.backends, "fp32_precision", "none")  # export fails if a command has set it here
    model = build(**form)
    inputs = {"input_ids": ids, "position_ids": TWO_TEXTS, "use_cache": False}
    exported = torch.export.export(model, (), inputs, strict=False).module()
    torch.testing.assert_close(exported(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("form", FORMS)
def test_padding_does_not_change_real_tokens(build, ids, form):
    model = build(**form)
    alone = model(ids[:1, 4:]).logits
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    left = model(ids, attention_mask=mask, position_ids=positions).logits[:1, 4:]
    torch.testing.assert_close(left, alone)
    right = model(ids.roll(-4, 1), attention_mask=mask.flip(1)).logits[:1, :8]
    torch.testing.assert_close(right, alone)


@pytest.mark.parametrize("form", FORMS)
def test_generation_with_and_without_cache_agrees(build, ids, form):
    model = build(**form)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, use_cache=True, **options)
    assert cached.shape == (2, 22)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_more_tokens_than_learned_positions_are_refused(build):
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    for run, tokens in ((build(), 33), (partial(build().generate, **options), 12)):
        with pytest.raises(ValueError, match="33 tokens, but max_position_embeddings=32"):
            run(torch.zeros(1, tokens, dtype=torch.long))


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_generation_ignores_left_padding(build, position):
    """4 tokens after 8 of padding: 24 more end at position 28 of 32, though the row has 36."""
    model, text = build(position=position), torch.randint(1, 61, (1, 4), generator=torch.Generator().manual_seed(3))
    padded, mask = (torch.cat([torch.zeros(1, 8, dtype=torch.long), row], 1) for row in (text, torch.ones_like(text)))
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(text, **options)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 8:], alone)


def test_loss_and_logits_of_the_next_token(build, ids):
    model = build()
    output = model(ids, labels=ids)
    chosen = output.logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    torch.testing.assert_close(output.loss, -chosen.mean())
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=44).loss, output.loss / 2)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, output.logits[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([3, 7])).logits, output.logits[:, [3, 7]])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", [{"residual": "sequential"}, {"residual": "parallel"}, *CHOICES])
def test_gradient_checkpointing_gives_equal_gradients(build, ids, form, reentrant):
    def gradients(checkpointing):
        model = build(activation="leaky_relu", learnable_slope="shared", **form).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        if "attention_sink" in form:  # rows that do not sum to 1 have no entropy
            model(ids, labels=ids).loss.backward()
        else:
            output = model(ids, labels=ids, entropy_layers=(0, 2))
            (output.loss + output.head_entropies.sum()).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize("form", [FORMS[0], *FORMS[7:]])
def test_compiles_without_graph_breaks(build, ids, form):
    model = build(**form)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits)


def test_training_builds_no_cache_unless_asked(build, ids):
    model = build().train()
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None
    assert model.eval()(ids).past_key_values is not None
    model.train().activation_checkpointing_enable()
    assert model(ids, use_cache=True).past_key_values is None


def test_dropout_acts_in_training_only(build, ids):
    for name in ("embedding_dropout", "attention_dropout", "residual_dropout"):
        model = build(**{name: 0.5})
        assert torch.equal(model(ids).logits, model(ids).logits), name
        assert not torch.equal(model.train()(ids).logits, model(ids).logits), name


@pytest.mark.parametrize("residual_init", ["flat", "scaled"])
def test_weights_start_as_stated(residual_init):
    fields = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 500}
    config = NormFreeConfig(**fields, residual_init=residual_init, initializer_range=0.05, bias="all")
    residual_std = 0.05 / 2 if residual_init == "scaled" else 0.05
    for name, parameter in NormFreeForCausalLM(config).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            expected = residual_std if ".output." in name else 0.05
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name


def test_variants_of_one_seed_start_from_the_same_matrices():
    def start(**fields):
        torch.manual_seed(5)
        return NormFreeForCausalLM(NormFreeConfig(**SIZES | fields)).state_dict()

    reference = start()
    shared_slope = {"activation": "leaky_relu", "learnable_slope": "shared"}
    for fields in ({"norm": "none"}, {"activation": "relu"}, shared_slope):
        other = start(**fields)
        assert all(torch.equal(other[name], reference[name]) for name in reference.keys() & other.keys())


@pytest.mark.parametrize("training", [False, True], ids=["fused", "written out in bf16"])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
def test_a_nan_weight_of_any_projection_reaches_the_logits(build, ids, part, training):
    """On some CPUs fused attention returns 0 for rows whose scores are all NaN."""
    model = build(norm="none").train(training)
    weight = model.model.layers[0].attention.qkv.weight
    with torch.no_grad():
        weight[part * weight.shape[1], 0] = torch.nan
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=training):
        assert model(ids).logits.isnan().all()
