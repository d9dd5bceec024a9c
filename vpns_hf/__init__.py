"""Prune pretrained vision models with masks and visual prompts learned together (VPNs, arXiv 2312.01397)."""

from transformers import AutoConfig, AutoModelForImageClassification

from .configuration import PromptedSparseConfig
from .data import load_transfer_dataset
from .modeling import PromptedSparseModel
from .sparsity import SparsityReport
from .trainer import VPNsTrainer
from .training_args import VPNsTrainingArguments
from .version import __version__

AutoConfig.register(PromptedSparseConfig.model_type, PromptedSparseConfig)
AutoModelForImageClassification.register(PromptedSparseConfig, PromptedSparseModel)

__all__ = [
    "PromptedSparseConfig",
    "PromptedSparseModel",
    "SparsityReport",
    "VPNsTrainer",
    "VPNsTrainingArguments",
    "__version__",
    "load_transfer_dataset",
]
