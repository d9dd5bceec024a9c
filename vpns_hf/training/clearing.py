"""Remove from the folder of a finished run what only an unfinished one needs."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..model.modeling import PromptedSparseModel
from ..saved_folder import remove
from .checkpoints import publish_folder
from .run_record import FIRST_STATE_NAME, MODEL_FOLDER, RunRecord


def clear_run(folder: Path, keep: Collection[str] = ()) -> int:
    """Remove checkpoints and models of stages from a finished run whose model is saved in its folder.

    `stages.json`, the logs of the stages and the model stay, so the run can still be resumed, reported and pushed.

    Args:
        folder: output folder of the run; the model of the last stage is saved in it.
        keep: names of earlier stages whose model stays, packed: its scores are dropped, its outputs are the same.

    Returns:
        The bytes that were freed.
    """
    before = size(folder)
    record = RunRecord.load(folder, {})
    remove(folder / FIRST_STATE_NAME)
    for stage in record.finished:
        stage_folder = record.finished_folder(stage.name)
        for checkpoint in stage_folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            remove(checkpoint)
        model = stage_folder / MODEL_FOLDER
        if not model.is_dir():
            continue
        if stage.name in keep and stage is not record.finished[-1]:
            _pack(model)
        else:
            _remove_at_once(model)
    return before - size(folder)


def size(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _pack(folder: Path) -> None:
    model = PromptedSparseModel.from_pretrained(folder)
    if model.config.state == "search":
        model.freeze_masks()
    temporary = folder.with_suffix(".tmp")
    model.save_pretrained(temporary)
    publish_folder(temporary, folder)


def _remove_at_once(folder: Path) -> None:
    """Remove a folder such that none is left half-removed under its name."""
    temporary = folder.with_suffix(".tmp")
    os.replace(folder, temporary)
    remove(temporary)
