"""Fill the README's tables of the demo and of the comparison, and draw its picture.

    python recipes/comparison/make_readme.py

The demo's table is of `model_cards/vpns-demo-95/card.json`, the comparison's of `demo/results.jsonl`. They replace
what lies between `<!-- NAME: begin -->` and `<!-- NAME: end -->` in README.md.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from vpns_hf.experiments.figure import comparison_figure
from vpns_hf.experiments.results import CellResult, read_results
from vpns_hf.experiments.tables import paired_differences, percentage, summary_markdown
from vpns_hf.report import SubnetworkCard
from vpns_hf.report.style import save_figure
from vpns_hf.report.tables import file_size, markdown_table, milliseconds, percent

ROOT = Path(__file__).parents[2]
README, PICTURE = ROOT / "README.md", ROOT / "docs/assets/accuracy.png"
RESULTS = ROOT / "recipes/comparison/demo/results.jsonl"
CARDS = ROOT / "model_cards"
METHODS = ("dense", "vpns_joint", "hydra_joint", "vpns_gradual", "gmp_lamp", "gmp", "lamp", "vpns")
DRAWN = ("dense", "vpns_joint", "hydra_joint", "gmp_lamp", "gmp", "vpns")
OURS, CONTROL = "vpns_joint", "hydra_joint"


def read_card(name: str) -> SubnetworkCard:
    """Read the facts of a released subnetwork."""
    return SubnetworkCard.from_json((CARDS / name / "card.json").read_text(encoding="utf-8"))


def demo_table(card: SubnetworkCard) -> str:
    """Return the table of the demo: accuracy without the prompt, bytes and milliseconds."""
    rows = [
        (
            result.name.removesuffix(" after tuning"),
            percentage(result.sparsity),
            percent(result.accuracy),
            file_size(result.file_bytes),
            milliseconds(result.milliseconds),
        )
        for result in card.results
    ]
    return markdown_table(("model", "sparsity", "test accuracy", "file", "ms an image"), rows)


def comparison_table(results: Sequence[CellResult]) -> str:
    """Return the table of the comparison, and the difference that the prompt makes in words."""
    sparsities = sorted({result.sparsity for result in results if result.method != "dense"})
    differences = [
        f"{each.mean:+.2f}{'' if each.sd is None else f' ± {each.sd:.2f}'} points at {percentage(each.sparsity)}"
        for each in paired_differences(results, OURS, CONTROL)
    ]
    prompt = f"`{OURS}` minus `{CONTROL}`, the same loop without the prompt, paired by seed: {', '.join(differences)}."
    return f"{summary_markdown(results, METHODS, sparsities)}\n\n{prompt}"


def picture(results: Sequence[CellResult]) -> Figure:
    """Plot accuracy against sparsity, with the size of the packed file below each sparsity."""
    figure = comparison_figure([result for result in results if result.method in DRAWN], controls=(CONTROL,))
    figure.set_size_inches(8.6, 4.4)
    (axes,) = figure.axes
    sizes = {
        percentage(card.results[-1].sparsity): file_size(card.results[-1].file_bytes)
        for card in map(read_card, ("vpns-demo-90", "vpns-demo-95", "vpns-demo-98"))
    }
    sparsities = sorted({result.sparsity for result in results if result.method in DRAWN and result.sparsity})
    axes.xaxis.set_major_locator(FixedLocator([1 - sparsity for sparsity in sparsities]))

    def label(density: float, _: int | None) -> str:
        sparsity = percentage(1 - density)
        return f"{sparsity}\n{sizes[sparsity]}" if sparsity in sizes else sparsity

    axes.xaxis.set_major_formatter(FuncFormatter(label))
    dense = file_size(read_card("vpns-demo-95").results[0].file_bytes)
    axes.set_xlabel(f"sparsity, and size of the packed file (dense: {dense})")
    return figure


def fill(text: str, name: str, content: str) -> str:
    """Replace what lies between the marks of a block.

    Raises:
        ValueError: the text does not have the block once.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    block = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    if len(block.findall(text)) != 1:
        raise ValueError(f"README.md does not have the block {name!r} once; expected {begin} and {end} around it.")
    return block.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def readme(text: str) -> str:
    """Return the README with its tables filled in."""
    text = fill(text, "demo", demo_table(read_card("vpns-demo-95")))
    return fill(text, "results", comparison_table(read_results(RESULTS)))


if __name__ == "__main__":
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    save_figure(picture(read_results(RESULTS)), PICTURE)
