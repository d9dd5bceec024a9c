"""Inspect the files of a subnetwork without building the model or decoding its weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME

from .. import masking, storage
from ..masking.patterns import UNSTRUCTURED
from ..model.configuration import PromptedSparseConfig
from ..model.sparsity import KeptEntries, KeptInLayers
from ..saved_files import MAX_YAML, check_weights, read_front_matter, read_json, read_text, read_yaml
from ..saved_folder import current_folder

WEIGHT_FILES = "model*.safetensors"
MAX_LAYERS = 10_000
PROMPT_FACTS = ("prompt", "prompt_size", "prompt_inner_size", "image_size", "use_prompt")
CARD_FACTS = ("base_model", "datasets", "license")
RECIPE_FACTS = (
    "model_name_or_path",
    "model_revision",
    "dataset_name",
    "dataset_title",
    "dataset_revision",
    "method",
    "seed",
    "data_seed",
    "split_seed",
)


@dataclass(frozen=True)
class StoredLayer(KeptEntries):
    """Masked weight as it is stored in a file.

    Args:
        name: its name in the file.
        kept, total: entries that are not pruned, and all.
        bytes: of the stored values and the mask.
        coding: how the mask is stored: a key of [`storage.CODINGS`], or `"raw"` where the weight is not packed.
    """

    bytes: int
    coding: str


@dataclass(frozen=True)
class StoredSubnetwork(KeptInLayers):
    """Folder that holds a subnetwork.

    Args:
        backbone: class or model type of the backbone.
        state: `"frozen"`, `"search"` or `"dense"`.
        pattern: pattern of the masks.
        num_labels: how many classes it tells apart.
        label_mapping: how source classes became these, or None.
        prompt: the fields of the configuration that describe the prompt, or None.
        layers: the masked weights.
        files: bytes of every file of weights by its name.
        provenance: what the model card and `recipe.yaml` say of where it comes from.
    """

    backbone: str
    state: str
    pattern: str
    num_labels: int
    label_mapping: str | None
    prompt: dict[str, Any] | None
    layers: tuple[StoredLayer, ...]
    files: dict[str, int]
    provenance: dict[str, Any]

    def to_json(self) -> str:
        """All of it as a JSON object."""
        totals = {"sparsity": self.sparsity, "kept": self.kept, "total": self.total}
        layers = [asdict(layer) | {"sparsity": layer.sparsity} for layer in self.layers]
        return json.dumps(asdict(self) | totals | {"layers": layers}, indent=2, default=str)


def inspect_folder(folder: Path) -> StoredSubnetwork:
    """Read configuration, file headers, model card and recipe; no weights are decoded and no code is run.

    Args:
        folder: what `save_pretrained`, a recipe or a download left.

    Raises:
        ValueError: a file is damaged, or the folder holds another kind of model.
        OSError: a file is missing.
    """
    model_folder = current_folder(folder)
    config = _read_config(model_folder)
    files = sorted(model_folder.glob(WEIGHT_FILES))
    for file in files:
        check_weights(file)
    if not files:
        raise FileNotFoundError(f"{folder} holds no {WEIGHT_FILES}; save the model with `save_pretrained` first.")
    backbone = config["backbone_config"]
    return StoredSubnetwork(
        backbone=str(backbone.get("architecture") or backbone.get("model_type")),
        state=str(config.get("state")),
        # transformers leaves out what is its default.
        pattern=str(config.get("pattern", UNSTRUCTURED.name)),
        num_labels=len(config["id2label"]),
        label_mapping=config.get("label_mapping"),
        prompt={name: config.get(name) for name in PROMPT_FACTS} if config.get("prompt") else None,
        layers=_layers(files),
        files={file.name: file.stat().st_size for file in files},
        provenance=_from_card(folder / "README.md") | _from_recipe(folder / "recipe.yaml"),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}; expected a folder that `save_pretrained` wrote.")
    config = read_json(path)
    model_type = config.get("model_type")
    if model_type != PromptedSparseConfig.model_type:
        raise ValueError(
            f"{path} describes a model of type {model_type!r}, not a subnetwork of vpns_hf "
            f"({PromptedSparseConfig.model_type!r})."
        )
    config.setdefault("id2label", {0: "LABEL_0", 1: "LABEL_1"})  # transformers leaves out what is its default
    if not isinstance(config.get("backbone_config"), dict) or not isinstance(config["id2label"], dict):
        raise ValueError(f"{path} lacks the configuration of the backbone or its labels.")
    return config


def _layers(files: list[Path]) -> tuple[StoredLayer, ...]:
    # Shards of an unpacked model: a mask and its weight may lie in different files.
    sizes: dict[str, int] = {}
    for path in files:
        sizes |= _read(path, _sizes)
    found = [layer for path in files for layer in _read(path, partial(_layers_of_file, sizes=sizes))]
    if len(found) > MAX_LAYERS:
        raise ValueError(
            f"{files[0].parent} holds more than {MAX_LAYERS} masked weights, as no image classifier does."
        )
    return tuple(found)


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _layers_of_file(path: Path, sizes: dict[str, int]) -> list[StoredLayer]:
    layers = _packed_layers(path) if storage.is_packed(path) else _raw_layers(path, sizes)
    return list(islice(layers, MAX_LAYERS + 1))


def _packed_layers(path: Path) -> Iterator[StoredLayer]:
    with storage.PackedFile(path) as file:
        for name in file.masked:
            stored = file.stored(name)
            yield StoredLayer(_weight_name(name), stored.kept, stored.total, stored.bytes, stored.coding)


def _raw_layers(path: Path, sizes: dict[str, int]) -> Iterator[StoredLayer]:
    with safe_open(path, "np") as file:
        for name in file.keys():  # noqa: SIM118
            if file.get_slice(name).get_dtype() != "BOOL":
                continue
            if name.endswith(".0.mask"):
                weight = name.removesuffix(".0.mask") + ".original"
            elif name.endswith(masking.MASK_SUFFIX):
                weight = name.removesuffix(masking.MASK_SUFFIX)
            else:
                continue
            mask = file.get_tensor(name)
            if weight not in sizes:
                raise ValueError(f"mask {name} belongs to no weight.")
            size = sizes[weight] + sizes[name]
            yield StoredLayer(_weight_name(weight), int(mask.sum()), mask.size, size, "raw")


def _sizes(path: Path) -> dict[str, int]:
    """Read the bytes of every tensor of a file from its header."""
    with safe_open(path, "np") as file:
        return {name: _bytes(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118


def _bytes(stored: Any) -> int:
    bits = re.search(r"\d+", stored.get_dtype())
    return math.prod(stored.get_shape()) * (int(bits.group()) // 8 if bits else 1)


def _weight_name(stored: str) -> str:
    return stored.removeprefix("backbone.").replace("parametrizations.", "").removesuffix(".original")


def _from_card(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    data = ModelCardData(**read_front_matter(path), ignore_metadata_errors=True)
    facts = {name: value for name, value in data.to_dict().items() if name in CARD_FACTS}
    results = {
        f"{result.metric_name or result.metric_type} on {result.dataset_name}, {result.dataset_split}": (
            result.metric_value
        )
        for result in data.eval_results or ()
    }
    return facts | ({"results": results} if results else {})


def _from_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    text = read_text(path, MAX_YAML)
    recipe = read_yaml(path, text)
    comments = read_yaml(path, "\n".join(line[2:] for line in text.splitlines() if line.startswith("# ")))
    known = recipe if isinstance(recipe, dict) else {}
    facts = {name: known[name] for name in RECIPE_FACTS if known.get(name) is not None}
    packages = comments.get("packages") if isinstance(comments, dict) else None
    return facts | ({"packages": packages} if packages else {})
