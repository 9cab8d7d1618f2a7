"""How a module reaches the attention registry of transformers, and what its attention function is called with."""

# B batch, H query heads, G key heads, T query, S key, D head width

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask, flash_attention_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from normfree.entropy.request import Request, as_request
from normfree.entropy.support import UnsupportedModel
from normfree.entropy.visibility import shown

Result = TypeVar("Result")


class Arguments(NamedTuple):
    """Arguments of `attention_entropy`, and facts about the keys."""

    q: Tensor
    k: Tensor
    mask: Tensor | None
    sinks: Tensor | None
    scale: float | None
    causal: bool
    window: int | None
    softcap: float | None
    chunked: bool  # the layer attends within chunks (llama4), and its cache is a sliding one
    forgets_first: bool  # the cache of the layer drops the first token
    own_keys: int  # the first so many keys stand for one token each; 0 where a cache hides the number
    positions: Tensor | None  # position ids, where nothing else tells apart the texts of a row


class AttentionCall(Arguments):
    """One call of a registered function, as every tap sees it."""

    padded: Tensor | None = None
    """True for queries that are padding, broadcastable to (B, H, T); None if none is known. The first tap sets it."""

    def once(self, compute: Callable[[AttentionCall], Result]) -> Result:
        """What `compute` makes of this call, computed for the first tap and kept for the others."""
        results: dict[Any, Any] = vars(self).setdefault("results", {})
        if compute not in results:
            results[compute] = compute(self)
        return results[compute]

    def request(self, *, patterns: bool = False) -> Request:
        """The call as input of the paths that compute entropy. Raises UnsupportedModel for several texts in a row."""
        if self.positions is not None and bool((self.positions.diff(dim=-1) != 1).any()):
            raise UnsupportedModel("flash attention on several texts in one row: load with attn_implementation='sdpa'")
        # Under autocast some models rotate queries alone in fp32.
        both = torch.promote_types(self.q.dtype, self.k.dtype)
        return as_request(self.q.to(both), self.k.to(both), *self[2:8], patterns)

    def check_first_token(self, layer: object) -> None:
        """Raise ValueError if the distances of the keys or the first token are unknown."""
        advice, keys = "leave out patterns=True", self.k.shape[2]
        if self.own_keys != keys:
            raise ValueError(f"layer {layer} appends compressed keys, whose distance is unknown; {advice}")
        if self.q.shape[2] < keys and self.forgets_first:
            raise ValueError(f"the cache of layer {layer} forgets the first token: use none, or {advice}")
        # No row sees a key behind the newest token.
        if self.q.shape[2] < keys and self.mask is not None and not bool(shown(self.mask[..., -1]).any()):
            raise ValueError(f"distances are unknown in a static cache; use a dynamic one, or {advice}")


@functools.cache
def registry_of(module_class: type[nn.Module]) -> AttentionInterface | None:
    """The registry object in which a class looks up its attention function, if it does."""
    registry = global_named(module_class, "ALL_ATTENTION_FUNCTIONS")
    return registry if isinstance(registry, AttentionInterface) else None


def global_named(module_class: type[nn.Module], ending: str) -> Any:
    """The first global object whose name ends so that a method of the class uses."""
    for base in module_class.__mro__[: module_class.__mro__.index(nn.Module)]:
        for value in vars(base).values():
            function = inspect.unwrap(value) if callable(value) else value
            if inspect.isfunction(function):
                for name in function.__code__.co_names:
                    if name.endswith(ending) and name in function.__globals__:
                        return function.__globals__[name]
    return None


