"""Write, publish and find complete checkpoints."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..saved_folder import sync_files

logger = logging.getLogger(__name__)
CHECKPOINT_FILES_NAME = "checkpoint_files.json"
# Where a checkpoint is written before it takes its name.
UNFINISHED_CHECKPOINT = "checkpoint.tmp"


def publish_checkpoint(written: Path, checkpoint: Path) -> None:
    """Publish a complete checkpoint: list its files and their sizes in it, then move it to its final name."""
    sizes = {str(path.relative_to(written)): path.stat().st_size for path in written.rglob("*") if path.is_file()}
    (written / CHECKPOINT_FILES_NAME).write_text(json.dumps(sizes, indent=2, sort_keys=True), encoding="utf-8")
    publish_folder(written, checkpoint)


def publish_folder(written: Path, folder: Path) -> None:
    """Move a complete folder to its final name in one step, replacing an earlier one."""
    sync_files(written)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(written, folder)


def damage(checkpoint: Path) -> str | None:
    """Check the files of a checkpoint and describe what is damaged; None: it is complete."""
    try:
        sizes = json.loads((checkpoint / CHECKPOINT_FILES_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{CHECKPOINT_FILES_NAME} is missing or cut short"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Find the newest complete checkpoint of a stage, or None; damaged newer ones are reported as warnings."""
    checkpoints = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(checkpoints, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        if (wrong := damage(path)) is None:
            return path
        logger.warning("%s is half-written (%s), so it is passed over.", path, wrong)
    return None


def is_at_the_end(checkpoint: Path) -> bool:
    """Return whether no optimizer step is left after a checkpoint."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state.global_step >= state.max_steps
