"""Draw test accuracy against optimizer steps, from the folders of several budgets.

    python recipes/comparison/make_steps.py

Reads `demo*/results.jsonl`, which `compare_methods.py --total_max_steps` wrote, at one sparsity; writes
`demo/steps.png` and the table `demo/steps.md`.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter, ScalarFormatter

from vpns_hf.experiments.results import CellResult, read_results
from vpns_hf.experiments.tables import mean_and_spread, standard_deviation
from vpns_hf.report.style import save_figure
from vpns_hf.report.tables import MISSING, markdown_table

HERE = Path(__file__).parent
SPARSITY = 0.95
METHODS = {
    "dense": ("#222222", "x"),
    "vpns_joint": ("#0072B2", "o"),
    "hydra_joint": ("#56B4E9", "s"),
    "gmp_lamp": ("#009E73", "^"),
    "gmp": ("#CC79A7", "D"),
    "lamp": ("#E69F00", "P"),
    "vpns": ("#D55E00", "v"),
}


def read_budgets() -> dict[int, list[CellResult]]:
    """Return the results at the sparsity, and the dense ones, by the number of steps."""
    budgets: dict[int, list[CellResult]] = {}
    for path in sorted(HERE.glob("demo*/results.jsonl")):
        for result in read_results(path):
            if result.method in METHODS and result.sparsity in (0, SPARSITY):
                budgets.setdefault(result.steps, []).append(result)
    return dict(sorted(budgets.items()))


def accuracies(results: Sequence[CellResult], method: str) -> list[float]:
    """Return those of a method's seeds, without the prompt."""
    return [result.accuracy for result in results if result.method == method]


def table(budgets: dict[int, list[CellResult]]) -> str:
    """Return mean and standard deviation by method and steps."""
    found = {method: [accuracies(results, method) for results in budgets.values()] for method in METHODS}
    seeds = max(len(values) for each in found.values() for values in each)
    rows = [(name, *(mean_and_spread(values, seeds) or MISSING for values in each)) for name, each in found.items()]
    return markdown_table(("test accuracy (%)", *(f"{steps} steps" for steps in budgets)), rows)


def figure(budgets: dict[int, list[CellResult]]) -> Figure:
    """Plot mean and standard deviation against the steps."""
    drawn = Figure(figsize=(7, 4.4), layout="constrained")
    axes = drawn.add_subplot()
    for method, (colour, marker) in METHODS.items():
        found = {steps: accuracies(results, method) for steps, results in budgets.items()}
        found = {steps: values for steps, values in found.items() if values}
        means = [statistics.fmean(values) for values in found.values()]
        spreads = [standard_deviation(values) or 0.0 for values in found.values()]
        line = "--" if method == "dense" else "-"
        axes.errorbar(
            list(found), means, spreads, label=method, color=colour, marker=marker, linestyle=line, capsize=2
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(budgets)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    axes.set_xlabel("optimizer steps of 32 images")
    axes.set_ylabel(f"test accuracy at {SPARSITY:.0%} sparsity (%)")
    axes.grid(axis="y", color="#D9D9D9", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return drawn


if __name__ == "__main__":
    budgets = read_budgets()
    save_figure(figure(budgets), HERE / "demo/steps.png")
    (HERE / "demo/steps.md").write_text(table(budgets) + "\n", encoding="utf-8")
