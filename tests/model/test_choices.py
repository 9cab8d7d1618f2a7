"""Every choice of norm, placement, branch, linear map and attention against its formula, written a second time.

`python -m tests.model.test_choices` writes tests/golden/choices.json anew: a change there changes what is computed.
"""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from normfree import EntropyProbe, NormFreeConfig, NormFreeForCausalLM
from normfree.model.norms import TaperedNorm
from normfree.model.tables import TABLES
from tests.small_model import CHOICES, SIZES, small_model

TAPER = {"norm": "taper", "taper_end_step": 8}
SINGLE = [
    *({"norm": norm} for norm in ("rmsnorm", "lns", "dyt", "derf", "bhyt")),
    {"final_norm": "derf", "norm": "dyt", "norm_steepness": [0.8, 0.2, 0.3]},
    TAPER,
    {"norm": "fake", "fake_start_step": 2, "fake_gap_steps": 1},
    *({"placement": placement, "norm": "rmsnorm"} for placement in ("post", "peri")),
    {"placement": "mix", "post_share": 0.34},
    {"placement": "peri", "residual": "parallel"},
    {"query_key_norm": "rmsnorm", "position": "rotary", "rotary_share": 0.5},
    *({"branch": branch} for branch in ("scaled_ffn", "layerscale", "rezero", "fixed")),
    {"branch": "rezero", "residual": "parallel"},
    {"embedding_scale": "learned"},
    {"linear": "weight_norm"},
    {"linear": "spectral_norm", "bias": "all"},
    {"linear": "spectral_norm", "linear_groups": ["q", "ffn"]},
    *({"attention_temperature": each} for each in ("head", "position")),
    *({"attention_sink": sink} for sink in ("softmax_1", "learned")),
    *({"attention_gate": gate} for gate in ("head", "channel")),
]
GOLDEN = Path(__file__).parents[1] / "golden" / "choices.json"
FORMS = [
    pytest.param(form, id=", ".join(f"{key} {value}" for key, value in form.items())) for form in [*SINGLE, *CHOICES]
]


