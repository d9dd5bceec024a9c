"""Training: the stages of a method, one after the other, in transformers' Trainer."""

from .arguments import VPNsTrainingArguments
from .trainer import VPNsTrainer

__all__ = ["VPNsTrainer", "VPNsTrainingArguments"]
