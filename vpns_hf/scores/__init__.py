"""Scores of weights for one-shot pruning, and starts of scores that are learned."""

from .starts import SCORE_STARTS
from .table import SCORES, score_weights

__all__ = ["SCORES", "SCORE_STARTS", "score_weights"]
