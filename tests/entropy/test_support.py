"""The support tables against the installed transformers, and the families one by one."""

import re
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from normfree.entropy.support import EAGER_ONLY, NOT_MEASURED, ROUTED
from tests.entropy.families import tiny_model
from tests.entropy.test_probe import LEFT_PADDED, by_eager_matrices, measure

# Types without attention code of their own, and whose attention they use.
BORROWED = {
    "fuyu": "persimmon",
    "gemma4_assistant": "gemma4",
    "gemma4_unified_assistant": "gemma4_unified",
    "got_ocr2": "qwen2",
    "gpt-sw3": "gpt2",
    "internlm3": "llama",
    "iquestcoder": "llama",
}

# Random, tiny, left-padded: each is built by one generic recipe (families.py).
AGREE = """
    afmoe apertus arcee bart bert biogpt bitnet blenderbot camembert cohere cohere2 cwm deepseek_v2 deepseek_v3
    deepseek_v32 diffllama electra ernie4_5 exaone4 flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe glm_moe_dsa
    gpt2 gpt_bigcode gpt_neox gpt_oss granite granitemoe helium hunyuan_v1_dense jais2 jetmoe lfm2 llama marian
    mbart minicpm3 ministral mistral mixtral modernbert-decoder nanochat nemotron olmo olmo2 olmo3 olmoe opt pegasus
    persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe roberta seed_oss smollm3 solar_open stablelm
    starcoder2 vaultgemma whisper youtu
"""


def modeling_source(model_type: str) -> str:
    """The file that defines the type's causal LM, as text: importing all of them takes a minute."""
    borrowed = BORROWED.get(model_type, model_type)
    folder = Path(transformers.__file__).parent / "models" / model_type_to_module_name(borrowed)
    files = [path.read_text() for path in sorted(folder.glob("modeling_*.py"))]
    if borrowed == model_type:
        named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
        names = "|".join([named] if isinstance(named, str) else named)
        files = [text for text in files if re.search(rf"^class ({names})\b", text, re.MULTILINE)]
    assert files, f"{model_type}: no modeling file found; is it another type's? Then add it to BORROWED"
    return "\n".join(files)


def test_the_tables_list_installed_types_once():
    listed = [name for table in (ROUTED, EAGER_ONLY, NOT_MEASURED) for name in table]
    assert sorted(listed) == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_the_table_says_what_the_installed_source_does(model_type):
    routed = ROUTED | {"blt"} | {"git", "zamba", "zamba2"}  # the last: by parts, or shared by layers
    assert ("ALL_ATTENTION_FUNCTIONS" in modeling_source(model_type)) == (model_type in routed)


@pytest.mark.slow
@pytest.mark.parametrize("family", AGREE.split())
def test_family_agrees_with_its_eager_matrices_under_left_padding(family):
    model = tiny_model(family)
    heads = measure(model, mask=LEFT_PADDED)
    assert (heads.mean_nats() - by_eager_matrices(model, LEFT_PADDED)).abs().max() < 2e-5
    assert heads.nonfinite_rows.sum() == 0
    assert 0.05 < heads.mean_nats().mean() < heads.ceiling_nats().mean()
