"""The configuration checks itself when it is built, from a file and in Python alike."""

import json
import math
import re

import pytest
import torch
from helpers.models import CONFIGS, tiny_model
from transformers import AutoConfig, AutoModelForImageClassification, CLIPTextConfig, TimmWrapperConfig

from vpns_hf import PromptedSparseConfig, PromptedSparseModel
from vpns_hf.model import configuration_checks
from vpns_hf.model.backbone_config import timm_arguments

SIX = {index: f"class {index}" for index in range(6)}
NAN, INF = math.nan, math.inf


def build(**fields):
    """A configuration that fits together but for what is passed."""
    whole = dict(backbone_config=CONFIGS["vit"](), id2label=SIX, image_size=[32, 32], image_mean=[0.5] * 3)
    return PromptedSparseConfig(**(whole | dict(image_std=[0.5] * 3, prompt="pad") | fields))


WRONG = {
    "state": ["sparse", None, 1, ["frozen"], ""],
    "sparsity": [1.0, -0.1, 1.5, NAN, INF, "0.9", True, None, [0.9]],
    "scope": ["rows", None, "Global", ["global"]],
    "pattern": ["5:4", "block:1", "blocks", "2:4 ", None, 24, ["2:4"]],
    "channel_groups": ["fc1", [], [[2]], [[0, [["a", 0, 0, 1]], []]], [[2, [], []]], [[2, [["a", 2, 0, 1]], []]]],
    "weight_positions": [3, {"a": -1}, {"a": 1.5}, ["a"]],
    "channel_budget": ["flops", None, "macs:0.5", 1],
    "channel_multiple": [0, 8.0, True, None, 10**6],
    "signed_scores": ["no", 0, None],
    "ignore_modules": ["head", [1], [""], None, ["x" * 501], {"a": 1}, ["a"] * 10_001],
    "head_parameters": ["classifier.weight", [None], 3],
    "new_head": ["false", 1],
    "prompt": ["frame", True, [], ""],
    "prompt_size": ["16", 16.0, True, None, 10**9, [16]],
    "prompt_inner_size": [16, [16], [0, 16], [16.0, 16], ["16", "16"], [10**6, 16], "no"],
    "image_size": [32, [32], [32, 32, 3], [-1, 32], [True, 32], [10**5, 32], "auto"],
    "image_mean": [0.5, [], [0.5, NAN, 0.5], [INF] * 3, ["0.5"] * 3, [0.5] * 100, [[0.5]] * 3, [1e30] * 3],
    "image_std": [0.5, [0.5, 0, 0.5], [NAN] * 3, [-0.5] * 3, [1e-30] * 3, [True] * 3, []],
    "use_prompt": ["no", "yes", 0, 1, None],
    "label_mapping": ["nearest", 1, True, []],
    "label_mapping_state": ["set", None, "Final"],
    "mapped_labels": ["012345", [0.0] * 6, [-1] + [0] * 5, [True] * 6, [None] * 6, [], 3, [10**9] * 6],
    "keep_source_head": ["no", 1, None],
}
WRONG_TOGETHER = [
    (dict(sparsity=1, state="dense"), "`sparsity` is 1"),
    (dict(channel_groups=[[2, [["a", 0, 0, 1]], []]]), "are of `pattern='channels'` alone"),
    (dict(channel_multiple=8), "are of `pattern='channels'` alone"),
    (dict(pattern="channels", channel_groups=None), "`channel_groups` is None"),
    (dict(use_prompt=True, prompt=None), "`use_prompt` is True, but `prompt` is None"),
    (dict(image_std=[0.5] * 2), "`image_mean` has 3 values and `image_std` 2"),
    (dict(image_mean=[0.5], image_std=[0.5]), "`image_mean` has 1 values, and the backbone takes 3 channels"),
    (dict(label_mapping_state="final"), "`label_mapping` is None"),
    (dict(mapped_labels=[0] * 6), "`label_mapping` is None"),
    (dict(label_mapping="frequency", label_mapping_state="final"), "`mapped_labels` is None"),
    (dict(label_mapping="frequency", mapped_labels=[0] * 6), "`label_mapping_state` 'unset'"),
    (dict(label_mapping="bayesian", label_mapping_state="final", mapped_labels=[0] * 6), "'bayesian'"),
    (
        dict(label_mapping="frequency", label_mapping_state="final", mapped_labels=[0] * 5),
        "`mapped_labels` has 5 entries; expected one for each of the 6 classes",
    ),
    (
        dict(label_mapping="frequency", label_mapping_state="open", mapped_labels=[0, 1, 2, 3, 4, 6]),
        "names class 6, and the head has 6 classes",
    ),
    (dict(id2label=None, num_labels=3), "The head has 6 classes and `id2label` 3"),
    (
        dict(label_mapping="frequency", label_mapping_state="final", mapped_labels=[9, 8], id2label={0: "a", 1: "b"}),
        "The head has 6 classes and `id2label` 2",
    ),
]
WRONG_LABELS = [
    (dict(id2label=SIX, num_labels=5), "`num_labels` is 5, but `id2label` names 6"),
    (dict(id2label={1: "a", 2: "b"}), "expected each number from 0 to 1 once"),
    (dict(id2label={0: "a", 2: "b"}), "expected each number from 0 to 1 once"),
    (dict(id2label={"x": "a"}), "expected each number from 0 to 0 once"),
    (dict(id2label={}), "numbers its 0 classes"),
    (dict(id2label={0: None}), "expected the name of each class"),
    (dict(id2label=None, num_labels=0), "`num_labels` is 0"),
    (dict(id2label=None, num_labels=10**9), "`num_labels` is 1000000000"),
    (dict(id2label=None, num_labels="6"), "`num_labels` is '6'"),
    (dict(id2label=None, num_labels=True), "`num_labels` is True"),
    (dict(dtype="float33"), "`dtype` is 'float33'"),
    (dict(dtype="nn"), "`dtype` is 'nn'"),
]
WRONG_BACKBONES = [
    (3, "`backbone_config` is 3"),
    ([], r"`backbone_config` is \[\]"),
    ({}, "model type None, which this version of transformers does not know"),
    ({"model_type": "from-the-future"}, "'from-the-future'"),
    ({"model_type": ["vit"]}, r"\['vit'\]"),
    ({"model_type": "clip_text_model"}, "transformers has no image classifier of that type"),
    ({"model_type": "prompted_sparse", "backbone_config": None}, "'prompted_sparse' again; a backbone is plain"),
    ({"model_type": "vit", "num_labels": 10**9}, "`num_labels` of the backbone is 1000000000"),
    ({"model_type": "vit", "num_hidden_layers": 2**40}, "`num_hidden_layers` of the backbone is"),
    ({"model_type": "vit", "hidden_size": "768"}, "`backbone_config` is no 'vit' configuration"),
    ({"model_type": "vit", "id2label": {"x": "a"}}, "`backbone_config` is no 'vit' configuration"),
    ({"model_type": "vit", "layer_norm_eps": NAN}, "`layer_norm_eps` of the backbone is nan"),
    ({"model_type": "vit", "hidden_act": "x" * 3000}, "`hidden_act` of the backbone has 3000 characters"),
    ({"model_type": "vit", "attn_implementation": "me/kernel"}, "'me/kernel', code of another repository"),
    ({"model_type": "timm_wrapper", "architecture": "hf-hub:me/x"}, "without a source such as `hf-hub:`"),
    ({"model_type": "timm_wrapper", "architecture": "local-dir:/etc"}, "which would read other files"),
    ({"model_type": "timm_wrapper", "architecture": "../x"}, "which would read other files"),
]


