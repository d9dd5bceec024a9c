"""Arguments of a transfer: source task, target tasks, and what is trained on these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..methods.table import MASK_ALONE, get_method
from ..values import FRACTIONS, NAME, NAMES, SEEDS, TEXT, check_fields, list_of, one_of, optional
from .arguments import DATA, METHOD_NAMES, DataArguments, DryRunArguments
from .results import DENSE, FULL

# Row of the masks of `--subnetwork`.
SHARED = "subnetwork"
# Mode of a cell that finds a mask; it has no line of its own.
FIND = "find"


@dataclass(frozen=True)
class Mode:
    """A way to train on a target under the mask.

    Args:
        description: one sentence.
        method: name of a method for a model that is pruned already.
        prompt: the prompt that it starts with. None: no prompt; `"new"`: a new one, which changes no image yet;
            `"source"`: the prompt of the subnetwork that the mask is from; `"other"`: that of another subnetwork.
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

MODE_NAMES = list_of(one_of(MODES), f"names out of {', '.join(MODES)}", least=1)


@dataclass
class SourceArguments(DataArguments):
    """Arguments of the source task, on which masks are found."""

    dataset_name: str = field(
        default="",
        metadata={
            "help": "Source task, named as a target is; not needed for masks that no data are needed for, such as "
            "those of --subnetwork, omp and random."
        },
    )

    def __post_init__(self) -> None:
        check_fields(self, DATA | {"dataset_name": TEXT})


@dataclass
class TransferArguments(DryRunArguments):
    """Arguments of `transfer` beside those of model, source and training: masks, targets and modes."""

    targets: list[str] = field(
        default_factory=list,
        metadata={"help": "Target tasks: transfer tasks (cifar100, dtd, ...), Hub ids or local folders."},
    )
    methods: list[str] = field(
        default_factory=lambda: [DENSE, "vpns", "hydra", "omp", "random"],
        metadata={"help": "Methods that find the masks; `dense` keeps every weight, as the reference."},
    )
    modes: list[str] = field(
        default_factory=lambda: [FULL], metadata={"help": f"Ways to train on a target: {', '.join(MODES)}."}
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
        check_fields(
            self,
            {
                "targets": NAMES,
                "methods": METHOD_NAMES,
                "modes": MODE_NAMES,
                "sparsities": optional(FRACTIONS),
                "seeds": SEEDS,
                "reference": NAME,
            },
        )
        if not self.targets:
            raise ValueError("`targets` is empty; name at least one task, such as `--targets cifar100`.")
        self._check_methods()
        self._check_modes()

    def _check_methods(self) -> None:
        if self.subnetwork is not None and SHARED not in self.methods:
            self.methods = [SHARED, *self.methods]
        if self.subnetwork is None and SHARED in self.methods:
            raise ValueError(f"`methods` has {SHARED!r}; say which with `--subnetwork`, a Hub id or a folder.")
        for method in self.methods:
            _check_method(method)
        _check_method(self.reference.partition(", ")[0])

    def _check_modes(self) -> None:
        given = [name for name in (self.prompt_subnetwork, self.prompt_dataset_name) if name is not None]
        wanted = [mode for mode in self.modes if MODES[mode].prompt == "other"]
        if wanted and len(given) != 1:
            raise ValueError(
                f"The mode {wanted[0]!r} needs either `--prompt_subnetwork` or `--prompt_dataset_name`, which say "
                "where its prompt comes from."
            )


def _check_method(name: str) -> None:
    if name not in (DENSE, SHARED):
        get_method(f"{name}{MASK_ALONE}")
