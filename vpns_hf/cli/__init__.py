"""The command `vpns-hf`."""

from .program import main

__all__ = ["main"]
