"""The command `vpns-hf`."""

from .errors import exit_in_one_sentence
from .program import main

__all__ = ["exit_in_one_sentence", "main"]
