"""The model: a backbone with masks over its weights and a visual prompt on its input."""

from .configuration import PromptedSparseConfig
from .modeling import PromptedSparseModel
from .prompts import PROMPTS
from .sparsity import SparsityReport

__all__ = ["PROMPTS", "PromptedSparseConfig", "PromptedSparseModel", "SparsityReport"]
