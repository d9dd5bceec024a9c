"""Tabulate the transfer tasks: their data sets and the settings that the paper trained with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PaperSettings:
    """Hold the paper's settings for a data set: VPNs on a ResNet-18, from the authors' launch scripts.

    The search prompt shares the learning rate of the scores, the tuned prompt that of the weights.

    Args:
        batch_size: images per optimizer step, over all processes and accumulation steps.
        score_optim: optimizer of scores and prompt during the search.
        score_learning_rate: learning rate of scores and prompt during the search.
        optim: optimizer of weights and prompt in the tune stage.
        learning_rate: learning rate of weights and prompt in the tune stage.
    """

    batch_size: int = 256
    score_optim: str = "adam"
    score_learning_rate: float = 1e-4
    optim: str = "sgd"
    learning_rate: float = 1e-2

    def search_arguments(self) -> dict[str, Any]:
        """Build the arguments of the search, named as in `VPNsTrainingArguments`; the optimizer comes first."""
        return {
            "score_optim": self.score_optim,
            "score_learning_rate": self.score_learning_rate,
            "search_prompt_learning_rate": self.score_learning_rate,
        }

    def tune_arguments(self) -> dict[str, Any]:
        """Build the arguments of the tune stage, named as in `VPNsTrainingArguments`; the optimizer comes first."""
        return {
            "optim": self.optim,
            "learning_rate": self.learning_rate,
            "prompt_learning_rate": self.learning_rate,
        }


@dataclass(frozen=True)
class TransferTask:
    """Describe a data set: its Hub id, columns and splits, classes, licence and metrics.

    Args:
        path: Hub id of the data set.
        num_classes: number of classes.
        name: configuration of a data set that has several.
        image: column of the images.
        label: column of the classes.
        train: split to train on.
        validation: split to select on; None: carved from `train`.
        test: split of the final numbers.
        clip: columns that identify the clip of a frame, of which the middle frame is used; empty for data sets of
            single images.
        frame: column of the position of a frame in its clip.
        licence: licence of the images, as far as their makers state one; the page of the data set has the terms.
        metrics: metrics to report on this data set, the usual one first.
        paper: settings of the paper; None: no runs on this data set.
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
"""Transfer tasks by the short key that `load_transfer_dataset` takes instead of a Hub id: the paper's eight, ImageNet,
and five common benchmarks of visual prompting. They give the defaults of batch size and learning rates where neither
the YAML file nor a flag sets them."""
