"""What a run of several stages remembers: which have ended, what they have spent, where to go on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .modeling import PromptedSparseModel

STAGES_NAME = "stages.json"
FIRST_STATE_NAME = "first_state.safetensors"
MODEL_FOLDER = "model"
CHECKPOINT_FILES_NAME = "checkpoint_files.json"
# Where a checkpoint is written before it takes its name.
UNFINISHED_CHECKPOINT = "checkpoint.tmp"
_LEFTOVERS = (f"{STAGES_NAME}.tmp", "first_state.tmp", f"{MODEL_FOLDER}.tmp", UNFINISHED_CHECKPOINT, ".saving-*")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cost:
    """What a stage has spent, evaluation aside.

    Args:
        images: training images seen, on all processes.
        forward_images, backward_images: images that went forward and backward through the backbone to train or score.
        seconds: time of the training steps and of what ran before them.
        trained_weights: parameters that were trained, pruned ones not counted.
    """

    images: int = 0
    forward_images: int = 0
    backward_images: int = 0
    seconds: float = 0.0
    trained_weights: int = 0


@dataclass(frozen=True)
class FinishedStage:
    """A stage that ended.

    Args:
        name: its name.
        steps: its optimizer steps.
        metrics: what the evaluation after it gave; empty without one.
        cost: what it has spent.
    """

    name: str
    steps: int
    metrics: dict[str, float]
    cost: Cost = Cost()


@dataclass
class RunRecord:
    """The stages of a run that have ended, kept in `stages.json`, which is replaced atomically.

    Args:
        folder: output folder of the run.
        settings: what a run that goes on must have in common with it: `method`, `sparsity` and `seed`.
        finished: the stages that ended, in order.
    """

    folder: Path
    settings: dict[str, Any]
    finished: list[FinishedStage]

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any]) -> RunRecord:
        """Read the record, or make an empty one where there is none.

        Raises:
            ValueError: the folder holds a run of other settings.
        """
        path = folder / STAGES_NAME
        if not path.is_file():
            return cls(folder, settings, [])
        content = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if content["settings"][name] != value:
                raise ValueError(
                    f"{folder} holds a run of {name} {content['settings'][name]!r}, not {value!r}; choose another "
                    "`output_dir`."
                )
        finished = [FinishedStage(**stage | {"cost": Cost(**stage["cost"])}) for stage in content["finished"]]
        return cls(folder, settings, finished)

    def save(self) -> None:
        """Write the record.

        Raises:
            OSError: it cannot be written; the record that is there is untouched.
        """
        content = {"settings": self.settings, "finished": [asdict(stage) for stage in self.finished]}
        temporary = self.folder / f"{STAGES_NAME}.tmp"
        with writing(f"The record of the run, {self.folder / STAGES_NAME},", temporary):
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")
            os.replace(temporary, self.folder / STAGES_NAME)

    def remove_leftovers(self) -> None:
        """Remove what a run that was killed in this folder had begun to write."""
        for folder in [self.folder, *self.folder.glob("[0-9]*-*")]:
            for pattern in _LEFTOVERS:
                for path in folder.glob(pattern):
                    _remove(path)

    def stage_folder(self, index: int, name: str) -> Path:
        """Where a stage keeps its checkpoints and, once it has ended, its model and log."""
        return self.folder / f"{index}-{name}"

    def finished_folder(self, name: str) -> Path:
        """The folder of a stage that has ended.

        Raises:
            ValueError: no stage of that name has ended.
        """
        names = [stage.name for stage in self.finished]
        if name not in names:
            raise ValueError(f"No stage {name!r} has ended in {self.folder}; finished: {', '.join(names) or 'none'}.")
        return self.stage_folder(names.index(name), name)

    def find_checkpoint(self, names: Sequence[str], resume_from_checkpoint: str | bool | None) -> Path | None:
        """Where to resume; drops from the record what comes after that checkpoint.

        Args:
            names: of all stages of the run.
            resume_from_checkpoint: as for [`VPNsTrainer.train`].

        Raises:
            ValueError: the folder holds another run, or the checkpoint is none of it.
        """
        if str(resume_from_checkpoint).lower() in ("true", "false"):
            # Flags and YAML files give strings.
            resume_from_checkpoint = str(resume_from_checkpoint).lower() == "true"
        if not resume_from_checkpoint:
            if self.finished or any(self.folder.glob(f"*/{PREFIX_CHECKPOINT_DIR}-*")):
                raise ValueError(
                    f"{self.folder} holds an earlier run; pass `resume_from_checkpoint=True` to go on with it, or "
                    "choose another `output_dir`."
                )
            return None
        done, folders = len(self.finished), [self.stage_folder(index, name) for index, name in enumerate(names)]
        if resume_from_checkpoint is True:
            return last_complete_checkpoint(folders[done]) if done < len(folders) else None
        checkpoint, folders = Path(resume_from_checkpoint).resolve(), [folder.resolve() for folder in folders]
        if checkpoint.parent not in folders[: done + 1] or not checkpoint.is_dir():
            raise ValueError(
                f"{checkpoint} is no checkpoint of the run in {self.folder}; expected {folders[0]}/checkpoint-N, or "
                "`True` for the last one."
            )
        if wrong := damage(checkpoint):
            raise ValueError(f"{checkpoint} is half-written: {wrong}; pass `True` for the last complete checkpoint.")
        self.finished = self.finished[: folders.index(checkpoint.parent)]
        return checkpoint


# Checkpoints ---------------------------------------------------------------------------------------------------------


def publish_checkpoint(written: Path, checkpoint: Path) -> None:
    """Give a checkpoint its name once it is complete: list its files and their sizes in it, then move it there."""
    sizes = {str(path.relative_to(written)): path.stat().st_size for path in written.rglob("*") if path.is_file()}
    (written / CHECKPOINT_FILES_NAME).write_text(json.dumps(sizes, indent=2, sort_keys=True), encoding="utf-8")
    publish_folder(written, checkpoint)


def publish_folder(written: Path, folder: Path) -> None:
    """Move a complete folder to its place, in one step; what was there before is dropped."""
    for path in written.rglob("*"):
        if path.is_file():
            # Else a machine that crashes could leave the new name with empty files behind it.
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(written, folder)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None: it is complete."""
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
    """The newest checkpoint of a stage whose files are all there and whole, or None; newer ones are warned of."""
    checkpoints = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(checkpoints, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        if (wrong := damage(path)) is None:
            return path
        logger.warning("%s is half-written (%s), so it is passed over.", path, wrong)
    return None


@contextmanager
def writing(what: str, temporary: Path, advice: str = "") -> Iterator[None]:
    """Where a file or folder is written: a failure is told in one sentence and leaves nothing half-written.

    Args:
        what: what is written, as the sentence begins.
        temporary: the file or folder that is written to; removed where it fails.
        advice: the end of the sentence: what is safe and how to go on.

    Raises:
        OSError: the disk is full, the folder is read-only, or the like.
    """
    try:
        yield
    # torch and safetensors have errors of their own for a full disk.
    except (OSError, RuntimeError, SafetensorError) as error:
        _remove(temporary)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise OSError(f"{what} could not be written: {reason.rstrip('.')}{advice}.") from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


@dataclass(eq=False)
class Counters(TrainerCallback, ExportableState):
    """What is counted over a stage and kept in its checkpoints.

    Args:
        flips: mask entries that changed since the last log.
        images, forward_images, backward_images, seconds: as in [`Cost`].
        logged_step: the step of the last log.
        logged_loss: sum of the losses up to that step.
        loss: sum of the losses after it.
    """

    flips: int = 0
    images: int = 0
    forward_images: int = 0
    backward_images: int = 0
    seconds: float = 0.0
    logged_step: int = 0
    logged_loss: float = 0.0
    loss: float = 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback."""
        return {"args": dict(vars(self)), "attributes": {}}

    def reset(self) -> None:
        """Count from zero again."""
        self.__dict__ = dict(vars(Counters()))

    def cost(self, trained_weights: int) -> Cost:
        """What the stage has spent."""
        return Cost(self.images, self.forward_images, self.backward_images, self.seconds, trained_weights)

    def count_batch(self, images: int) -> None:
        """Count images that training takes forward and backward."""
        self.images += images
        self.forward_images += images
        self.backward_images += images

    def take_flips(self) -> int:
        """The count since the last call."""
        flips, self.flips = self.flips, 0
        return flips

    @contextmanager
    def measuring(self, model: PromptedSparseModel) -> Iterator[None]:
        """Count the time and the passes of this model and of copies made of it meanwhile."""

        def count(module: Any, args: Any, output: Any) -> None:
            images = len(output.logits)
            self.forward_images += images
            if output.logits.requires_grad:
                output.logits.register_hook(lambda gradient: self._count_backward(images))

        handle, started = model.backbone.register_forward_hook(count), time.perf_counter()
        try:
            yield
        finally:
            handle.remove()
            self.seconds += time.perf_counter() - started

    def _count_backward(self, images: int) -> None:
        self.backward_images += images
