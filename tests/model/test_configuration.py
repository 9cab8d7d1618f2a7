"""NormFreeConfig: defaults, refused fields, files, and parameter counts."""

import pytest
from transformers import PreTrainedConfig

from normfree.model import NormFreeConfig


def test_defaults_are_the_gpt2_baseline_of_the_paper():
    config = NormFreeConfig()
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (12, 12, 768)
    assert (config.intermediate_size, config.max_position_embeddings) == (3072, 128)
    assert (config.norm, config.final_norm, config.activation) == ("layernorm", "layernorm", "gelu")
    assert (config.bias, config.residual_init, config.initializer_range) == ("qk", "flat", 0.02)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"nrom": "none"}, "unknown model field 'nrom'; did you mean .*norm"),
        ({"zzzz": 1}, "unknown model field 'zzzz'; allowed: vocab_size, .*norm"),
        ({"norm": "layernrom"}, "norm='layernrom'; did you mean layernorm"),
        ({"activation": ["relu", "swish"], "num_hidden_layers": 2}, "activation='swish'; allowed: gelu, "),
        ({"activation": ["relu"] * 3}, "activation lists 3 names, but num_hidden_layers is 12"),
        ({"activation": [1]}, r"activation=\[1\]; allowed: str \| list\[str\]"),
        ({"learnable_slope": "shared"}, "learnable_slope='shared' needs activation='leaky_relu'"),
        ({"learnable_slope": "global"}, r"learnable_slope='global'; allowed: Literal\['none', 'per_layer', 'shared'\]"),
        ({"hidden_size": 100, "num_attention_heads": 3}, "hidden_size=100 .* num_attention_heads=3"),
        ({"hidden_size": "768"}, "hidden_size='768'; allowed: int"),
        ({"hidden_size": 0}, "hidden_size=0 must be above 0"),
        ({"intermediate_size": 2.5}, r"intermediate_size=2.5; allowed: int \| None"),
        ({"residual_dropout": 1.0}, "residual_dropout=1.0 must be at least 0 and below 1"),
        ({"initializer_range": float("inf")}, "initializer_range=inf must be above 0 and finite"),
        ({"position": "rotary", "rotary_share": 1.5}, "rotary_share=1.5 of head_dim=64 .* from 2 to all"),
        ({"position": "rotary", "rotary_share": 3 / 64}, "rotary_share=0.046875 of head_dim=64 .* even number"),
        ({"family": "vision", "position": "rotary"}, "position='rotary' is for family='decoder' or 'encoder_decoder'"),
        ({"family": "vision", "norm": "fake", "fake_start_step": 1}, "norm='fake' is for family='decoder', and this"),
        ({"family": "vision", "image_size": 13}, "image_size=13 must be a multiple of patch_size=4"),
        ({"family": "encoder_decoder", "residual": "parallel"}, "is for family='decoder' or 'vision', and this"),
        ({"family": "encoder_decoder", "noise_share": 1.0}, "noise_share=1.0 must be at least 0 and below 1"),
    ],
)
def test_a_wrong_field_is_refused_with_what_is_allowed(fields, words):
    with pytest.raises(ValueError, match=words):
        NormFreeConfig(**fields)


def test_keys_of_transformers_pass():
    keys = {"torch_dtype": "float32", "auto_map": {"AutoConfig": "configuration.NormFreeConfig"}, "num_labels": 3}
    keys |= {"_name_or_path": "somewhere", "transformers_version": "5.0.0", "architectures": ["X"]}
    config = NormFreeConfig(**keys, attn_implementation="eager")
    assert config._attn_implementation == "eager"
    assert set(PreTrainedConfig().to_dict()) <= set(NormFreeConfig(**PreTrainedConfig().to_dict()).to_dict())
