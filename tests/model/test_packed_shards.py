"""Packed models as folders: names, shards, damage."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.models import tiny_backbone, tiny_model
from helpers.states import assert_same_state
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from vpns_hf import PromptedSparseModel, storage
from vpns_hf.model import packed_shards
from vpns_hf.storage import PackedFormatError, load_packed, save_packed

INDEX = "model.safetensors.index.json"


def frozen(family="vit", **kwargs):
    model = tiny_model(family, **kwargs)
    model.freeze_masks()
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One frozen model: in one packed file, in packed shards, and dense."""
    torch.manual_seed(0)
    model, root = frozen(), tmp_path_factory.mktemp("folders")
    model.save_pretrained(root / "whole")
    model.save_pretrained(root / "shards", max_shard_size="10KB")
    model.save_pretrained(root / "dense", packed=False)
    return model, root


@pytest.fixture
def copied(folders, tmp_path):
    """A function that copies one of the folders, to be damaged."""

    def copy(name):
        for file in (folders[1] / name).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    return copy


def arrays(file):
    with safe_open(file, "pt") as opened:
        return {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118


@pytest.mark.parametrize("family", ["vit", "beit", "swin", "resnet", "timm_vit", "timm_resnet"])
def test_packed_files_have_the_names_of_dense_ones(family, tmp_path):
    model = frozen(family)
    model.save_pretrained(tmp_path / "packed")
    model.save_pretrained(tmp_path / "dense", packed=False)
    masks = {f"{name}:mask" for name in load_packed(tmp_path / "packed" / "model.safetensors")[1]}
    assert len(masks) == len(model.masks())
    names = {
        name.removesuffix("_mask") + ":mask" if name.endswith("_mask") else name
        for name in arrays(tmp_path / "dense" / "model.safetensors")
    }
    assert set(arrays(tmp_path / "packed" / "model.safetensors")) == names
    assert_same_state(PromptedSparseModel.from_pretrained(tmp_path / "packed"), model)


def test_the_rest_of_the_folder_is_as_transformers_writes_it(folders):
    _, root = folders
    assert {file.name for file in (root / "whole").iterdir()} == {"config.json", "model.safetensors"}
    assert (root / "whole" / "config.json").read_text() == (root / "dense" / "config.json").read_text()


def test_saving_leaves_the_model_as_it_is(tmp_path):
    model = frozen()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_state_dict_and_a_variant(tmp_path):
    model, other = frozen(), frozen()
    model.save_pretrained(tmp_path, state_dict=other.state_dict(), variant="other")
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.other.safetensors"}
    assert_same_state(PromptedSparseModel.from_pretrained(tmp_path, variant="other"), other)
    other.save_pretrained(tmp_path / "shards", variant="other", max_shard_size="10KB")
    assert (tmp_path / "shards" / "model.safetensors.index.other.json").is_file()
    assert_same_state(PromptedSparseModel.from_pretrained(tmp_path / "shards", variant="other"), other)


def test_other_processes_write_nothing(tmp_path):
    frozen().save_pretrained(tmp_path, is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_another_dtype_is_converted(folders):
    model, root = folders
    loaded = PromptedSparseModel.from_pretrained(root / "whole", dtype=torch.bfloat16)
    assert loaded.backbone.classifier.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.backbone.classifier.weight, model.backbone.classifier.weight.bfloat16())
    assert all(torch.equal(mask, model.masks()[name]) for name, mask in loaded.masks().items())
    assert loaded.prompt.top.dtype == torch.float32


def test_the_dtype_is_found_without_the_configuration(copied, folders):
    folder = copied("whole")
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    config["backbone_config"].pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    assert_same_state(PromptedSparseModel.from_pretrained(folder), folders[0])


def test_loading_without_threads(folders, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    assert_same_state(PromptedSparseModel.from_pretrained(folders[1] / "shards"), folders[0])


def test_deepspeed_gets_tensors(folders, monkeypatch):
    monkeypatch.setattr(packed_shards, "is_deepspeed_zero3_enabled", lambda: True)
    with packed_shards.open_state_dict({str(folders[1] / "whole" / "model.safetensors"): None}) as state:
        assert all(type(tensor) is torch.Tensor for tensor in state.values())


def test_offloaded_models_are_not_packed(tmp_path):
    model = frozen()
    model.backbone.classifier.to("meta")
    with pytest.raises(ValueError, match=r"backbone\.classifier\.weight is offloaded"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


# Shards --------------------------------------------------------------------------------------------------------------


def test_shards(folders):
    model, root = folders
    shards = sorted((root / "shards").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((root / "shards" / INDEX).read_text())
    stored = {name: shard.name for shard in shards for name in arrays(shard)}
    assert index["weight_map"] == stored
    sizes = {shard: sum(len(bytes(tensor.numpy())) for tensor in load_file(shard).values()) for shard in shards}
    assert index["metadata"] == {"total_parameters": model.num_parameters(), "total_size": sum(sizes.values())}
    for shard, size in sizes.items():
        tensors = [name for name in arrays(shard) if not name.endswith(":mask")]
        assert size <= 10_000 or len(tensors) == 1
    assert max(len(arrays(shard)) for shard in shards) > 2
    for name, shard in stored.items():
        assert stored.get(f"{name}:mask", shard) == shard
    assert_same_state(PromptedSparseModel.from_pretrained(root / "shards"), model)
    assert_same_state(AutoModelForImageClassification.from_pretrained(root / "shards"), model)


def test_a_subnetwork_in_shards(folders):
    model = tiny_model()
    model.load_subnetwork(folders[1] / "shards")
    assert all(torch.equal(mask, folders[0].masks()[name]) for name, mask in model.masks().items())


def test_saving_again_leaves_no_other_shards(copied, folders):
    folder = copied("shards")
    folders[0].save_pretrained(folder)
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
    folders[0].save_pretrained(folder, max_shard_size="20KB")
    assert not (folder / "model.safetensors").exists()
    assert_same_state(PromptedSparseModel.from_pretrained(folder), folders[0])


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as caught:
        PromptedSparseModel.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    return caught.value


def edit_index(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "c:x.safetensors", "x.bin", "", 3, None],
)
def test_shards_outside_the_folder_are_refused(copied, shard):
    folder = copied("shards")
    edit_index(folder, lambda index: index["weight_map"].update({"backbone.classifier.bias": shard}))
    assert isinstance(refused(folder, "which is no safetensors file beside it"), PackedFormatError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no sound JSON"),
        ("[" * 10**6, "no sound JSON"),
        ("[]", "no `weight_map`"),
        ("{}", "no `weight_map`"),
        ('{"weight_map": {}}', "no `weight_map`"),
        ('{"weight_map": []}', "no `weight_map`"),
        ('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', "names 'a' twice"),
        (" " * (2**26 + 1), "takes more than"),
    ],
    ids=lambda text: text[:40],
)
def test_damaged_indices_are_refused(copied, text, message):
    folder = copied("shards")
    (folder / INDEX).write_text(text)
    assert isinstance(refused(folder, f"is no sound index of shards: .*{message}"), PackedFormatError)


def test_wrong_shards_are_refused(copied, folders):
    folder = copied("shards")
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    content = first.read_bytes()
    first.write_bytes(content[:-1])
    refused(folder, f"{first.name} is no packed file .* its header describes")
    first.write_bytes(second.read_bytes())
    refused(folder, f"{first.name} does not hold what the index of the shards says")
    first.write_bytes((folders[1] / "dense" / "model.safetensors").read_bytes())
    refused(folder, f"{first.name} is no packed file .* an ordinary safetensors file")
    first.unlink()
    refused(folder, rf"lacks 1 of the \d+ files that its {INDEX} lists, such as {first.name}")
    first.write_bytes(content)
    edit_index(folder, lambda index: index["weight_map"].update({"more": first.name}))
    refused(folder, f"{first.name} does not hold what the index of the shards says: 1 names differ, such as 'more'")


def test_a_name_in_two_shards_is_refused(tmp_path, folders):
    """Under two names in the files, but under one in the model."""
    for file in (folders[1] / "whole").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    save_packed(tmp_path / "b.safetensors", {"backbone.classifier.weight_mask": torch.ones(6, 32) > 0}, {}, {})
    weight_map = {name: f"{shard}.safetensors" for shard in "ab" for name in arrays(tmp_path / f"{shard}.safetensors")}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(tmp_path, r"hold 'backbone.classifier.weight_mask' twice")


# A packed file that is not what the configuration describes ----------------------------------------------------------


def rewrite(folder, edit):
    tensors, masks, metadata = load_packed(folder / "model.safetensors")
    edit(tensors, masks)
    save_packed(folder / "model.safetensors", tensors, masks, metadata)


def drop(name):
    def edit(tensors, masks):
        del tensors[name]
        masks.pop(name, None)

    return edit


def narrow(tensors, masks):
    for content in (tensors, masks):
        content["backbone.classifier.weight"] = content["backbone.classifier.weight"][:, :-1]


WEIGHT = "backbone.classifier.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(WEIGHT), f"2 are missing, .*; {WEIGHT} is missing"),
        (drop("backbone.classifier.bias"), "1 are missing, .*; backbone.classifier.bias is missing"),
        (lambda tensors, masks: masks.pop(WEIGHT), f"1 are missing, .*; {WEIGHT}_mask is missing"),
        (lambda tensors, masks: tensors.update(more=torch.ones(2)), "1 are .*; more is unknown"),
        (narrow, rf"2 are .*; {WEIGHT} has shape \(6, 31\)"),
        (
            lambda tensors, masks: masks.update({"backbone.classifier.bias": torch.ones(6) > 0}),
            "1 are .*; backbone.classifier.bias_mask is unknown",
        ),
        (lambda tensors, masks: tensors["prompt.top"].fill_(float("nan")), "prompt.top of this model holds NaN"),
    ],
    ids=["weight", "bias", "mask", "unknown", "shape", "mask of a bias", "NaN"],
)
def test_other_tensors_are_refused(copied, edit, message):
    folder = copied("whole")
    rewrite(folder, edit)
    refused(folder, message)


