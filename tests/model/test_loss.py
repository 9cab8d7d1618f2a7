"""Cross-entropy in blocks against that of all logits; the fast path against plain float32."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload

from normfree.model import loss as loss_module
from normfree.model.loss import next_token_loss


@pytest.fixture
def case(monkeypatch):
    """Hidden states, weight and labels in three blocks of tokens, some labels ignored."""
    monkeypatch.setattr(loss_module, "LARGEST_BLOCK", 10)
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 13, 8, generator=random)
    weight = torch.randn(29, 8, generator=random)
    labels = torch.randint(0, 29, (2, 13), generator=random)
    labels[0, 3:7] = labels[1, -1] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def test_loss_and_gradients_are_those_of_all_logits_in_float64(case):
    hidden, weight, labels = case
    loss = next_token_loss(hidden, weight, labels)
    (3 * loss).backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logits = exact[0][:, :-1] @ exact[1].mT
    truth = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    (3 * truth).backward()
    assert loss.item() == pytest.approx(truth.item(), abs=1e-6)
    for mine, theirs in zip((hidden, weight), exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-6, rtol=1e-5)


def test_the_divisor_is_given_or_counted(case):
    hidden, weight, labels = case
    counted = (labels[:, 1:] != -100).sum()
    doubled = next_token_loss(hidden, weight, labels, num_items_in_batch=counted / 2)
    torch.testing.assert_close(doubled, 2 * next_token_loss(hidden, weight, labels))
    assert next_token_loss(hidden, weight, torch.full_like(labels, -100)).isnan()


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_learns_the_same_without_logits(build, ids, tied):
    def trained(return_logits):
        model = build(tie_word_embeddings=tied).train()
        output = model(ids, labels=ids, return_logits=return_logits)
        output.loss.backward()
        return output, {name: parameter.grad for name, parameter in model.named_parameters()}

    (with_logits, expected), (without, gradients) = trained(True), trained(False)
    assert without.logits is None
    assert with_logits.logits is not None
    torch.testing.assert_close(without.loss, with_logits.loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)


HEADS = {
    "bias": lambda model: setattr(model, "lm_head", torch.nn.Linear(32, 61)),
    "hook": lambda model: model.lm_head.register_forward_hook(lambda module, inputs, output: output / 2),
    "backward hook": lambda model: model.lm_head.register_full_backward_hook(lambda module, *gradients: None),
    "offloaded": lambda model: cpu_offload(model, execution_device=torch.device("cpu")),
}


@pytest.mark.parametrize("head", [*HEADS, "shift_labels", "ignore_index"])
def test_a_head_beyond_its_weight_is_called(build, ids, head):
    model = build(tie_word_embeddings=False)
    options = {"shift_labels": {"shift_labels": ids.flip(1)}, "ignore_index": {"ignore_index": int(ids[0, 3])}}
    HEADS.get(head, bool)(model)
    inputs = {"labels": ids, **options.get(head, {})}
    with torch.no_grad():
        expected, without = model(ids, **inputs), model(ids, **inputs, return_logits=False)
    assert without.logits is None
    torch.testing.assert_close(without.loss, expected.loss)


def test_what_the_loss_alone_cannot_give_is_refused(build, ids):
    model = build()
    with pytest.raises(ValueError, match="pass labels=input_ids"):
        model(ids, return_logits=False)
    loss = model(ids, labels=ids, return_logits=False).loss
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss, model.model.embed_tokens.weight, create_graph=True)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_fifty_steps_in_bf16_follow_plain_float32(build, activation, seed):
    """Loss without logits and explicit attention, both in bf16, against all logits in float32."""
    text = torch.randint(0, 61, (50, 8, 32), generator=torch.Generator().manual_seed(5)).sort(-1).values

    def losses(fast):
        model = build(seed=seed, activation=activation, norm="none").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        curve = []
        for ids in text:
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                loss = model(ids, labels=ids, return_logits=not fast).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        return torch.tensor(curve)

    fast, plain = losses(True), losses(False)
    assert plain[-1] < plain[0] - 0.3
    # Over twenty seeds the largest difference is 0.010 in the first ten steps, 0.039 in all fifty, and 0.022 on average
    # over the last ten: two runs that round differently diverge slowly.
    differences = (fast - plain).abs()
    assert differences[:10].max() < 0.02
    assert differences.max() < 0.06
    assert differences[-10:].mean() < 0.03


# The compiler itself looks at .grad of the loss when it goes on after the blocked cross-entropy.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_model_trains_without_logits(build, ids):
    model = build(norm="none").train()
    compiled = torch.compile(model, backend="aot_eager")
    loss = compiled(ids, labels=ids, return_logits=False).loss
    torch.testing.assert_close(loss, model(ids, labels=ids, return_logits=False).loss)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_negative_labels_other_than_the_ignored_one_are_refused():
    """Other code ignores -1; here it must not train towards token 0."""
    hidden, weight = torch.randn(1, 5, 4), torch.randn(6, 4)
    with pytest.raises((RuntimeError, IndexError), match=r"out of (bounds|range)"):
        next_token_loss(hidden, weight, torch.tensor([[1, 2, -1, -1, 3]]))
