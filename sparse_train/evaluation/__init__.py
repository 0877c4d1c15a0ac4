"""Evaluation: perplexity with its protocol."""

from sparse_train.evaluation.perplexity import PerplexityProtocol, PerplexityResult, evaluate_perplexity, token_ids

__all__ = ["PerplexityProtocol", "PerplexityResult", "evaluate_perplexity", "token_ids"]
