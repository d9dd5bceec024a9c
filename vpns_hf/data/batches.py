"""Draw and collate batches that are either prompted or plain."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from math import ceil, floor
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

LABEL_NAMES = ("labels", "label", "label_ids")
Mixing = Literal["alternate", "always", "never"]


class SampleKey(NamedTuple):
    """Address one view of a row: the item that `RoleBatchSampler` yields and `RoleDataset` takes.

    Args:
        index: row number in the data set.
        use_prompt: role of the image, True for prompted.
        seed: seed of the augmentation of this image, at most 63 bits.
    """

    index: int  # type: ignore[assignment]  # tuples have a method of that name
    use_prompt: bool
    seed: int


class RoleBatchSampler(Sampler[list[SampleKey]]):
    """Sample batches of one role each, prompted or plain.

    One epoch of `alternate` shows every image once prompted and once plain, in two independent shuffles: `window`
    prompted batches, `window` plain ones, and so on. `always` has the prompted batches only, `never` the plain ones.
    All batches of one optimizer step share their role if `window` is the number of batches per step (accumulation
    steps x processes). With a window above 1 the sampler pads the last step with images from the start of the same
    shuffle, as distributed samplers do; with a window of 1 the last batch is smaller.

    The order and every seed are a function of (seed, epoch, role) alone and independent of earlier draws, so a
    resumed run sees the same batches.

    Args:
        length: number of rows in the data set.
        batch_size: images per batch.
        mixing: `alternate`, `always` or `never`.
        window: number of consecutive batches of one role.
        seed: any integer.
        shuffle: random instead of stored order.
        drop_last: whether images that do not fill the last step of an epoch are left out.

    Raises:
        ValueError: a number is below 1, or `mixing` is none of the three.
    """

    ROLES: Mapping[str, tuple[bool, ...]] = {"alternate": (True, False), "always": (True,), "never": (False,)}

    def __init__(
        self,
        length: int,
        batch_size: int,
        mixing: Mixing,
        window: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        for name, value in (("length", length), ("batch_size", batch_size), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} is {value}: expected a whole number of at least 1.")
        if mixing not in self.ROLES:
            raise ValueError(f"mixing is '{mixing}': expected one of {', '.join(self.ROLES)}.")
        self.length = length
        self.batch_size = batch_size
        self.mixing = mixing
        self.window = window
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.drop_last = drop_last
        if not self._windows:
            raise ValueError(
                f"No step is left with drop_last: {length} images do not fill one of {batch_size * window} images."
            )

    @property
    def sampler(self) -> RoleBatchSampler:
        """Return itself: accelerate looks for `set_epoch` here once it has wrapped the batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration follows."""
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
        steps = self.length / (self.batch_size * self.window)
        return floor(steps) if self.drop_last else ceil(steps)

    def _batches(self, use_prompt: bool) -> Iterator[list[SampleKey]]:
        stream = _mix(_mix(_mix(self.seed) ^ self.epoch) ^ use_prompt)
        order, seeds = np.arange(self.length), _seeds(stream, self.length)
        if self.shuffle:
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(stream)).numpy()
        if self.window > 1 or self.drop_last:
            order = np.resize(order, self._windows * self.window * self.batch_size)  # repeats from the start
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            keys = zip(rows.tolist(), seeds[rows].tolist(), strict=True)
            yield [SampleKey(index, use_prompt, item_seed) for index, item_seed in keys]


def _splitmix64(state: np.ndarray) -> np.ndarray:
    """Apply the output function of the SplitMix64 generator to each element: uint64 -> uint64."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _seeds(stream: int, length: int) -> np.ndarray:
    """Draw the first numbers of a SplitMix64 stream, cut to 63 bits because seeds are signed: int64 [length]."""
    steps = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_splitmix64(steps + np.uint64(stream % 2**64)) >> np.uint64(1)).astype(np.int64)


def _mix(number: int) -> int:
    return int(_seeds(number, 1)[0])


class RoleItem(NamedTuple):
    """Item of a `RoleDataset`.

    Args:
        example: item of the view.
        use_prompt: whether the image is shown with the prompt.
    """

    example: Any
    use_prompt: bool


class RoleDataset(torch.utils.data.Dataset[RoleItem]):
    """Serve two views of the same rows, addressed by `SampleKey`.

    Each item is augmented under the seed of its key, independent of the number of workers and of earlier draws; the
    global random state (torch on the CPU, numpy, Python) is restored afterwards.

    Args:
        plain: view for plain batches, usually through `ImageTransforms.train`, with dicts as items.
        prompted: view for prompted batches, usually through `ImageTransforms.eval`, with dicts as items.
        batch_sampler: sampler of this data set. Where accelerate cannot reach it (a resumed epoch on several
            processes), accelerate sets the epoch on the data set instead.

    Raises:
        ValueError: the views differ in length.
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
        """Set the epoch of the batch sampler."""
        if self.batch_sampler is not None:
            self.batch_sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, key: SampleKey) -> RoleItem:
        view = self.prompted if key.use_prompt else self.plain
        with _seeded(key.seed):
            return RoleItem(view[key.index], key.use_prompt)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the generators that augmentations draw from and restore them afterwards, except those of CUDA."""
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
    """Collate examples into one batch.

    Args:
        examples: n dicts of `pixel_values`, a tensor [channels, height, width]; optionally `labels` (or `label`,
            `label_ids`), a class or a float vector [classes].

    Returns:
        `pixel_values` [n, channels, height, width] and `labels`, long [n] or float [n, classes].

    Raises:
        ValueError: the images differ in size.
    """
    images = [torch.as_tensor(example["pixel_values"]) for example in examples]
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise ValueError(
            f"The images of one batch differ in shape ({', '.join(str(shape) for shape in shapes)}): "
            "use an image processor or transform that gives every image the same size."
        )
    batch: dict[str, Any] = {"pixel_values": torch.stack(images)}
    name = next((name for name in LABEL_NAMES if name in examples[0]), None)
    if name is not None:
        labels = torch.stack([torch.as_tensor(example[name]) for example in examples])
        batch["labels"] = labels.float() if labels.is_floating_point() else labels.long()
    return batch


def with_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch of any collator with its labels under the name `labels`.

    Raises:
        ValueError: the collator gave no dictionary.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"The data collator gave a {type(batch).__name__}; expected a dictionary with `pixel_values` and `labels`."
        )
    name = next((name for name in LABEL_NAMES if name in batch), None)
    if name in (None, "labels"):
        return dict(batch)
    return {key: value for key, value in batch.items() if key != name} | {"labels": batch[name]}


class RoleCollator:
    """Collate items of a `RoleDataset` with any collator; the role is added afterwards, whatever the collator keeps.

    Args:
        collate: function that makes a dictionary of examples, such as `collate_images` or one of transformers.
    """

    def __init__(self, collate: Callable[[list[Any]], Mapping[str, Any]]):
        self.collate = collate

    def __call__(self, items: Sequence[RoleItem]) -> dict[str, Any]:
        """Make one batch, with `use_prompt`.

        Raises:
            ValueError: prompted and plain items are mixed, or the collator gives no dictionary.
        """
        roles = {item.use_prompt for item in items}
        if len(roles) > 1:
            raise ValueError(
                "A batch mixes prompted and plain images: draw batches with RoleBatchSampler, whose batches have one "
                "role each."
            )
        return {**with_labels(self.collate([item.example for item in items])), "use_prompt": roles.pop()}
