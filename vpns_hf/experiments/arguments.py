"""Arguments of an experiment, as dataclasses whose fields are the keys of a recipe and the flags."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..data.checks import LOADING
from ..data.transforms import AUGMENTATIONS
from ..masking.patterns import get_pattern
from ..methods.table import get_method
from ..model.checks import split_budget
from ..model.configuration_checks import FIELDS
from ..values import (
    FRACTION,
    NAME,
    NAMES,
    Check,
    check_fields,
    count,
    list_of,
    one_of,
    optional,
    require,
)

MODEL: dict[str, Check] = {
    "model_name_or_path": NAME,
    "model_revision": NAME,
    **{
        name: FIELDS[name] for name in ("scope", "pattern", "prompt", "prompt_size", "label_mapping", "ignore_modules")
    },
    "budget": optional(NAME),
    "channel_multiple": FIELDS["channel_multiple"],
    "prompt_inner_size": optional(count(1, 2**14)),
    "image_size": optional(count(1, 2**14)),
}
DATA: dict[str, Check] = {
    "dataset_name": NAME,
    **{
        name: LOADING[name] for name in ("validation_fraction", "shots", "fraction", "corrupt_images", "stream_images")
    },
    "split_seed": LOADING["seed"],
    "preprocessing_num_workers": LOADING["num_proc"],
    "augmentation": one_of(AUGMENTATIONS),
}
METHOD_NAMES = list_of(NAME, "names of methods", least=1)


@dataclass
class ModelArguments:
    """Arguments of the backbone and its wrapping; see [`PromptedSparseModel.from_backbone`]."""

    model_name_or_path: str = field(
        metadata={"help": "Hub id or local folder of an image classifier (transformers or timm)."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the backbone."})
    token: str | None = field(default=None, metadata={"help": "Hub token; the one of `hf auth login` when not given."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are cached."})
    scope: str = field(default="global", metadata={"help": "Ranking of weights: global, layer or erk."})
    pattern: str = field(
        default="unstructured",
        metadata={
            "help": "What is pruned together: unstructured, n:m such as 2:4, blocks such as block:32, or channels."
        },
    )
    budget: str | None = field(
        default=None,
        metadata={"help": "Channels alone: unit of the sparsity, channels, parameters or macs, as in macs:0.5."},
    )
    channel_multiple: int = field(
        default=1, metadata={"help": "Channels alone: number that widths are multiples of, such as 8."}
    )
    prompt: str | None = field(
        default="pad", metadata={"help": "Visual prompt: pad, fixed, random, expand, stripe, lowrank, or none."}
    )
    prompt_size: int = field(default=16, metadata={"help": "Width of the prompt in pixels."})
    prompt_inner_size: int | None = field(
        default=None,
        metadata={"help": "Side to which prompted images are shrunk inside the prompt; overlaid when not given."},
    )
    label_mapping: str | None = field(
        default=None,
        metadata={
            "help": "Keep the pretrained head and map its classes: random, frequency, optimal, iterative or bayesian."
        },
    )
    keep_source_head: bool = field(
        default=False, metadata={"help": "With a label mapping, keep all source classes in the head."}
    )
    new_head: bool | None = field(
        default=None, metadata={"help": "Initialise a new head; when not given, only if the label count differs."}
    )
    ignore_modules: list[str] = field(default_factory=list, metadata={"help": "Modules that are never pruned."})
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the input in pixels; the backbone's own when not given."}
    )

    def __post_init__(self) -> None:
        if self.prompt in ("none", "None", ""):
            self.prompt = None
        check_fields(self, MODEL)
        get_pattern(self.pattern)
        split_budget(self.budget, None)


@dataclass
class DataArguments:
    """Arguments of the data set; see [`load_transfer_dataset`]."""

    dataset_name: str = field(
        metadata={
            "help": "A transfer task (cifar100, dtd, ...), a Hub id, or a local folder (image folders, parquet or "
            "arrow files)."
        }
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the data set."})
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of the images; found when not given."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of the labels; found when not given."}
    )
    train_split: str | None = field(default=None, metadata={"help": "Split to train on."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Split for every choice; carved from train when there is none."}
    )
    test_split: str | None = field(default=None, metadata={"help": "Split that is evaluated once, at the end."})
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Share of train that a carved validation split takes."}
    )
    split_seed: int = field(default=42, metadata={"help": "Seed of that carving; the same for every training seed."})
    shots: int | None = field(default=None, metadata={"help": "Training images of each class to keep; all if none."})
    fraction: float | None = field(
        default=None, metadata={"help": "Share of the training images to keep, stratified by class."}
    )
    corrupt_images: str = field(
        default="error",
        metadata={"help": "An image that cannot be read: error stops the run, skip leaves it out and says so."},
    )
    stream_images: int | None = field(
        default=None,
        metadata={"help": "Training images to fetch from a stream instead of the whole download; for short runs."},
    )
    check_duplicates: bool = field(
        default=False, metadata={"help": "Report images that are in more than one split before the run starts."}
    )
    augmentation: str = field(
        default="paper",
        metadata={"help": "Augmentation of plain training images: paper, randaugment, trivialaugment or none."},
    )
    cache_images: bool = field(
        default=False,
        metadata={"help": "Keep resized copies of training and validation images on disk, where loading is slow."},
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that prepare data, resize copies and look for corrupt images."}
    )
    augment_prompted: bool = field(
        default=False, metadata={"help": "Augment prompted batches like plain ones (the released code does not)."}
    )

    def __post_init__(self) -> None:
        check_fields(self, DATA)


@dataclass
class DryRunArguments:
    """Base of a program's own arguments, beside those of model, data and training."""

    dry_run: bool = field(
        default=False,
        metadata={"help": "Build model, data and arguments, print a summary, and stop before training."},
    )


