"""Run the cells of a transfer: find a mask on the source task, tune it on a target task."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..masking.patterns import get_pattern
from ..methods.mask_schedules import keep_all
from ..methods.table import MASK_ALONE, get_method
from ..model.configuration import PromptedSparseConfig
from ..model.modeling import PromptedSparseModel
from ..training.arguments import VPNsTrainingArguments
from ..training.run_record import STAGES_NAME
from .arguments import DataArguments, ModelArguments
from .experiment import Experiment, check_cells
from .results import DENSE, Cell, CellResult
from .runner import CellRunner, changed_fields, settings_digest
from .transfer_arguments import FIND, MODES, SHARED, SourceArguments, TransferArguments


def task_name(dataset_name: str) -> str:
    """Return the name of a task in lines and tables: of a local folder its last part."""
    return Path(dataset_name).name if Path(dataset_name).is_dir() else dataset_name


def needs_source(method: str) -> bool:
    """Return whether the mask of a method depends on the task that it is found on."""
    return method not in (DENSE, SHARED) and get_method(f"{method}{MASK_ALONE}").needs_data


class Transfer(CellRunner):
    """Find masks on the source task and tune them on the targets.

    Args:
        model_args, source_args: arguments of backbone and source task.
        wanted: the cells.
        arguments_of: function from the name of a data set to the arguments of training on it; tasks of the table have
            settings of their own.

    Raises:
        ValueError: a method needs a source task that is not named, two targets have one name, or `eval_prompt` leaves
            out the accuracy without the prompt, or a method or sparsity does not work with the pattern.
    """

    def __init__(
        self,
        model_args: ModelArguments,
        source_args: SourceArguments,
        wanted: TransferArguments,
        arguments_of: Callable[[str], VPNsTrainingArguments],
    ):
        args = arguments_of(source_args.dataset_name)
        super().__init__(Path(args.output_dir))
        self.model_args, self.source_args = model_args, source_args
        self.wanted, self.arguments_of = wanted, arguments_of
        self.hub: dict[str, Any] = {"token": model_args.token, "cache_dir": model_args.cache_dir}
        if args.eval_prompt == "with":
            raise ValueError("Masks are compared without the prompt; use `eval_prompt` 'both' or 'without'.")
        if wanted.prompt_subnetwork is not None:
            PromptedSparseConfig.from_pretrained(wanted.prompt_subnetwork, **self.hub)  # refused before cells run
        methods = [method for method in wanted.methods if method not in (DENSE, SHARED)]
        check_cells(model_args.pattern, methods, wanted.sparsities or ())
        self.targets = self._target_experiments()
        self.finders = self._finder_experiments(args)

    def _target_experiments(self) -> dict[str, Experiment]:
        """Build the experiment of each target, by its name."""
        names = [task_name(target) for target in self.wanted.targets]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"Two targets are called {min(twice)!r}; rename a folder or leave one out.")
        return {
            name: Experiment(self.model_args, self._data(target), self.arguments_of(target))
            for name, target in zip(names, self.wanted.targets, strict=True)
        }

    def _finder_experiments(self, args: VPNsTrainingArguments) -> dict[str, Experiment]:
        """Build the experiments in which masks and prompts are found, by the name of their task."""
        finders, wanted = dict(self.targets), self.wanted
        if (other := wanted.prompt_dataset_name) is not None:
            finders[task_name(other)] = Experiment(self.model_args, self._data(other), self.arguments_of(other))
        if self.source is None:
            if learned := [method for method in wanted.methods if needs_source(method)]:
                raise ValueError(
                    f"The masks of {learned[0]} are found on a source task; name it with `--dataset_name`."
                )
            return finders
        model_args = self.model_args
        if wanted.identity_source_head:
            model_args = dataclasses.replace(model_args, label_mapping=None, new_head=False)
        finders[self.source] = Experiment(model_args, self.source_args, args)
        return finders

    def _data(self, dataset_name: str) -> DataArguments:
        """Return the source's data arguments for another task, without the names of columns and splits."""
        names = ("dataset_config_name", "dataset_revision", "image_column_name", "label_column_name")
        splits = ("train_split", "validation_split", "test_split")
        unknown: dict[str, Any] = dict.fromkeys((*names, *splits))
        return dataclasses.replace(self.source_args, dataset_name=dataset_name, **unknown)

    @property
    def source(self) -> str | None:
        """Name of the source task, or None."""
        return task_name(self.source_args.dataset_name) if self.source_args.dataset_name else None

    @cached_property
    def sparsities(self) -> list[float]:
        """Sparsities that the methods prune to; by default that of the shared subnetwork or the pattern, else 0.9."""
        if self.wanted.sparsities is not None:
            return self.wanted.sparsities
        return [get_pattern(self.model_args.pattern).final_sparsity(self.shared_sparsity)]

    @cached_property
    def shared_sparsity(self) -> float | None:
        """Sparsity of the shared subnetwork, to four digits, or None."""
        if self.wanted.subnetwork is None:
            return None
        return round(PromptedSparseConfig.from_pretrained(self.wanted.subnetwork, **self.hub).sparsity, 4)

    def cells(self) -> Iterator[Cell]:
        """Yield all cells target by target, those of dense and of the shared subnetwork once."""
        for index, sparsity in enumerate(self.sparsities):
            for task in self.targets:
                for method in self.wanted.methods:
                    if method in (DENSE, SHARED) and index:
                        continue
                    own = {DENSE: 0.0, SHARED: self.shared_sparsity}.get(method, sparsity)
                    for mode in self.modes_of(method):
                        for seed in self.wanted.seeds:
                            yield Cell(method, sparsity if own is None else own, seed, task, mode)

    def modes_of(self, method: str) -> list[str]:
        """Return the modes that a method has the prompt for."""
        has_prompt = method == SHARED or (method != DENSE and get_method(method).uses_prompt)
        return [mode for mode in self.wanted.modes if has_prompt or MODES[mode].prompt != "source"]

    def settings(self, cell: Cell) -> str:
        """Return the digest of a target, whose data are its own, together with the source."""
        if cell.mode == FIND:
            return settings_digest(self.experiment(cell))
        wanted = self.wanted
        shared = (wanted.subnetwork, wanted.prompt_subnetwork, wanted.prompt_dataset_name)
        return settings_digest(
            self.experiment(cell),
            source=changed_fields(self.source_args) or None,
            found_on=self._found_on() or None,
            identity_source_head=wanted.identity_source_head or None,
            shared=[name and task_name(name) for name in shared] if any(shared) else None,
        )

    def _found_on(self) -> list[dict[str, str]]:
        """Return the digests of the data that masks and prompts are found on."""
        other = self.wanted.prompt_dataset_name
        names = (self.source, None if other is None else task_name(other))
        return [self.finders[name].splits.content_digests for name in names if name is not None]

    def is_done(self, cell: Cell) -> bool:
        """Return whether the cell has its line, or its subnetwork where it finds one."""
        return self.subnetwork_folder(cell).is_dir() if cell.mode == FIND else super().is_done(cell)

    def experiment(self, cell: Cell) -> Experiment:
        """Return the experiment that a cell is trained in."""
        return (self.finders if cell.mode == FIND else self.targets)[str(cell.task)]

    def arguments(self, cell: Cell) -> VPNsTrainingArguments:
        """Return the arguments of the cell's task with method, sparsity, seed and folder of the cell."""
        args = copy.copy(self.experiment(cell).args)
        args.method = f"{cell.method}{MASK_ALONE}" if cell.mode == FIND else MODES[str(cell.mode)].method
        args.sparsity, args.seed = cell.sparsity, cell.seed
        args.output_dir = str(self.cell_folder(cell))
        return args

    def subnetwork_folder(self, cell: Cell) -> Path:
        """Return the folder that keeps a found subnetwork."""
        return self.folder / "subnetworks" / self.cell_folder(cell).name

    def find(self, task: str, method: str, sparsity: float, seed: int) -> str:
        """Return the folder of the subnetwork that a method finds on a task, trained here unless it exists."""
        cell, is_waiting = Cell(method, sparsity, seed, task, FIND), False
        while True:
            with self.turn(cell) as is_ours:
                if is_ours:
                    self._find(cell)
            if broadcast_object_list([self.is_done(cell)])[0]:
                return str(self.subnetwork_folder(cell))
            if not is_waiting and PartialState().is_main_process:
                print(f"[mask] {cell}: waiting for another launch, which is finding it in {self.folder}", flush=True)
            is_waiting = True
            self.wait()

    def _find(self, cell: Cell) -> None:
        trainer = self.experiment(cell).trainer(self.arguments(cell))
        self.train(trainer)
        folder, work = self.subnetwork_folder(cell), self.cell_folder(cell)
        temporary = folder.with_name(f"{folder.name}.tmp")
        trainer.save_model(str(temporary))
        if PartialState().is_main_process:
            shutil.copy(work / STAGES_NAME, temporary)
            os.replace(temporary, folder)
            shutil.rmtree(work)
            print(f"[mask] {cell}", flush=True)
        trainer.accelerator.wait_for_everyone()

    def mask_of(self, cell: Cell) -> str:
        """Return the Hub id or folder of the subnetwork whose mask the cell tunes."""
        if cell.method == SHARED:
            return str(self.wanted.subnetwork)
        # Without a source only masks are asked for that no data decide.
        return self.find(self.source or str(cell.task), cell.method, cell.sparsity, cell.seed)

    def other_prompt(self, cell: Cell) -> str:
        """Return the Hub id or folder of the subnetwork that the other prompt is from."""
        if self.wanted.prompt_subnetwork is not None:
            return self.wanted.prompt_subnetwork
        task = task_name(str(self.wanted.prompt_dataset_name))
        return self.find(task, "vpns", cell.sparsity or self.sparsities[0], cell.seed)

    def run_cell(self, cell: Cell) -> CellResult:
        """Tune one mask on one target and evaluate it on the target's test split."""
        mask = None if cell.method == DENSE else self.mask_of(cell)
        wanted = MODES[str(cell.mode)].prompt
        prompt = self.other_prompt(cell) if wanted == "other" else mask if wanted == "source" else None
        experiment = self.experiment(cell)
        trainer = experiment.trainer(self.arguments(cell), lambda model: self.move(model, mask, prompt))
        validation = self.train(trainer)
        return self.measure(cell, trainer, experiment, validation, mask_steps=self._mask_steps(mask))

    def move(self, model: PromptedSparseModel, mask: str | None, prompt: str | None) -> None:
        """Apply a mask (None: one that keeps every weight) and load a prompt (None: none) into a pretrained model."""
        if mask is None:
            keep_all(model)
        else:
            model.load_subnetwork(mask, prompt=False, **self.hub)
        if prompt is not None:
            model.load_prompt(prompt, **self.hub)

    def _mask_steps(self, mask: str | None) -> int | None:
        if mask is None or not (Path(mask) / STAGES_NAME).is_file():
            return None
        stages = json.loads((Path(mask) / STAGES_NAME).read_text(encoding="utf-8"))["finished"]
        return sum(stage["steps"] for stage in stages if stage["name"] != "warm_up")
