"""Visual prompting upgrades network sparsification: prune pretrained vision models with masks and prompts learned together."""

from transformers import AutoConfig, AutoModelForImageClassification

from .configuration import PromptedSparseConfig
from .modeling import PromptedSparseModel
from .sparsity import SparsityReport
from .version import __version__

AutoConfig.register(PromptedSparseConfig.model_type, PromptedSparseConfig)
AutoModelForImageClassification.register(PromptedSparseConfig, PromptedSparseModel)

__all__ = [
    "PromptedSparseConfig",
    "PromptedSparseModel",
    "SparsityReport",
    "__version__",
]