class Formulas:
    """The decoder by its formulas, in the dtype of `state`, whose names are those of `state_dict`."""

    def __init__(self, config: NormFreeConfig, state: dict[str, torch.Tensor]) -> None:
        self.config, self.state = config, state

    def logits(self, ids):
        config, state = self.config, self.state
        x = state["model.embed_tokens.weight"][ids]
        if config.embedding_scale == "learned":
            x = x * state["model.embedding_scale"]
        if config.position == "learned":
            x = x + state["model.positions.vectors.weight"][: ids.shape[1]]
        for layer in range(config.num_hidden_layers):
            attended = self.branch(x, x, layer, "attention", self.attention)
            source = x if config.residual == "parallel" else attended
            x = self.branch(attended, source, layer, "feed_forward", self.feed_forward)
        x = self.norm(x, "model.final_norm", config.final_norm, None)
        return x @ state["model.embed_tokens.weight"].T

    def norm(self, x, name, kind, layer):
        values = {key.rpartition(".")[2]: v for key, v in self.state.items() if key.startswith(f"{name}.")}
        root = (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        if kind in ("layernorm", "lns", "fake"):  # test_folding.py has a fake norm that is fixed
            centred = x - x.mean(-1, keepdim=True)
            whole = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * values["weight"] + values["bias"]
            return whole / math.sqrt(layer + 1) if kind == "lns" and layer is not None else whole
        if kind == "rmsnorm":
            return values["weight"] * x / root
        if kind == "bhyt":
            return values["gain"] * torch.tanh(values["bound"] / 10 * x / root)
        if kind == "taper":
            return values["gain"] * (values["share"] / root + (1 - values["share"]) * values["mean_inverse_rms"]) * x
        if kind == "dyt":
            return values["gain"] * torch.tanh(values["steepness"] * x) + values["offset"]
        if kind == "derf":
            return values["gain"] * torch.erf(values["steepness"] * x + values["shift"]) + values["offset"]
        return x

    def weight(self, rows, prefix):
        if f"{prefix}.gain" not in self.state:
            return rows
        gain = self.state[f"{prefix}.gain"]
        if self.config.linear == "weight_norm":
            return gain[:, None] * rows / rows.pow(2).sum(1, keepdim=True).sqrt()
        return gain * rows / torch.einsum("r,rc,c->", self.state[f"{prefix}.left"], rows, self.state[f"{prefix}.right"])

    def linear(self, x, name, groups):
        parts = self.state[f"{name}.weight"].chunk(len(groups))
        used = [self.weight(rows, f"{name}.maps.{group}") for group, rows in zip(groups, parts, strict=True)]
        y = x @ torch.cat(used).T
        bias = self.state.get(f"{name}.bias", y.new_zeros(y.shape[-1]))
        return y + torch.cat([bias, y.new_zeros(y.shape[-1] - len(bias))])

    def rotated(self, x):
        width = self.config.rotary_dim
        angles = torch.arange(x.shape[-2])[:, None] / self.config.rotary_base ** (torch.arange(0, width, 2) / width)
        cosines, sines = angles.cos(), angles.sin()
        first, second, rest = x[..., : width // 2], x[..., width // 2 : width], x[..., width:]
        return torch.cat([first * cosines - second * sines, second * cosines + first * sines, rest], -1)

    def attention(self, x, name):
        config, heads, tokens = self.config, self.config.num_attention_heads, x.shape[1]
        states = self.linear(x, f"{name}.qkv", "qkv").chunk(3, -1)
        q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in states)
        q = self.norm(q, f"{name}.query_norm", config.query_key_norm, 0)
        k = self.norm(k, f"{name}.key_norm", config.query_key_norm, 0)
        if config.position == "rotary":
            q, k = self.rotated(q), self.rotated(k)
        scores = q @ k.mT / math.sqrt(config.head_dim)
        if config.attention_temperature != "fixed":
            scores = scores / self.state[f"{name}.temperature.value"].view(heads, -1)[:, :tokens, None]
        logits = [scores.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -torch.inf)]
        if config.attention_sink == "softmax_1":
            logits.append(torch.zeros_like(scores[..., :1]))
        if config.attention_sink == "learned":
            logits.append(self.state[f"{name}.sink.logit"][:, None, None].expand_as(scores[..., :1]))
        mixed = (torch.cat(logits, -1).softmax(-1)[..., :tokens] @ v).transpose(1, 2)
        if config.attention_gate != "none":
            gates = torch.sigmoid(x @ self.state[f"{name}.gate.projection.weight"].T)
            mixed = mixed * gates.unflatten(-1, (heads, -1))
        return self.linear(mixed.flatten(2), f"{name}.output", "o")

    def feed_forward(self, x, name):
        features = F.gelu(self.linear(x, f"{name}.input", ["ffn"]))
        return self.linear(features, f"{name}.output", ["ffn"])

    def branch(self, stream, source, layer, part, compute):
        config, name = self.config, f"model.layers.{layer}.{part}"
        first_post = config.placement == "mix" and layer < round(config.num_hidden_layers * config.post_share)
        post = config.placement == "post" or first_post
        if not post:
            source = self.norm(source, f"{name}_norm", config.norm, layer)
        written = compute(source, name)
        if config.placement == "peri":
            written = self.norm(written, f"{name}_output_norm", config.norm, layer)
        joined = self.joined(stream, written, f"{name}_join", part)
        return self.norm(joined, f"{name}_stream_norm", config.norm, layer) if post else joined

    def joined(self, stream, written, name, part):
        if self.config.branch == "scaled_ffn" and part == "feed_forward":
            return self.state[f"{name}.stream_weight"] * stream + written / self.state[f"{name}.divisor"]
        if self.config.branch in ("layerscale", "rezero"):
            return stream + self.state[f"{name}.scale"] * written
        return stream + written * (0.2 * math.sqrt(18 / 3) if self.config.branch == "fixed" else 1)


