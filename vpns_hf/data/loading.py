"""Load any image-classification data set as splits train, validation and test with columns image and label."""

from __future__ import annotations

import glob
import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..values import PATH, Check, checked, require
from . import folders
from .checks import EVALUATION, LOADING
from .columns import check_classes, check_trained, choose_columns, encode_labels, require_columns
from .corrupt import skip_corrupt
from .sampling import carve, check_sampling, sample
from .splits import Part, StoredRows, TransferSplits, listed
from .tasks import TRANSFER_TASKS, TransferTask

logger = logging.getLogger(__name__)
SPLITS = ("train", "validation", "test")
_DATA_SET = Check("a key of TRANSFER_TASKS, a Hub id, a local folder, or a data set in memory", PATH.accepts)
SHUFFLE_BUFFER = 1000
"""Size of the shuffle buffer of a stream, in encoded images; the order of shards is shuffled as well."""


@checked(**LOADING)
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
    shots: int | None = None,
    fraction: float | None = None,
    seed: int = 42,
    corrupt_images: str = "error",
    stream_images: int | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    num_proc: int | None = None,
) -> TransferSplits:
    """Load a classification data set as splits `train`, `validation` and `test` with columns `image` and `label`.

    Images are decoded as RGB. All splits share one `ClassLabel`: integer and string labels are numbered in sorted
    order over all splits together. A missing validation or test split is carved from `train`, stratified by class:
    the same seed always gives the same images.

    Args:
        path: key of `TRANSFER_TASKS`, Hub id, local folder (images in class folders, parquet or arrow files, or the
            output of `save_to_disk`), or data set in memory. Write `./<folder>` for a folder named like a key.
        name: configuration of a data set that has several.
        image_column: column of the images; None: detected.
        label_column: column of the classes; None: detected.
        train_split: split to train on; None: `train`.
        validation_split: split to select on; None: `validation`, else carved from the training split.
        test_split: split to report on; None: `test`, else carved from the training split with a warning.
        validation_fraction: share of the training split in each carved split.
        shots: training images per class (all, where a class has fewer); 8 shots are a subset of 16. Validation and
            test splits stay whole.
        fraction: share of the training images, stratified by class; smaller shares are subsets of larger ones.
        seed: seed of the carved splits and of the subsets of `shots` and `fraction`.
        corrupt_images: `"error"`: the first image that cannot be decoded stops the run; `"skip"`: every image is
            decoded once beforehand, and those that cannot be are left out with a warning each.
        stream_images: number of training images to fetch from a stream instead of downloading the whole training
            split, for runs that `max_steps` keeps short: the first of the shuffled stream, cached on disk because
            prompted and plain batches draw images by index. Validation and test splits are fetched whole.
        revision: commit, tag or branch of a data set on the Hub.
        cache_dir: cache folder of `datasets`.
        token: Hub token for private and gated data sets.
        num_proc: number of processes that prepare the data set and look for corrupt images.

    Returns:
        The three splits and the row numbers of their images in the stored data set.

    Raises:
        ConnectionError: the Hub cannot be reached and the data set is not in the local cache.
        FileNotFoundError: there is no such data set or folder.
        ValueError: a split or column is missing, labels are missing or out of range, class names differ only in
            letter case or spaces, a class has no training image or too few to be split, or a data set of the table
            has other classes than its row says.
    """
    check_sampling(shots, fraction)
    task = TRANSFER_TASKS.get(path) if isinstance(path, str) else None
    expected_classes = None
    if task is not None:
        expected_classes = task.num_classes if label_column in (None, task.label) else None
        path, name = task.path, name or task.name
        image_column, label_column = image_column or task.image, label_column or task.label
        train_split, test_split = train_split or task.train, test_split or task.test
        validation_split = validation_split or task.validation
    options: dict[str, Any] = {"name": name, "revision": revision, "cache_dir": cache_dir, "token": token}
    asked = [split for split in (train_split, validation_split, test_split) if split is not None]
    options |= {"num_proc": num_proc} if stream_images is None else {"streaming": True}
    raw = _read(path, asked, **options)
    chosen = _choose_splits(raw, train_split, validation_split, test_split)
    if task is None and (unused := [split for split in raw if split not in chosen.values()]):
        logger.warning("Not used: the splits %s of the data set.", listed(unused))
    parts = {
        ours: _part(raw[theirs], theirs, stream_images if ours == "train" else None, seed, cache_dir)
        for ours, theirs in chosen.items()
    }
    if task is not None and task.clip:
        parts = {ours: _middle_frames(part, task) for ours, part in parts.items()}
    parts = choose_columns(parts, image_column, label_column)
    if corrupt_images == "skip":
        parts = {ours: skip_corrupt(part, num_proc) for ours, part in parts.items()}
    parts = encode_labels(parts)
    check_classes(parts["train"], expected_classes, path)
    check_trained(parts, is_sample=stream_images is not None)
    if "test" not in parts:
        logger.warning(
            "The data set has no test split: %.3g of the training split is held out as one.", validation_fraction
        )
        parts = carve(parts, "test", validation_fraction, seed)
    if "validation" not in parts:
        logger.info("%.3g of the training split is held out for validation.", validation_fraction)
        parts = carve(parts, "validation", validation_fraction, seed)
    parts["train"] = sample(parts["train"], shots, fraction, seed)
    return TransferSplits({ours: parts[ours].data for ours in SPLITS}, {ours: parts[ours].stored for ours in SPLITS})