@dataclass(frozen=True)
class Reference:
    """Run that is trained and measured beside the one of the recipe.

    Args:
        method: name of a pruning method.
        sparsity: sparsity, a fraction; None: that of the recipe.
    """

    method: str
    sparsity: float | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read `"<method>"` or `"<method>@<sparsity>"`.

        Raises:
            ValueError: there is no such method, or the sparsity is no fraction.
        """
        method, at, sparsity = text.partition("@")
        get_method(method)
        if not at:
            return cls(method)
        try:
            fraction = float(sparsity)
        except ValueError:
            raise ValueError(
                f"`references` has {text!r}; expected a method, or a method at another sparsity, such as 'vpns@0.9'."
            ) from None
        require("references", fraction, FRACTION)
        return cls(method, fraction)


@dataclass
class PruneArguments(DryRunArguments):
    """Arguments of `prune` beside those of model, data and training."""

    references: list[str] = field(
        default_factory=lambda: ["dense"],
        metadata={
            "help": "Methods to run as well, for the table: 'dense' is the dense model tuned for as many optimizer "
            "steps, 'hydra_joint' is vpns_joint without a prompt, 'vpns_joint@0.9' has another sparsity; 'none' runs "
            "none."
        },
    )
    license: str | None = field(
        default=None,
        metadata={"help": "Licence of the pruned model, as the Hub spells it; by default the backbone's own."},
    )
    dataset_title: str | None = field(
        default=None,
        metadata={
            "help": "Name of the data set on the model card; by default the `pretty_name` in the README.md of a local "
            "folder, else `dataset_name`."
        },
    )
    keep_checkpoints: bool = field(
        default=False,
        metadata={"help": "Keep the checkpoints and the model of every stage when the run has ended."},
    )

    def __post_init__(self) -> None:
        check_fields(self, {"references": NAMES, "dataset_title": optional(NAME)})
        if self.references == ["none"]:
            self.references = []
        for text in self.references:
            Reference.parse(text)
