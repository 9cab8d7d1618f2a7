"""Encoders, encoder-decoders and models of images: groups of heads against eager matrices, each with its ceiling."""

# B batch, H heads, T query, S key

import json
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, BertConfig, BertLMHeadModel
from transformers.models.auto import modeling_auto

from normfree.entropy import EntropyProbe, HeadEntropy
from normfree.entropy.layers import attention_layers
from tests.entropy.families import tiny_model
from tests.entropy.kinds import IDS, PADDED, SIDES, TARGETS, inputs_of, matrices_of, real_queries, tiny_kind

FAST = ["bert", "bart", "t5", "vit", "clip", "whisper"]
SLOW = """
    altclip beit blenderbot blenderbot-small camembert chinese_clip data2vec-text deit dinov2 dinov2_with_registers
    distilbert electra ernie esm eurobert gte ijepa jina_embeddings_v3 layoutlm m2m_100 marian mbart metaclip_2
    modernbert mt5 nllb-moe nomic_bert pegasus plbart roberta roberta-prelayernorm roc_bert siglip swin
    switch_transformers t5gemma ultrabert umt5 vit_msn xlm-roberta xlm-roberta-xl
"""
SWIN = {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 16, "patch_size": 2, "window_size": 4, "image_size": 16}


def measure(model, inputs, method="auto", **options) -> HeadEntropy:
    with EntropyProbe(model, method, **options) as probe, torch.no_grad():
        model(**inputs)
    return probe.statistics()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", FAST + [pytest.param(name, marks=pytest.mark.slow) for name in SLOW.split()])
def test_every_group_agrees_with_its_eager_matrices(family, side):
    model = tiny_kind(family, **SWIN if family == "swin" else {})
    inputs = inputs_of(model, side)
    heads, matrices = measure(model, inputs), matrices_of(model, inputs)
    assert sorted(map(str, heads.layers)) == sorted(matrices)
    if family == "bart":
        assert heads.layers == list(matrices)
    assert heads.nonfinite_rows.sum() == 0
    for place, layer in enumerate(map(str, heads.layers)):
        p_BHTS = matrices[layer]
        real_BHT = real_queries(layer, p_BHTS, inputs)[:, None].expand(p_BHTS.shape[:3])
        rows = real_BHT.sum((0, 2))
        nats_H = (torch.special.entr(p_BHTS).sum(-1) * real_BHT).sum((0, 2)) / rows
        ceiling = ((p_BHTS > 0).sum(-1).log() * real_BHT).sum() / real_BHT.sum()
        measured_H = heads.mean_nats()[place, : len(rows)]
        assert (measured_H - nats_H).abs().max() < 2e-5
        assert heads.rows[place, : len(rows)].tolist() == rows.tolist()
        assert heads.ceiling_nats()[place] == pytest.approx(ceiling.item(), abs=1e-6)
        assert 0.05 < measured_H.mean() < ceiling


def test_cross_attention_has_a_first_token_but_no_distance():
    model = tiny_kind("t5")
    inputs = inputs_of(model)
    heads, matrices = measure(model, inputs, patterns=True), matrices_of(model, inputs)
    assert heads.mean_distance()[:4].isfinite().all()
    assert heads.mean_distance()[4:].isnan().all()
    first_B = PADDED.argmax(1)
    for place, layer in enumerate(heads.layers):
        if "cross" in str(layer):
            p_BHTS = matrices[str(layer)]
            real_BT = inputs["decoder_attention_mask"].double()
            mass_H = sum(p_BHTS[b, :, :, first_B[b]] @ real_BT[b] for b in range(2)) / real_BT.sum()
            torch.testing.assert_close(heads.mean_first_mass()[place], mass_H, atol=1e-6, rtol=0)


def test_queries_as_many_as_keys_keep_their_own_padding():
    model = tiny_kind("bart")
    inputs = inputs_of(model) | {"decoder_input_ids": IDS, "decoder_attention_mask": torch.ones_like(PADDED)}
    heads = measure(model, inputs)
    assert heads.rows[:, 0].tolist() == [34, 34, 40, 40, 40, 40]


