"""Write `results.csv`, one row for each released subnetwork and for each method and sparsity of a comparison.

    python model_cards/make_results.py

Rows of subnetworks are from their `card.json`, one seed each; rows of comparisons are means over the seeds of their
`results.jsonl`. A field is empty where it was not measured. Accuracies are of the test split and in percent.
"""

import csv
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from io import StringIO
from pathlib import Path

import yaml

from vpns_hf.experiments.origins import backbone_origin, dataset_origin
from vpns_hf.experiments.results import DENSE, CellResult, read_results
from vpns_hf.experiments.tables import standard_deviation
from vpns_hf.report import SubnetworkCard

CARDS = Path(__file__).parent
RECIPES = CARDS.parent / "recipes"
# Folders that are not in the repository, by the names that recipes/imagenet/make_assets.py gives them.
ABSENT = {"mobilenet_v2": "mobilenetv2_100 (ImageNet)", "cifar10_small": "CIFAR-10 (5,000 images)"}
COMPARISONS = ("demo", "imagenet", "all_methods", "all_methods_imagenet")


@dataclass(frozen=True)
class Row:
    """Row of the table.

    Args:
        name: folder of the subnetwork, or of the comparison.
        model, method, pattern, dataset: as cards name them.
        sparsity: share of the prunable weights that are zero, in percent.
        accuracy: accuracy without the prompt.
        accuracy_sd: sample standard deviation over the seeds.
        accuracy_prompted: accuracy with the prompt.
        dense_accuracy: accuracy of the dense model after the same optimizer steps.
        steps: number of optimizer steps, as the source counts them.
        kept_weights: number of prunable weights that are kept.
        file_bytes: size of the saved weights.
        milliseconds: time of one image on the machine.
        machine: processor and number of its cores.
        seeds: seeds, with spaces between them.
    """

    name: str
    model: str
    method: str
    pattern: str
    sparsity: str
    dataset: str
    accuracy: str
    accuracy_sd: str
    accuracy_prompted: str
    dense_accuracy: str
    steps: str
    kept_weights: str
    file_bytes: str
    milliseconds: str
    machine: str
    seeds: str


def card_rows(folder: Path) -> Iterator[Row]:
    """Yield a row for each card, in order of the folders' names."""
    cards = {
        path.parent.name: SubnetworkCard.from_json(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*/card.json"))
    }
    for name, card in cards.items():
        result = card.results[-1]
        yield Row(
            name=name,
            model=card.base_model,
            method=result.name.split()[0],
            pattern=card.sparsity.pattern,
            sparsity=_percent(result.sparsity),
            dataset=card.dataset,
            accuracy=_percent(result.accuracy),
            accuracy_sd="",
            accuracy_prompted=_percent(result.accuracy_prompted),
            dense_accuracy=_percent(_dense_accuracy(card, cards.values())),
            steps=str(result.steps),
            kept_weights=str(card.sparsity.kept),
            file_bytes="" if result.file_bytes is None else str(result.file_bytes),
            milliseconds="" if result.milliseconds is None else f"{result.milliseconds:.3g}",
            machine=card.settings.get("machine", ""),
            seeds=card.settings["seed"],
        )


def _dense_accuracy(card: SubnetworkCard, cards: Iterable[SubnetworkCard]) -> float | None:
    """Return the accuracy of the dense model on a card, or on that of another sparsity that was trained alike."""

    def training(other: SubnetworkCard) -> tuple[object, ...]:
        return other.base_model, other.dataset, other.settings, other.results[-1].steps

    alike = [card, *(other for other in cards if training(other) == training(card))]
    rows = (result for other in alike for result in other.results)
    return next((result.accuracy for result in rows if result.sparsity == 0), None)


def comparison_rows(name: str) -> Iterator[Row]:
    """Yield a row for each method and sparsity of a comparison, in the order of its lines."""
    recipe = yaml.safe_load((RECIPES / "comparison" / f"{name}.yaml").read_text(encoding="utf-8"))
    model, dataset = (RECIPES / "comparison" / recipe[key] for key in ("model_name_or_path", "dataset_name"))
    results = read_results(RECIPES / "comparison" / name / "results.jsonl")
    dense = [result.accuracy for result in results if result.method == DENSE]
    for method, sparsity in dict.fromkeys((result.method, result.sparsity) for result in results):
        cells = [result for result in results if (result.method, result.sparsity) == (method, sparsity)]
        accuracies = [cell.accuracy for cell in cells]
        yield Row(
            name=f"comparison/{name}",
            model=ABSENT.get(model.name) or backbone_origin(str(model)).title,
            method=method,
            pattern=recipe.get("pattern", "unstructured"),
            sparsity=_percent(sparsity),
            dataset=ABSENT.get(dataset.name) or dataset_origin(str(dataset)).title,
            accuracy=_percent(statistics.fmean(accuracies)),
            accuracy_sd=_percent(standard_deviation(accuracies)),
            accuracy_prompted=_percent(_mean_prompted(cells)),
            dense_accuracy=_percent(statistics.fmean(dense) if dense else None),
            steps=str(cells[0].steps),
            kept_weights="",
            file_bytes="",
            milliseconds="",
            machine="",
            seeds=" ".join(str(cell.seed) for cell in cells),
        )


def _mean_prompted(cells: Iterable[CellResult]) -> float | None:
    prompted = [cell.accuracy_prompted for cell in cells if cell.accuracy_prompted is not None]
    return statistics.fmean(prompted) if prompted else None


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2f}"


def table() -> str:
    """Return the whole table as CSV."""
    text = StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(row) for row in card_rows(CARDS))
    writer.writerows(vars(row) for name in COMPARISONS for row in comparison_rows(name))
    return text.getvalue()


if __name__ == "__main__":
    (CARDS / "results.csv").write_text(table(), encoding="utf-8")
