"""Packed checkpoints: the state of a frozen model in one packed file or in shards with an index, and back.

Names and tied weights are those of transformers' own `save_pretrained`, and so are shards, which are cut by the packed
sizes. A mask lies in the shard of its weight.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, cast

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from .. import storage
from ..masking.prunable import MASK_SUFFIX
from ..saved_files import check_weights

_MAX_INDEX = 2**26


def save_weights(
    folder: Path,
    model: PreTrainedModel,
    state_dict: dict[str, Tensor],
    *,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    save_original_format: bool = True,
) -> None:
    """Write the state of a frozen model packed, in shards of at most `max_shard_size` where one file does not do.

    Args:
        folder: where to; it must be there.
        model: the model that the state is of.
        state_dict: its state dictionary.
        max_shard_size: bytes, or text such as `"5GB"`. A single tensor may be larger.
        variant: goes into the names of the files.
        save_original_format: give the weights the names that the original checkpoint has.

    Raises:
        ValueError: a masked weight is not zero where it is pruned or NaN where it is kept, or the model is offloaded.
        OSError: a file cannot be written.
    """
    if offloaded := [name for name, tensor in state_dict.items() if tensor.is_meta]:
        raise ValueError(
            f"{offloaded[0]} is offloaded, and a packed file is written from memory; load the model without "
            "`device_map`, or save it with `packed=False`."
        )
    state = remove_tied_weights_from_state_dict(dict(state_dict), model)
    if save_original_format:
        state = revert_weight_conversion(model, state)
    masks = {name: mask for name in state if (mask := _mask_of(name, state)) is not None}
    mask_names = {name + MASK_SUFFIX for name in masks}
    tensors = {name: tensor for name, tensor in state.items() if name not in mask_names}
    split = split_state_dict_into_shards_factory(
        {name: storage.largest_packed_size(tensor, masks.get(name)) for name, tensor in tensors.items()},
        get_storage_size=int,
        filename_pattern=_file_name(SAFE_WEIGHTS_NAME, variant).replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard_size,
    )
    weight_map, total_size = dict[str, str](), 0
    for file, names in split.filename_to_tensors.items():
        content = {name: tensors[name] for name in names}
        kept = {name: masks[name] for name in names if name in masks}
        sizes = storage.save_packed(folder / file, content, kept, {})
        weight_map |= dict.fromkeys(sizes, file)
        total_size += sum(sizes.values())
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": model.num_parameters(), "total_size": total_size},
            "weight_map": weight_map,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / _file_name(SAFE_WEIGHTS_INDEX_NAME, variant)).write_text(text, encoding="utf-8")


def _mask_of(name: str, state: Mapping[str, Tensor]) -> Tensor | None:
    mask = state.get(name + MASK_SUFFIX)
    return mask if mask is not None and mask.dtype == torch.bool and mask.shape == state[name].shape else None


def _file_name(name: str, variant: str | None) -> str:
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else name


def find_packed_files(
    name: str, find: Callable[[str], str | None], variant: str | None = None
) -> dict[str, set[str] | None]:
    """Find the weight files of a model, if they are packed.

    Args:
        name: the model, for the messages.
        find: the local path of one of its files by name, or None where it has no such file.
        variant: as for `from_pretrained`.

    Returns:
        What each file holds by its local path, masks named as in the file; None where it holds the whole model. Empty
        if the files are not packed or not there.

    Raises:
        ValueError: a file of weights is a pointer of git LFS or no regular file.
        PackedFormatError: the index of the shards is damaged, or names a file that is not there or not in the folder.
    """
    whole = find(_file_name(SAFE_WEIGHTS_NAME, variant))
    if whole is not None:
        check_weights(Path(whole))
        return {whole: None} if storage.is_packed(whole) else {}
    index = find(_file_name(SAFE_WEIGHTS_INDEX_NAME, variant))
    if index is None:
        return {}
    with storage.blaming(f"{index} is no sound index of shards:"):
        shards = _read_index(Path(index))
    paths = {shard: find(shard) for shard in sorted(shards)}
    for path in filter(None, paths.values()):
        check_weights(Path(path))
    if not any(path is not None and storage.is_packed(path) for path in paths.values()):
        return {}
    if lost := [shard for shard, path in paths.items() if path is None]:
        raise storage.PackedFormatError(
            f"{name} lacks {len(lost)} of the {len(paths)} files that its {Path(index).name} lists, such as "
            f"{lost[0]}. The download may be incomplete."
        )
    return {path: shards[shard] for shard, path in paths.items() if path is not None}


def unpacked_size(find: Callable[[str], str | None], variant: str | None = None) -> int:
    """Bytes that the weights of a model take once they are unpacked, read from the headers of their files.

    Args:
        find: as for [`find_packed_files`].
        variant: as for `from_pretrained`.

    Raises:
        PackedFormatError: a header or the index is damaged.
    """
    for name, index_name in (
        (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME),
        (WEIGHTS_NAME, WEIGHTS_INDEX_NAME),
    ):
        if (whole := find(_file_name(name, variant))) is not None:
            return _unpacked_size(whole)
        if (index := find(_file_name(index_name, variant))) is not None:
            return sum(_unpacked_size(path) for shard in _read_index(Path(index)) if (path := find(shard)) is not None)
    return 0


def _unpacked_size(path: str) -> int:
    if not storage.is_packed(path):
        return os.path.getsize(path)
    with storage.PackedFile(path) as file:
        return sum(math.prod(file.shape(name)) * (file.dtype(name).itemsize + 1) for name in file.names)


def _read_index(index: Path) -> dict[str, set[str]]:
    """Return the names of the arrays in each shard."""
    if index.stat().st_size > _MAX_INDEX:
        raise ValueError(f"it takes more than {_MAX_INDEX} bytes.")
    content = storage.parse_json(index.read_bytes(), "content")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("it has no `weight_map`.")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\:\0"):
            raise ValueError(f"it puts {name!r} into {shard!r}, which is no safetensors file beside it.")
        shards.setdefault(shard, set()).add(name)
    return shards


@contextmanager
def open_state_dict(files: Mapping[str, set[str] | None]) -> Iterator[dict[str, Any]]:
    """Open the state dictionary of packed files, whose tensors are unpacked when transformers' loader places them.

    So no more than a few tensors are in memory beside the model, also where it converts or moves them.

    Args:
        files: as from [`find_packed_files`].

    Raises:
        PackedFormatError: a file is damaged, or the shards do not hold what their index says.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(storage.PackedFile(file)) for file in files]
        for file, (path, names) in zip(opened, files.items(), strict=True):
            _check_names(path, file, names)
        state = _state_dict([_Unit(file, name) for file in opened for name in file.names])
        # DeepSpeed takes nothing but tensors.
        yield {name: part[...] for name, part in state.items()} if is_deepspeed_zero3_enabled() else state


