"""Run cells: each once, by whichever launch claims it, with one line of results a cell."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..training.trainer import VPNsTrainer
from .experiment import Experiment
from .results import Cell, CellResult, append_result, claim, read_results

# Seconds between two checks of another launch.
_PATIENCE = 5.0
# Arguments of a cell, a machine or the output, not settings that cells must share.
_NOT_A_SETTING = (
    *("method", "sparsity", "seed", "methods", "sparsities", "seeds", "modes", "targets"),
    *("only_report", "dry_run", "reference", "paper_numbers"),
    *("output_dir", "run_name", "logging_dir", "token", "cache_dir", "disable_tqdm", "logging_steps", "report_to"),
    *("cache_images", "check_duplicates", "preprocessing_num_workers"),
)


class CellRunner(ABC):
    """Base class: claim and run the cells that have no line in `results.jsonl` yet, and append theirs.

    Args:
        folder: folder of lines, claims and unfinished cells.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.results = folder / "results.jsonl"

    @abstractmethod
    def settings(self, cell: Cell) -> str:
        """Return the digest of the settings that all cells of the cell's task share (see [`settings_digest`])."""

    @abstractmethod
    def run_cell(self, cell: Cell) -> CellResult:
        """Train one cell, in [`~CellRunner.cell_folder`], and evaluate it."""

    def run(self, cells: Sequence[Cell]) -> None:
        """Run the cells that have no line yet and that no other launch is running."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for index, cell in enumerate(cells):
            with self.turn(cell) as is_ours:
                if is_ours:
                    self._finish(self.run_cell(cell), f"[cell {index + 1} of {len(cells)}]")
        with suppress(OSError):  # cells of other launches are in it
            (self.folder / "cells").rmdir()

    @contextmanager
    def turn(self, cell: Cell) -> Iterator[bool]:
        """Claim a cell for a `with` block; yield whether this launch runs it, as its main process decides."""
        main_process = PartialState().is_main_process
        with claim(self.folder, cell) if main_process else nullcontext(False) as is_ours:
            # Every process reads, so that all of them meet an error. Another launch may have finished the cell.
            is_done = self.is_done(cell)
            if is_ours and is_done:
                # Of a launch that was killed when the cell was done.
                shutil.rmtree(self.cell_folder(cell), ignore_errors=True)
            yield broadcast_object_list([is_ours and not is_done])[0]

    def is_done(self, cell: Cell) -> bool:
        """Return whether the cell has its line.

        Raises:
            ValueError: there are lines of its task that were measured with other settings.
        """
        settings = self.settings(cell)
        lines = [result for result in read_results(self.results) if result.task == cell.task]
        for result in lines:
            if result.settings != settings:
                raise ValueError(
                    f"{self.results} holds cells of other settings ({result.settings}; these are {settings}); choose "
                    "another `output_dir`."
                )
        return any(result.cell == cell for result in lines)

    def wait(self) -> None:
        """Sleep while another launch finds what this one needs."""
        time.sleep(_PATIENCE)

    def _finish(self, result: CellResult, place: str) -> None:
        """Append the line of a cell, and only then remove its folder."""
        if PartialState().is_main_process:
            append_result(self.results, result)
            shutil.rmtree(self.cell_folder(result.cell))
            print(f"{place} {result.cell}: accuracy {result.accuracy:.2%}, {result.seconds:.0f} s", flush=True)

    def cell_folder(self, cell: Cell) -> Path:
        """Return the folder of the cell's checkpoints, which exists until the cell is done."""
        # A cell of other settings must not be resumed.
        parts = (cell.method, f"{cell.sparsity:g}", cell.seed, cell.task, cell.mode, self.settings(cell))
        name = "-".join(str(part) for part in parts if part is not None)
        return self.folder / "cells" / name.replace("/", "--").replace(":", "-")

    def train(self, trainer: VPNsTrainer) -> Any:
        """Run or resume the stages of a cell and return its validation data."""
        validation = trainer.eval_dataset
        if trainer.args.eval_strategy == "no":
            # Not after every stage either: a method in rounds has many.
            trainer.eval_dataset = None
        trainer.train(resume_from_checkpoint=True)
        return validation

    def measure(
        self, cell: Cell, trainer: VPNsTrainer, experiment: Experiment, validation: Any, mask_steps: int | None = None
    ) -> CellResult:
        """Evaluate a trained cell on the test split, once, and return its line."""
        test = trainer.evaluate(experiment.eval_split("test"), metric_key_prefix="test")
        stages = trainer.finished_stages
        own = [stage for stage in stages if stage.name != "teacher"]
        costs = [stage.cost for stage in own]
        warm_up = sum(stage.steps for stage in stages if stage.name == "warm_up")
        return CellResult(
            method=cell.method,
            sparsity=cell.sparsity,
            seed=cell.seed,
            accuracy=test["test_accuracy"],
            accuracy_prompted=test.get("test_accuracy_prompted"),
            validation_accuracy=trainer.evaluate(validation)["eval_accuracy"],
            measured_sparsity=trainer.model.sparsity,
            steps=sum(stage.steps for stage in own) - warm_up,
            warm_up_steps=warm_up,
            images=sum(cost.images for cost in costs),
            forward_images=sum(cost.forward_images for cost in costs),
            backward_images=sum(cost.backward_images for cost in costs),
            seconds=sum(cost.seconds for cost in costs),
            trained_weights=costs[-1].trained_weights,
            splits={
                "weights, masks, prompt, scores": "train",
                "checkpoint": "validation" if trainer.args.load_best_model_at_end else "none: the last weights",
                "accuracy": "test",
            },
            settings=self.settings(cell),
            task=cell.task,
            mode=cell.mode,
            mask_steps=mask_steps,
            teacher_steps=sum(stage.steps for stage in stages if stage not in own),
            teacher_images=sum(cost.teacher_images for cost in costs),
            metrics={name: test[f"test_{name}"] for name in trainer.args.metrics or () if name != "accuracy"},
        )


def changed_fields(arguments: Any) -> dict[str, Any]:
    """Return the fields of a dataclass of arguments that are settings and differ from their default."""
    changed = {
        entry.name: value
        for entry in fields(arguments)
        for value in [getattr(arguments, entry.name)]
        if entry.init and entry.name not in _NOT_A_SETTING and value != entry.default
    }
    # By name, wherever the files are: the digest of the data says which they are.
    paths = ("model_name_or_path", "dataset_name")
    return changed | {name: Path(changed[name]).name for name in paths if name in changed}


def settings_digest(experiment: Experiment, **further: Any) -> str:
    """Return a short digest of the settings that cells must share: arguments that differ from their default, and data.

    Args:
        experiment: backbone, data and arguments of training.
        further: further settings by name; None counts as absent.
    """
    # By contents, because two data sets may have folders of one name.
    settings: dict[str, Any] = {"images": experiment.splits.content_digests}
    for group in (experiment.model_args, experiment.data_args, experiment.args):
        settings |= changed_fields(group)
    settings |= {name: value for name, value in further.items() if value is not None}
    if (processes := PartialState().num_processes) > 1:
        # Processes share the batch size.
        settings["processes"] = processes
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]
