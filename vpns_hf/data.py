"""Data: the paper's transfer tasks, image transforms, and batches that are either prompted or plain."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from math import ceil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset, load_from_disk
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from PIL import Image as PILImage
from sklearn.model_selection import train_test_split
from torch.utils.data import Sampler
from torchvision.transforms import v2
from transformers import BaseImageProcessor, TimmWrapperImageProcessor, ViTImageProcessor

logger = logging.getLogger(__name__)

Mixing = Literal["alternate", "always", "never"]

# ----------------------------------------------------------------------------------------------------
# Transfer tasks
# ----------------------------------------------------------------------------------------------------


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


def load_transfer_dataset(
    path: str | Path | Dataset | DatasetDict,
    *,
    name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    test_split: str | None = None,
    validation_fraction: float = 0.1,
    seed: int = 42,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> DatasetDict:
    """Load a classification data set as splits `train`, `validation` and `test` with columns `image` and `label`.

    Images come out as RGB whatever they were stored as. Classes are the same `ClassLabel` in every split: integer and
    string labels are numbered in sorted order over all splits together. A validation or test split that the data set
    does not have is carved from `train`, stratified by class: the same seed always gives the same images.

    Args:
        path: key of `TRANSFER_TASKS`, Hub id, local folder (image folder, parquet or arrow files, or what
            `save_to_disk` wrote), or a data set in memory. A folder named like a key is meant as `./<folder>`.
        name: configuration of the data set, where it has several.
        image_column: column of the images; `None` finds it.
        label_column: column of the classes; `None` finds it.
        train_split: split to train on; `None` means `train`.
        validation_split: split to select on; `None` means `validation`, else it is carved from the training split.
        test_split: split to report on; `None` means `test`, else it is carved from the training split with a warning.
        validation_fraction: share of the training split that a carved split takes.
        seed: seed of the carved splits.
        revision: commit, tag or branch of a data set on the Hub.
        cache_dir: folder that `datasets` keeps its files in.
        token: Hub token for private and gated data sets.

    Returns:
        The three splits.

    Raises:
        ConnectionError: if the Hub cannot be reached and the data set is not in the local cache.
        FileNotFoundError: if there is no such data set or folder.
        ValueError: if a split or column is missing, labels are missing, or a class is too small to be split.
    """
    task = TRANSFER_TASKS.get(path) if isinstance(path, str) else None
    if task is not None:
        path, name = task.path, name or task.name
        image_column, label_column = image_column or task.image, label_column or task.label
        train_split, test_split = train_split or task.train, test_split or task.test
        validation_split = validation_split or task.validation
    raw = _read(path, name=name, revision=revision, cache_dir=cache_dir, token=token)
    splits = _choose_splits(raw, train_split, validation_split, test_split)
    splits = _choose_columns(splits, image_column, label_column)
    splits = _encode_labels(splits)
    if "test" not in splits:
        logger.warning(
            "The data set has no test split: %.3g of the training split is held out as one.", validation_fraction
        )
        splits = _carve(splits, "test", validation_fraction, seed)
    if "validation" not in splits:
        logger.info("%.3g of the training split is held out for validation.", validation_fraction)
        splits = _carve(splits, "validation", validation_fraction, seed)
    return DatasetDict({split: splits[split] for split in ("train", "validation", "test")})


def _read(path: str | Path | Dataset | DatasetDict, **options: Any) -> DatasetDict:
    """The data set as it is stored, all splits."""
    if isinstance(path, str | Path):
        folder = Path(path)
        saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
        path = load_from_disk(str(folder)) if saved else _load(str(path), **options)
    return DatasetDict({"train": path}) if isinstance(path, Dataset) else path


def _load(path: str, **options: Any) -> DatasetDict:
    """`load_dataset`, with its many ways to fail put into one sentence."""
    try:
        return load_dataset(path, **options)
    except (ConnectionError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ConnectionError(
            f"The data set '{path}' is neither a local folder nor in the local cache, and the Hugging Face Hub cannot "
            "be reached: load it once on a machine with a network and copy the cache here (HF_HUB_OFFLINE=1 keeps to "
            "the cache), or pass the path of a local folder."
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"No data set was found at '{path}': expected a key of TRANSFER_TASKS, a data set of the Hugging Face Hub "
            "that you may read (pass token= for a private or gated one), or a local folder of images in one folder a "
            "class, of parquet or arrow files, or written by save_to_disk."
        ) from error


def _choose_splits(raw: DatasetDict, train: str | None, validation: str | None, test: str | None) -> DatasetDict:
    """The splits that are asked for, under our names; validation and test may be absent where none was asked for."""
    train = train or "train"
    test = test or ("test" if "test" in raw else None)
    if validation is None and "validation" in raw and test != "validation":
        validation = "validation"
    chosen = {"train": train, "validation": validation, "test": test}
    chosen = {ours: theirs for ours, theirs in chosen.items() if theirs is not None}
    for ours, theirs in chosen.items():
        if theirs not in raw:
            raise ValueError(
                f"The data set has no split '{theirs}' to use for {ours}: its splits are {_listed(raw)}, "
                f"name one of them with {ours}_split."
            )
    if len(set(chosen.values())) < len(chosen):
        raise ValueError(
            f"One split is used twice ({', '.join(f'{ours}: {theirs}' for ours, theirs in chosen.items())}): "
            "give train_split, validation_split and test_split different names."
        )
    return DatasetDict({ours: raw[theirs] for ours, theirs in chosen.items()})


def _choose_columns(splits: DatasetDict, image: str | None, label: str | None) -> DatasetDict:
    """The splits with columns `image` (RGB) and `label` only."""
    features = splits["train"].features
    image = image or _find_column(features, Image, ("image", "img"), "image")
    label = label or _find_column(features, ClassLabel, ("label", "labels", "fine_label", "target", "class"), "label")
    renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}

    def choose(name: str, split: Dataset) -> Dataset:
        for ours, theirs in (("image", image), ("label", label)):
            if theirs not in split.column_names:
                raise ValueError(
                    f"The split '{name}' has no column '{theirs}': its columns are {_listed(split.column_names)}, "
                    f"name one of them with {ours}_column."
                )
        split = split.with_format(None).select_columns([image, label]).rename_columns(renamed)
        return split.cast_column("image", Image(mode="RGB"))

    return DatasetDict({name: choose(name, split) for name, split in splits.items()})


def _find_column(features: Features, kind: type, usual_names: Sequence[str], what: str) -> str:
    """The only column of type `kind`, else the first of the usual names."""
    typed = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(typed) == 1:
        return typed[0]
    for column in usual_names:
        if column in (typed or features):
            return column
    raise ValueError(
        f"It is not clear which column holds the {what}s among {_listed(features)}: name it with {what}_column."
    )


def _encode_labels(splits: DatasetDict) -> DatasetDict:
    """The splits with one and the same `ClassLabel` for their labels."""
    labels = {name: split["label"][:] for name, split in splits.items()}
    for name, values in labels.items():
        unlabelled = sum(value is None or value == -1 for value in values)
        if unlabelled or not values:
            raise ValueError(
                f"The split '{name}' has no labels for {unlabelled} of its {len(values)} images: "
                f"choose a labelled one with {name}_split or remove the images without a label."
            )
    features = {name: split.features["label"] for name, split in splits.items()}
    if isinstance(features["train"], ClassLabel) and all(each == features["train"] for each in features.values()):
        return splits
    for name, feature in features.items():
        if isinstance(feature, ClassLabel):
            labels[name] = feature.int2str(labels[name])
    # Not `class_encode_column`: it numbers each split for itself, sorts 10 before 2, and rewrites the images.
    classes = _sorted_classes(list(chain.from_iterable(labels.values())), features["train"])
    ids = {value: index for index, value in enumerate(classes)}
    feature = ClassLabel(names=[str(value) for value in classes])
    return DatasetDict(
        {
            name: split.remove_columns("label").add_column("label", [ids[v] for v in labels[name]], feature=feature)
            for name, split in splits.items()
        }
    )


def _sorted_classes(values: Sequence[Any], feature: Any) -> list[Any]:
    """The distinct labels in order."""
    kinds = {type(value) for value in values}
    if len(kinds) > 1 or not kinds <= {bool, int, str}:
        raise ValueError(
            f"The label column holds {feature}: expected one whole number or one string for each image, the same type "
            "in every split, name another column with label_column or convert it."
        )
    return sorted(set(values))


def _carve(splits: DatasetDict, name: str, fraction: float, seed: int) -> DatasetDict:
    """The splits with a stratified share of `train` moved to a new split; both keep the order of `train`."""
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction is {fraction}: expected a share between 0 and 1, such as 0.1.")
    train = splits["train"]
    labels = np.asarray(train["label"][:])
    counts = np.bincount(labels)
    if (counts == 1).any():
        label = train.features["label"].int2str(int(np.argmax(counts == 1)))
        raise ValueError(
            f"The class '{label}' has only one training image, so no {name} split can be carved from the training "
            f"split: name a split with {name}_split, add images or leave the class out."
        )
    size, num_classes = ceil(fraction * len(labels)), np.count_nonzero(counts)
    if min(size, len(labels) - size) < num_classes:
        smallest = train.features["label"].int2str(int(np.argmin(np.where(counts > 0, counts, counts.max()))))
        raise ValueError(
            f"Carving {size} of {len(labels)} training images as the {name} split leaves less than one image a class "
            f"for {num_classes} classes (the smallest is '{smallest}' with {counts[counts > 0].min()}): change "
            f"validation_fraction (now {fraction}) or name a split with {name}_split."
        )
    kept, carved = train_test_split(np.arange(len(labels)), test_size=size, stratify=labels, random_state=seed)
    return DatasetDict({**splits, "train": train.select(np.sort(kept)), name: train.select(np.sort(carved))})


def _listed(names: Any) -> str:
    return ", ".join(str(name) for name in names)


# ----------------------------------------------------------------------------------------------------
# Transforms
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageTransforms:
    """The two views of an image: augmented for training, and as the image processor makes it.

    Both methods take and return a batch, as `datasets` wants it: `dataset.with_transform(transforms.train)`.

    Args:
        image_processor: image processor of the backbone, of any backend.
        image_size: height and width of the images that the backbone takes.
        mean: mean of each channel, for images in [0, 1].
        std: standard deviation of each channel, for images in [0, 1].
    """

    image_processor: BaseImageProcessor
    image_size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]

    def train(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Augment as the paper does: resize to 9/8 of the size, crop at random, flip at random, normalise.

        Args:
            batch: `image`, a list of n PIL images, and `label`, if there are labels. The draws are torch's own.

        Returns:
            `pixel_values`, a float tensor [n, 3, height, width], and `labels`.
        """
        return _features(torch.stack([self._augment(image) for image in _rgb(batch["image"])]), batch)

    def eval(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Do exactly what the image processor does, as the image-classification pipeline would.

        Args:
            batch: `image`, a list of n PIL images, and `label`, if there are labels.

        Returns:
            `pixel_values`, a float tensor [n, 3, height, width], and `labels`.

        Raises:
            ValueError: if the image processor makes images of another size than `image_size`.
        """
        pixel_values = self.image_processor(images=_rgb(batch["image"]), return_tensors="pt")["pixel_values"]
        if tuple(pixel_values.shape[-2:]) != tuple(self.image_size):
            raise ValueError(
                f"The image processor makes images of {_size(pixel_values.shape[-2:])} pixels and the model takes "
                f"{_size(self.image_size)}: give the image processor the size of the model."
            )
        return _features(pixel_values, batch)

    @cached_property
    def _augment(self) -> v2.Compose:
        height, width = self.image_size
        return v2.Compose(
            [
                v2.Resize((height * 9 // 8, width * 9 // 8)),
                v2.RandomCrop((height, width)),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(self.mean), list(self.std)),
            ]
        )


def matching_image_processor(
    processor: BaseImageProcessor | None, image_size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> BaseImageProcessor:
    """The processor itself if it saves itself and gives images of this size; else a `ViTImageProcessor` that does.

    Args:
        processor: a backbone's image processor, or None. timm's is replaced, because it cannot be saved on its own.
        image_size: (height, width) in pixels.
        mean, std: normalisation, one value a channel.
    """
    if processor is not None and not isinstance(processor, TimmWrapperImageProcessor):
        sample = PILImage.new("RGB", (image_size[1] + 1, image_size[0] + 1))
        if tuple(processor(sample, return_tensors="pt")["pixel_values"].shape[-2:]) == tuple(image_size):
            return processor
    height, width = image_size
    return ViTImageProcessor(size={"height": height, "width": width}, image_mean=list(mean), image_std=list(std))


def _features(pixel_values: torch.Tensor, batch: Mapping[str, Any]) -> dict[str, Any]:
    return {"pixel_values": pixel_values} | ({"labels": batch["label"]} if "label" in batch else {})


def _rgb(images: Sequence[PILImage.Image]) -> list[PILImage.Image]:
    return [image if image.mode == "RGB" else image.convert("RGB") for image in images]


def _size(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"


# ----------------------------------------------------------------------------------------------------
# Prompted and plain batches
# ----------------------------------------------------------------------------------------------------


class SampleKey(NamedTuple):
    """What a `RoleBatchSampler` asks of a `RoleDataset`.

    Args:
        index: row of the data set.
        use_prompt: whether the image is shown with the prompt.
        seed: seed of the random numbers drawn for this image, at most 63 bits.
    """

    index: int  # type: ignore[assignment]  # tuples have a method of that name
    use_prompt: bool
    seed: int


class RoleBatchSampler(Sampler[list[SampleKey]]):
    """Batches of which each is either prompted or plain, never both.

    One epoch of `alternate` shows every image once prompted and once plain, in two independent shuffles: `window`
    prompted batches, `window` plain ones, and so on. `always` has the prompted batches only, `never` the plain ones.
    All batches of one optimizer step share their role if `window` is the number of batches of a step (accumulation
    steps x processes). With a window above 1 every step is made complete with images from the start of the same
    shuffle, as distributed samplers do; with a window of 1 the last batch is simply short.

    The order and every seed are a function of (seed, epoch, role) alone, so they do not depend on what was drawn
    before, and training picks up where it stopped.

    Args:
        length: number of rows of the data set.
        batch_size: images in a batch.
        mixing: `alternate`, `always` or `never`.
        window: consecutive batches that share a role.
        seed: any whole number.
        shuffle: whether rows come in random order.

    Raises:
        ValueError: if a number is below 1 or `mixing` is none of the three.
    """

    ROLES: Mapping[str, tuple[bool, ...]] = {"alternate": (True, False), "always": (True,), "never": (False,)}

    def __init__(
        self, length: int, batch_size: int, mixing: Mixing, window: int = 1, seed: int = 0, shuffle: bool = True
    ) -> None:
        for name, value in (("length", length), ("batch_size", batch_size), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} is {value}: expected a whole number of at least 1.")
        if mixing not in self.ROLES:
            raise ValueError(f"mixing is '{mixing}': expected one of {_listed(self.ROLES)}.")
        self.length = length
        self.batch_size = batch_size
        self.mixing = mixing
        self.window = window
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.drop_last = False  # accelerate asks

    @property
    def sampler(self) -> RoleBatchSampler:
        """Itself: accelerate looks for `set_epoch` here once the batch sampler is wrapped."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.ROLES[self.mixing]) * self._windows * self.window

    def __iter__(self) -> Iterator[list[SampleKey]]:
        batches = [self._batches(use_prompt) for use_prompt in self.ROLES[self.mixing]]
        for _ in range(self._windows):
            for of_one_role in batches:
                yield from islice(of_one_role, self.window)

    @property
    def _windows(self) -> int:
        return ceil(self.length / (self.batch_size * self.window))

    def _batches(self, use_prompt: bool) -> Iterator[list[SampleKey]]:
        stream = _mix(_mix(_mix(self.seed) ^ self.epoch) ^ use_prompt)
        order, seeds = np.arange(self.length), _seeds(stream, self.length)
        if self.shuffle:
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(stream)).numpy()
        if self.window > 1:
            order = np.resize(order, self._windows * self.window * self.batch_size)  # repeats from the start
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            keys = zip(rows.tolist(), seeds[rows].tolist(), strict=True)
            yield [SampleKey(index, use_prompt, item_seed) for index, item_seed in keys]