@checked(**EVALUATION)
def load_evaluation_split(
    path: str | Path | Dataset | DatasetDict,
    split: str = "test",
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
) -> Dataset:
    """Load a split to evaluate on, or all images of a data set without splits.

    Args:
        path: data set, as for `load_transfer_dataset`.
        split: `train`, `validation` or `test`; splits that a data set with several does not have are carved as
            `load_transfer_dataset` does. Without effect on a data set of one split, which is used whole.
        name, image_column, label_column, revision, cache_dir, token: as for `load_transfer_dataset`.
        train_split, validation_split, test_split, validation_fraction, seed: likewise, where there are several splits.

    Returns:
        A data set with columns `image` and `label`.

    Raises:
        ConnectionError, FileNotFoundError, ValueError: as `load_transfer_dataset`, but no class is too small.
    """
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    options: dict[str, Any] = {"name": name, "revision": revision, "cache_dir": cache_dir, "token": token}
    named: dict[str, Any] = {
        "train_split": train_split,
        "validation_split": validation_split,
        "test_split": test_split,
    }
    carving: dict[str, Any] = {"validation_fraction": validation_fraction, "seed": seed}
    if isinstance(path, str) and path in TRANSFER_TASKS:
        return load_transfer_dataset(path, **named, **carving, **columns, **options)[split]
    raw = _read(path, [theirs for theirs in named.values() if theirs is not None], **options)
    if len(raw) > 1:
        return load_transfer_dataset(raw, **named, **carving, **columns)[split]
    stored = next(iter(raw))
    for argument, theirs in named.items():
        if theirs not in (None, stored):
            raise ValueError(f"The data set has no split '{theirs}': leave {argument} out to use all of '{stored}'.")
    parts = {"train": _part(raw[stored], stored, None, 0, cache_dir)}
    return encode_labels(choose_columns(parts, image_column, label_column))["train"].data


def _read(path: str | Path | Dataset | DatasetDict, asked: list[str], **options: Any) -> DatasetDict:
    """Read the data set as it is stored, all splits."""
    if isinstance(path, IterableDataset | IterableDatasetDict):
        raise ValueError(
            "Prompted and plain batches draw images by index, which a stream cannot give: pass the Hub id or folder "
            "with stream_images=n, or keep what you need of the stream with "
            "Dataset.from_generator(lambda: stream.take(n), features=stream.features)."
        )
    if isinstance(path, Dataset):
        return DatasetDict({"train": path})
    if isinstance(path, DatasetDict):
        return path
    require("path", path, _DATA_SET)
    folder = Path(path)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = load_from_disk(str(folder))
        return DatasetDict({"train": saved}) if isinstance(saved, Dataset) else saved
    return _read_folder(folder, asked, **options) if folder.is_dir() else _load(str(path), **options)


def _read_folder(folder: Path, asked: list[str], **options: Any) -> DatasetDict:
    """Read a local folder and report its image files that are no rows."""
    listing = folders.list_folder(folder)
    if folders.is_image_folder(folder, listing):
        for argument, flag in (("name", "--dataset_config_name"), ("revision", "--dataset_revision")):
            if options[argument] is not None:
                raise ValueError(
                    f"{argument} (`{flag}`) is '{options[argument]}' and '{folder}' is a local folder of images, "
                    f"which has no {argument}: leave it out."
                )
        return folders.read_image_folder(folder, listing, asked, options["cache_dir"], "streaming" in options)
    if glob.has_magic(str(folder)):
        raise ValueError(
            f"The path '{folder}' has one of the characters * ? [, which `datasets` reads as a pattern: rename the "
            "folder."
        )
    raw = _load(str(folder), **options)
    if not listing.is_mostly_images or "streaming" in options:
        return raw
    rows = sum(raw.num_rows.values())
    if rows < listing.num_images:
        logger.warning(
            "Left out: %d of the %d image files of '%s': no row of its metadata or archives names them, or "
            "`datasets` took words such as train and test in some of their names for splits.",
            listing.num_images - rows,
            listing.num_images,
            folder,
        )
    return raw


