"""Cross-entropy in blocks against cross-entropy of all logits; the fast path against plain float32."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload

from normfree.model import loss as loss_module
from normfree.model.loss import next_token_loss


def plain_loss(hidden, weight, labels):
    logits = hidden[:, :-1] @ weight.mT
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


@pytest.fixture
def case(monkeypatch):
    """Hidden states, weight and labels in float64's reach; three blocks of tokens, some labels left out."""
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
    truth = plain_loss(*exact, labels)
    (3 * truth).backward()
    assert loss.item() == pytest.approx(truth.item(), abs=1e-6)
    for mine, theirs in zip((hidden, weight), exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-6, rtol=1e-5)


def test_the_divisor_can_be_given(case):
    hidden, weight, labels = case
    counted = (labels[:, 1:] != -100).sum()
    doubled = next_token_loss(hidden, weight, labels, num_items_in_batch=counted / 2)
    torch.testing.assert_close(doubled, 2 * next_token_loss(hidden, weight, labels))


def test_no_label_that_counts_gives_nan_not_zero(case):
    hidden, weight, labels = case
    assert next_token_loss(hidden, weight, torch.full_like(labels, -100)).isnan()


def test_a_frozen_weight_gets_no_gradient_and_the_hidden_state_does(case):
    hidden, weight, labels = case
    next_token_loss(hidden, weight.detach(), labels).backward()
    assert weight.grad is None
    assert hidden.grad is not None
    with torch.no_grad():
        assert not next_token_loss(hidden, weight, labels).requires_grad


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


def with_bias(model, ids):
    model.lm_head = torch.nn.Linear(32, 61)
    return {"labels": ids}


def with_hook(model, ids):
    model.lm_head.register_forward_hook(lambda module, inputs, output: output / 2)
    return {"labels": ids}


def with_backward_hook(model, ids):
    model.lm_head.register_full_backward_hook(lambda module, *gradients: None)
    return {"labels": ids}


def with_offloaded_head(model, ids):
    cpu_offload(model, execution_device=torch.device("cpu"))
    return {"labels": ids}


def with_other_labels(model, ids):
    return {"labels": ids, "shift_labels": ids.flip(1)}


def with_another_ignored_label(model, ids):
    return {"labels": ids, "ignore_index": int(ids[0, 3])}


@pytest.mark.parametrize(
    "case",
    [with_bias, with_hook, with_backward_hook, with_offloaded_head, with_other_labels, with_another_ignored_label],
)
def test_what_a_weight_alone_does_not_say_goes_through_the_head(build, ids, case):
    model = build(tie_word_embeddings=False)
    asked = case(model, ids)
    with torch.no_grad():
        expected, without = model(ids, **asked), model(ids, **asked, return_logits=False)
    assert without.logits is None
    torch.testing.assert_close(without.loss, expected.loss)


def test_a_second_derivative_without_logits_is_refused(build, ids):
    model = build()
    weight = model.model.embed_tokens.weight
    loss = model(ids, labels=ids, return_logits=False).loss
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss, weight, create_graph=True)


def test_a_loss_without_logits_needs_labels(build, ids):
    with pytest.raises(ValueError, match="pass labels=input_ids"):
        build()(ids, return_logits=False)


# Twenty seeds, ReLU and GELU: the largest difference is 0.010 in the first ten steps, 0.039 (ReLU) and 0.021 (GELU) in
# all fifty, and 0.022 on average over the last ten: two runs that round differently part slowly.
FIRST_TEN_STEPS, ANY_STEP, LAST_TEN_STEPS = 0.02, 0.06, 0.03


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_fifty_steps_in_bf16_follow_plain_float32(build, activation, seed):
    """Loss without logits and attention written out, both in bf16, against all logits in float32."""
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
    apart = (fast - plain).abs()
    assert apart[:10].max() < FIRST_TEN_STEPS
    assert apart.max() < ANY_STEP
    assert apart[-10:].mean() < LAST_TEN_STEPS


# The compiler itself looks at .grad of the loss when it goes on after the blocked cross-entropy.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_model_has_the_same_loss_and_gradient_without_logits(build, ids):
    model = build(norm="none").train()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(
        compiled(ids, labels=ids, return_logits=False).loss, model(ids, labels=ids, return_logits=False).loss
    )
    compiled(ids, labels=ids, return_logits=False).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_negative_label_that_is_not_the_ignored_one_is_no_token():
    """-1 is what other code ignores by; it must not train towards token 0."""
    hidden, weight = torch.randn(1, 5, 4), torch.randn(6, 4)
    with pytest.raises((RuntimeError, IndexError), match=r"out of (bounds|range)"):
        next_token_loss(hidden, weight, torch.tensor([[1, 2, -1, -1, 3]]))
