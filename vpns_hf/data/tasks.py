"""The transfer tasks: which data sets they are, and how the paper trained on them; one table of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PaperSettings:
    """How the paper's runs trained on a data set: VPNs on a ResNet-18, from the authors' launch scripts.

    The search prompt has the learning rate of the scores, and the prompt of the tune stage that of the weights.

    Args:
        batch_size: images of one optimizer step, over all processes and accumulation steps.
        score_optim: optimizer of scores and prompt during the search.
        score_learning_rate: their learning rate.
        optim: optimizer of weights and prompt in the tune stage.
        learning_rate: their learning rate.
    """

    batch_size: int = 256
    score_optim: str = "adam"
    score_learning_rate: float = 1e-4
    optim: str = "sgd"
    learning_rate: float = 1e-2

    def search_arguments(self) -> dict[str, Any]:
        """Of the search, under the names of `VPNsTrainingArguments`; the optimizer comes first."""
        return {
            "score_optim": self.score_optim,
            "score_learning_rate": self.score_learning_rate,
            "search_prompt_learning_rate": self.score_learning_rate,
        }

    def tune_arguments(self) -> dict[str, Any]:
        """Of the tune stage, under the names of `VPNsTrainingArguments`; the optimizer comes first."""
        return {
            "optim": self.optim,
            "learning_rate": self.learning_rate,
            "prompt_learning_rate": self.learning_rate,
        }


@dataclass(frozen=True)
class TransferTask:
    """Where a data set is on the Hub, what of it is used, and what is known of it.

    Args:
        path: Hub id of the data set.
        num_classes: number of classes.
        name: configuration of the data set, where it has several.
        image: column of the images.
        label: column of the classes.
        train: split to train on.
        validation: split to select on; `None` where one is carved from `train`.
        test: split that the final numbers are measured on.
        clip: columns that together name the clip that a frame is from; of each clip the middle frame is used. Empty
            for data sets of single images.
        frame: column that orders the frames of a clip.
        licence: licence of the images, as far as their makers state one. The terms on the page of the data set count.
        metrics: metrics that results on this data set are reported in; the first is the usual one here.
        paper: settings of the paper; `None` where it has no runs on this data set.
    """

    path: str
    num_classes: int
    name: str | None = None
    image: str = "image"
    label: str = "label"
    train: str = "train"
    validation: str | None = None
    test: str = "test"
    clip: tuple[str, ...] = ()
    frame: str | None = None
    licence: str = "not stated"
    metrics: tuple[str, ...] = ("accuracy",)
    paper: PaperSettings | None = None


_IMAGENET_TERMS = "ImageNet terms of access: non-commercial research and education"
_BY_CLASS = ("accuracy", "mean_per_class_accuracy")
TRANSFER_TASKS: dict[str, TransferTask] = {
    "cifar10": TransferTask("uoft-cs/cifar10", 10, image="img", paper=PaperSettings()),
    "cifar100": TransferTask("uoft-cs/cifar100", 100, image="img", label="fine_label", paper=PaperSettings()),
    # It has no labels for its test images, so the paper and everyone else measure on its validation images.
    "tiny_imagenet": TransferTask(
        "zh-plus/tiny-imagenet", 200, test="valid", licence=_IMAGENET_TERMS, paper=PaperSettings()
    ),
    # Its train split holds the official train and val splits together, as the paper trains on them.
    "dtd": TransferTask("tanganke/dtd", 47, licence="research only", paper=PaperSettings(batch_size=64)),
    "flowers102": TransferTask(
        "dpdl-benchmark/oxford_flowers102",
        102,
        validation="validation",
        metrics=_BY_CLASS,
        paper=PaperSettings(128, "adam", 1e-3, "adam", 1e-3),
    ),
    "stanford_cars": TransferTask("tanganke/stanford_cars", 196, paper=PaperSettings(128, "adam", 1e-3, "adam", 1e-3)),
    "oxford_pets": TransferTask(
        "timm/oxford-iiit-pet",
        37,
        licence="CC BY-SA 4.0",
        metrics=_BY_CLASS,
        paper=PaperSettings(64, "sgd", 5e-2, "sgd", 1e-2),
    ),
    # What the Hub calls its validation split is the official test split.
    "food101": TransferTask("ethz/food101", 101, test="validation", paper=PaperSettings()),
    # The official test split has no labels. The paper gives no learning rates of its own for it.
    "imagenet_1k": TransferTask(
        "ILSVRC/imagenet-1k", 1000, test="validation", licence=_IMAGENET_TERMS, paper=PaperSettings(batch_size=1024)
    ),
    "sun397": TransferTask("tanganke/sun397", 397),
    "svhn": TransferTask("ufldl-stanford/svhn", 10, name="cropped_digits", licence="non-commercial use only"),
    "eurosat": TransferTask("timm/eurosat-rgb", 10, validation="validation", licence="MIT"),
    "gtsrb": TransferTask("tanganke/gtsrb", 43),
    "ucf101": TransferTask("flwrlabs/ucf101", 101, clip=("video_id", "clip_id"), frame="frame"),
}
"""Every transfer task by a short key that `load_transfer_dataset` takes in place of a Hub id: the paper's eight,
ImageNet, and five that visual prompting is often measured on. `experiments.parse_recipe` takes batch size and learning
rates from here where neither the YAML file nor a flag sets them."""
