"""Report a run: tables, figures and the model card."""

from .confusion import plot_confusion
from .density import plot_density
from .latency import latency_table
from .latency_figure import plot_latency
from .model_card import SubnetworkCard
from .prompt import plot_prompt
from .tables import Result, results_markdown, results_table
from .training import plot_training

__all__ = [
    "Result",
    "SubnetworkCard",
    "latency_table",
    "plot_confusion",
    "plot_density",
    "plot_latency",
    "plot_prompt",
    "plot_training",
    "results_markdown",
    "results_table",
]
