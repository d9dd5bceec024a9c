"""Wrong calls in Python: each ends in one sentence of ours, and nothing is trained or written."""

import math
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.models import tiny_backbone, tiny_model
from helpers.pictures import in_memory, write_images
from helpers.training import SMALL, Images
from torch import nn
from transformers import ViTImageProcessor

import vpns_hf
from vpns_hf import (
    PromptedSparseModel,
    VPNsTrainer,
    VPNsTrainingArguments,
    hub,
    load_transfer_dataset,
    masking,
    metrics,
    storage,
)
from vpns_hf.data import ImageTransforms
from vpns_hf.data.loading import load_evaluation_split
from vpns_hf.experiments.arguments import DataArguments, ModelArguments, PruneArguments
from vpns_hf.experiments.compare import ComparisonArguments
from vpns_hf.experiments.transfer_arguments import TransferArguments
from vpns_hf.export import export_onnx, export_plain
from vpns_hf.label_mapping import map_labels
from vpns_hf.scores import score_weights

PACKAGE = Path(vpns_hf.__file__).parent
NAN, INF, HUGE = math.nan, math.inf, 10**30
MODEL = {"model_name_or_path": "x"}
TRAINING = {
    "method": ["vpn", "VPNs", "", None, 3, ["vpns"], "vpns+prompt", "vpns:mask+prompt"],
    "sparsity": [1.0, -0.1, 90, NAN, INF, "0.9", True, [0.9], np.array([0.9])],
    "max_steps": [0, -2, 1.5, "10", True, None, HUGE, NAN],
    "search_max_steps": [0, -5, 2.5, None, "3"],
    "total_max_steps": [0, -3, 1.0, None],
    "search_epochs": [-1, NAN, INF, "3", None, True, HUGE],
    "num_train_epochs": [-0.5, NAN, "many", None, HUGE],
    "head_warm_up_epochs": [-1, None, NAN],
    "mix_unaugmented": ["no", 1, None],
    "teacher": ["", 3, True],
    "teacher_weight": [-0.1, 1.1, NAN, "half", None],
    "teacher_temperature": [0, -1, INF, NAN, "2"],
    "calibration_images_per_class": [0, -1, 1.5, "10", None],
    "consistency_check_steps": [-1, 1.5, None, "no"],
    "score_optim": ["adamm", "", None, 3, "platon"],
    "score_learning_rate": [-1, NAN, INF, "fast", True, [1e-4], "nan", "-1"],
    "score_travel": [0, -1, INF, NAN, "far"],
    "score_start": ["hydro", "", 1],
    "search_prompt_learning_rate": [-1e-4, NAN, INF, "auto", None],
    "score_lr_scheduler_type": ["cosin", "", 3],
    "optim": ["sdg", "", None, 3, ["sgd"]],
    "learning_rate": [-1e-2, NAN, INF, "1e-2", None, True, [0.1]],
    "head_learning_rate": [-1, NAN, "auto", True],
    "prompt_learning_rate": [-1, INF, None, "0.1"],
    "momentum": [-0.1, 1.0, NAN, "0.9", None],
    "mixup_alpha": [-1, NAN, INF, "0.2", None],
    "cutmix_alpha": [-1, NAN, True],
    "prompt_mixing": ["both", None, True, ""],
    "eval_prompt": ["no", None, False, ["both"]],
    "metrics": ["top5_accuracy", ["top6_accuracy"], [1], {"a": 1}, True],
    "lr_scheduler_type": ["cosin", None, 1, ""],
    "weight_decay": [-1, NAN, INF, "1e-4", None],
    "max_grad_norm": [-1, NAN, None, "0"],
    "hub_strategy": ["start", None, 1],
    "per_device_train_batch_size": [0, -8, 8.0, "8", None, True, HUGE],
    "per_device_eval_batch_size": [0, -1, 1.5, None],
    "gradient_accumulation_steps": [0, -1, 1.5, "2", None],
    "seed": [1.5, -1, "7", None, True, 2**32, HUGE],
    "data_seed": [1.5, -1, "7", 2**32],
    "warmup_steps": [-1, NAN, "10", None],
    "adam_beta1": [1.0, -0.1, NAN, "0.9"],
    "adam_beta2": [1.0, -0.1, INF],
    "adam_epsilon": [-1e-8, NAN, "small"],
    "label_smoothing_factor": [-0.1, 1.0, 2, NAN, "0.1"],
    "logging_steps": [0, -1, 1.5, NAN, "10", None],
    "eval_steps": [0, -1, NAN, "10", 1.5],
    "save_steps": [0, -1, NAN, "10", None],
    "save_total_limit": [0, -1, 1.5, "2"],
    "dataloader_num_workers": [-1, 1.5, "2", None, True],
    "dataloader_prefetch_factor": [0, -1, 1.5],
    "eval_accumulation_steps": [0, -1, 1.5],
    "eval_strategy": ["never", None, False, 3],
    "save_strategy": ["never", None, False],
    "logging_strategy": ["never", None],
    "report_to": [3, ["tensorbord"], "tensorbord", True],
    "bf16": ["no", None, 1],
    "use_cpu": ["yes", None, 0],
    "push_to_hub": ["no", None, 1],
    "output_dir": [3, True, ["a"], ""],
    "lr_scheduler_kwargs": [[1], 3, "{"],
    "optim_args": [3, ["a=1"], {"a": 1}],
    "dataloader_pin_memory": ["no", 1, None],
    "load_best_model_at_end": ["no", 1, None],
    "eval_delay": [-1, NAN, "3"],
    "run_name": [3, ["a"]],
    "full_determinism": ["no", 1],
}
ARGUMENTS = [
    (
        ModelArguments,
        {"model_name_or_path": "x"},
        {
            "model_name_or_path": [None, 3, "", ["x"]],
            "model_revision": [None, 1, True],
            "scope": ["rows", None, 1, ["global"]],
            "prompt": ["frame", True, 3, ["pad"]],
            "prompt_size": [1.5, "16", None, True, HUGE],
            "prompt_inner_size": [1.5, 0, -1, "16", HUGE, [16, 16]],
            "label_mapping": ["nearest", 3, True],
            "keep_source_head": ["no", None, 1],
            "new_head": ["no", 1],
            "ignore_modules": ["head", [1], None, {"head": 1}, [""]],
            "image_size": [0, -224, 1.5, "224", HUGE],
            "token": [3, ["a"]],
            "cache_dir": [3, True],
        },
    ),
    (
        DataArguments,
        {"dataset_name": "x"},
        {
            "dataset_name": [None, 3, "", ["x"]],
            "dataset_config_name": [3, True],
            "image_column_name": [3, ["image"]],
            "train_split": [3, ["train"]],
            "validation_fraction": [0, 1, -0.1, 1.5, NAN, "0.1", None],
            "split_seed": [1.5, -1, None, "42", 2**32],
            "shots": [1.5, 0, -1, "16", True, HUGE],
            "fraction": [0, 1.1, -0.1, NAN, "0.1"],
            "corrupt_images": ["ignore", None, True],
            "stream_images": [0, 1.5, -1, "100"],
            "check_duplicates": ["no", 1, None],
            "augmentation": ["autoaugment", None, 3],
            "cache_images": ["no", None],
            "preprocessing_num_workers": [0, -1, 1.5, "2"],
            "augment_prompted": ["no", None],
        },
    ),
    (
        PruneArguments,
        {},
        {
            "references": ["dense", ["dens"], [1], None, {"dense": 1}],
            "license": [3, ["mit"]],
            "dry_run": ["no", 1, None],
        },
    ),
    (
        ComparisonArguments,
        {},
        {
            "methods": ["vpns", ["vpn"], [1], [], None],
            "sparsities": [0.9, [1.0], ["0.9"], [NAN], [], [-0.1], None, [True]],
            "seeds": [7, [1.5], ["7"], [], None, [-1], [True], [2**32], [7, 7]],
            "reference": ["vpn", None, 3],
            "only_report": ["no", None],
            "paper_numbers": [3, ["a"]],
        },
    ),
    (
        TransferArguments,
        {"targets": ["cifar10"]},
        {
            "targets": ["cifar10", [], None, [3], [""]],
            "methods": ["vpns", ["vpn"], [], None],
            "modes": ["full", ["fully"], [], None],
            "sparsities": [0.9, [1.0], [], ["0.9"]],
            "seeds": [7, [1.5], [], [-1]],
            "reference": ["vpn", None],
            "identity_source_head": ["no", None],
            "subnetwork": [3, ["a"]],
        },
    ),
]
BUILDING = {
    "backbone": [None, 3, "", ["google/vit"], nn.Linear(3, 4), "no/such-model", "./missing", "a b c", Path("missing")],
    "sparsity": [1.0, 1, -0.1, NAN, INF, "0.9", True, [0.9]],
    "scope": ["rows", None, 3, ["global"]],
    "prompt": ["frame", True, "", 3],
    "prompt_size": [0, -1, 17, 1.5, "4", None, True, HUGE],
    "prompt_inner_size": [0, -1, 64, 1.5, "16", [16], [16, 16, 3], HUGE],
    "label_mapping": ["nearest", True, 3, ""],
    "new_head": ["no", 1],
    "keep_source_head": ["no", 1, None],
    "num_labels": [0, -1, 1.5, "6", True, HUGE],
    "id2label": [["a", "b"], {1: "a", 2: "b"}, {0: "a", 2: "b"}, {}, "ab", {0: None}, {"x": "a"}, 3],
    "ignore_modules": ["classifier", [1], None, [""]],
    "image_processor": ["x", 3, {"size": 32}],
    "image_size": [0, -32, 32.0, "32", [32], HUGE, [32, 32, 3], 7],
    "image_mean": [0.5, [0.5], [NAN] * 3, "0.5", [0.5] * 4],
    "image_std": [0.5, [0.5], [0] * 3, [-1] * 3, "abc"],
    "sparsty": [0.9],
    "revision": ["main"],
}
LOADING = {
    "name": [3, True, ["a"], "a b"],
    "image_column": ["picture", 3],
    "label_column": ["class", 3, ["label"]],
    "train_split": ["training", 3],
    "validation_split": ["dev", 3],
    "test_split": ["final", 3],
    "validation_fraction": [0, 1, -1, NAN, "0.1", None, 0.001],
    "shots": [1.5, 0, -1, "16", True, HUGE],
    "fraction": [0, 1.5, NAN, "0.5", 0.001],
    "seed": [1.5, -1, "7", None, 2**32],
    "corrupt_images": ["ignore", None],
    "stream_images": [0, 1.5, "10", True],
    "num_proc": [0, -1, 1.5, "2"],
    "cache_dir": [3],
    "token": [3],
    "revision": [3],
}