def _splitmix64(state: np.ndarray) -> np.ndarray:
    """The output function of the SplitMix64 generator, element by element: uint64 -> uint64."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _seeds(stream: int, length: int) -> np.ndarray:
    """The first numbers of a SplitMix64 stream, cut to 63 bits (seeds are signed): int64 [length]."""
    steps = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_splitmix64(steps + np.uint64(stream % 2**64)) >> np.uint64(1)).astype(np.int64)


def _mix(number: int) -> int:
    return int(_seeds(number, 1)[0])


class RoleDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Two views of the same rows, addressed by `SampleKey`.

    An item is drawn under its key's own seed, so augmentation depends neither on the number of workers nor on what was
    drawn before; the global random state (torch on the CPU, numpy, Python) is as it was afterwards.

    Args:
        plain: view for plain batches, usually with `ImageTransforms.train`; its items are dicts.
        prompted: view for prompted batches, usually with `ImageTransforms.eval`; its items are dicts.
        batch_sampler: the sampler that draws from this data set. Where accelerate cannot reach it (a resumed epoch on
            several processes), accelerate tells the data set the epoch instead.

    Raises:
        ValueError: if the views differ in length.
    """

    def __init__(self, plain: Any, prompted: Any, batch_sampler: RoleBatchSampler | None = None) -> None:
        if len(plain) != len(prompted):
            raise ValueError(
                f"The plain view has {len(plain)} rows and the prompted view {len(prompted)}: expected two views of "
                "the same data set."
            )
        self.plain = plain
        self.prompted = prompted
        self.batch_sampler = batch_sampler

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch on to the batch sampler."""
        if self.batch_sampler is not None:
            self.batch_sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        view = self.prompted if key.use_prompt else self.plain
        with _seeded(key.seed):
            return {**view[key.index], "use_prompt": key.use_prompt}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the generators that augmentations draw from, and put them back afterwards; CUDA's are left alone."""
    generator = torch.random.default_generator
    states = generator.get_state(), random.getstate(), np.random.get_state()
    generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        generator.set_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def collate_images(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make one batch of examples.

    Args:
        examples: n dicts with `pixel_values`, a tensor [3, height, width]; optionally `labels` (or `label`,
            `label_ids`), a class or a float vector [classes]; optionally `use_prompt`.

    Returns:
        `pixel_values` [n, 3, height, width]; `labels`, long [n] or float [n, classes]; `use_prompt`, one bool.

    Raises:
        ValueError: if the images differ in size, or prompted and plain examples are mixed.
    """
    images = [torch.as_tensor(example["pixel_values"]) for example in examples]
    if len({image.shape for image in images}) > 1:
        raise ValueError(
            f"The images of one batch differ in shape ({_listed(sorted({tuple(image.shape) for image in images}))}): "
            "use an image processor or transform that gives every image the same size."
        )
    batch: dict[str, Any] = {"pixel_values": torch.stack(images)}
    name = next((name for name in ("labels", "label", "label_ids") if name in examples[0]), None)
    if name is not None:
        labels = torch.stack([torch.as_tensor(example[name]) for example in examples])
        batch["labels"] = labels.float() if labels.is_floating_point() else labels.long()
    if "use_prompt" in examples[0]:
        roles = {bool(example["use_prompt"]) for example in examples}
        if len(roles) > 1:
            raise ValueError(
                "A batch mixes prompted and plain images: draw batches with RoleBatchSampler, whose batches have one "
                "role each."
            )
        batch["use_prompt"] = roles.pop()
    return batch