@pytest.mark.parametrize("form", FORMS)
def test_logits_and_gradients_are_those_of_the_formulas(ids, form):
    model = small_model(**form).double()
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    expected = Formulas(model.config, state).logits(ids)
    actual = model(ids).logits
    tolerance = 1e-6 if form.get("position") == "rotary" else 1e-10  # rotation is float32
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)
    parameters = list(model.parameters())
    direction = torch.randn(actual.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = [torch.autograd.grad((each * direction).sum(), parameters) for each in (actual, expected)]
    for (name, _), ours, theirs in zip(model.named_parameters(), *gradients, strict=True):
        assert theirs.abs().max() > 0, name
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_every_entry_of_every_table_is_compared_with_a_formula():
    for field in TABLES.keys() - {"final_norm"}:
        tested = {form[field] for form in SINGLE if field in form}
        assert tested | {"none", "layernorm", "plain", "pre", "fixed"} >= set(TABLES[field]), field


@pytest.mark.parametrize("linear", ["weight_norm", "spectral_norm"])
def test_a_reparametrised_model_starts_as_the_plain_one(linear, ids):
    logits = []
    for name in (linear, "plain"):
        torch.manual_seed(0)
        logits.append(NormFreeForCausalLM(NormFreeConfig(**SIZES, linear=name)).double()(ids).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("fields", "changes"),
    [({}, False), ({"linear": "weight_norm"}, False), ({"linear": "spectral_norm"}, True), (TAPER, True)],
)
def test_training_advances_only_models_with_state(fields, changes):
    assert small_model(**fields).has_state == changes


def test_power_iterations_find_the_largest_singular_value():
    projection = small_model(linear="spectral_norm").double().model.layers[0].feed_forward.input
    spectral = projection.maps["ffn"]
    for _ in range(200):
        projection.advance()
    largest = torch.linalg.matrix_norm(projection.weight, ord=2)
    torch.testing.assert_close(torch.linalg.matrix_norm(projection.used_weight(), ord=2), spectral.gain.abs()[0])
    torch.testing.assert_close(spectral.left @ projection.weight @ spectral.right, largest)


def test_taper_ends_as_a_fixed_scale(ids):
    model = small_model(**TAPER, taper_start_step=2).train()
    shares = []
    for step in range(1, 9):
        model.advance(step, model(ids).norm_sums)
        shares.append(float(model.model.layers[0].attention_norm.share))
    assert shares[0] == 1.0  # step 2 is the last with the whole norm
    assert shares[1] == pytest.approx(0.5 * (1 + math.cos(math.pi / 6)))
    assert shares[6:] == [0.0, 0.0]  # step 8 has the fixed scale
    assert all(after < before for before, after in itertools.pairwise(shares[:7]))


def test_taper_averages_the_inverse_rms_over_steps_and_batches(ids):
    norm = TaperedNorm(8, 1e-5, start=0, end=100)
    with torch.no_grad():
        norm.share.fill_(1.0)
        norm.mean_inverse_rms.zero_()
    batches = torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(1))
    means = (batches.pow(2).mean(-1) + 1e-5).rsqrt().mean(-1)
    for step, parts in enumerate(batches, start=1):
        norm.advance(step, sum(norm.sums(part) for part in parts))
    one, two, three = means.mean(1)
    torch.testing.assert_close(norm.mean_inverse_rms, 0.9 * (0.9 * one + 0.1 * two) + 0.1 * three)


@pytest.mark.parametrize("form", [TAPER, {"linear": "spectral_norm"}], ids=["taper", "spectral_norm"])
def test_forward_passes_change_no_state(ids, form):
    model = small_model(**form).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(ids, labels=ids).loss.backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("form", [param for param in FORMS if "attention_sink" in param.values[0]])
def test_a_probe_measures_attention_with_a_sink(ids, form):
    model = small_model(**form)
    with EntropyProbe(model, patterns=True) as probe:
        model(ids)
    weights = small_model(**form, attention="eager")(ids, output_attentions=True).attentions
    for layer, weights_BHTT in enumerate(weights):
        assert (weights_BHTT.sum(-1) < 0.999).any()
        entropies = torch.special.entr(weights_BHTT.double()).sum(-1)
        measured = probe.statistics().mean_nats()[layer]
        torch.testing.assert_close(measured, entropies.mean((0, 2)), atol=2e-5, rtol=0)


def first_losses(form: dict) -> list[float]:
    """Losses of five AdamW steps on one batch, as training makes them: `advance` after each."""
    torch.manual_seed(0)
    model = NormFreeForCausalLM(NormFreeConfig(**(SIZES | form))).train()
    ids_BT = torch.randint(0, 61, (4, 16), generator=torch.Generator().manual_seed(5))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(1, 6):
        output = model(ids_BT, labels=ids_BT, return_logits=False)
        output.loss.backward()
        losses.append(output.loss.item())
        optimizer.step()
        optimizer.zero_grad()
        model.advance(step, output.norm_sums)
    return losses


@pytest.mark.parametrize("form", FORMS)
def test_first_losses_are_the_committed_ones(form, request):
    assert first_losses(form) == pytest.approx(json.loads(GOLDEN.read_text())[request.node.callspec.id], rel=2e-5)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({param.id: first_losses(*param.values) for param in FORMS}, indent=1) + "\n")
