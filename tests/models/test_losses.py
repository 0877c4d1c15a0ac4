"""Losses against a float64 reference, and what they hold in memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_train.models import losses as module
from sparse_train.models.losses import logit_losses, next_token_loss, squarehead_loss
from tests.reference import distillation_losses, squarehead

pytestmark = pytest.mark.filterwarnings("ignore")

B, LENGTH, V, H = 3, 7, 50, 8


@pytest.fixture
def logits():
    return 3 * torch.randn(B, LENGTH, V), 3 * torch.randn(B, LENGTH, V)


@pytest.fixture
def labels():
    """Some without a loss: at the start, where the shift drops it, in the middle, and padding at the end."""
    labels = torch.randint(V, (B, LENGTH))
    labels[0, 0], labels[1, 3], labels[2, 4:] = -100, -100, -100
    return labels


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("chunk", [1, 4 * V, 2**22], ids=["a token", "four tokens", "all tokens"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0)])
def test_logit_losses_equal_the_reference(logits, labels, temperature, chunk, weights, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk)
    student, teacher = logits
    expected_input, actual_input = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = distillation_losses(expected_input, teacher, labels, temperature)
    actual = logit_losses(actual_input, teacher, labels, temperature)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    (weights[0] * expected[0] + weights[1] * expected[1]).backward()
    (weights[0] * actual[0] + weights[1] * actual[1]).backward()
    torch.testing.assert_close(actual_input.grad, expected_input.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4 * V, 2**22], ids=["a token", "four tokens", "all tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_next_token_loss_equals_the_reference(logits, labels, chunk, dtype, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk)
    student = logits[0].to(dtype)
    expected_input, actual_input = student.double().requires_grad_(), student.clone().requires_grad_()
    log_p = expected_input[:, :-1].log_softmax(-1)
    counted = labels[:, 1:] != -100
    picked = log_p.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    expected = -picked[counted].mean()
    actual, tokens = next_token_loss(actual_input, labels)
    assert actual.dtype == torch.float32 and int(tokens) == int(counted.sum())
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    (3 * actual).backward()
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
    torch.testing.assert_close(actual_input.grad.double(), 3 * expected_input.grad, **tolerance)


def test_the_next_token_loss_ignores_what_has_no_label(logits, labels):
    ignored = torch.cat([labels[:, 1:] == -100, torch.ones(B, 1, dtype=torch.bool)], dim=1)
    student = logits[0].masked_fill(ignored[..., None], math.nan).requires_grad_()
    loss, _ = next_token_loss(student, labels)
    assert torch.equal(loss, next_token_loss(logits[0], labels)[0])
    loss.backward()
    assert not student.grad[ignored].any() and student.grad[~ignored].any(-1).all()
    none, tokens = next_token_loss(student, torch.full_like(labels, -100))
    assert none == 0 and tokens == 0


def test_cross_entropy_is_that_of_validation(logits, labels):
    ce, _ = logit_losses(*logits, labels)
    torch.testing.assert_close(ce, next_token_loss(logits[0], labels)[0])


def test_the_mathematics_is_in_float32(logits, labels):
    student, teacher = (each.bfloat16() for each in logits)
    student.requires_grad_()
    losses = logit_losses(student, teacher, labels)
    expected = distillation_losses(student, teacher, labels, 1.0)
    for ours, theirs in zip(losses, expected, strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    sum(losses).backward()
    assert student.grad.dtype == torch.bfloat16


def test_squarehead_equals_the_reference(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 4 * H)
    mask = torch.ones(B, LENGTH, dtype=torch.int64)
    mask[1, 5:], mask[2, :2] = 0, 0
    scales = (0.01, 1.0, 300.0)  # as states grow with depth
    teacher = [scale * torch.randn(B, LENGTH, H) for scale in scales]
    ours = [state.add(0.3 * scale * torch.randn(B, LENGTH, H)) for scale, state in zip(scales, teacher, strict=True)]
    theirs = [state.clone().requires_grad_() for state in ours]
    ours = [state.requires_grad_() for state in ours]
    actual, expected = squarehead_loss(ours, teacher, mask), squarehead(theirs, teacher, mask)
    assert actual.dtype == torch.float32
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    actual.backward()
    expected.backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-9)
        assert not a.grad[~mask.bool()].any()


def test_what_is_ignored_has_no_part_in_it(logits, labels):
    student, teacher = logits
    before = logit_losses(student, teacher, labels)
    ignored = torch.cat([labels[:, 1:] == -100, torch.ones(B, 1, dtype=torch.bool)], dim=1)
    student, teacher = student.masked_fill(ignored[..., None], math.nan), teacher.masked_fill(ignored[..., None], 1e9)
    student.requires_grad_()
    after = logit_losses(student, teacher, labels)
    assert torch.equal(torch.stack(before), torch.stack(after))
    sum(after).backward()
    assert not student.grad[ignored].any()
    assert student.grad[~ignored].any(-1).all()


def test_a_batch_without_a_label_teaches_nothing(logits):
    student = logits[0].requires_grad_()
    losses = logit_losses(student, logits[1], torch.full((B, LENGTH), -100))
    states = [torch.randn(B, LENGTH, H, requires_grad=True)]
    distance = squarehead_loss(states, [torch.randn(B, LENGTH, H)], torch.zeros(B, LENGTH))
    (sum(losses) + distance).backward()
    assert [loss.item() for loss in (*losses, distance)] == [0, 0, 0]
    assert not student.grad.any() and not states[0].grad.any()


class LargestFloat32(TorchDispatchMode):
    """Notes the most elements that a float32 tensor has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return output


@pytest.mark.parametrize("loss", ["text", "logits", "states"])
def test_no_more_than_a_chunk_is_ever_in_float32(loss, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 4 * V)
    student, teacher = (torch.randn(4, 16, V, dtype=torch.bfloat16) for _ in range(2))
    student.requires_grad_()
    labels, saved = torch.randint(V, (4, 16)), []
    with LargestFloat32() as largest:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            if loss == "text":
                total, _ = next_token_loss(student, labels)
            elif loss == "logits":
                total = sum(logit_losses(student, teacher, labels))
            else:
                total = squarehead_loss([student], [teacher], torch.ones(4, 16))
        total.backward()
    assert student.grad.any()
    assert largest.elements == 4 * V
    # until backward: the two operands as they are, and what is a number a token
    wide = [tensor for tensor in saved if tensor.numel() > 4 * 16]
    operands = [student] if loss == "text" else [student, teacher]
    assert {tensor.data_ptr() for tensor in wide} == {operand.data_ptr() for operand in operands}


def test_tokens_that_the_teacher_rules_out_add_nothing_to_the_divergence(logits):
    student, teacher = (each.clone() for each in logits)
    teacher[..., 3:] = -torch.inf
    labels = torch.ones(teacher.shape[:2], dtype=torch.int64)
    _, kldiv = logit_losses(student, teacher, labels)
    p, log_q = teacher[:, :-1].double().softmax(-1), student[:, :-1].double().log_softmax(-1)
    expected = (torch.special.xlogy(p, p) - p * log_q).sum(-1).mean()
    torch.testing.assert_close(kldiv.double(), expected, rtol=1e-5, atol=0)
