"""Evaluation: perplexity and zero-shot accuracy, each with the protocol of its measurement."""

from sparse_train.evaluation.perplexity import PerplexityResult, evaluate_perplexity, token_ids
from sparse_train.evaluation.zeroshot import WANDA7, TaskAccuracy, ZeroShotResult, evaluate_zero_shot

__all__ = [
    "WANDA7",
    "PerplexityResult",
    "TaskAccuracy",
    "ZeroShotResult",
    "evaluate_perplexity",
    "evaluate_zero_shot",
    "token_ids",
]
