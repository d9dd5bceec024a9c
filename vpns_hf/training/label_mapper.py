"""Find label mappings from the predictions of the model that is trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ..label_mapping import count_predictions, map_labels
from ..model.modeling import PromptedSparseModel


class LabelMapper:
    """Set the label mapping before the first stage, and recompute an iterative one as the mask changes.

    Args:
        trainer: trainer of the model.
        dataset: training images as prompted batches show them.
    """

    def __init__(self, trainer: Trainer, dataset: Any):
        self.trainer, self.dataset = trainer, dataset

    def begin(self, checkpoint: Path | None) -> None:
        """Set the label mapping: as the checkpoint has it, else from the dense model's predictions."""
        model, config = self.trainer.model, self.trainer.model.config
        if config.label_mapping is None or config.label_mapping_state != "unset":
            return
        if checkpoint is not None:
            saved = PromptedSparseModel.from_pretrained(checkpoint)
            mapping = saved.config.mapped_labels if saved.label_matrix is None else saved.label_matrix
            model.set_label_mapping(mapping, final=saved.config.label_mapping_state == "final")
            return
        if config.state == "search":
            # The predictions are those of the dense model; the stage selects its mask later.
            model.set_sparsity(0.0)
        model.set_label_mapping(self._find(), final=config.label_mapping != "iterative")

    def refresh(self, final: bool = False) -> None:
        """Recompute an iterative label mapping from the predictions of the masked model, without the prompt.

        Args:
            final: whether the mapping stays.
        """
        if self.trainer.model.config.label_mapping_state == "open":
            self.trainer.model.set_label_mapping(self._find(), final=final)

    def _find(self) -> Tensor:
        config = self.trainer.model.config
        # Neither the loader nor a random mapping may move the global random state, which resuming restores later.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.trainer.args.seed)
            counts = count_predictions(self._predictions(), config.backbone_config.num_labels, config.num_labels)
            return map_labels(counts, str(config.label_mapping))

    @torch.no_grad()
    def _predictions(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.trainer.model.eval()
        for batch in self.trainer.get_eval_dataloader(self.dataset):
            predicted = self.trainer.model.head_logits(batch["pixel_values"]).argmax(-1)
            labels = batch["labels"].argmax(-1) if batch["labels"].is_floating_point() else batch["labels"]
            yield self.trainer.accelerator.gather_for_metrics((predicted, labels))
