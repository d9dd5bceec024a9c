"""Report a run: tables, figures and the model card."""

from .confusion import plot_confusion
from .density import plot_density
from .model_card import SubnetworkCard
from .prompt import plot_prompt
from .tables import Result, results_markdown, results_table
from .training import plot_training

__all__ = [
    "Result",
    "SubnetworkCard",
    "plot_confusion",
    "plot_density",
    "plot_prompt",
    "plot_training",
    "results_markdown",
    "results_table",
]
