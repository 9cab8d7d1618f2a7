"""Read every attention call of a model: queries and keys in float32, and which scores they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from normfree.entropy.functional import request_of
from normfree.entropy.request import Request
from normfree.entropy.routing import eager_function, registry_of, routed_attention, scores_asked
from normfree.entropy.support import UnsupportedModel, refusal

Reader = Callable[[int, Request], None]
"""Takes the layer and one of its attention calls."""


class AttentionTap:
    """Call a reader at every attention call of a model inside the `with`; the registry is as before outside.

    Taps may be nested, with each other and with an EntropyProbe. Raises UnsupportedModel (a ValueError) for a model
    that does not route its attention through the registry of transformers.
    """

    def __init__(self, model: nn.Module, read: Reader) -> None:
        self._modules = set(routed_attention(model).values())
        if not self._modules:
            raise UnsupportedModel(refusal(getattr(model, "config").model_type))  # noqa: B009
        if len({cast(Any, module).layer_idx for module in self._modules}) < len(self._modules):
            raise UnsupportedModel("layers of an encoder and a decoder have the same numbers; give one part alone")
        self._read = cast(Reader, torch.compiler.disable(read))
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> AttentionTap:
        entries = {}
        for module in self._modules:
            registry = cast(AttentionInterface, registry_of(module))
            entries[id(registry), cast(Any, module).config._attn_implementation] = registry
        for (_, name), registry in entries.items():
            self._undo.append(self._cover(registry, name))
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _cover(self, registry: AttentionInterface, name: str) -> Callable[[], None]:
        covered = registry.get(name)

        def tapped_attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **asked: Any
        ) -> Any:
            if module in self._modules:
                scores = scores_asked(name, module, query, key, attention_mask, asked)
                self._read(cast(Any, module).layer_idx, request_of(query, scores))
            attend = covered if covered is not None else eager_function(type(module))
            return attend(module, query, key, value, attention_mask, *args, **asked)

        registry[name] = tapped_attention

        def undo() -> None:
            del registry[name]
            if covered is not None and registry.get(name) is not covered:
                registry[name] = covered  # the registry had an entry of its own

        return undo
