"""Units, spectra and selectivity of feed-forward features against numpy on features that the tests store themselves."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tokenizers import decoders

from normfree import measure
from normfree.measures import open_measures
from normfree.measures.held_out import blocks_of, measure_batches
from normfree.measures.measure import values_of
from normfree.measures.reading import real_tokens
from normfree.measures.token_classes import CLASSES, class_of, token_classes
from normfree.measures.units import Selectivity, Units
from tests.entropy.families import tiny_model
from tests.entropy.kinds import tiny_kind
from tests.measures.byte_model import TEXT, byte_gpt2, byte_tokenizer
from tests.measures.families import recorded
from tests.small_model import small_model

IDS = torch.randint(0, 61, (16, 12), generator=torch.Generator().manual_seed(0))


def built(kind: str) -> tuple[Any, list[Any], list[Any]]:
    """A model, the modules whose input enters the activation, and those whose input is the activated features."""
    if kind == "llama":
        model = tiny_model(kind)
        return model, [layer.mlp.act_fn for layer in model.model.layers], [b.mlp.down_proj for b in model.model.layers]
    if kind == "bert":
        model = tiny_kind(kind)
        blocks = model.encoder.layer
        return model, [b.intermediate.intermediate_act_fn for b in blocks], [b.output.dense for b in blocks]
    model = small_model(activation=kind)
    blocks = model.model.layers
    return model, [b.feed_forward.activation for b in blocks], [b.feed_forward.output for b in blocks]


@pytest.mark.parametrize("kind", ["relu", "gelu", "llama", "bert"])
def test_shares_of_units_are_counted(kind: str) -> None:
    model, _, maps = built(kind)
    features = recorded(model, {"input_ids": IDS}, before=maps)
    measured = measure(model, IDS, "units", batch=5)
    for layer, linear in enumerate(maps):
        magnitude = abs(features[linear])
        octave = np.where(magnitude > 0, np.floor(np.log2(np.maximum(magnitude, 1e-300))), -np.inf)
        assert measured["zero_share"][layer] == pytest.approx((magnitude == 0).mean(), abs=1e-12)
        assert measured["small_share"][layer] == pytest.approx((octave < octave.max(0) - 10).mean(), abs=1e-12)
        assert measured["dead_share"][layer] == pytest.approx((features[linear].max(0) <= 0).mean(), abs=1e-12)
    assert (measured["unit_tokens"] == IDS.numel()).all()
    assert (measured["zero_share"] > 0.1).all() == (kind == "relu")


def spectrum(features: np.ndarray) -> np.ndarray:
    values = np.linalg.eigvalsh(np.cov(features.T, bias=True))[::-1]
    return np.maximum(values, 0) / np.maximum(values, 0).sum()


def entropy(share: np.ndarray) -> float:
    return -sum(p * math.log(p) for p in share if p > 0)


@pytest.mark.parametrize("kind", ["gelu", "llama", "bert"])
def test_spectra_are_those_of_numpy_in_float64(kind: str) -> None:
    model, activations, maps = built(kind)
    features = recorded(model, {"input_ids": IDS}, before=[*activations, *maps])
    measured = measure(model, IDS, "spectrum", batch=5)
    for layer, modules in enumerate(zip(activations, maps, strict=True)):
        before, after = (spectrum(features[module]) for module in modules)
        width = len(after)
        for name, share in (("before", before), ("after", after)):
            enrichment = sum(share[: k + 1].sum() - (k + 1) / width for k in range(width)) / (width / 2)
            assert measured[f"spectral_entropy_{name}"][layer] == pytest.approx(entropy(share), abs=1e-9)
            assert measured[f"participation_ratio_{name}"][layer] == pytest.approx(1 / (share**2).sum(), rel=1e-9)
            assert measured[f"early_enrichment_{name}"][layer] == pytest.approx(enrichment, abs=1e-9)
        middle = (before + after) / 2
        divergence = entropy(middle) - (entropy(before) + entropy(after)) / 2
        assert measured["spectral_divergence"][layer] == pytest.approx(divergence, abs=1e-9)
        assert measured["tokens_per_feature"][layer] == IDS.numel() / width


def area(inside: np.ndarray, outside: np.ndarray) -> float:
    """The area under the ROC curve from ranks: the share of pairs in order, ties as half."""
    order = np.concatenate([inside, outside]).argsort(kind="stable")
    values = np.concatenate([inside, outside])[order]
    _, first, count = np.unique(values, return_index=True, return_counts=True)
    rank = np.empty(len(values))
    rank[order] = np.repeat(first + (count + 1) / 2, count)
    return (rank[: len(inside)].sum() - len(inside) * (len(inside) + 1) / 2) / (len(inside) * len(outside))


@pytest.mark.parametrize("kind", ["relu", "gelu", "llama"])
def test_selectivity_is_that_of_means_and_ranks(kind: str) -> None:
    model, _, maps = built(kind)
    ids = IDS % 60
    classes = torch.arange(len(model.get_input_embeddings().weight)) // 13 % 4
    labels = classes[ids].flatten().numpy()
    features = recorded(model, {"input_ids": ids}, before=maps)
    measured = measure(model, ids, "selectivity", batch=5, selectivity={"classes": classes})
    for layer, linear in enumerate(maps):
        indices, areas = [], []
        for unit in abs(features[linear]).T:
            groups = [unit[labels == label] for label in range(4)]
            mean = sorted(group.mean() for group in groups)
            rest = np.mean(mean[:-1])
            indices.append((mean[-1] - rest) / (mean[-1] + rest) if mean[-1] else 0.0)
            areas.append(max(area(unit[labels == label], unit[labels != label]) for label in range(4)))
        assert measured["selectivity_index"][layer] == pytest.approx(np.mean(indices), abs=1e-6)
        assert measured["selectivity_area"][layer] == pytest.approx(np.mean(areas), abs=2e-3)  # bins


def test_the_error_of_bins_is_half_the_shared_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    model = small_model()
    measure = Selectivity(model, classes=torch.arange(61) % 2)
    labels = torch.randint(0, 2, (4000,), generator=generator)
    magnitude = torch.randn(4000, 128, generator=generator).abs() * (1 + labels[:, None] / 2)
    measure._labels = {"input_ids": [labels, labels]}
    for layer in range(3):
        measure.read_after(layer, magnitude)
    exact, shared = [], []
    for unit in magnitude.T.numpy():
        exact.append(max(area(unit[labels == label], unit[labels != label]) for label in range(2)))
        octave = np.floor(np.log2(unit))
        bins = octave * 8 + np.floor((unit / 2**octave - 1) * 8)
        counts = [dict(zip(*np.unique(bins[labels == label], return_counts=True), strict=True)) for label in range(2)]
        pairs = sum(count * counts[1].get(place, 0) for place, count in counts[0].items())
        shared.append(pairs / (labels == 0).sum() / (labels == 1).sum())
    values = values_of([measure])["selectivity_area"]
    assert np.mean(exact) > 0.6
    assert abs(values[0] - np.mean(exact)) <= np.mean(shared) / 2
    assert abs(values[0] - np.mean(exact)) < 1e-3


def test_shuffled_labels_lose_a_class_that_the_unit_tells() -> None:
    model = small_model()
    measure = Selectivity(model, classes=torch.arange(61) % 3)
    with measure:
        measure._read_ids(model, (IDS,), {})
        labels = (IDS % 3).flatten()
        for layer in range(3):
            measure.read_after(layer, (labels == 1).float()[:, None] * torch.ones(128))
    values = values_of([measure])
    assert values["selectivity_index"].tolist() == [1, 1, 1]
    assert values["selectivity_area"].tolist() == [1, 1, 1]
    assert (values["selectivity_index_shuffled"] < 0.3).all()
    assert (values["selectivity_area_shuffled"] < 0.6).all()


def test_classes_of_pieces_of_python() -> None:
    pieces = {
        "keyword": ["return", " def", "None"],
        "name": ["x1", " self", "_", "für"],
        "number": ["1", " 0x1F", "3.5", "1_000"],
        "string": ["'", ' f"', "'''"],
        "operator": [" ==", "(", "):", "->", "."],
        "comment": ["#", " # note"],
        "whitespace": ["\n", "    ", "\t"],
        "other": ["", "x.", "\ufffd", "(x"],
    }
    assert {text: class_of(text) for texts in pieces.values() for text in texts} == {
        text: name for name, texts in pieces.items() for text in texts
    }
    assert set(pieces) == set(CLASSES)


def test_a_tokenizer_gives_the_classes_of_its_vocabulary() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    classes = token_classes(tokenizer, 300)
    ids = tokenizer(TEXT)["input_ids"]
    texts = [tokenizer.decode([number]) for number in ids]
    assert [CLASSES[classes[number]] for number in ids] == [class_of(text) for text in texts]
    assert {"name", "whitespace", "operator", "number"} <= {class_of(text) for text in texts}
    assert len(classes) == 300
    assert (classes[256:] == CLASSES.index("other")).all()
    measured = measure(byte_gpt2(), torch.tensor(ids[:60])[None], "selectivity", tokenizer=tokenizer)
    assert np.isfinite(measured["selectivity_index"]).all()


def measure_a_half(rank: int, address: str) -> None:
    """Values over all processes are those of all the text."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model, options = small_model(norm="layernorm"), {"selectivity": {"classes": torch.arange(61) % 3}}
    names = ["sinks", "logits", "ranges", "residual", "propagation", "losses", "units", "spectrum", "selectivity"]
    shared, alone = (open_measures(names, model, **options) for _ in range(2))
    measure_batches(model, blocks_of(model, IDS, 4), shared)
    measure_batches(model, [{"input_ids": ids_BT} for ids_BT in IDS.split(5)], alone)
    values = values_of(shared, "cpu")
    for name, value in values_of(alone).items():
        if "shuffled" not in name:
            np.testing.assert_allclose(values[name], value, rtol=1e-5, atol=1e-7)
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_pool_what_they_read_of_a_text(tmp_path) -> None:
    mp.spawn(measure_a_half, args=(f"file://{tmp_path}/meeting",), nprocs=2)


def wrong_labels(model: Any) -> None:
    with Selectivity(model, classes=torch.arange(61) % 2):
        model(IDS[:1, :4])  # as many tokens, but of another pass
        model(inputs_embeds=torch.randn(1, 4, 32))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda model: Selectivity(model, classes=torch.arange(60)),
            r"shape \(60,\); give 0, 1, 2, ... for each of the 61",
        ),
        (lambda model: Selectivity(model, classes=torch.full((61,), -1)), "give 0, 1, 2"),
        (Selectivity, "give tokenizer=, or selectivity={'classes'"),
        (wrong_labels, "knows the class of 0 tokens, but layer 0 has 4"),
        (lambda model: values_of([Units(model)]), "no forward pass reached Units"),
        (lambda model: real_tokens(torch.ones(2, 3, 4), torch.ones(2, 4)), r"mask of shape \(2, 4\) does not fit 6"),
    ],
)
def test_what_does_not_fit_is_named(act: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act(small_model())
