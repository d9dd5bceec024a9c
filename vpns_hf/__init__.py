"""Prune pretrained vision models with masks and visual prompts learned together (VPNs, arXiv 2312.01397)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForImageClassification

from .model import PromptedSparseConfig, PromptedSparseModel, SparsityReport
from .version import __version__

if TYPE_CHECKING:
    from .data import load_transfer_dataset
    from .training import VPNsTrainer, VPNsTrainingArguments

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

# Loading a model needs neither Trainer nor datasets, which take seconds to import.
_LAZY = {"VPNsTrainer": "training", "VPNsTrainingArguments": "training", "load_transfer_dataset": "data"}
_LAZY_FOLDERS = ("data", "experiments", "export", "methods", "report", "scores", "training")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    if name in _LAZY_FOLDERS:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
