"""Run the subcommands of `vpns-hf` on a model or subnetwork."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import snapshot_download
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import BaseImageProcessor, Trainer, TrainingArguments

from ..data.batches import collate_images
from ..data.loading import load_transfer_dataset
from ..data.transforms import ImageTransforms, matching_image_processor
from ..export.onnx import export_onnx
from ..export.plain import export_plain
from ..hub import PUBLISHED_FILES, clear_errors, push_folder
from ..metrics import compute_metrics
from ..model.loading import load_image_processor
from ..model.modeling import PromptedSparseModel
from ..report.tables import percent, terminal_table
from ..saved_files import printable
from .inspection import StoredSubnetwork, inspect_folder


def inspect(args: argparse.Namespace) -> None:
    """Show what the files of a subnetwork say of it.

    Reads the configuration, the headers of the weight files, the model card and recipe.yaml. The model is not built
    and its weights are not decoded, so this is quick, and safe with files that you do not trust.
    """
    found = inspect_folder(_folder(args))
    if args.json:
        print(found.to_json())
        return
    console = Console()
    layers = [
        (layer.name, f"{layer.kept:,}", f"{layer.total:,}", percent(layer.sparsity), f"{layer.bytes:,}", layer.coding)
        for layer in found.layers
    ]
    if layers:
        columns = ("weight", "kept", "total", "sparsity", "bytes", "mask")
        console.print(terminal_table(columns, _printable(layers), None))
    facts = Table.grid("name", "value", padding=(0, 2))
    for name, value in _printable([(name, _in_words(value)) for name, value in _facts(found).items()]):
        facts.add_row(escape(name), escape(value))
    console.print(facts)


def export(args: argparse.Namespace) -> None:
    """Write a model that works without vpns_hf.

    With --format transformers or timm, OUT is a new folder with the plain model, the zeros written in, and its image
    processor. With --format onnx, OUT is the file; labels and normalisation are in its metadata.

    A prompt is built into an ONNX file. A plain model can hold it only if it is a ViT and the prompt does not overlap
    the image; where that is not so, export says it and stops, unless --without_prompt leaves the prompt out. Logits
    are compared with those of the model before anything is written.
    """
    folder = _folder(args)
    model = PromptedSparseModel.from_pretrained(folder)
    if args.format == "onnx":
        export_onnx(model, args.out, args.use_prompt, args.opset)
    else:
        if args.format == "timm" and model.config.backbone_config.model_type != "timm_wrapper":
            raise ValueError(
                f"The backbone is a {type(model.backbone).__name__} of transformers, which timm cannot load; use "
                "`--format transformers`."
            )
        export_plain(model, args.out, _image_processor(folder), args.use_prompt)
    print(f"Written to {args.out}.")


def push(args: argparse.Namespace) -> None:
    """Publish a folder that a run or an export left, in one commit.

    Uploaded are the files that a shared subnetwork consists of, and no others: the model card, the configuration,
    packed weights, image processor, recipe, sparsity report and figures. Checkpoints, optimizer states and pickles
    stay where they are. Sign in first with `hf auth login`.
    """
    info = push_folder(
        args.folder,
        args.repo_id,
        commit_message=args.commit_message,
        private=args.private or None,
        token=args.token,
        revision=args.revision,
        create_pr=args.create_pr,
    )
    print(info.pr_url if args.create_pr else info.commit_url)


def evaluate(args: argparse.Namespace) -> None:
    """Measure the accuracy of a subnetwork, without and with its prompt.

    Uses the image processor that was saved with the model, and a GPU if there is one; on several, start it with
    `accelerate launch -m vpns_hf.cli evaluate ...`. Splits that the data set does not have are carved from its
    training split, the same images every time.
    """
    folder = _folder(args)
    model = PromptedSparseModel.from_pretrained(folder)
    processor = matching_image_processor(_image_processor(folder), *model.config.geometry)
    splits = load_transfer_dataset(
        args.dataset_name,
        name=args.dataset_config_name,
        revision=args.dataset_revision,
        image_column=args.image_column_name,
        label_column=args.label_column_name,
        test_split=args.test_split,
        token=args.token,
    )
    images = _with_labels_of(model, splits[args.split])
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                scratch,
                per_device_eval_batch_size=args.batch_size,
                remove_unused_columns=False,
                dataloader_pin_memory=torch.cuda.is_available(),
                disable_tqdm=not sys.stderr.isatty(),
                report_to="none",
            ),
            data_collator=collate_images,
            compute_metrics=compute_metrics,
        )
        accuracies: dict[str, float | None] = {"accuracy": None, "accuracy_prompted": None}
        for name, use_prompt in (("accuracy", False), ("accuracy_prompted", True)):
            if use_prompt and model.prompt is None:
                continue
            model.config.use_prompt = use_prompt
            dataset = images.with_transform(ImageTransforms(processor, *model.config.geometry).eval)
            accuracies[name] = trainer.predict(dataset).metrics["test_accuracy"]
    if not trainer.is_world_process_zero():
        return
    facts = {"dataset": str(args.dataset_name), "split": args.split, "images": len(images), **accuracies}
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    row = (
        f"{facts['dataset']}, {args.split}",
        f"{len(images):,}",
        percent(accuracies["accuracy"]),
        percent(accuracies["accuracy_prompted"]),
    )
    Console().print(terminal_table(("data", "images", "accuracy", "accuracy with prompt"), _printable([row]), None))


def _folder(args: argparse.Namespace) -> Path:
    """The local folder, or the downloaded files of the repository."""
    if Path(args.model).is_dir():
        return Path(args.model)
    with clear_errors(f"Could not read {args.model}", args.revision):
        return Path(
            snapshot_download(
                args.model, revision=args.revision, token=args.token, allow_patterns=list(PUBLISHED_FILES)
            )
        )


def _image_processor(folder: Path) -> BaseImageProcessor | None:
    return load_image_processor(str(folder), {})


def _with_labels_of(model: PromptedSparseModel, images: Dataset) -> Dataset:
    """The images with classes numbered as the model numbers them, where both name the same classes."""
    names, own = images.features["label"].names, list(model.config.id2label.values())
    if len(names) != len(own):
        raise ValueError(
            f"The model tells {len(own)} classes apart and the data set has {len(names)}; name the data set that the "
            "model was pruned for."
        )
    if set(names) == set(own) and names != own:
        return images.align_labels_with_mapping({name: index for index, name in enumerate(own)}, "label")
    if set(names) != set(own) and own != [f"LABEL_{index}" for index in range(len(own))]:
        print(
            f"vpns-hf evaluate: the model's classes ({own[0]}, ...) have other names than those of the data set "
            f"({names[0]}, ...); they are matched by number.",
            file=sys.stderr,
        )
    return images


def _facts(found: StoredSubnetwork) -> dict[str, Any]:
    """What is shown below the table of weights."""
    return {
        "backbone": found.backbone,
        "state": found.state,
        "classes": found.num_labels,
        "label mapping": found.label_mapping,
        "sparsity": f"{percent(found.sparsity)} ({found.kept:,} of {found.total:,} weights kept)",
        "prompt": found.prompt and {name: value for name, value in found.prompt.items() if value is not None},
        **{name: f"{size:,} bytes" for name, size in found.files.items()},
        **found.provenance,
    }


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {each}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)


def _printable(rows: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Cut the cells to a line, without the characters by which a file of others could steer the terminal."""
    return [tuple(printable(cell) for cell in row) for row in rows]