def refused(message, make, *arguments, **fields):
    """The call raises a ValueError of one line that matches."""
    with pytest.raises(ValueError, match=message) as caught:
        make(*arguments, **fields)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def from_json(**fields):
    """The same, by way of a file."""
    whole = build().to_dict() | fields
    backbone = whole["backbone_config"]
    whole["backbone_config"] = backbone.to_dict() if hasattr(backbone, "to_dict") else backbone
    return PromptedSparseConfig.from_dict(json.loads(json.dumps(whole)))


def test_every_field_has_a_check_and_wrong_values():
    fields = set(PromptedSparseConfig.__annotations__) - {"backbone_config"}
    assert fields == set(configuration_checks.FIELDS) == set(WRONG)


@pytest.mark.parametrize("make", [build, from_json])
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_fields_are_refused(make, name, value):
    refused(f"`{name}` (is|has|names) ", make, **{name: value})


@pytest.mark.parametrize("make", [build, from_json])
@pytest.mark.parametrize(("fields", "message"), WRONG_TOGETHER)
def test_fields_that_contradict_each_other_are_refused(make, fields, message):
    refused(re.escape(message), make, **fields)


@pytest.mark.parametrize("make", [build, from_json])
@pytest.mark.parametrize(("fields", "message"), WRONG_LABELS)
def test_wrong_labels_and_dtypes_are_refused(make, fields, message):
    refused(re.escape(message), make, **fields)


