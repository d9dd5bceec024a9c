"""Load models and image processors from folders that a stranger may have written."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.utils import IMAGE_PROCESSOR_NAME

from .. import hub
from ..pixels import measure_pixels
from ..saved_files import read_json

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

    from .configuration import PromptedSparseConfig

logger = logging.getLogger(__name__)

_MAX_SIDE = 2**12
# Models register some tensors twice while they are built, and small ones are no danger.
_FACTOR, _SPARE_ENTRIES, _SPARE_TENSORS = 2, 2**22, 2000
# Bytes that a tensor takes at least in the header of a file.
_HEADER_ENTRY = 50


@contextmanager
def in_one_sentence(name: str) -> Iterator[None]:
    """Turn what libraries raise on contradictory values into one sentence.

    Args:
        name: the model, for the message.

    Raises:
        ValueError: in place of errors of the kinds that wrong values of a configuration cause; all others pass.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ImportError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{name} cannot be loaded: its configuration and its weights describe no model ({type(error).__name__}: "
            f"{reason})."
        ) from error


@contextmanager
def no_larger_than(size: int) -> Iterator[None]:
    """Refuse to build a model that is much larger than its files, before memory is taken for it.

    transformers builds models on the meta device, so all that is counted here is shapes.

    Args:
        size: bytes of the weight files, unpacked.

    Raises:
        ValueError: the model registers more than twice the entries that the files could hold.
    """
    counter = _EntryCounter(size)

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        # Each thread has a counter of its own.
        if tensor is not None and tensor.is_meta and _counter.get() is counter:
            counter.add(tensor)

    token = _counter.set(counter)
    handles = [
        torch_module.register_module_parameter_registration_hook(count),
        torch_module.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        _counter.reset(token)
        for handle in handles:
            handle.remove()


class _EntryCounter:
    """Counter of the entries of a model that is built to hold the weights of some files.

    Args:
        size: bytes of the files, unpacked.
    """

    def __init__(self, size: int):
        self.size, self.entries, self.tensors, self.is_paused = size, 0, 0, False

    def add(self, tensor: Tensor) -> None:
        """Count a tensor; raise a ValueError where there are more than the files could hold."""
        self.entries, self.tensors = self.entries + (0 if self.is_paused else tensor.numel()), self.tensors + 1
        if (
            self.entries > _FACTOR * self.size + _SPARE_ENTRIES
            or self.tensors > self.size // _HEADER_ENTRY + _SPARE_TENSORS
        ):
            raise ValueError(
                f"The configuration describes a model of more than {self.entries:,} entries, and the weight files "
                f"hold {self.size:,} bytes; they do not belong together."
            )


_counter: ContextVar[_EntryCounter | None] = ContextVar("counter", default=None)


@contextmanager
def counting_later() -> Iterator[None]:
    """Count no entries of a model that is built in this context, because its layers are cut afterwards.

    It takes no memory before that, on the meta device; pass it to [`count_entries`] once it is cut.
    """
    counter = _counter.get()
    if counter is not None:
        counter.is_paused = True
    try:
        yield
    finally:
        if counter is not None:
            counter.is_paused = False


def count_entries(model: nn.Module) -> None:
    """Count the tensors of a model as [`no_larger_than`] counts those that are registered."""
    if (counter := _counter.get()) is not None:
        for tensor in (*model.parameters(), *model.buffers()):
            counter.add(tensor)


def load_image_processor(name: str, kwargs: Mapping[str, Any]) -> BaseImageProcessor | None:
    """Load the image processor that was saved with a model; None where there is none.

    Args:
        name: Hub id or folder.
        kwargs: the arguments of `from_pretrained`.

    Raises:
        ValueError: its file describes none, or one that is only code of the repository.
        OSError: the Hub cannot be reached.
    """
    path = hub.find_file(name, IMAGE_PROCESSOR_NAME, kwargs)
    if path is None:
        return None
    values = read_json(Path(path))
    _check_processor(path, values)
    mean = values.get("image_mean")
    channels = len(mean) if isinstance(mean, list) else 3
    # That of timm takes PIL images only, and PIL has no images of other than 1, 3 or 4 channels.
    picture = Image.new("RGB", (48, 64)) if channels == 3 else torch.zeros(channels, 64, 48, dtype=torch.uint8)
    try:
        image_processor = transformers.AutoImageProcessor.from_pretrained(name, **hub.hub_kwargs(kwargs))
        # Most wrong values only show when they are used.
        image_processor(picture, return_tensors="pt")
        return image_processor
    except OSError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} describes no image processor ({type(error).__name__}: {reason}).") from error


def warn_of_other_images(name: str, image_processor: BaseImageProcessor, config: PromptedSparseConfig) -> None:
    """Warn if an image processor makes images of another size or normalisation than the configuration states.

    Args:
        name: Hub id or folder of both, for the message.
        image_processor: image processor that was saved with a model.
        config: configuration of the model.
    """
    if None in (config.image_size, config.image_mean, config.image_std):
        return
    try:
        pixels = measure_pixels(image_processor, config.geometry.size)
    except ValueError as error:
        logger.warning("The image processor of %s does not make images for its model: %s", name, error)
        return
    if pixels.size != config.geometry.size or not pixels.agrees(config.geometry.mean, config.geometry.std):
        logger.warning(
            "The image processor of %s makes images of %s (height, width) with mean %s and std %s, and the model's "
            "configuration states %s with mean %s and std %s; one of the two files was changed.",
            name,
            *(pixels.size, pixels.mean, pixels.std),
            *config.geometry,
        )


def _check_processor(path: str, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name.startswith("do_") and value is not None and type(value) is not bool:
            raise ValueError(f"`{name}` in {path} is {value!r}; expected true or false.")
        for number in _numbers(value):
            if not math.isfinite(number) or abs(number) > _MAX_SIDE:
                raise ValueError(f"`{name}` in {path} is {number}; expected at most {_MAX_SIDE}.")
            if name == "image_std" and number <= 0:
                raise ValueError(f"`image_std` in {path} is {value!r}; expected numbers above 0.")


def _numbers(value: Any) -> Iterator[int | float]:
    """Return the numbers in a value of an image processor, which nests them once at most."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return (item for item in inner if isinstance(item, int | float))
