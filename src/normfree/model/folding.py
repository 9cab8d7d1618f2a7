"""fold_norms(): norms with a fixed scale become a part of the matrices that read them, and leave the model."""

# E hidden size, R rows of a matrix

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .configuration import NormFreeConfig
from .modeling import NormFreeForCausalLM
from .norms import FakeLayerNorm, TaperedNorm

FOLDABLE = ("fake", "taper")
"""Names of `NormFreeConfig.norm` that end in a fixed scale."""


@dataclass(frozen=True)
class LinearNorm:
    """What a norm computes whose scale is fixed: scale * (x - mean(x)) + offset, or without subtracting the mean."""

    scale_E: Tensor
    offset_E: Tensor
    centres: bool

    def fold(self, weight_RE: Tensor, bias_R: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of the linear map that computes weight @ norm(x) + bias, in float64."""
        folded_RE = weight_RE.double() * self.scale_E
        if self.centres:  # W (I - 11^T / E) subtracts each row's mean
            folded_RE = folded_RE - folded_RE.mean(1, keepdim=True)
        return folded_RE, bias_R.double() + weight_RE.double() @ self.offset_E


@torch.no_grad()
def fold_norms(model: NormFreeForCausalLM) -> NormFreeForCausalLM:
    """A model that computes the same without norms in its blocks, nor at the end if the final norm is fixed too.

    Gains, offsets and centring go into the matrices that read the norms, which therefore get biases; a folded final
    norm unties the output projection and gives it a bias. Raises ValueError for a model without such norms, one whose
    norms are not fixed yet, and parts that read a norm and are no plain matrix.
    """
    config = model.config
    if config.norm not in FOLDABLE:
        raise ValueError(
            f"norm={config.norm!r}: there is nothing to fold; norm='fake' and norm='taper' end in a fixed scale"
        )
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
    places = [(f"model.layers.{layer}.", part) for layer in range(config.num_hidden_layers) for part in _READERS]
    places += [("model.", "final_norm")] if folds_final else []
    for prefix, norm_name in places:
        reader = "lm_head" if norm_name == "final_norm" else prefix + _READERS[norm_name]
        norm = linear_norm(model.get_submodule(prefix + norm_name), place=prefix + norm_name)
        weight_RE, bias_R = state[f"{reader}.weight"], _bias(model.get_submodule(reader))
        folded = norm.fold(weight_RE, bias_R)
        for name, value in zip(("weight", "bias"), folded, strict=True):
            state[f"{reader}.{name}"] = value.to(weight_RE.dtype)
        state = {name: value for name, value in state.items() if not name.startswith(f"{prefix}{norm_name}.")}
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


_READERS = {"attention_norm": "attention.qkv", "feed_forward_norm": "feed_forward.input"}
"""The matrix that reads a norm, by the names of both in a block."""


def linear_norm(norm: nn.Module, *, place: str) -> LinearNorm:
    """The map of a norm whose scale is fixed. Raises ValueError, with its `place`, if it is not."""
    if isinstance(norm, FakeLayerNorm) and norm.is_fixed > 0 and norm.sigma_first == norm.sigma_rest:
        scale_E = norm.weight.double() / norm.sigma_rest.double()
        return LinearNorm(scale_E, norm.bias.double(), centres=True)
    if isinstance(norm, TaperedNorm) and norm.share == 0:
        scale_E = norm.gain.double() * norm.mean_inverse_rms.double()
        return LinearNorm(scale_E, torch.zeros_like(scale_E), centres=False)
    raise ValueError(f"{place} still depends on each token's scale: train to the end of its schedule first")


def _bias(linear: nn.Module) -> Tensor:
    """(R,): the bias of a linear map, 0 where it has none; a shorter one is that of its first rows."""
    weight, bias = linear.get_parameter("weight"), getattr(linear, "bias", None)
    if bias is None:
        return weight.new_zeros(len(weight))
    return nn.functional.pad(bias, (0, len(weight) - len(bias)))