def read_call(name: str, module: Any, q: Tensor, k: Tensor, mask: Any, arguments: dict[str, Any]) -> AttentionCall:
    """Translate the arguments of a registered function into those of `attention_entropy`.

    Follows transformers 5.23: `sdpa` and eager functions take windows from the mask alone, flash ones from
    `sliding_window`; without a mask sdpa and flash are causal, and eager sees everything. A user's own function is
    treated as the kind whose masks are registered under its name.
    """
    sinks = arguments.get("s_aux", arguments.get("sinks")) if name != "sdpa" else None
    if "before_sink" in arguments:  # one of our models put a sink's key in front of the others (attention_parts.py)
        q, k, _, mask, sinks = arguments["before_sink"]
    kind = _kind(name)
    _check_mask(name, kind, mask, arguments)
    is_causal = arguments.get("is_causal")
    is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    is_flash = kind == "flash"
    causal = is_causal and (is_flash or (q.shape[2] > 1 and mask is None and kind == "sdpa"))
    if causal and not is_flash and k.shape[2] > q.shape[2]:
        k = k[:, :, : q.shape[2]]  # sdpa's prefill into an empty static cache: the other keys are not there yet
    window, own_keys = arguments.get("sliding_window"), k.shape[2]
    if compresses_keys(module):
        expected = q.shape[2] + q.shape[2] // module.compressor.compress_rate
        own_keys = q.shape[2] if own_keys == expected else 0
    types, layer = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    chunked = bool(types) and isinstance(layer, int) and types[layer] == "chunked_attention"
    return AttentionCall(
        q=q,
        k=k,
        mask=_with_bias(mask, arguments.get("position_bias"), k.shape[2]),
        sinks=sinks,
        scale=arguments.get("scaling"),
        causal=causal,
        window=window if is_flash and causal else None,
        softcap=arguments.get("softcap"),
        chunked=chunked,
        forgets_first=window is not None or chunked,
        own_keys=own_keys,
        positions=arguments.get("position_ids") if is_flash and mask is None and q.shape[2] > 1 else None,
    )


def _kind(name: str) -> str | None:
    """'sdpa', 'eager' or 'flash', by how the function reads its mask; None if unknown."""
    if name in ("sdpa", "eager"):
        return name
    if name.startswith("flash_attention"):
        return "flash"
    kinds: dict[Any, str] = {sdpa_mask: "sdpa", eager_mask: "eager", flash_attention_mask: "flash"}
    return kinds.get(AttentionMaskInterface._global_mapping.get(name))  # only names registered here get masks


def _check_mask(name: str, kind: str | None, mask: Any, arguments: dict[str, Any]) -> None:
    """Raise UnsupportedModel for a call whose arguments do not tell which keys a row sees."""
    if name.startswith("paged|") or not (mask is None or isinstance(mask, Tensor)):
        raise UnsupportedModel(
            f"{name!r} with a {type(mask).__name__} mask is not supported; load with attn_implementation='sdpa'"
        )
    if kind is None and (mask is None or mask.dim() != 4):
        raise UnsupportedModel(
            f"no mask says which keys the attention function {name!r} hides; call AttentionMaskInterface.register("
            f"{name!r}, eager_mask) or sdpa_mask, or give a mask of (batch, heads, queries, keys)"
        )
    if kind == "eager" and mask is not None and mask.dtype == torch.bool:
        raise UnsupportedModel("eager attention adds its mask, so a boolean one hides nothing; give 0 and -inf")
    if arguments.get("cu_seq_lens_q") is not None:  # texts packed for flash attention
        raise UnsupportedModel(
            "cu_seq_lens_q= means several texts in one row; give a padded batch, with attn_implementation='sdpa'"
        )


def compresses_keys(module: nn.Module) -> bool:
    """True if the layer appends compressed keys to those of the tokens (deepseek_v4)."""
    return getattr(module, "compressor", None) is not None


def _with_bias(mask: Tensor | None, bias: Tensor | None, keys: int) -> Tensor | None:
    if bias is None:
        return mask
    bias = bias[..., :keys].to(torch.promote_types(bias.dtype, torch.float32))
    if mask is None:
        return bias
    return torch.where(shown(mask), bias if mask.dtype == torch.bool else bias + mask, -torch.inf)
