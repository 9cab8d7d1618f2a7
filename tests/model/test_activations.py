"""Activations: slopes at 0 and 1, learning, sharing, one activation for each layer."""

import pytest
import torch

LEARNABLE = ["none", "per_layer", "shared"]


@pytest.mark.parametrize("learnable", LEARNABLE)
@pytest.mark.parametrize(("slope", "same_as"), [(0.0, "relu"), (1.0, "identity")])
@pytest.mark.parametrize("autocast", [False, True])
def test_leaky_relu_at_its_ends_is_relu_and_identity(build, ids, learnable, slope, same_as, autocast):
    leaky = build(activation="leaky_relu", negative_slope=slope, learnable_slope=learnable)
    plain = build(activation=same_as)
    plain.load_state_dict({k: v for k, v in leaky.state_dict().items() if not k.endswith("slope")})
    assert torch.equal(leaky(ids).logits, plain(ids).logits)
    for model in (leaky, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        loss.backward()
    gradients = dict(leaky.named_parameters())
    assert all(torch.equal(p.grad, gradients[name].grad) for name, p in plain.named_parameters())


def test_the_slope_changes_the_logits_however_it_is_kept(build, ids):
    leaky = {"activation": "leaky_relu", "negative_slope": 0.3}
    gentle, *others = [build(**leaky, learnable_slope=kind)(ids).logits for kind in LEARNABLE]
    assert all(torch.equal(gentle, logits) for logits in others)
    assert not torch.allclose(build(activation="leaky_relu", negative_slope=0.5)(ids).logits, gentle)


@pytest.mark.parametrize("names", [["leaky_relu"] * 3, ["relu", "leaky_relu", "gelu"]])
def test_each_leaky_layer_learns_a_slope_of_its_own(build, ids, names):
    model = build(activation=names, learnable_slope="per_layer")
    layers = [layer for layer, name in enumerate(names) if name == "leaky_relu"]
    expected = [f"model.layers.{layer}.feed_forward.activation.negative_slope" for layer in layers]
    assert (list(model.negative_slopes()), model.slope_layers()) == (expected, layers)
    model(ids, labels=ids).loss.backward()
    assert all(model.get_parameter(name).grad.abs() > 0 for name in expected)


def test_every_layer_uses_the_one_shared_slope(build, ids):
    model = build(activation="leaky_relu", learnable_slope="shared")
    assert list(model.negative_slopes()) == ["model.shared_negative_slope"]
    assert model.slope_layers() == []
    separate = build(activation="leaky_relu", learnable_slope="per_layer")
    missing = separate.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert len(missing) == 3
    for candidate in (model, separate):
        candidate(ids, labels=ids).loss.backward()
    total = sum(separate.get_parameter(name).grad for name in separate.negative_slopes())
    torch.testing.assert_close(model.model.shared_negative_slope.grad, total)


def test_negative_slopes_are_float_copies(build):
    model = build(activation="leaky_relu", learnable_slope="shared", negative_slope=0.25).to(torch.bfloat16)
    slope = model.negative_slopes()["model.shared_negative_slope"]
    assert (slope.dtype, slope.shape, slope.item()) == (torch.float32, (), 0.25)
    slope.fill_(9.0)
    assert model.negative_slopes()["model.shared_negative_slope"].item() == 0.25
    assert build(activation="leaky_relu").negative_slopes() == {}


def test_a_list_gives_each_layer_its_activation(build, ids):
    mixed = build(activation=["relu", "gelu", "identity"])(ids).logits
    for others in (["gelu", "gelu", "identity"], ["relu", "relu", "identity"], ["relu", "gelu", "gelu"]):
        assert not torch.allclose(mixed, build(activation=others)(ids).logits)
    assert torch.equal(build(activation=["relu"] * 3)(ids).logits, build(activation="relu")(ids).logits)
