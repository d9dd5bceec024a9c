"""Scores of weights for one-shot pruning."""

from .table import SCORES, score_weights

__all__ = ["SCORES", "score_weights"]
