"""Render the results of a run as a model card for the Hub, from `card_templates/template.md`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Self

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..hub import BEGIN, END, TAGS, merge_cards
from ..latency import LatencyReport
from ..model.sparsity import LayerSparsity, SparsityReport
from ..training.plan import StageSettings
from ..version import __version__
from .latency import latency_section
from .tables import Result, markdown_table, percent, results_markdown

TEMPLATE = "template.md"


@dataclass(frozen=True)
class SubnetworkCard:
    """Facts of the model card of a subnetwork; the card states no others.

    Args:
        title: heading of the card.
        repo_id: repository or folder that the code on the card loads the model from.
        base_model: Hub id or name of the backbone.
        base_model_is_on_hub: True if `base_model` is a Hub id, which belongs in the metadata.
        dataset: name of the data set.
        dataset_id: Hub id of the data set, or None.
        dataset_license: identifier of its licence; None where it is not known.
        dataset_source: where it comes from, an address or a sentence; None where that is not known.
        split: split that the results were measured on.
        images: number of images of the split.
        method: description of the method, one sentence.
        results: rows of the table of results; the last one is this model.
        sparsity: kept weights, layer by layer.
        stages: settings of each stage.
        settings: further settings by name, such as seed and batch size.
        uses_prompt: True if the published model adds its prompt by default.
        has_prompt: True if it has a prompt.
        figures: paths of pictures within the repository, by their captions.
        license: identifier of the licence, as the Hub spells it; None leaves it out.
        version: version of this library that the model was trained with.
        latency: how fast it is; None where that was not measured.
    """

    title: str
    repo_id: str
    base_model: str
    base_model_is_on_hub: bool
    dataset: str
    dataset_id: str | None
    split: str
    images: int
    method: str
    results: Sequence[Result]
    sparsity: SparsityReport
    stages: Sequence[StageSettings]
    settings: dict[str, str] = field(default_factory=dict)
    uses_prompt: bool = False
    has_prompt: bool = False
    figures: dict[str, str] = field(default_factory=dict)
    license: str | None = None
    version: str = __version__
    latency: LatencyReport | None = None
    dataset_license: str | None = None
    dataset_source: str | None = None

    def to_json(self) -> str:
        """Return all facts as a JSON object, which [`~SubnetworkCard.from_json`] reads."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse the facts of [`~SubnetworkCard.to_json`]."""
        facts = json.loads(text)
        report = facts["sparsity"]
        report["layers"] = tuple(LayerSparsity(**layer) for layer in report["layers"])
        facts["sparsity"] = SparsityReport(**report)
        facts["results"] = [Result(**result) for result in facts["results"]]
        facts["stages"] = [
            StageSettings(stage["name"], stage["steps"], {role: tuple(how) for role, how in stage["roles"].items()})
            for stage in facts["stages"]
        ]
        if facts.get("latency") is not None:
            facts["latency"] = LatencyReport.from_dict(facts["latency"])
        return cls(**facts)

    def metadata(self) -> ModelCardData:
        """Return the YAML block of the card, with the accuracy of the last result."""
        result = self.results[-1]
        accuracy = result.accuracy
        if self.uses_prompt and result.accuracy_prompted is not None:
            accuracy = result.accuracy_prompted
        return ModelCardData(
            library_name="vpns_hf",
            pipeline_tag="image-classification",
            license=self.license,
            base_model=self.base_model if self.base_model_is_on_hub else None,
            datasets=[self.dataset_id] if self.dataset_id else None,
            metrics=["accuracy"],
            tags=list(TAGS),
            model_name=self.title,
            eval_results=[
                EvalResult(
                    task_type="image-classification",
                    dataset_type=self.dataset_id or self.dataset,
                    dataset_name=self.dataset,
                    dataset_split=self.split,
                    metric_type="accuracy",
                    metric_value=round(accuracy, 6),
                    metric_name="accuracy",
                )
            ],
        )

    def render(self) -> ModelCard:
        """Render the card with its metadata."""
        blocks = [
            (name, f"{block.kept:,}", f"{block.total:,}", percent(block.sparsity))
            for name, block in self.sparsity.blocks().items()
        ]
        return ModelCard.from_template(
            self.metadata(),
            template_str=(files("vpns_hf.card_templates") / TEMPLATE).read_text(encoding="utf-8"),
            card=self,
            begin=BEGIN,
            end=END,
            kept=percent(1 - self.sparsity.sparsity),
            kept_weights=f"{self.sparsity.kept:,}",
            prunable_weights=f"{self.sparsity.total:,}",
            parameters=f"{self.sparsity.parameters:,}",
            all_parameters=percent(self.sparsity.sparsity_of_all_parameters),
            results_table=results_markdown(self.results),
            latency=latency_section(self.latency) if self.latency else None,
            blocks_table=markdown_table(("block", "kept", "weights", "sparsity"), blocks),
            stages_table=markdown_table(
                ("stage", "what trained", "optimizer steps"), [stage.row() for stage in self.stages], text_columns=2
            ),
        )

    def save(self, path: str | Path) -> None:
        """Write the card, or update an earlier one that people may have edited.

        Text outside the marked part stays, and so do metadata that this card does not set.
        """
        path, card = Path(path), self.render()
        if path.is_file():
            card = merge_cards(ModelCard.load(path), card)
        card.save(path)