def wrong_calls():
    """Yield (id, function of the prepared objects and a folder)."""
    for name, values in TRAINING.items():
        for value in values:
            yield (
                f"VPNsTrainingArguments({name}={short(value)})",
                lambda w, name=name, value=value: VPNsTrainingArguments(
                    **{"output_dir": str(w.folder / "out"), "use_cpu": True, "report_to": "none", name: value}
                ),
            )
    for cls, required, fields in ARGUMENTS:
        for name, values in fields.items():
            for value in values:
                yield (
                    f"{cls.__name__}({name}={short(value)})",
                    lambda w, cls=cls, given=required | {name: value}: cls(**given),
                )
    for name, values in BUILDING.items():
        for value in values:
            yield (
                f"from_backbone({name}={short(value)})",
                lambda w, name=name, value=value: w.build(**{name: value}),
            )
    for name, values in LOADING.items():
        for value in values:
            yield (
                f"load_transfer_dataset({name}={short(value)})",
                lambda w, given={name: value}: load_transfer_dataset(w.images, **given),
            )
    yield from OTHERS.items()


def short(value):
    return (repr(value) if not isinstance(value, nn.Module) else type(value).__name__)[:40]


class World:
    """Objects that wrong calls are made with; each is built when it is first asked for."""

    def __init__(self, folder):
        self.folder = folder
        self.images = folder / "images"
        write_images(self.images / "train", 8)
        write_images(self.images / "test", 3)
        (folder / "file.txt").write_text("a file")
        (folder / "empty").mkdir()
        tiny_model().save_pretrained(folder / "search")
        model = tiny_model()
        model.freeze_masks()
        model.save_pretrained(folder / "frozen")
        model = tiny_model("vit", prompt=None, image_size=32)
        model.freeze_masks()
        model.save_pretrained(folder / "plain")
        tiny_backbone("vit").save_pretrained(folder / "backbone")

    @property
    def searching(self):
        return tiny_model()

    @property
    def frozen(self):
        model = tiny_model()
        model.freeze_masks()
        return model

    def build(self, **given):
        backbone = given.pop("backbone", None) if "backbone" in given else tiny_backbone("vit")
        settings = {"prompt_size": 4, "image_size": 32, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        return PromptedSparseModel.from_backbone(backbone, **settings | given)

    def trainer(self, model=None, args=None, data=None, **given):
        if args is None:
            args = VPNsTrainingArguments(output_dir=str(self.folder / "out"), **SMALL)
        data = Images() if data is None else data
        return VPNsTrainer(model=self.searching if model is None else model, args=args, train_dataset=data, **given)


def masks(model, change):
    return {name: change(mask) for name, mask in model.masks().items()}


BATCH = [{"pixel_values": torch.zeros(2, 3, 32, 32), "labels": torch.tensor([0, 1])}]
OTHERS = {
    "train_only('wieghts')": lambda w: w.searching.train_only("wieghts"),
    "train_only(['weights'])": lambda w: w.searching.train_only(["weights"]),
    "train_only(None)": lambda w: w.searching.train_only(None),
    "set_sparsity(1.0)": lambda w: w.searching.set_sparsity(1.0),
    "set_sparsity(1.5)": lambda w: w.searching.set_sparsity(1.5),
    "set_sparsity('0.5')": lambda w: w.searching.set_sparsity("0.5"),
    "set_sparsity(nan)": lambda w: w.searching.set_sparsity(NAN),
    "set_sparsity(True)": lambda w: w.searching.set_sparsity(True),
    "set_sparsity frozen": lambda w: w.frozen.set_sparsity(0.5),
    "update_masks frozen": lambda w: w.frozen.update_masks(),
    "freeze_masks twice": lambda w: w.frozen.freeze_masks(),
    "attach_scores twice": lambda w: w.searching.attach_scores(),
    "detach_scores frozen": lambda w: w.frozen.detach_scores(),
    "zero_masked_weights search": lambda w: w.searching.zero_masked_weights(),
    "set_implicit_gradient('a')": lambda w: w.searching.set_implicit_gradient("a"),
    "set_implicit_gradient(nan)": lambda w: w.searching.set_implicit_gradient(NAN),
    "attach_scores('no')": lambda w: dense().attach_scores("no"),
    "apply_masks({})": lambda w: w.searching.apply_masks({}),
    "apply_masks(None)": lambda w: w.searching.apply_masks(None),
    "apply_masks float": lambda w: w.searching.apply_masks(masks(w.searching, torch.Tensor.float)),
    "apply_masks int": lambda w: w.frozen.apply_masks(masks(w.frozen, torch.Tensor.int)),
    "apply_masks shape": lambda w: w.searching.apply_masks(masks(w.searching, lambda mask: mask[:1])),
    "apply_masks list": lambda w: w.searching.apply_masks(list(w.searching.masks().values())),
    "apply_masks numpy": lambda w: w.searching.apply_masks(masks(w.searching, lambda mask: mask.numpy())),
    "apply_masks None in it": lambda w: w.searching.apply_masks(masks(w.searching, lambda mask: None)),
    "set_label_mapping without": lambda w: w.searching.set_label_mapping([0, 1, 2, 3, 4, 5]),
    "set_label_mapping short": lambda w: mapped().set_label_mapping([0, 1]),
    "set_label_mapping text": lambda w: mapped().set_label_mapping("012"),
    "set_label_mapping float": lambda w: mapped().set_label_mapping([0.5, 1.0, 2.0]),
    "set_label_mapping range": lambda w: mapped().set_label_mapping([0, 1, 6]),
    "set_label_mapping negative": lambda w: mapped().set_label_mapping([0, 1, -1]),
    "set_label_mapping bool": lambda w: mapped().set_label_mapping([True, False, True]),
    "set_label_mapping None": lambda w: mapped().set_label_mapping(None),
    "set_label_mapping words": lambda w: mapped().set_label_mapping(["a", "b", "c"]),
    "set_label_mapping final='no'": lambda w: mapped().set_label_mapping([0, 1, 2], final="no"),
    "set_label_mapping bayesian classes": lambda w: mapped("bayesian").set_label_mapping([0, 1, 2]),
    "set_label_mapping bayesian nan": lambda w: mapped("bayesian").set_label_mapping(torch.full((6, 3), NAN)),
    "set_label_mapping bayesian shape": lambda w: mapped("bayesian").set_label_mapping(torch.zeros(3, 6)),
    "rewind({})": lambda w: w.searching.rewind({}),
    "rewind(None)": lambda w: w.searching.rewind(None),
    "forward use_prompt='no'": lambda w: w.searching(BATCH[0]["pixel_values"], use_prompt="no"),
    "forward use_prompt without": lambda w: without_prompt()(BATCH[0]["pixel_values"], use_prompt=True),
    "load_subnetwork missing": lambda w: w.searching.load_subnetwork(str(w.folder / "missing")),
    "load_subnetwork search": lambda w: w.searching.load_subnetwork(w.folder / "search"),
    "load_subnetwork backbone": lambda w: w.searching.load_subnetwork(w.folder / "backbone"),
    "load_subnetwork None": lambda w: w.searching.load_subnetwork(None),
    "load_subnetwork prompt='no'": lambda w: w.searching.load_subnetwork(w.folder / "frozen", prompt="no"),
    "load_prompt without": lambda w: w.searching.load_prompt(w.folder / "plain"),
    "load_prompt missing": lambda w: w.searching.load_prompt("missing folder"),
    "from_pretrained missing": lambda w: PromptedSparseModel.from_pretrained(w.folder / "missing"),
    "from_pretrained empty": lambda w: PromptedSparseModel.from_pretrained(w.folder / "empty"),
    "from_pretrained file": lambda w: PromptedSparseModel.from_pretrained(w.folder / "file.txt"),
    "from_pretrained None": lambda w: PromptedSparseModel.from_pretrained(None),
    "from_pretrained 3": lambda w: PromptedSparseModel.from_pretrained(3),
    "from_pretrained ''": lambda w: PromptedSparseModel.from_pretrained(""),
    "from_pretrained backbone": lambda w: PromptedSparseModel.from_pretrained(w.folder / "backbone"),
    "from_pretrained unknown": lambda w: PromptedSparseModel.from_pretrained(w.folder / "frozen", sparsty=0.5),
    "from_pretrained dtype": lambda w: PromptedSparseModel.from_pretrained(w.folder / "frozen", dtype="float33"),
    "save_pretrained packed search": lambda w: w.searching.save_pretrained(w.folder / "new", packed=True),
    "save_pretrained packed='no'": lambda w: w.frozen.save_pretrained(w.folder / "new", packed="no"),
    "save_pretrained file": lambda w: w.frozen.save_pretrained(w.folder / "file.txt"),
    "save_pretrained None": lambda w: w.frozen.save_pretrained(None),
    "save_pretrained ''": lambda w: w.frozen.save_pretrained(""),
    "save_pretrained push": lambda w: w.frozen.save_pretrained(w.folder / "new", push_to_hub=True),
    "save_pretrained shard": lambda w: w.frozen.save_pretrained(w.folder / "new", max_shard_size="big"),
    "save_pretrained shard 0": lambda w: w.frozen.save_pretrained(w.folder / "new", max_shard_size=0),
    "push_to_hub ''": lambda w: w.frozen.push_to_hub(""),
    "push_to_hub None": lambda w: w.frozen.push_to_hub(None),
    "push_to_hub 'a b'": lambda w: w.frozen.push_to_hub("a b"),
    "push_folder missing": lambda w: hub.push_folder(w.folder / "missing", "me/x"),
    "push_folder empty": lambda w: hub.push_folder(w.folder / "empty", "me/x"),
    "push_folder file": lambda w: hub.push_folder(w.folder / "file.txt", "me/x"),
    "push_folder repo": lambda w: hub.push_folder(w.folder / "frozen", "a/b/c"),
    "export_onnx opset 3": lambda w: export_onnx(w.frozen, w.folder / "a.onnx", opset=3),
    "export_onnx opset 99": lambda w: export_onnx(w.frozen, w.folder / "a.onnx", opset=99),
    "export_onnx opset '18'": lambda w: export_onnx(w.frozen, w.folder / "a.onnx", opset="18"),
    "export_onnx opset 18.5": lambda w: export_onnx(w.frozen, w.folder / "a.onnx", opset=18.5),
    "export_onnx folder": lambda w: export_onnx(w.frozen, w.folder / "empty"),
    "export_onnx use_prompt='no'": lambda w: export_onnx(w.frozen, w.folder / "a.onnx", use_prompt="no"),
    "export_onnx prompt": lambda w: export_onnx(without_prompt(), w.folder / "a.onnx", use_prompt=True),
    "export_onnx backbone": lambda w: export_onnx(tiny_backbone("vit"), w.folder / "a.onnx"),
    "export_plain file": lambda w: export_plain(w.frozen, w.folder / "file.txt"),
    "export_plain use_prompt='no'": lambda w: export_plain(w.frozen, w.folder / "new", use_prompt="no"),
    "export_plain backbone": lambda w: export_plain(tiny_backbone("vit"), w.folder / "new"),
    "export_plain processor": lambda w: export_plain(w.frozen, w.folder / "new", "processor"),
    "for_inference search": lambda w: w.searching.for_inference(BATCH[0]["pixel_values"]),
    "for_inference None": lambda w: w.frozen.for_inference(None),
    "for_inference shape": lambda w: w.frozen.for_inference(torch.zeros(3, 32, 32)),
    "for_inference size": lambda w: w.frozen.for_inference(torch.zeros(1, 3, 20, 20)),
    "for_inference kernels": lambda w: w.frozen.for_inference(BATCH[0]["pixel_values"], kernels=["fast"]),
    "for_inference kernels text": lambda w: w.frozen.for_inference(BATCH[0]["pixel_values"], kernels="csr"),
    "select_masks none": lambda w: masking.select_masks({}, 0.5),
    "select_masks 1.5": lambda w: masking.select_masks({"a": torch.rand(4)}, 1.5),
    "select_masks nan": lambda w: masking.select_masks({"a": torch.rand(4)}, NAN),
    "select_masks text": lambda w: masking.select_masks({"a": torch.rand(4)}, "0.5"),
    "select_masks True": lambda w: masking.select_masks({"a": torch.rand(4)}, True),
    "select_masks scope": lambda w: masking.select_masks({"a": torch.rand(4)}, 0.5, "rows"),
    "select_masks scope list": lambda w: masking.select_masks({"a": torch.rand(4)}, 0.5, ["layer"]),
    "select_masks nan scores": lambda w: masking.select_masks({"a": torch.full((4,), NAN)}, 0.5),
    "select_masks list": lambda w: masking.select_masks([torch.rand(4)], 0.5),
    "select_masks numpy": lambda w: masking.select_masks({"a": np.zeros(4)}, 0.5),
    "select_masks complex": lambda w: masking.select_masks({"a": torch.rand(4).to(torch.complex64)}, 0.5),
    "map_labels method": lambda w: map_labels(torch.ones(6, 3), "frequently"),
    "map_labels None": lambda w: map_labels(torch.ones(6, 3), None),
    "map_labels dims": lambda w: map_labels(torch.ones(6)),
    "map_labels nan": lambda w: map_labels(torch.full((6, 3), NAN)),
    "map_labels negative": lambda w: map_labels(-torch.ones(6, 3)),
    "map_labels few": lambda w: map_labels(torch.ones(3, 6)),
    "map_labels list": lambda w: map_labels([[1, 2], [3, 4]]),
    "map_labels complex": lambda w: map_labels(torch.ones(6, 3, dtype=torch.complex64)),
    "score_weights name": lambda w: score_weights("snap", w.searching, BATCH),
    "score_weights None": lambda w: score_weights(None, w.searching, BATCH),
    "score_weights backbone": lambda w: score_weights("magnitude", tiny_backbone("vit"), BATCH),
    "score_weights no batches": lambda w: score_weights("snip", w.searching, []),
    "score_weights a batch": lambda w: score_weights("snip", w.searching, BATCH[0]),
    "score_weights None batches": lambda w: score_weights("snip", w.searching, None),
    "score_weights no labels": lambda w: score_weights(
        "snip", w.searching, [{"pixel_values": torch.zeros(2, 3, 32, 32)}]
    ),
    "score_weights no pixels": lambda w: score_weights("snip", w.searching, [{"labels": torch.zeros(2).long()}]),
    "score_weights masks": lambda w: score_weights("snip", w.searching, BATCH, masks={}),
    "score_weights float masks": lambda w: score_weights(
        "snip", w.searching, BATCH, masks=masks(w.searching, torch.Tensor.float)
    ),
    "score_weights option": lambda w: score_weights("snip", w.searching, BATCH, temperature=3),
    "score_weights seed": lambda w: score_weights("random", w.searching, BATCH, seed="7"),
    "score_weights temperature": lambda w: score_weights("grasp", w.searching, BATCH, temperature=0),
    "save_packed zeros": lambda w: storage.save_packed(
        w.folder / "a.safetensors", {"a": torch.ones(4)}, {"a": torch.zeros(4, dtype=torch.bool)}, {}
    ),
    "save_packed float mask": lambda w: storage.save_packed(
        w.folder / "a.safetensors", {"a": torch.ones(4)}, {"a": torch.ones(4)}, {}
    ),
    "save_packed unknown": lambda w: storage.save_packed(
        w.folder / "a.safetensors", {"a": torch.ones(4)}, {"b": torch.ones(4, dtype=torch.bool)}, {}
    ),
    "save_packed numpy": lambda w: storage.save_packed(w.folder / "a.safetensors", {"a": np.ones(4)}, {}, {}),
    "save_packed metadata": lambda w: storage.save_packed(
        w.folder / "a.safetensors", {"a": torch.ones(4)}, {}, {"a": 3}
    ),
    "save_packed name": lambda w: storage.save_packed(w.folder / "a.safetensors", {3: torch.ones(4)}, {}, {}),
    "save_packed folder": lambda w: storage.save_packed(w.folder / "empty", {"a": torch.ones(4)}, {}, {}),
    "load_packed missing": lambda w: storage.load_packed(w.folder / "missing.safetensors"),
    "load_packed folder": lambda w: storage.load_packed(w.folder / "empty"),
    "load_packed text": lambda w: storage.load_packed(w.folder / "file.txt"),
    "load_transfer_dataset missing": lambda w: load_transfer_dataset(w.folder / "missing"),
    "load_transfer_dataset file": lambda w: load_transfer_dataset(w.folder / "file.txt"),
    "load_transfer_dataset empty": lambda w: load_transfer_dataset(w.folder / "empty"),
    "load_transfer_dataset None": lambda w: load_transfer_dataset(None),
    "load_transfer_dataset ''": lambda w: load_transfer_dataset(""),
    "load_transfer_dataset 3": lambda w: load_transfer_dataset(3),
    "load_transfer_dataset list": lambda w: load_transfer_dataset([1, 2]),
    "load_transfer_dataset both": lambda w: load_transfer_dataset(w.images, shots=2, fraction=0.5),
    "load_transfer_dataset twice": lambda w: load_transfer_dataset(w.images, train_split="train", test_split="train"),
    "load_transfer_dataset columns": lambda w: load_transfer_dataset(Dataset.from_dict({"a": [1, 2]})),
    "load_transfer_dataset one": lambda w: load_transfer_dataset(in_memory(["a"])),
    "load_evaluation_split split": lambda w: load_evaluation_split(w.images, "tset"),
    "load_evaluation_split missing": lambda w: load_evaluation_split(w.folder / "missing"),
    "load_evaluation_split test_split": lambda w: load_evaluation_split(w.images, test_split="final"),
    "ImageTransforms augmentation": lambda w: ImageTransforms(processor(), (32, 32), (0.5,) * 3, (0.5,) * 3, "auto"),
    "ImageTransforms size": lambda w: ImageTransforms(processor(), (16, 16), (0.5,) * 3, (0.5,) * 3),
    "ImageTransforms mean": lambda w: ImageTransforms(processor(), (32, 32), (0.1,) * 3, (0.5,) * 3),
    "ImageTransforms None": lambda w: ImageTransforms(None, (32, 32), (0.5,) * 3, (0.5,) * 3),
    "load_metric": lambda w: metrics.load_metric("f1"),
    "get_metric None": lambda w: metrics.get_metric(None),
    "VPNsTrainer backbone": lambda w: w.trainer(tiny_backbone("vit")),
    "VPNsTrainer name": lambda w: w.trainer("google/vit"),
    "VPNsTrainer args": lambda w: w.trainer(args={"output_dir": "x"}),
    "VPNsTrainer no data": lambda w: VPNsTrainer(
        w.searching, VPNsTrainingArguments(output_dir=str(w.folder / "out"), **SMALL)
    ).train(),
    "VPNsTrainer list": lambda w: w.trainer(data=[]).train(),
    "VPNsTrainer frozen": lambda w: w.trainer(w.frozen).train(),
    "VPNsTrainer pruned": lambda w: w.trainer(args=arguments(w, method="tune")),
    "VPNsTrainer prompt": lambda w: w.trainer(without_prompt()),
    "VPNsTrainer optimizers": lambda w: w.trainer(optimizers=(torch.optim.SGD([torch.zeros(1)], 0.1), None)),
    "VPNsTrainer resume": lambda w: w.trainer().train(resume_from_checkpoint="missing"),
    "VPNsTrainer resume 3": lambda w: w.trainer().train(resume_from_checkpoint=3),
    "VPNsTrainer unknown": lambda w: w.trainer(sparsity=0.9),
    "VPNsTrainer callbacks": lambda w: w.trainer(callbacks=3),
    "VPNsTrainer load_stage": lambda w: w.trainer().load_stage("search"),
    "VPNsTrainer budget": lambda w: w.trainer(args=arguments(w, total_max_steps=1)),
    "VPNsTrainer fp16": lambda w: w.trainer(args=arguments(w, fp16=True)),
}


def arguments(world, **given):
    return VPNsTrainingArguments(output_dir=str(world.folder / "out"), **SMALL | given)


def dense():
    model = tiny_model()
    model.detach_scores()
    return model


def mapped(mapping="frequency"):
    return tiny_model("vit", label_mapping=mapping, num_labels=3)


def without_prompt():
    model = tiny_model("vit", prompt=None)
    model.freeze_masks()
    return model


def processor():
    return ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


CALLS = dict(wrong_calls())


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def _untrained(monkeypatch):
    def train_stage(*args, **kwargs):
        raise AssertionError("a wrong call came to training")

    monkeypatch.setattr(VPNsTrainer, "_train_stage", train_stage)


def test_there_are_many():
    assert len(CALLS) > 500


@pytest.mark.usefixtures("_untrained")
@pytest.mark.parametrize("name", CALLS)
def test_wrong_calls_are_refused_in_one_sentence(name, world, monkeypatch):
    monkeypatch.chdir(world.folder)
    before = files(world.folder)
    with pytest.raises((ValueError, OSError, TypeError)) as caught:
        CALLS[name](world)
    error = caught.value
    assert "\n" not in str(error)
    assert 10 < len(str(error)) < 600
    # A TypeError is that of Python's own binding of arguments; others mean that nobody has looked at the value.
    is_binding = "unexpected keyword argument" in str(error)
    ours = traceback.extract_tb(error.__traceback__)[-1].filename.startswith(str(PACKAGE))
    assert isinstance(error, ValueError | OSError) or is_binding or ours
    assert files(world.folder) == before
