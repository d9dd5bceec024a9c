"""Files of a saved folder that a stranger may have written."""

import builtins
import json
import os
import socket

import pytest
import torch
from helpers.models import tiny_backbone, tiny_model
from safetensors.torch import load_file, save_file
from transformers import ViTImageProcessor

from vpns_hf import PromptedSparseModel
from vpns_hf.saved_files import check_published, printable, read_json, read_yaml

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
EVIL = "from pathlib import Path\nPath('{ran}').write_text('ran')\n"


@pytest.fixture
def folder(tmp_path):
    model = tiny_model()
    model.freeze_masks()
    path = tmp_path / "model"
    model.save_pretrained(path)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        path
    )
    return path


@pytest.fixture
def no_prompt(monkeypatch):
    """Nothing may ask on the terminal."""

    def asked(text=""):
        raise SystemExit(f"asked: {text}")

    monkeypatch.setattr(builtins, "input", asked)


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(message, action, *arguments):
    with pytest.raises(ValueError, match=message) as caught:
        action(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("processor_type", [None, "FromTheFuture"])
def test_code_in_a_folder_is_neither_run_nor_asked_about(folder, no_prompt, tmp_path, processor_type):
    (folder / "evil.py").write_text(EVIL.format(ran=tmp_path / "ran"))
    values = {"auto_map": {"AutoImageProcessor": "evil.Evil"}, "image_processor_type": processor_type}
    edit(folder / "preprocessor_config.json", **values)
    refused("preprocessor_config.json describes no image processor", PromptedSparseModel.from_pretrained, folder)
    config = {"AutoConfig": "evil.Evil", "AutoModelForImageClassification": "evil.Evil"}
    edit(folder / "config.json", auto_map=config)
    refused("describes no image processor", PromptedSparseModel.from_pretrained, folder)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_backbone_is_neither_run_nor_asked_about(no_prompt, tmp_path):
    tiny_backbone("vit").save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "evil.py").write_text(EVIL.format(ran=tmp_path / "ran"))
    edit(tmp_path / "plain" / "config.json", model_type="new", auto_map={"AutoConfig": "evil.Evil"})
    with pytest.raises(ValueError, match="contains custom code"):
        PromptedSparseModel.from_backbone(str(tmp_path / "plain"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_resize": "no"}, "`do_resize` in .* is 'no'; expected true or false"),
        ({"size": {"height": 10**9, "width": 32}}, "`size` in .* is 1000000000"),
        ({"image_std": [0.5, 0, 0.5]}, "`image_std` in .* expected numbers above 0"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "`image_mean` in .* is nan"),
        ({"resample": "dense"}, "describes no image processor"),
        ({"image_mean": [0.5, 0.5]}, "describes no image processor"),
        ({"rescale_factor": "x"}, "describes no image processor"),
        ({"image_processor_type": "Unknown"}, "describes no image processor"),
    ],
)
def test_wrong_image_processors_are_refused(folder, values, message):
    edit(folder / "preprocessor_config.json", **values)
    refused(message, PromptedSparseModel.from_pretrained, folder)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "values",
    [{"hidden_size": 2**14, "intermediate_size": 2**14}, {"num_hidden_layers": 10**6}, {"image_size": 2**14}],
)
def test_a_model_larger_than_its_files_is_refused_before_memory_is_taken(folder, packed, values):
    model = PromptedSparseModel.from_pretrained(folder)
    model.save_pretrained(folder, packed=packed)
    config = json.loads((folder / "config.json").read_text())
    config["backbone_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))
    refused("they do not belong together", PromptedSparseModel.from_pretrained, folder)


@pytest.mark.parametrize("value", [1.0, float("nan"), 1e-45])
def test_weights_that_are_not_zero_where_they_are_pruned_are_refused(folder, value):
    PromptedSparseModel.from_pretrained(folder).save_pretrained(folder, packed=False)
    tensors = load_file(folder / "model.safetensors")
    weight, mask = (tensors[f"backbone.classifier.weight{suffix}"] for suffix in ("", "_mask"))
    position = tuple((~mask).nonzero()[0])
    weight[position] = -0.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    PromptedSparseModel.from_pretrained(folder)
    weight[position] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(
        "1 weights of classifier.weight are not zero although the mask prunes them",
        PromptedSparseModel.from_pretrained,
        folder,
    )


def test_a_damaged_unpacked_file_is_one_sentence(folder):
    PromptedSparseModel.from_pretrained(folder).save_pretrained(folder, packed=False)
    os.truncate(folder / "model.safetensors", 9000)
    refused("cannot be loaded: .*SafetensorError", PromptedSparseModel.from_pretrained, folder)


def test_pickles_are_not_read(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        PromptedSparseModel.from_pretrained(folder)


def test_a_pointer_of_git_lfs_is_named(folder):
    (folder / "model.safetensors").write_text(POINTER)
    refused("fetch them with `git lfs pull`", PromptedSparseModel.from_pretrained, folder)


@pytest.mark.parametrize("text", ["a: &x [1]\nb: *x", "a: [", "x" * 2**17, "[" * 3000, "a: \x07"])
def test_yaml_is_plain_and_small(tmp_path, text):
    refused("YAML", read_yaml, tmp_path / "recipe.yaml", text)


def test_json_is_an_object_in_a_regular_file(tmp_path):
    for text in ("[]", "{", "[" * 10**5, '{"a": 1, "a": 2}'):
        (tmp_path / "x.json").write_text(text)
        refused("no sound JSON|no JSON object", read_json, tmp_path / "x.json")
    os.mkfifo(tmp_path / "fifo.json")
    refused("no regular file", read_json, tmp_path / "fifo.json")


def test_links_out_of_the_folder_are_not_published(folder, tmp_path):
    (tmp_path / "id_rsa").write_text("private")
    (folder / "figures").mkdir()
    (folder / "figures" / "prompt.png").symlink_to(tmp_path / "id_rsa")
    refused("is a link to a file outside the folder", check_published, folder, ["figures/prompt.png"])
    (folder / "figures" / "prompt.png").unlink()
    (folder / "figures").rmdir()
    (folder / "figures").symlink_to(tmp_path)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    refused("is a link to a file outside the folder", check_published, folder, ["figures/a.png"])


def test_a_snapshot_of_the_cache_is_published(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_text("{}")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/1")
    check_published(snapshot, ["config.json"])


@pytest.mark.parametrize("name", ["a.png", "config.json", "recipe.yaml", "README.md", "model.safetensors"])
def test_contents_match_their_type(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\xfe: [ private key")
    refused(f"{name} is no", check_published, tmp_path, [name])


def test_what_is_printed_is_short_and_steers_nothing():
    assert printable("a\x1b[2Jb\nc") == "a?[2Jb?c"
    assert printable("x" * 10**6, 10) == "x" * 10 + "..."


def test_a_socket_is_no_file(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.json"))
        refused("no regular file", read_json, tmp_path / "s.json")