def test_a_damaged_file_is_refused_by_name(copied):
    folder = copied("whole")
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    content[end + header[f"{WEIGHT}:mask"]["data_offsets"][0]] ^= 1
    file.write_bytes(content)
    assert isinstance(refused(folder, f"is damaged: tensor '{WEIGHT}'"), PackedFormatError)


def test_a_packed_file_for_another_state_is_refused(copied):
    folder = copied("whole")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"state": "dense"}))
    refused(folder, "_mask is unknown")


def test_nans_are_not_packed(tmp_path):
    model = frozen()
    weight = model.backbone.classifier.weight
    weight.data[model.masks()["classifier.weight"]] = float("nan")
    with pytest.raises(ValueError, match=f"'{WEIGHT}' holds NaN"):
        model.save_pretrained(tmp_path)
    weight.data.zero_()
    model.prompt.top.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"prompt.top of this model holds NaN"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    model.save_pretrained(tmp_path, packed=False)


# Memory --------------------------------------------------------------------------------------------------------------

PEAK = """
import gc, importlib.util, re, sys, torch
from pathlib import Path
spec = importlib.util.spec_from_file_location("storage", sys.argv[1])
storage = sys.modules["storage"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(storage)
torch.set_num_threads(2)

def status(field):
    return int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def peak(action):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = action()
    return status("VmHWM") - before, result

for dtype in (torch.float32, torch.bfloat16):
    for sparsity in (0.5, 0.9):
        masks = {f"w{index}": torch.rand(2**21) >= sparsity for index in range(12)}
        tensors = {name: mask.to(dtype) for name, mask in masks.items()}
        saving, _ = peak(lambda: storage.save_packed(sys.argv[2], tensors, masks, {}))
        del tensors, masks
        with storage.PackedFile(sys.argv[2]) as file:
            loading, kept = peak(lambda: [file.read(name) for name in file.names])
            size = sum(tensor.nbytes + mask.nbytes for tensor, mask in kept)
        del kept
        largest = 2**21 * dtype.itemsize
        print(dtype, sparsity, saving / largest, (loading - size) / largest)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="counts memory as Linux does")
def test_memory_beyond_the_model_is_that_of_two_tensors(tmp_path):
    command = [sys.executable, "-c", PEAK, storage.__file__, str(tmp_path / "file")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 4
    assert all(float(number) <= 2 for line in lines for number in line[2:]), run.stdout


def test_no_part_is_kept_once_it_is_placed(folders):
    with packed_shards.open_state_dict({str(folders[1] / "whole" / "model.safetensors"): None}) as state:
        part, mask = state[WEIGHT], state[f"{WEIGHT}_mask"]
        assert (part.shape, part.dtype, mask.dtype) == ((6, 32), torch.float32, torch.bool)
        assert part.is_floating_point()
        assert not mask.is_floating_point()
        weight = part[...]
        assert torch.equal(weight != 0, mask[...])
        assert part._unit._unpacked == [None, None]
        assert torch.equal(part[...], weight)


def test_a_dense_folder_is_left_to_transformers(folders, tmp_path):
    model, root = folders
    assert_same_state(PromptedSparseModel.from_pretrained(root / "dense"), model)
    tiny_backbone("vit").save_pretrained(tmp_path, max_shard_size="10KB")
    found = packed_shards.find_packed_files(
        "x", lambda file: str(tmp_path / file) * (tmp_path / file).exists() or None
    )
    assert found == {}
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="an ordinary safetensors file"):
        load_packed(tmp_path / "model.safetensors")
