"""How a module reaches the attention registry of transformers, and what a registered function is asked."""

# B batch, H query heads, G key heads, T query, S key, D head width

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask, flash_attention_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from normfree.entropy.support import CROSS_ATTENTION_NAMES, UnsupportedModel
from normfree.entropy.visibility import hidden

REGISTRY = "ALL_ATTENTION_FUNCTIONS"
EAGER = "eager_attention_forward"


def registry_of(module: nn.Module) -> AttentionInterface | None:
    """The registry object that the module's class looks its attention up in, or None if it does not."""
    found = _global_named(type(module), lambda name: name == REGISTRY)
    return found if isinstance(found, AttentionInterface) else None


def eager_function(module_class: type[nn.Module]) -> Callable[..., Any]:
    """The eager attention beside a routed class: what its lookup falls back to under "eager"."""
    found = _global_named(module_class, lambda name: name.endswith(EAGER))
    if found is None:
        raise UnsupportedModel(
            f"{module_class.__name__} names no eager attention; load with attn_implementation='sdpa'"
        )
    return found


def routed_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Self-attention modules that look their function up in a registry and know their layer, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(layer := getattr(module, "layer_idx", None), int)
        and layer >= 0  # zamba2 calls all of them -1
        and CROSS_ATTENTION_NAMES.isdisjoint(name.split("."))
        and registry_of(module) is not None
    }


def scores_asked(
    name: str, module: nn.Module, q: Tensor, k: Tensor, mask: Any, asked: dict[str, Any]
) -> dict[str, Any]:
    """Translate a registered function's arguments into those of `attention_entropy`.

    Follows transformers 5.23: `sdpa` and eager functions take windows from the mask alone, flash ones
    from `sliding_window`; a missing mask means causal for sdpa and flash, everything visible for eager.
    A function of the user's own is of the kind whose masks are registered under its name.
    """
    if name.startswith("paged|") or not (mask is None or isinstance(mask, Tensor)):
        raise UnsupportedModel(
            f"attention implementation {name!r} with a {type(mask).__name__} mask is not read here; "
            f"load the model with attn_implementation='sdpa'"
        )
    kind = _kind(name)
    if kind is None and (mask is None or mask.dim() != 4):
        raise UnsupportedModel(
            f"no mask says which keys the attention function {name!r} hides; register the masks that it follows, "
            f"AttentionMaskInterface.register({name!r}, eager_mask) or sdpa_mask, both of transformers.masking_utils, "
            "or call the model with a mask of (batch, heads, queries, keys)"
        )
    if kind == "eager" and mask is not None and mask.dtype == torch.bool:
        raise UnsupportedModel(
            "most families' eager attention adds its mask to the scores, and a boolean one added hides nothing: give a "
            "float mask (0 and -inf), or load the model with attn_implementation='sdpa'"
        )
    for key in ("cache", "cu_seq_lens_q"):  # a paged cache; texts packed for flash attention
        if asked.get(key) is not None:
            raise UnsupportedModel(
                f"attention that is called with {key}= serves several texts in one row, which is not read here; load "
                "the model with attn_implementation='sdpa' and call it on a padded batch"
            )
    own_causal = asked.get("is_causal")
    own_causal = getattr(module, "is_causal", True) if own_causal is None else own_causal
    is_flash = kind == "flash"
    causal = bool(own_causal) and (is_flash or (q.shape[2] > 1 and mask is None and kind == "sdpa"))
    if causal and mask is None and not is_flash and k.shape[2] > q.shape[2]:
        k = k[:, :, : q.shape[2]]  # sdpa's prefill into an empty static cache: the rest is not there yet
    scale = asked.get("scaling")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    sinks = asked.get("s_aux", asked.get("sinks")) if name != "sdpa" else None
    return {
        "k": k,
        "mask": _with_bias(mask, asked.get("position_bias"), q, k, causal),
        "sinks": None if sinks is None else sinks.detach(),
        "scale": scale,
        "causal": causal,
        "window": asked.get("sliding_window") if is_flash and causal else None,
        "softcap": asked.get("softcap"),
        "forgets_first": asked.get("sliding_window") is not None or _is_chunked(module),
        "chunked": _is_chunked(module),
        "own_keys": _own_keys(module, q.shape[2], k.shape[2]),
        "positions": asked.get("position_ids") if is_flash and mask is None and q.shape[2] > 1 else None,
    }


def _kind(name: str) -> str | None:
    """What a function makes of its mask: as 'sdpa', 'eager' or 'flash' does, or None where nothing says."""
    if name in ("sdpa", "eager"):
        return name
    if name.startswith("flash_attention"):
        return "flash"
    kinds: dict[Any, str] = {sdpa_mask: "sdpa", eager_mask: "eager", flash_attention_mask: "flash"}
    return kinds.get(AttentionMaskInterface._global_mapping.get(name))  # masks are made for these names alone


def compresses_keys(module: nn.Module) -> bool:
    """Whether the layer puts compressed keys behind those of the tokens (deepseek_v4)."""
    return getattr(module, "compressor", None) is not None


def _own_keys(module: nn.Module, queries: int, keys: int) -> int:
    """How many keys, the first ones, are tokens of their own; 0 where a cache hides that."""
    if not compresses_keys(module):
        return keys
    compressor: Any = module.compressor
    return queries if keys == queries + queries // compressor.compress_rate else 0


def _is_chunked(module: nn.Module) -> bool:
    """Whether the layer attends within chunks (llama4), whose cache is a sliding one."""
    types = getattr(getattr(module, "config", None), "layer_types", None)
    index = getattr(module, "layer_idx", None)
    return bool(types) and isinstance(index, int) and types[index] == "chunked_attention"


def _with_bias(mask: Tensor | None, bias: Tensor | None, q: Tensor, k: Tensor, causal: bool) -> Tensor | None:
    if bias is None:
        return mask
    # The model holds this bias, T x S for every head, anyway.
    bias = bias[..., : k.shape[2]].to(torch.promote_types(bias.dtype, torch.float32))
    if mask is None:
        return bias
    if mask.dtype != torch.bool:
        mask = ~hidden(mask)
    return torch.where(mask, bias, -torch.inf)


def _global_named(module_class: type[nn.Module], wanted: Callable[[str], bool]) -> Any:
    for function in _functions(module_class):
        for name in function.__code__.co_names:
            if wanted(name) and name in function.__globals__:
                return function.__globals__[name]
    return None


def _functions(module_class: type[nn.Module]) -> Iterator[Any]:
    for base in module_class.__mro__:
        if base is nn.Module:
            return
        for value in vars(base).values():
            function = inspect.unwrap(value) if callable(value) else value
            if inspect.isfunction(function):
                yield function