def test_a_decoder_alone_has_plain_numbers_until_it_looks_across():
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertLMHeadModel(BertConfig(**config, vocab_size=60, is_decoder=True, add_cross_attention=True)).eval()
    assert measure(model, {"input_ids": IDS}).layers == [0]
    heads = measure(model, {"input_ids": IDS, "encoder_hidden_states": torch.randn(2, 5, 16)})
    assert heads.layers == ["decoder 0", "cross 0"]
    assert heads.ceiling_nats()[1] == pytest.approx(torch.tensor(5.0).log().item())


def test_one_part_of_a_model_is_measured_alone():
    model = tiny_kind("bart")
    with EntropyProbe(model.get_encoder()) as probe, torch.no_grad():
        model(input_ids=IDS, decoder_input_ids=TARGETS)
    assert probe.statistics().layers == [0, 1]
    assert probe.statistics().rows.unique().tolist() == [40]


@pytest.mark.parametrize("side", SIDES)
def test_matrices_of_an_encoder_decoder_give_the_same_groups(side):
    model = tiny_kind("bart", attn_implementation="eager")
    inputs = inputs_of(model, side)
    routed, eager = measure(model, inputs), measure(model, inputs, "eager")
    assert routed.layers == eager.layers
    torch.testing.assert_close(eager.mean_nats(), routed.mean_nats(), atol=1e-5, rtol=0)
    torch.testing.assert_close(eager.ceiling_nats(), routed.ceiling_nats(), atol=1e-6, rtol=0)


def test_layers_that_share_one_module_are_one_layer():
    model = tiny_kind("albert")
    inputs = inputs_of(model)
    heads = measure(model, inputs)
    assert heads.layers == [0]
    real_BHT = PADDED.bool()[:, None].expand(2, 4, 20)
    matrices = matrices_of(model, inputs).values()
    of_call = [(torch.special.entr(p_BHTS).sum(-1) * real_BHT).sum((0, 2)) / 34 for p_BHTS in matrices]
    torch.testing.assert_close(heads.mean_nats()[0], torch.stack(of_call).mean(0), atol=2e-5, rtol=0)


def test_two_stacks_of_one_model_are_named_by_their_modules():
    heads = measure(tiny_model("hrm_text"), {"input_ids": IDS, "attention_mask": PADDED})
    assert heads.layers == ["H_module 0", "H_module 1", "L_module 0", "L_module 1"]


MAPPINGS = "MASKED_LM SEQ_TO_SEQ_CAUSAL_LM IMAGE_CLASSIFICATION SPEECH_SEQ_2_SEQ ZERO_SHOT_IMAGE_CLASSIFICATION"
GROUPS = Path(__file__).with_name("groups.json")
"""The types of these mappings by their groups of routed heads; "" is a model with one stack. Not built here: another
package is missing, or the type has no configuration of its own."""


def groups_of(model_type: str) -> str:
    """The groups of a type's model, built with two layers and without memory."""
    try:
        config = CONFIG_MAPPING[model_type]()
        for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            for name in ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers"):
                if isinstance(getattr(part, name, None), int):
                    with suppress(NotImplementedError):  # prophetnet's number of all layers
                        setattr(part, name, 2)
        with torch.device("meta"):
            layers = attention_layers(AutoModel.from_config(config))
    except Exception:  # whatever a family raises
        return "not built here"
    return ", ".join(sorted({layer.group for layer in layers.values()})) if layers else "not routed"


def types_by_groups() -> dict[str, list[str]]:
    tables = [getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES") for mapping in MAPPINGS.split()]
    types = defaultdict(list)
    for name in sorted({name for table in tables for name in table}):
        types[groups_of(name)].append(name)
    return dict(sorted(types.items()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_installed_types_have_the_recorded_groups_of_heads():
    """An upgrade that changes this set is looked at, then recorded: `python -m tests.entropy.test_kinds`."""
    assert types_by_groups() == json.loads(GROUPS.read_text())


if __name__ == "__main__":
    GROUPS.write_text(json.dumps(types_by_groups(), indent=1) + "\n")