def _load(path: str, **options: Any) -> DatasetDict:
    """Call `load_dataset` and turn each of its failures into one sentence."""
    try:
        return load_dataset(path, **options)
    except (ConnectionError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        snapshot = _downloaded_snapshot(path, options["revision"])
        if snapshot is not None:
            logger.warning("The Hub cannot be reached; '%s' is read from %s.", path, snapshot)
            return _load(snapshot, **options | {"revision": None})
        revision = f" --revision {options['revision']}" if options["revision"] else ""
        raise ConnectionError(
            f"The data set '{path}' is neither a local folder nor in the local cache, and the Hugging Face Hub cannot "
            f"be reached: run `hf download {path} --repo-type dataset{revision}` where there is a network, copy the "
            f"folder {HF_HUB_CACHE} here if that is another machine, and start again."
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"No data set was found at '{path}': expected a key of TRANSFER_TASKS, a data set of the Hugging Face Hub "
            "that you may read (pass token= for a private or gated one), or a local folder of images in one folder "
            f"per class, of parquet or arrow files, or written by save_to_disk. ({error})"
        ) from error
    except ValueError as error:
        # A configuration that is missing or unknown; the message lists those that there are.
        raise ValueError(f"The data set '{path}' cannot be read with name={options['name']!r}: {error}") from error
    except (RuntimeError, DatasetGenerationError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"The data set '{path}' cannot be read: {reason}") from error


def _downloaded_snapshot(path: str, revision: str | None) -> str | None:
    """Find the snapshot of `hf download` in the cache of huggingface_hub, if it is complete."""
    try:
        folder = snapshot_download(path, repo_type="dataset", revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    blobs = Path(folder).parents[1] / "blobs"
    return None if any(blobs.glob("*.incomplete")) else folder


def _choose_splits(raw: DatasetDict, train: str | None, validation: str | None, test: str | None) -> dict[str, str]:
    """Map our splits to stored ones; validation and test may be absent if the user named none."""
    train = train or "train"
    test = test or ("test" if "test" in raw else None)
    if validation is None and "validation" in raw and test != "validation":
        validation = "validation"
    chosen = {
        ours: theirs for ours, theirs in zip(SPLITS, (train, validation, test), strict=True) if theirs is not None
    }
    for ours, theirs in chosen.items():
        if theirs not in raw:
            raise ValueError(
                f"The data set has no split '{theirs}' to use for {ours}: its splits are {listed(raw)}, "
                f"name one of them with {ours}_split."
            )
    if len(set(chosen.values())) < len(chosen):
        raise ValueError(
            f"One split is used twice ({', '.join(f'{ours}: {theirs}' for ours, theirs in chosen.items())}): "
            "give train_split, validation_split and test_split different names."
        )
    return chosen


def _part(
    stored: Dataset | IterableDataset, split: str, count: int | None, seed: int, cache_dir: str | Path | None
) -> Part:
    """Take all rows of a stored split, or a sample of a stream."""
    if isinstance(stored, IterableDataset):
        stored = _fetch(stored, count, seed, cache_dir)
        split = split if count is None else f"{split} (stream shuffled with seed {seed})"
    return Part(stored.with_format(None), StoredRows(split, np.arange(len(stored))))


def _fetch(stream: IterableDataset, count: int | None, seed: int, cache_dir: str | Path | None) -> Dataset:
    """Fetch a stream, or the first rows of the shuffled stream, into the cache of `datasets`."""
    if stream.features is None:
        raise ValueError("The columns of this stream are known only once it is read: load it without stream_images.")
    for column, feature in stream.features.items():
        if isinstance(feature, Image):
            stream = stream.cast_column(column, Image(decode=False))
    if count is not None:
        stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER).take(count)
    return Dataset.from_generator(
        _rows,
        features=stream.features,
        gen_kwargs={"stream": stream},
        cache_dir=None if cache_dir is None else str(cache_dir),
    )


def _rows(stream: IterableDataset) -> Iterator[dict[str, Any]]:
    yield from stream


def _middle_frames(part: Part, task: TransferTask) -> Part:
    """Select the middle frame of each clip."""
    columns = [*task.clip, str(task.frame)]
    require_columns(part, dict.fromkeys(columns, f"pass '{task.path}' to use every frame of every clip"))
    *clip, frame = (part.data[column][:] for column in columns)
    clips: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, key in enumerate(zip(*clip, strict=True)):
        clips[key].append(index)
    middle = [sorted(indices, key=frame.__getitem__)[len(indices) // 2] for indices in clips.values()]
    return part.select(np.asarray(middle))
