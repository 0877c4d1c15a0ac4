"""Plain references, written from the papers: slow, obvious, in float64 unless bits are compared."""

import torch
from torch import Tensor


def row_mask(scores_OI: Tensor, sparsity: float) -> Tensor:
    """Wanda, arXiv 2306.11695, algorithm 1: sort each row, prune the first int(I * s). Stable: lower index first."""
    keep = torch.ones_like(scores_OI, dtype=torch.bool)
    order = torch.sort(scores_OI, dim=1, stable=True).indices
    keep.scatter_(1, order[:, : int(scores_OI.shape[1] * sparsity)], False)
    return keep


def nm_mask(scores_OI: Tensor, kept: int, group: int) -> Tensor:
    """The reference's loop over groups of consecutive inputs, with a stable sort in place of its topk."""
    keep = torch.ones_like(scores_OI, dtype=torch.bool)
    for start in range(0, scores_OI.shape[1], group):
        order = torch.sort(scores_OI[:, start : start + group], dim=1, stable=True).indices
        keep.scatter_(1, start + order[:, : group - kept], False)
    return keep


def wanda_scores(weight_OI: Tensor, inputs_TI: Tensor) -> Tensor:
    """|W_ij| * ||X_j||_2, equation 1."""
    return weight_OI.double().abs() * inputs_TI.double().pow(2).sum(0).sqrt()


def ria_scores(weight_OI: Tensor, inputs_TI: Tensor, a: float) -> Tensor:
    """(|W| / column sum + |W| / row sum) * ||X_j|| ** a; Zhang et al., ICLR 2024, section 3."""
    size = weight_OI.double().abs()
    return (size / size.sum(0) + size / size.sum(1, keepdim=True)) * inputs_TI.double().pow(2).sum(0).sqrt() ** a


def cumulative_mask(scores_OI: Tensor, sparsity: float) -> Tensor:
    """Wanda's variant: rows lose weights until a share alpha of their scores is gone; alpha found by bisection."""
    values, order = scores_OI.double().sort(dim=1, stable=True)
    gone = values.cumsum(1) / values.sum(1, keepdim=True)
    low, high = 0.0, 1.0
    for _ in range(100):
        alpha = (low + high) / 2
        low, high = (low, alpha) if (gone <= alpha).double().mean() > sparsity else (alpha, high)
    keep = torch.ones_like(scores_OI, dtype=torch.bool)
    return keep.scatter(1, order, gone > low)


def sparsegpt(weight_OI: Tensor, inputs_TI: Tensor, kept: int | None, group: int, block: int, damp: float):
    """Algorithm 1 of arXiv 2301.00774, a row at a time, in float64; ``kept`` of ``group``, or half of each block.

    Unstructured masks compare a block of columns over all rows, so rows go side by side there too.
    """
    weight = weight_OI.double().clone()
    hessian = inputs_TI.double().t() @ inputs_TI.double()
    hessian += damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    upper = torch.linalg.cholesky(inverse).t()  # inverse = upper^T upper
    keep = torch.ones_like(weight, dtype=torch.bool)
    columns = weight.shape[1]
    for j in range(columns):
        if kept is None and j % block == 0:
            part = slice(j, min(j + block, columns))
            saliency = weight[:, part] ** 2 / upper.diagonal()[part] ** 2
            pruned = saliency.flatten().argsort()[: saliency.numel() // 2]
            keep[:, part] = torch.ones(saliency.numel(), dtype=torch.bool).scatter(0, pruned, False).view_as(saliency)
        if kept is not None and j % group == 0:
            part = slice(j, j + group)
            saliency = weight[:, part] ** 2 / upper.diagonal()[part] ** 2
            keep[:, part] = torch.ones_like(keep[:, part]).scatter(1, saliency.argsort(1)[:, : group - kept], False)
        for i in range(len(weight)):
            if not keep[i, j]:
                weight[i, j:] -= weight[i, j] / upper[j, j] * upper[j, j:]
                weight[i, j] = 0
    return weight, keep


def distillation_losses(student, teacher, labels, temperature):
    """Position by position in float64: cross-entropy, and t^2 KL(teacher || student) at temperature t."""
    student, teacher = student.double(), teacher.double()
    ce, kldiv, count = 0.0, 0.0, 0
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            label = labels[b, t + 1]
            if label == -100:
                continue
            ce = ce - (student[b, t] - student[b, t].logsumexp(0))[label]
            p, q = (torch.softmax(logits[b, t] / temperature, 0) for logits in (teacher, student))
            kldiv = kldiv + temperature**2 * (p * (p / q).log()).sum()
            count += 1
    return ce / count, kldiv / count


def least_squares(weight, inputs, keep, dampening_frac):
    """Weights, zero where ``keep`` is False, whose outputs are closest to those of ``weight``, row by row."""
    weight, hessian = weight.double(), dampened(inputs, dampening_frac)
    fitted = torch.zeros_like(weight)
    for row, kept in enumerate(keep):
        fitted[row, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight[row])
    return fitted


def alone(weight, inputs, fitted, dampening_frac):
    """What each pruned weight would be, if it alone came back beside the fitted ones."""
    hessian = dampened(inputs, dampening_frac)
    return fitted + (weight.double() - fitted) @ hessian / hessian.diagonal()


def dampened(inputs, dampening_frac):
    """Second moments of the inputs, with a share of their mean on the diagonal."""
    hessian = inputs.double().T @ inputs.double()
    return hessian + dampening_frac * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