def _check_names(path: str, file: storage.PackedFile, names: set[str] | None) -> None:
    if names is not None and (wrong := sorted(names ^ set(file.stored_names))):
        raise storage.PackedFormatError(
            f"{path} does not hold what the index of the shards says: {len(wrong)} names differ, such as {wrong[0]!r}."
        )


def _state_dict(units: Sequence[_Unit]) -> dict[str, PackedTensor]:
    parts = [item for unit in units for item in unit.parts().items()]
    name, count = Counter(name for name, _ in parts).most_common(1)[0] if parts else ("", 1)
    if count > 1:
        raise storage.PackedFormatError(f"The packed files of the model hold {name!r} twice.")
    return dict(parts)


class _Unit:
    """A tensor of a packed file and its mask, unpacked together by whichever thread needs them first."""

    def __init__(self, file: storage.PackedFile, name: str):
        self._file, self._name = file, name
        self._lock = Lock()
        self._unpacked: list[Tensor | None] = [None, None]

    def parts(self) -> dict[str, PackedTensor]:
        """Return the placeholders of the tensor and its mask in a state dictionary."""
        dtype, shape = self._file.dtype(self._name), self._file.shape(self._name)
        parts = {self._name: PackedTensor(self, 0, dtype, shape)}
        if self._name in self._file.masked:
            parts[self._name + MASK_SUFFIX] = PackedTensor(self, 1, torch.bool, shape)
        return parts

    def take(self, part: int) -> Tensor:
        """Hand over the tensor (0) or the mask (1), and keep no reference to it."""
        with self._lock:
            tensor, self._unpacked[part] = self._unpacked[part], None
            if tensor is None:
                self._unpacked = list(self._file.read(self._name))
                tensor, self._unpacked[part] = cast(Tensor, self._unpacked[part]), None
        return tensor


class PackedTensor:
    """Stands for a tensor in a state dictionary until `[...]` unpacks it, as a slice of a safetensors file does.

    transformers' loader takes such slices and asks for each when it places it.

    Attributes:
        dtype: that of the tensor.
        shape: that of the tensor.
    """

    def __init__(self, unit: _Unit, part: int, dtype: torch.dtype, shape: torch.Size):
        self._unit, self._part = unit, part
        self.dtype, self.shape = dtype, shape

    def __getitem__(self, index: Any) -> Tensor:
        return self._unit.take(self._part)[index]

    def is_floating_point(self) -> bool:
        """As of a tensor; transformers looks for the dtype of a model by it."""
        return self.dtype.is_floating_point
