"""Find a subnetwork on one task and tune it on others: one line a cell of (target, method, mode, sparsity, seed).

    python recipes/transfer.py                                                # the embedded demo
    accelerate launch recipes/transfer.py --config my.yaml --dataset_name imagenet_1k --targets cifar100 dtd \
        --methods dense vpns hydra omp random --modes full linear_probe --sparsities 0.8 0.9
    accelerate launch recipes/transfer.py --config my.yaml --subnetwork user/pruned --targets cifar100 ./my_images

The mask of each learned method is found on the source task, with the source's head, once for a sparsity and a seed;
masks of a shared subnetwork are loaded. Only masks move, and the prompt where the mode says so: on every target the
weights start from the pretrained backbone again, under the mask, with a head of the target's own. `--modes` says what
is trained there; `MODES` lists them.

Lines, claims and resuming are those of `compare_methods.py`: cells that are in `output_dir/results.jsonl` are skipped,
and several launches may share one folder. Found subnetworks stay in `output_dir/subnetworks`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.markdown import Markdown
from transformers.utils import logging

from vpns_hf import PromptedSparseConfig, PromptedSparseModel, VPNsTrainingArguments
from vpns_hf.experiments import DataArguments, DryRunArguments, Experiment, ModelArguments, parse_recipe
from vpns_hf.experiments.dry_run import PlannedRun, dry_run
from vpns_hf.experiments.results import DENSE, FULL, Cell, CellResult, read_results, row_name
from vpns_hf.experiments.runner import CellRunner, changed_fields, settings_digest
from vpns_hf.experiments.tables import comparison_markdown, differences_markdown, transfer_markdown
from vpns_hf.methods import get_method
from vpns_hf.methods.mask_schedules import keep_all
from vpns_hf.methods.table import MASK_ALONE
from vpns_hf.training.run_record import STAGES_NAME

DEMO = Path(__file__).parent / "transfer" / "demo.yaml"
# The row of the masks that `--subnetwork` names.
SHARED = "subnetwork"
# The mode of a cell that finds a mask; it has no line of its own.
FIND = "find"


@dataclass(frozen=True)
class Mode:
    """What is trained on a target under the mask.

    Args:
        description: one sentence.
        method: name of a method for a model that is pruned already.
        prompt: the prompt that it starts with: None: there is none. `"new"`: one that does nothing yet. `"source"`:
            that of the subnetwork the mask is from. `"other"`: that of another one.
    """

    description: str
    method: str
    prompt: Literal["new", "source", "other"] | None = None


MODES: dict[str, Mode] = {
    FULL: Mode("All kept weights and the head, as in the paper; the mask alone is transferred.", "tune"),
    "full_new_prompt": Mode("The same with a new prompt.", "tune+prompt", "new"),
    "full_source_prompt": Mode("The same with the prompt that the mask was found with.", "tune+prompt", "source"),
    "full_other_prompt": Mode("The same with the prompt of another subnetwork.", "tune+prompt", "other"),
    "linear_probe": Mode("A new head alone; the kept weights stay as they were pretrained.", "linear_probe"),
    "prompt_only": Mode("A new prompt alone, once the head has been warmed up.", "prompt_only_new_head", "new"),
    "prompt_only_source_prompt": Mode(
        "The same, starting with the prompt that the mask was found with.", "prompt_only_new_head", "source"
    ),
    "prompt_only_other_prompt": Mode(
        "The same, starting with the prompt of another subnetwork.", "prompt_only_new_head", "other"
    ),
}


@dataclass
class SourceArguments(DataArguments):
    """The task that masks are found on."""

    dataset_name: str = field(
        default="",
        metadata={
            "help": "Source task, named as a target is; not needed for masks that no data are needed for, such as "
            "those of --subnetwork, omp and random."
        },
    )


@dataclass
class TransferArguments(DryRunArguments):
    """Which masks are tuned on which tasks, and how."""

    targets: list[str] = field(
        default_factory=list,
        metadata={"help": "Target tasks: transfer tasks (cifar100, dtd, ...), Hub ids or local folders."},
    )
    methods: list[str] = field(
        default_factory=lambda: [DENSE, "vpns", "hydra", "omp", "random"],
        metadata={"help": "Methods that find the masks; `dense` keeps every weight, as the reference."},
    )
    modes: list[str] = field(
        default_factory=lambda: [FULL], metadata={"help": f"What is trained on a target: {', '.join(MODES)}."}
    )
    sparsities: list[float] | None = field(
        default=None, metadata={"help": "Sparsities of the masks; that of --subnetwork, else 0.9, when not given."}
    )
    seeds: list[int] = field(default_factory=lambda: [7, 17, 27], metadata={"help": "Seeds of the cells."})
    subnetwork: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a subnetwork whose masks get a row of their own."}
    )
    prompt_subnetwork: str | None = field(
        default=None, metadata={"help": "Hub id or folder that the modes with another prompt take it from."}
    )
    prompt_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Task that vpns finds that prompt on instead, for the same sparsity and seed."},
    )
    identity_source_head: bool = field(
        default=False,
        metadata={
            "help": "On the source task keep the head of the backbone, class by class, as for ImageNet; the model's "
            "arguments then say what head the targets get."
        },
    )
    reference: str = field(
        default="vpns", metadata={"help": "Method whose distance to every other is reported, seed by seed."}
    )
    only_report: bool = field(default=False, metadata={"help": "Run no cell; write the tables of what is there."})

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("`targets` is empty; name at least one task, such as `--targets cifar100`.")
        if self.subnetwork is not None and SHARED not in self.methods:
            self.methods = [SHARED, *self.methods]
        if self.subnetwork is None and SHARED in self.methods:
            raise ValueError(f"`methods` has {SHARED!r}; say which with `--subnetwork`, a Hub id or a folder.")
        for method in self.methods:
            if method not in (DENSE, SHARED):
                get_method(f"{method}{MASK_ALONE}")
        for sparsity in self.sparsities or ():
            if not 0 <= sparsity < 1:
                raise ValueError(f"`sparsities` has {sparsity}; expected fractions in [0, 1), such as 0.9 for 90 %.")
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"`modes` has {mode!r}; expected names out of {', '.join(MODES)}.")
        given = [name for name in (self.prompt_subnetwork, self.prompt_dataset_name) if name is not None]
        wanted = [mode for mode in self.modes if MODES[mode].prompt == "other"]
        if wanted and len(given) != 1:
            raise ValueError(
                f"The mode {wanted[0]!r} needs either `--prompt_subnetwork` or `--prompt_dataset_name`, which say "
                "where its prompt comes from."
            )


def task_name(dataset_name: str) -> str:
    """What a task is called in lines and tables, wherever its files lie."""
    return Path(dataset_name).name if Path(dataset_name).is_dir() else dataset_name


class Transfer(CellRunner):
    """Finds the masks, tunes them on the targets and reports.

    Args:
        model_args, source_args: backbone and source task.
        wanted: which cells are run.
        arguments_of: gives the arguments of training on a data set; tasks of the table have settings of their own.
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
        self.source_args, self.wanted = source_args, wanted
        self.hub: dict[str, Any] = {"token": model_args.token, "cache_dir": model_args.cache_dir}
        if args.eval_prompt == "with":
            raise ValueError("Masks are compared without the prompt; use `eval_prompt` 'both' or 'without'.")
        names = [task_name(target) for target in wanted.targets]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"Two targets are called {min(twice)!r}; rename a folder or leave one out.")
        self.targets = {
            name: Experiment(model_args, self._data(target), arguments_of(target))
            for name, target in zip(names, wanted.targets, strict=True)
        }
        # Where masks and prompts are found, by task.
        self.finders = dict(self.targets)
        if wanted.prompt_dataset_name is not None:
            other = wanted.prompt_dataset_name
            self.finders[task_name(other)] = Experiment(model_args, self._data(other), arguments_of(other))
        if source_args.dataset_name:
            if wanted.identity_source_head:
                model_args = dataclasses.replace(model_args, label_mapping=None, new_head=False)
            self.finders[task_name(source_args.dataset_name)] = Experiment(model_args, source_args, args)
        elif learned := [method for method in wanted.methods if needs_source(method)]:
            raise ValueError(f"The masks of {learned[0]} are found on a source task; name it with `--dataset_name`.")

    def _data(self, dataset_name: str) -> DataArguments:
        """The source's data arguments for another task, without what names its columns and splits."""
        names = ("dataset_config_name", "dataset_revision", "image_column_name", "label_column_name")
        splits = ("train_split", "validation_split", "test_split")
        unknown: dict[str, Any] = dict.fromkeys((*names, *splits))
        return dataclasses.replace(self.source_args, dataset_name=dataset_name, **unknown)

    @property
    def source(self) -> str | None:
        """Name of the source task, if there is one."""
        return task_name(self.source_args.dataset_name) if self.source_args.dataset_name else None

    # Cells -----------------------------------------------------------------------------------------------------------

    @cached_property
    def sparsities(self) -> list[float]:
        """What the methods prune to; that of the shared subnetwork if nothing else was said."""
        if self.wanted.sparsities is not None:
            return self.wanted.sparsities
        return [0.9 if self.shared_sparsity is None else self.shared_sparsity]

    @cached_property
    def shared_sparsity(self) -> float | None:
        """Sparsity of the shared subnetwork, to four digits, or None."""
        if self.wanted.subnetwork is None:
            return None
        return round(PromptedSparseConfig.from_pretrained(self.wanted.subnetwork, **self.hub).sparsity, 4)

    def cells(self) -> Iterator[Cell]:
        """All cells: target by target, those of dense and of the shared subnetwork once."""
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
        """The modes that make sense for a method: only some have a prompt to hand on."""
        has_prompt = method == SHARED or (method != DENSE and get_method(method).uses_prompt)
        return [mode for mode in self.wanted.modes if has_prompt or MODES[mode].prompt != "source"]

    def settings(self, cell: Cell) -> str:
        """One for each target: they have data of their own, and the source in common."""
        if cell.mode == FIND:
            return settings_digest(self._experiment(cell))
        wanted = self.wanted
        shared = (wanted.subnetwork, wanted.prompt_subnetwork, wanted.prompt_dataset_name)
        return settings_digest(
            self._experiment(cell),
            source=changed_fields(self.source_args) or None,
            identity_source_head=wanted.identity_source_head or None,
            shared=[name and task_name(name) for name in shared] if any(shared) else None,
        )

    def is_done(self, cell: Cell) -> bool:
        """Whether the cell has its line, or its subnetwork where it finds one."""
        return self.subnetwork_folder(cell).is_dir() if cell.mode == FIND else super().is_done(cell)

    def _experiment(self, cell: Cell) -> Experiment:
        return (self.finders if cell.mode == FIND else self.targets)[str(cell.task)]

    def arguments(self, cell: Cell) -> VPNsTrainingArguments:
        """The shared arguments with those of the cell."""
        args = copy.copy(self._experiment(cell).args)
        args.method = f"{cell.method}{MASK_ALONE}" if cell.mode == FIND else MODES[str(cell.mode)].method
        args.sparsity, args.seed = cell.sparsity, cell.seed
        args.output_dir = str(self.cell_folder(cell))
        return args

    # Masks -----------------------------------------------------------------------------------------------------------

    def subnetwork_folder(self, cell: Cell) -> Path:
        """Where a found subnetwork is kept."""
        return self.folder / "subnetworks" / self.cell_folder(cell).name

    def find(self, task: str, method: str, sparsity: float, seed: int) -> str:
        """The folder of what a method finds on a task: found now unless it is there, or another launch is at it."""
        cell = Cell(method, sparsity, seed, task, FIND)
        while True:
            with self.turn(cell) as is_ours:
                if is_ours:
                    self._find(cell)
            if broadcast_object_list([self.is_done(cell)])[0]:
                return str(self.subnetwork_folder(cell))
            self.wait()

    def _find(self, cell: Cell) -> None:
        trainer = self._experiment(cell).trainer(self.arguments(cell))
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
        """Hub id or folder of the subnetwork whose mask the cell tunes."""
        if cell.method == SHARED:
            return str(self.wanted.subnetwork)
        # Without a source only masks are found that are the same wherever one looks.
        return self.find(self.source or str(cell.task), cell.method, cell.sparsity, cell.seed)

    def other_prompt(self, cell: Cell) -> str:
        """Hub id or folder of the subnetwork that the other prompt is taken from."""
        if self.wanted.prompt_subnetwork is not None:
            return self.wanted.prompt_subnetwork
        task = task_name(str(self.wanted.prompt_dataset_name))
        return self.find(task, "vpns", cell.sparsity or self.sparsities[0], cell.seed)

    # Targets ---------------------------------------------------------------------------------------------------------

    def run_cell(self, cell: Cell) -> CellResult:
        """Tune one mask on one target and measure it on the target's test split."""
        mask = None if cell.method == DENSE else self.mask_of(cell)
        wanted = MODES[str(cell.mode)].prompt
        prompt = self.other_prompt(cell) if wanted == "other" else mask if wanted == "source" else None
        experiment = self._experiment(cell)
        trainer = experiment.trainer(self.arguments(cell), lambda model: self.move(model, mask, prompt))
        validation = self.train(trainer)
        return self.measure(cell, trainer, experiment, validation, mask_steps=self._mask_steps(mask))

    def move(self, model: PromptedSparseModel, mask: str | None, prompt: str | None) -> None:
        """Put the mask, or one that keeps everything, and the prompt on the pretrained weights."""
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

    # Reports ---------------------------------------------------------------------------------------------------------

    def dry_run(self) -> None:
        """Print what the search of each method and one cell of each method and mode on each target would do."""
        seed, sparsity = self.wanted.seeds[0], self.sparsities[0]
        searched = [method for method in self.wanted.methods if method not in (DENSE, SHARED)]
        source = self.source or next(iter(self.targets))
        searches = [Cell(method, sparsity, seed, source, FIND) for method in searched]
        if self.wanted.prompt_dataset_name is not None:
            searches.append(Cell("vpns", sparsity, seed, task_name(self.wanted.prompt_dataset_name), FIND))
        first: dict[tuple[str | None, ...], Cell] = {}
        for cell in self.cells():
            first.setdefault((cell.task, cell.method, cell.mode), cell)
        dry_run(PlannedRun(str(cell), self._experiment(cell), self.arguments(cell)) for cell in searches)
        dry_run(
            PlannedRun(str(cell), self._experiment(cell), self.arguments(cell), self._stand_in(cell))
            for cell in first.values()
        )

    def _stand_in(self, cell: Cell) -> Callable[[PromptedSparseModel], None]:
        """What puts a mask and a prompt on the model of a dry run, in which none are found."""
        if cell.method in (DENSE, SHARED):
            mask = None if cell.method == DENSE else self.wanted.subnetwork
            return lambda model: self.move(model, mask, None)
        return PromptedSparseModel.freeze_masks

    def report(self) -> None:
        """Print the tables and write them."""
        results = [result for result in read_results(self.results) if result.task in self.targets]
        if not results:
            raise ValueError(f"{self.results} holds no cell of these targets yet; run some before you report.")
        rows = [row_name(method, mode) for method in self.wanted.methods for mode in self.modes_of(method)]
        own = [] if self.shared_sparsity is None else [self.shared_sparsity]
        sparsities = sorted({*self.sparsities, *own})
        summary = transfer_markdown(results, list(self.targets), rows, sparsities)
        Console().print(Markdown(summary))
        parts = [summary]
        for task in self.targets:
            of_task = [result for result in results if result.task == task]
            parts += [
                f"## {task}",
                differences_markdown(of_task, [(self.wanted.reference, row) for row in rows]),
                comparison_markdown(of_task, rows, sparsities),
            ]
        parts.append("\n".join(f"- `{mode}`: {MODES[mode].description}" for mode in self.wanted.modes))
        (self.folder / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def needs_source(method: str) -> bool:
    """Whether the mask of a method depends on the task that it is found on."""
    return method not in (DENSE, SHARED) and get_method(f"{method}{MASK_ALONE}").needs_data


def main() -> None:
    """Run the missing cells, then report."""
    logging.disable_progress_bar()

    def parse(*flags: str) -> tuple[Any, ...]:
        classes = (ModelArguments, SourceArguments, VPNsTrainingArguments, TransferArguments)
        return parse_recipe(classes, [*sys.argv[1:], *flags], default_config=DEMO)

    model_args, source_args, args, wanted = parse()
    # Read again for each task, so that each brings what the table says of it where neither file nor flags do.
    transfer = Transfer(model_args, source_args, wanted, lambda task: parse("--dataset_name", task)[2])
    if wanted.dry_run:
        return transfer.dry_run()
    if not wanted.only_report:
        transfer.run(list(transfer.cells()))
    if args.process_index == 0:
        transfer.report()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ConnectionError, FileNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
