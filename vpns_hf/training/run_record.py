"""Record finished stages of a run, to resume it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from ..locks import lock
from ..saved_folder import UNFINISHED, finish_replacing, remove, writing
from ..values import FLAG, PATH, Check, check_fields, check_values, count, either, instance_of, optional, require
from .checkpoints import UNFINISHED_CHECKPOINT, damage, last_complete_checkpoint
from .counters import Cost
from .run_settings import check_settings

STAGES_NAME = "stages.json"
LOCK_NAME = "run.lock"
# Seconds that data-loader workers of a killed run may outlive it, and hold its lock.
_PATIENCE = 10.0
FIRST_STATE_NAME = "first_state.safetensors"
MODEL_FOLDER = "model"
_LEFTOVERS = (f"{STAGES_NAME}.tmp", "first_state.tmp", f"{MODEL_FOLDER}.tmp", UNFINISHED_CHECKPOINT, UNFINISHED)
logger = logging.getLogger(__name__)
_CHECKPOINT = optional(either(FLAG, PATH))
_CONTENT = {"settings": instance_of(dict), "finished": instance_of(list)}
_METRICS = Check(
    "numbers by name",
    lambda value: isinstance(value, dict) and all(isinstance(number, int | float) for number in value.values()),
)


@contextmanager
def only_run(run_folder: Path, is_main_process: bool) -> Iterator[None]:
    """Keep other runs from training in a folder for the length of a `with` block.

    Args:
        run_folder: output folder of the run.
        is_main_process: whether this is the process that locks the folder for all of the run.

    Raises:
        ValueError: another run is training there.
        OSError: the folder cannot be written.
    """
    if not is_main_process:
        yield
        return
    with lock(run_folder / LOCK_NAME, _PATIENCE) as is_ours:
        if not is_ours:
            raise ValueError(
                f"Another run is training in {run_folder}; wait until it has ended, or choose another `output_dir`."
            )
        yield


def stage_folder(run_folder: Path, index: int, name: str) -> Path:
    """Return the folder of a stage: its checkpoints and, once it has ended, its model and log."""
    return run_folder / f"{index}-{name}"


@dataclass(frozen=True)
class FinishedStage:
    """Record of a finished stage.

    Args:
        name: name of the stage.
        steps: optimizer steps.
        metrics: numbers of the evaluation after the stage; empty without one.
        cost: cost of the stage.
        score_learning_rate: as in [`Counters`].
    """

    name: str
    steps: int
    metrics: dict[str, float]
    cost: Cost = field(default_factory=Cost)
    score_learning_rate: float = 0.0

    def summary(self, density: float) -> str:
        """Return steps, density and accuracies in one line."""
        accuracies = [
            f"{name.removeprefix('eval_').replace('_', ' ')} {value:.2%}"
            for name, value in self.metrics.items()
            if name.startswith("eval_accuracy")
        ]
        return ", ".join([f"{self.steps} steps", f"density {density:.2%}", *accuracies])


def _read_stage(values: Any) -> FinishedStage:
    stage = FinishedStage(**values | {"cost": Cost(**values.get("cost", {}))})
    check_fields(stage, {"steps": count(0), "metrics": _METRICS})
    check_fields(stage.cost, {})
    return stage


@dataclass
class RunRecord:
    """Record of the finished stages of a run, saved in `stages.json`, which is replaced atomically.

    Args:
        folder: output folder of the run.
        settings: settings that a resumed run must have in common with it, see `run_settings`.
        finished: finished stages, in order.
    """

    folder: Path
    settings: dict[str, Any]
    finished: list[FinishedStage]

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any]) -> RunRecord:
        """Read the record of a folder, or create an empty one for a run with these settings.

        Raises:
            ValueError: the record is damaged.
        """
        path = folder / STAGES_NAME
        if not path.is_file():
            return cls(folder, settings, [])
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            check_values(content, _CONTENT)
            return cls(folder, content["settings"], [_read_stage(stage) for stage in content["finished"]])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} is damaged ({error}), so the run cannot be resumed; choose another `output_dir`."
            ) from error

    @classmethod
    def last_model(cls, folder: Path) -> Path | None:
        """Return the folder of the model that the last finished stage of a run left; None where none has ended."""
        record = cls.load(folder, {})
        return record.model_folder(record.finished[-1].name) if record.finished else None

    @property
    def steps(self) -> int:
        """Optimizer steps of all finished stages."""
        return sum(stage.steps for stage in self.finished)

    def check(self, settings: dict[str, Any], started: bool) -> None:
        """Refuse to resume the run under other settings; one that has saved nothing takes the new ones.

        Args:
            settings: settings of the resumed run.
            started: whether there is a checkpoint to resume from.

        Raises:
            ValueError: names the settings that differ.
        """
        if self.finished or started:
            check_settings(self.folder, self.settings, settings)
        else:
            self.settings = settings

    def save(self) -> None:
        """Write the record.

        Raises:
            OSError: it cannot be written; an earlier record stays as it is.
        """
        content = {"settings": self.settings, "finished": [asdict(stage) for stage in self.finished]}
        temporary = self.folder / f"{STAGES_NAME}.tmp"
        with writing(f"The record of the run, {self.folder / STAGES_NAME},", temporary):
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")
            os.replace(temporary, self.folder / STAGES_NAME)

    def remove_leftovers(self) -> None:
        """Remove unfinished files of a run that was killed in this folder."""
        finish_replacing(self.folder)
        for folder in [self.folder, *self.folder.glob("[0-9]*-*")]:
            for pattern in _LEFTOVERS:
                for path in folder.glob(pattern):
                    remove(path)

    def finished_folder(self, name: str) -> Path:
        """Return the folder of a finished stage.

        Raises:
            ValueError: no stage of that name has ended.
        """
        names = [stage.name for stage in self.finished]
        if name not in names:
            raise ValueError(f"No stage {name!r} has ended in {self.folder}; finished: {', '.join(names) or 'none'}.")
        return stage_folder(self.folder, names.index(name), name)

    def model_folder(self, name: str) -> Path:
        """Return the folder of the model that a finished stage left.

        That of the last stage is the folder of the run itself once `clear_run` has removed the copy.

        Raises:
            ValueError: no stage of that name has ended, or its model was removed.
        """
        folder = self.finished_folder(name) / MODEL_FOLDER
        if folder.is_dir():
            return folder
        if name == self.finished[-1].name and (self.folder / CONFIG_NAME).is_file():
            return self.folder
        raise ValueError(
            f"The model of the stage {name!r} is not in {folder} any more; `--keep_checkpoints true` keeps it."
        )

    def find_checkpoint(self, names: Sequence[str], resume_from_checkpoint: str | bool | None) -> Path | None:
        """Find the checkpoint to resume from, and drop later stages from the record.

        Args:
            names: names of all stages of the run.
            resume_from_checkpoint: as for [`VPNsTrainer.train`].

        Raises:
            ValueError: the folder holds another run, or the checkpoint is none of it.
        """
        require("resume_from_checkpoint", resume_from_checkpoint, _CHECKPOINT)
        if str(resume_from_checkpoint).lower() in ("true", "false"):
            # Flags and YAML files give strings.
            resume_from_checkpoint = str(resume_from_checkpoint).lower() == "true"
        if not resume_from_checkpoint:
            if self.finished or any(self.folder.glob(f"*/{PREFIX_CHECKPOINT_DIR}-*")):
                raise ValueError(
                    f"{self.folder} holds an earlier run; pass `resume_from_checkpoint=True` to resume it, or "
                    "choose another `output_dir`."
                )
            return None
        done, folders = (
            len(self.finished),
            [stage_folder(self.folder, index, name) for index, name in enumerate(names)],
        )
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
