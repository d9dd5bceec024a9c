"""Find the saved models of one backbone that the app compares, and load them."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BaseImageProcessor

from vpns_hf import PromptedSparseConfig, PromptedSparseModel
from vpns_hf.inference import FastModel

logger = logging.getLogger(__name__)
_WEIGHTS = "model*.safetensors"


@dataclass(frozen=True)
class Subnetwork:
    """A pruned model, as it was saved and ready for inference.

    Args:
        name: name of its folder.
        model: the model, whose layers multiply the zeros, too.
        fast: the same with sparse kernels, where these were measured to be faster on this machine.
        file_bytes: size of its weights on disk.
    """

    name: str
    model: PromptedSparseModel
    fast: FastModel
    file_bytes: int


@dataclass(frozen=True)
class DenseModel:
    """A model of which nothing was pruned, tuned for the task of the subnetworks.

    Args:
        name: name of its folder.
        model: the model.
        file_bytes: size of its weights on disk.
    """

    name: str
    model: PromptedSparseModel
    file_bytes: int


@dataclass(frozen=True)
class Models:
    """Models of one backbone for one task.

    Args:
        subnetworks: the pruned ones, the least sparse first.
        dense: the dense one, or None.
        image_processor: image processor of all of them.
    """

    subnetworks: tuple[Subnetwork, ...]
    dense: DenseModel | None
    image_processor: BaseImageProcessor


def find_folders(parent: Path) -> list[Path]:
    """List the folders in `parent` that hold weights, of the backbone that most of them share.

    Raises:
        ValueError: there are none.
    """
    groups: dict[tuple[object, ...], list[Path]] = defaultdict(list)
    for folder in sorted({path.parent for path in parent.glob(f"*/{_WEIGHTS}")}):
        groups[_task(folder)].append(folder)
    if not groups:
        raise ValueError(f"No folder in {parent} holds weights; name folders of saved models, such as vpns-demo.")
    chosen = max(groups.values(), key=len)
    if others := [folder.name for group in groups.values() if group is not chosen for folder in group]:
        logger.warning("Left out, of another backbone or task: %s.", ", ".join(others))
    return chosen


def load_models(folders: Sequence[Path]) -> Models:
    """Load saved models and measure on which kernels each pruned one is fastest.

    Args:
        folders: folders of models of one backbone, written by `vpns-hf prune` or `save_pretrained`.

    Raises:
        ValueError: they are not of one backbone and task, none is pruned, several are dense, or masks are not frozen.
        OSError: a folder holds no saved model.
    """
    if len({_task(folder) for folder in folders}) > 1:
        raise ValueError(
            f"{', '.join(map(str, folders))} are not of one backbone, task and image size; name folders that are."
        )
    models = {folder: PromptedSparseModel.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders}
    dense = [folder for folder, model in models.items() if model.config.state == "dense"]
    pruned = [folder for folder in folders if folder not in dense]
    if not pruned or len(dense) > 1:
        raise ValueError(
            f"{len(pruned)} of the models are pruned and {len(dense)} dense; name folders of one pruned model or "
            "more, and of one dense model at most."
        )
    image_processor = models[pruned[0]].image_processor
    if image_processor is None:
        raise ValueError(f"{pruned[0]} has no image processor; save one into it with `save_pretrained`.")
    subnetworks = [_subnetwork(folder, models[folder]) for folder in pruned]
    return Models(
        tuple(sorted(subnetworks, key=lambda subnetwork: subnetwork.model.sparsity)),
        DenseModel(dense[0].name, models[dense[0]], _weight_bytes(dense[0])) if dense else None,
        image_processor,
    )


def _task(folder: Path) -> tuple[object, ...]:
    """Tell models of one backbone, with one list of labels and one image size, from others."""
    config = PromptedSparseConfig.from_pretrained(folder)
    backbone = config.backbone_config
    return backbone.model_type, backbone.name_or_path, tuple(config.id2label.values()), config.geometry


def _subnetwork(folder: Path, model: PromptedSparseModel) -> Subnetwork:
    (height, width), mean, _ = model.config.geometry
    example = torch.zeros(1, len(mean), height, width)
    return Subnetwork(folder.name, model, model.for_inference(example), _weight_bytes(folder))


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob(_WEIGHTS))
