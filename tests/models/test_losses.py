"""Losses against a float64 reference, and what they hold in memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_train.models import losses as module
from sparse_train.models.losses import distillation_loss, next_token_loss, top_k
from tests.reference import distillation_losses

pytestmark = pytest.mark.filterwarnings("ignore")

B, LENGTH, V = 3, 7, 50


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
    expected = (weights[0] * expected[0] + weights[1] * expected[1], *expected)
    actual = distillation_loss(actual_input, teacher, labels, temperature, *weights)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    (3 * expected[0]).backward()
    (3 * actual[0]).backward()
    torch.testing.assert_close(actual_input.grad, expected_input.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_top_k_of_all_tokens_is_the_teacher_itself(logits, labels, temperature):
    student, teacher = logits
    whole = distillation_loss(student, teacher, labels, temperature)
    kept = top_k(teacher, V, temperature)
    torch.testing.assert_close(distillation_loss(student, kept, labels, temperature), whole)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk", [4 * V, 2**22], ids=["four tokens", "all tokens"])
def test_of_a_top_k_all_other_tokens_count_as_one(logits, labels, temperature, chunk, monkeypatch):
    """Against float64: KL between K + 1 probabilities, with autograd's gradient."""
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk)
    student, teacher = logits
    kept = top_k(teacher, 5, temperature)
    actual_input, expected_input = student.clone().requires_grad_(), student.double().requires_grad_()
    total, ce, kldiv = distillation_loss(actual_input, kept, labels, temperature, 0.0, 2.0)
    log_q = (expected_input / temperature).log_softmax(-1)
    ids, log_p = kept.ids_BLK.long(), kept.log_probs_BLK.double()
    others = log_q.exp().scatter(2, ids, 0).sum(-1)
    divergence = (log_p.exp() * (log_p - log_q.gather(2, ids))).sum(-1)
    divergence = divergence + kept.log_rest_BL.double().exp() * (kept.log_rest_BL.double() - others.log())
    expected = temperature**2 * divergence[:, :-1][labels[:, 1:] != -100].mean()
    assert kldiv.item() == pytest.approx(expected.item(), rel=1e-4)
    _, of_live, live = distillation_loss(student, teacher, labels, temperature)
    assert ce == of_live and 0 <= kldiv < live
    total.backward()
    (2 * expected).backward()
    torch.testing.assert_close(actual_input.grad.double(), expected_input.grad, rtol=1e-3, atol=1e-6)


def test_a_teacher_that_is_sure_leaves_nothing_to_the_others(labels):
    student = torch.randn(B, LENGTH, V, requires_grad=True)
    kept = top_k(1000.0 * torch.nn.functional.one_hot(labels.clamp(min=0), V), 3)
    assert (kept.log_rest_BL == -torch.inf).all()
    total, _, kldiv = distillation_loss(student, kept, labels)
    total.backward()
    assert kldiv.isfinite() and student.grad.isfinite().all()


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
    _, ce, _ = distillation_loss(*logits, labels)
    torch.testing.assert_close(ce, next_token_loss(logits[0], labels)[0])


def test_the_mathematics_is_in_float32(logits, labels):
    student, teacher = (each.bfloat16() for each in logits)
    student.requires_grad_()
    total, *losses = distillation_loss(student, teacher, labels)
    for ours, theirs in zip(losses, distillation_losses(student, teacher, labels, 1.0), strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    total.backward()
    assert student.grad.dtype == torch.bfloat16


def test_cross_entropy_without_weight_cannot_make_the_loss_infinite(logits, labels):
    ruled_out = torch.nn.functional.one_hot(labels[0, 2], V).bool()
    student, teacher = (each.clone() for each in logits)
    student[0, 1, ruled_out] = teacher[0, 1, ruled_out] = -torch.inf
    total, ce, _ = distillation_loss(student, teacher, labels, 1.0, 0.0, 1.0)
    assert ce.isinf() and total.isfinite()


def test_a_second_derivative_is_refused(logits, labels):
    student = logits[0].requires_grad_()
    for loss in (next_token_loss(student, labels)[0], distillation_loss(student, logits[1], labels)[0]):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, student, create_graph=True)


def test_small_gradients_survive_float16(labels):
    """They are multiplied by the loss scale before they are divided by the number of tokens, not after."""
    logits = torch.randn(B, 512, V).half().requires_grad_()
    labels = torch.randint(V, (B, 512))
    loss, tokens = next_token_loss(logits, labels)
    (2.0**16 * loss).backward()
    expected = logits.detach().double().softmax(-1)[0, 0] * 2**16 / tokens
    expected[labels[0, 1]] -= 2**16 / tokens
    torch.testing.assert_close(logits.grad[0, 0].double(), expected, rtol=1e-2, atol=1e-3)


def test_what_is_ignored_has_no_part_in_it(logits, labels):
    student, teacher = logits
    before = distillation_loss(student, teacher, labels)
    ignored = torch.cat([labels[:, 1:] == -100, torch.ones(B, 1, dtype=torch.bool)], dim=1)
    student, teacher = student.masked_fill(ignored[..., None], math.nan), teacher.masked_fill(ignored[..., None], 1e9)
    student.requires_grad_()
    after = distillation_loss(student, teacher, labels)
    assert torch.equal(torch.stack(before), torch.stack(after))
    after[0].backward()
    assert not student.grad[ignored].any()
    assert student.grad[~ignored].any(-1).all()


def test_a_batch_without_a_label_teaches_nothing(logits):
    student = logits[0].requires_grad_()
    losses = distillation_loss(student, logits[1], torch.full((B, LENGTH), -100))
    losses[0].backward()
    assert [loss.item() for loss in losses] == [0, 0, 0]
    assert not student.grad.any()


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


@pytest.mark.parametrize("loss", ["text", "logits", "cache"])
def test_no_more_than_a_chunk_is_ever_in_float32(loss, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 4 * V)
    student, teacher = (torch.randn(4, 16, V, dtype=torch.bfloat16) for _ in range(2))
    student.requires_grad_()
    labels, saved = torch.randint(V, (4, 16)), []
    with LargestFloat32() as largest:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            if loss == "text":
                total, _ = next_token_loss(student, labels)
            else:
                taught = teacher if loss == "logits" else top_k(teacher, 2)
                total, _, _ = distillation_loss(student, taught, labels)
        total.backward()
    assert student.grad.any()
    assert largest.elements == 4 * V
    # until backward: the gradient as it will be, instead of the logits
    (wide,) = (tensor for tensor in saved if tensor.numel() > 4 * 16)
    assert wide.dtype == torch.bfloat16 and wide.numel() == student.numel()


def test_tokens_that_the_teacher_rules_out_add_nothing_to_the_divergence(logits):
    student, teacher = (each.clone() for each in logits)
    teacher[..., 3:] = -torch.inf
    labels = torch.ones(teacher.shape[:2], dtype=torch.int64)
    _, _, kldiv = distillation_loss(student, teacher, labels)
    p, log_q = teacher[:, :-1].double().softmax(-1), student[:, :-1].double().log_softmax(-1)
    expected = (torch.special.xlogy(p, p) - p * log_q).sum(-1).mean()
    torch.testing.assert_close(kldiv.double(), expected, rtol=1e-5, atol=0)
