"""fold_norms(): norms with a fixed scale become a part of the matrices that read them, and leave the model."""

# E hidden size, R rows of a matrix

from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

from .configuration import NormFreeConfig
from .linears import Projection
from .modeling import NormFreeForCausalLM
from .norms import FakeLayerNorm, TaperedNorm

FOLDABLE = ("fake", "taper")
"""Names of `NormFreeConfig.norm` that end in a fixed scale."""


@torch.no_grad()
def fold_norms(model: NormFreeForCausalLM) -> NormFreeForCausalLM:
    """A model that computes the same without norms in its blocks, nor at the end if the final norm is fixed too.

    Gains, offsets and centring go into the matrices that read the norms, which therefore get biases; a folded final
    norm unties the output projection and gives it a bias. Raises ValueError for a model without such norms, one whose
    norms are not fixed yet, and parts that read a norm and are no plain matrix.
    """
    config = model.config
    if config.norm not in FOLDABLE:
        raise ValueError(f"norm={config.norm!r}: there is nothing to fold; 'fake' and 'taper' end in a fixed scale")
    if obstacle := obstacle_to_folding(config):
        raise ValueError(obstacle)
    folds_final = config.final_norm == "fake"
    changes = {"norm": "none", "bias": "all", "fake_start_step": 0, "fake_gap_steps": 0}
    changes |= {"taper_start_step": 0, "taper_end_step": 0}
    changes |= {"final_norm": "none", "tie_word_embeddings": False, "output_bias": True} if folds_final else {}
    folded_config = deepcopy(config)
    for name, value in changes.items():
        setattr(folded_config, name, value)
    state = dict(model.state_dict())
    readers = {"model.final_norm": "lm_head"} if folds_final else {}
    for layer in (f"model.layers.{number}" for number in range(config.num_hidden_layers)):
        readers[f"{layer}.attention_norm"] = f"{layer}.attention.qkv"
        readers[f"{layer}.feed_forward_norm"] = f"{layer}.feed_forward.input"
    for norm, reader in readers.items():
        folded = _folded(model.get_submodule(norm), model.get_submodule(reader), norm)
        for name, value in zip(("weight", "bias"), folded, strict=True):
            state[f"{reader}.{name}"] = value.to(model.dtype)
        state = {name: value for name, value in state.items() if not name.startswith(f"{norm}.")}
    with torch.random.fork_rng(devices=[]):
        result: Any = NormFreeForCausalLM._from_config(folded_config, dtype=model.dtype)
    for name, module in result.named_modules():  # biases that no norm filled
        if isinstance(module, nn.Linear) and module.bias is not None:
            state.setdefault(f"{name}.bias", torch.zeros_like(module.bias))
    result.load_state_dict(state)
    return result.to(model.device).eval()


def obstacle_to_folding(config: NormFreeConfig) -> str:
    """The part of a model that reads a norm and is no plain matrix, in words; empty if there is none."""
    foldable = {"placement": "pre", "linear": "plain", "attention_gate": "none", "feed_forward": "plain"}
    for name, allowed in foldable.items():
        if (value := getattr(config, name)) != allowed:
            return f"{name}={value!r}: norms fold with {name}={allowed!r} only"
    return ""


def _folded(norm: nn.Module, reader: nn.Module, place: str) -> tuple[Tensor, Tensor]:
    """Weight (R, E) and bias (R,) of the linear map that computes reader(norm(x)), in float64.

    Raises ValueError, with the `place` of the norm, if its scale is not fixed.
    """
    weight_RE = reader.get_parameter("weight").double()
    bias_R = reader.used_bias() if isinstance(reader, Projection) else cast(nn.Linear, reader).bias
    bias_R = weight_RE.new_zeros(len(weight_RE)) if bias_R is None else bias_R.double()
    if isinstance(norm, FakeLayerNorm) and norm.is_fixed > 0 and norm.sigma_first == norm.sigma_rest:
        folded_RE = weight_RE * (norm.weight.double() / norm.sigma_rest.double())
        folded_RE -= folded_RE.mean(1, keepdim=True)  # W (I - 11^T / E) subtracts the mean of x
        return folded_RE, bias_R + weight_RE @ norm.bias.double()
    if isinstance(norm, TaperedNorm) and norm.share == 0:
        return weight_RE * (norm.gain.double() * norm.mean_inverse_rms.double()), bias_R
    raise ValueError(f"{place} still depends on each token's scale: train to the end of its schedule first")
