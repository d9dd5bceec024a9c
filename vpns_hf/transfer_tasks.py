"""The transfer tasks: which data sets they are, and how the paper trained on them; one table of rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TransferTask:
    """Where one data set of the paper is on the Hub, and which of its columns and splits are used.

    Args:
        path: Hub id of the data set.
        num_classes: number of classes.
        name: configuration of the data set, where it has several.
        image: column of the images.
        label: column of the classes.
        train: split to train on.
        validation: split to select on; `None` where one is carved from `train`.
        test: split that the final numbers are measured on.
    """

    path: str
    num_classes: int
    name: str | None = None
    image: str = "image"
    label: str = "label"
    train: str = "train"
    validation: str | None = None
    test: str = "test"


TRANSFER_TASKS: dict[str, TransferTask] = {
    "cifar10": TransferTask("uoft-cs/cifar10", 10, image="img"),
    "cifar100": TransferTask("uoft-cs/cifar100", 100, image="img", label="fine_label"),
    "dtd": TransferTask("tanganke/dtd", 47),
    "flowers102": TransferTask("dpdl-benchmark/oxford_flowers102", 102, validation="validation"),
    "food101": TransferTask("ethz/food101", 101, test="validation"),
    "oxford_pets": TransferTask("timm/oxford-iiit-pet", 37),
    "stanford_cars": TransferTask("tanganke/stanford_cars", 196),
    "sun397": TransferTask("tanganke/sun397", 397),
    "svhn": TransferTask("ufldl-stanford/svhn", 10, name="cropped_digits"),
    "eurosat": TransferTask("timm/eurosat-rgb", 10, validation="validation"),
    "gtsrb": TransferTask("tanganke/gtsrb", 43),
    # Every frame of every clip: frames of one clip are near copies, so a validation split carved from them looks easy.
    "ucf101": TransferTask("flwrlabs/ucf101", 101),
    "tiny_imagenet": TransferTask("zh-plus/tiny-imagenet", 200, test="valid"),
    # The official test split of ImageNet has no labels.
    "imagenet_1k": TransferTask("ILSVRC/imagenet-1k", 1000, test="validation"),
}
"""The data sets of the paper, by a short key that `load_transfer_dataset` takes in place of a Hub id."""