@pytest.mark.parametrize("make", [build, from_json])
@pytest.mark.parametrize(("backbone", "message"), WRONG_BACKBONES)
def test_wrong_backbones_are_refused(make, backbone, message):
    refused(message, make, backbone_config=backbone)


def test_objects_are_checked_as_dictionaries_are():
    refused("no image classifier of that type", build, backbone_config=CLIPTextConfig())
    refused("is of model type 'prompted_sparse' again", build, backbone_config=build())
    timm = TimmWrapperConfig(architecture="test_vit", model_args={"checkpoint_path": "/etc/passwd"})
    refused("`model_args` of the backbone holds 'checkpoint_path'", build, backbone_config=timm)


@pytest.mark.parametrize(
    "argument",
    ["checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pruned", "model_cfg"],
)
def test_timm_arguments_that_shape_no_model_are_refused(argument):
    backbone = {"model_type": "timm_wrapper", "architecture": "test_vit", "model_args": {argument: "x"}}
    refused(f"`model_args` of the backbone holds '{argument}'", from_json, backbone_config=backbone)


def test_timm_arguments_that_shape_a_model_are_kept():
    shaping = {"img_size", "global_pool", "drop_path_rate", "output_stride", "act_layer", "bn_eps", "in_chans"}
    assert shaping <= timm_arguments()
    assert not [
        name for name in timm_arguments() if re.search("(?<!drop_)path$|cache|pretrained(?!_window)|url|file", name)
    ]


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_built_comes_back_from_a_file(family, tmp_path):
    config = tiny_model(family).config
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_arguments_of_from_pretrained_are_checked(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert PromptedSparseModel.from_pretrained(tmp_path, use_prompt=True).config.use_prompt is True
    refused("`use_prompt` is 'no'", PromptedSparseModel.from_pretrained, tmp_path, use_prompt="no")
    refused("`num_labels` is 4, but", PromptedSparseModel.from_pretrained, tmp_path, num_labels=4)


def test_a_wrapper_in_a_wrapper_is_refused_at_once():
    nested = build().to_dict()
    for _ in range(80):
        nested = {"model_type": "prompted_sparse", "backbone_config": nested}
    refused("'prompted_sparse' again", PromptedSparseConfig.from_dict, nested)


def test_a_deep_or_long_backbone_is_refused():
    deep = []
    for _ in range(50):
        deep = [deep]
    refused("nested deeper", build, backbone_config={"model_type": "vit", "x": deep})
    refused("holds more than", build, backbone_config={"model_type": "vit", "x": [[0] * 1000] * 2000})


@pytest.mark.parametrize("dtype", [None, "bfloat16", torch.float16])
def test_dtypes(dtype):
    assert build(dtype=dtype).dtype == (torch.bfloat16 if dtype == "bfloat16" else dtype)


def test_a_model_that_was_mapped_loads_again(tmp_path):
    for keep, name in ((True, "kept"), (False, "sliced")):
        model = tiny_model("vit", label_mapping="frequency", num_labels=3, keep_source_head=keep)
        model.set_label_mapping([5, 0, 4])
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / name)
        assert loaded.config.mapped_labels == [5, 0, 4]
