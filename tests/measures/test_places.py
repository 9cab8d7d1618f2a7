"""Places of blocks and their parts, against the sums that the models themselves make."""

# B batch, T tokens, E hidden size

import json
from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from normfree.measures.places import Place, blocks_of, places_of, stream_of
from tests.entropy.families import tiny_model
from tests.measures.families import IDS, KINDS, inputs_of, kind_of, random_model
from tests.small_model import CHOICES, small_model

FAMILIES = Path(__file__).with_name("places.json")
LARGEST = 20_000_000  # parameters of a model that runs here


def first(output: Any) -> Any:
    return output if isinstance(output, Tensor) else output[0]


class Passing:
    """What passes through a block and its places in one forward pass."""

    def __init__(self, place: Place, hooks: ExitStack) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.inside: list[tuple[Tensor, Tensor]] = []  # inputs and outputs of every module of the block

        def keep(name: str, tensor: Tensor) -> None:
            self.tensors[name] = tensor.clone()  # some models add in place afterwards

        def enter(_block: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            keep("stream", stream_of(positional, named))

        def passed(_part: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            tensors = [value for value in (*positional, *named.values()) if isinstance(value, Tensor)]
            self.inside += [(tensor.clone(), first(output)) for tensor in tensors if isinstance(first(output), Tensor)]

        block = place.block
        handles = [block.register_forward_pre_hook(enter, with_kwargs=True)]
        handles.append(block.register_forward_hook(lambda _block, _inputs, output: keep("output", first(output))))
        for name in ("attention", "feed_forward"):
            if (part := getattr(place, name)) is not None:
                handles.append(place.read_added(part, partial(keep, name)))
        handles.append(place.reads.register_forward_hook(lambda _part, _inputs, output: keep("before", output)))
        handles.append(place.writes.register_forward_pre_hook(lambda _part, inputs: keep("after", inputs[0])))
        handles += [part.register_forward_hook(passed, with_kwargs=True) for part in list(block.modules())[1:]]
        for handle in handles:
            hooks.callback(handle.remove)

    def adds_up(self) -> bool:
        """True if stream + attention enters a module, and a tensor + feed-forward enters one or leaves the block.

        Between them may be a norm of the sum (post-norm) and a further branch (cross-attention).
        """
        stream, added, fed, output = (self.tensors[name] for name in ("stream", "attention", "feed_forward", "output"))
        fed, joined = fed.reshape(stream.shape), stream + added
        ends = [output, *(entered for entered, _ in self.inside)]
        if same(joined + fed, output):
            return True
        reached = [joined, *(tensor for passed in self.inside for tensor in passed)]
        reached += [joined + left for _, left in self.inside if left.shape == joined.shape]
        return any(same(joined, end) for end in ends) and any(
            same(each + fed, end) for each in reached if each.shape == fed.shape for end in ends
        )


def same(first: Tensor, second: Tensor) -> bool:
    return first.numel() == second.numel() and torch.allclose(first, second.reshape(first.shape), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def passing(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[tuple[Place, Passing]]:
    with ExitStack() as hooks:
        blocks = [(place, Passing(place, hooks)) for place in places_of(model)]
        model(**inputs)
    return blocks


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "falcon", "bert", "vit", "dinov2", "t5", "bart"])
def test_branches_add_up_to_the_blocks_output(model_type: str) -> None:
    model = random_model(model_type)
    for place, block in passing(model, inputs_of(model, kind_of(model_type))):
        assert block.adds_up()
        assert block.tensors["after"].shape[-1] == place.width
        assert block.tensors["before"].shape[-1] in (place.width, 2 * place.width)


@pytest.mark.parametrize("fields", [{}, {"residual": "parallel"}, *CHOICES, {"branch": "fixed"}])
def test_our_branches_add_up_to_the_blocks_output(fields: dict[str, Any]) -> None:
    for place, block in passing(small_model(**fields), {"input_ids": IDS}):
        assert block.adds_up()
        before, after = block.tensors["before"], block.tensors["after"]
        assert same(place.block.feed_forward.activation(before, None), after)


def test_the_gate_is_first_in_a_fused_map() -> None:
    for place, block in passing(tiny_model("phi3"), {"input_ids": IDS}):
        gate, up = block.tensors["before"].split(place.width, dim=-1)
        assert same(nn.functional.silu(gate) * up, block.tensors["after"])


def test_labels_name_the_stack_where_there_are_several() -> None:
    assert list(blocks_of(random_model("t5", device="meta"))) == ["encoder 0", "encoder 1", "decoder 0", "decoder 1"]
    labels = list(blocks_of(random_model("clip", device="meta")))
    assert (labels[0], labels[-1]) == ("text 0", "vision 11")
    assert list(blocks_of(random_model("vit", device="meta"))) == [0, 1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(2, 2), "no list of blocks in Linear; looked for lists named h, layers"),
        (lambda: random_model("mixtral", device="meta"), r"block 0 of MixtralForCausalLM .* is a mixture of experts"),
        (lambda: random_model("ctrl", device="meta"), r"CTRLLMHeadModel \(EncoderLayer\) has no feed-forward part"),
    ],
)
def test_models_without_a_feed_forward_part_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        places_of(build())


def standing(model_type: str) -> str:
    """What is known of a family: whether its branches add up where it runs here, or why it is refused."""
    try:
        model = random_model(model_type, device="meta")
    except Exception:
        return "no tiny model"
    try:
        places = places_of(model)
    except ValueError as error:
        reasons = {"experts": "mixture of experts", "cannot be measured": "unreadable stream"}
        return next((name for word, name in reasons.items() if word in str(error)), "no feed-forward part")
    if any(place.attention is None for place in places):
        return "feed-forward part alone"
    if model.num_parameters() > LARGEST:
        return "not run"
    try:
        model = random_model(model_type)
        blocks = passing(model, inputs_of(model, kind_of(model_type)))
    except Exception:
        return "not run"
    return "branches add up" if all(block.adds_up() for _, block in blocks) else "branches do not add up"


def standings() -> dict[str, list[str]]:
    families = defaultdict(list)
    for model_type in sorted({name for names in KINDS.values() for name in names}):
        families[standing(model_type)].append(model_type)
    return dict(sorted(families.items()))


@pytest.mark.slow
def test_the_installed_families_stand_as_recorded() -> None:
    """An upgrade that changes this set is looked at, then recorded: `python -m tests.measures.test_places`."""
    assert standings() == json.loads(FAMILIES.read_text())


if __name__ == "__main__":
    FAMILIES.write_text(json.dumps(standings(), indent=1) + "\n")
