"""Run the subcommands of `vpns-hf` on a model or subnetwork."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download

from ..hub import PUBLISHED_FILES, clear_errors, push_folder
from ..model.configuration import PromptedSparseConfig
from ..model.modeling import PromptedSparseModel
from .inspection import inspect_folder

# Trainer, data sets, exports and tables load in the command that needs them, so that `--help` is quick.
if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BaseImageProcessor

    from ..latency.benchmark import LabelledImages
    from ..latency.measured import LatencyReport

CALIBRATION_IMAGES = 64


def inspect(args: argparse.Namespace) -> None:
    """Show what the files of a subnetwork say of it.

    Reads the configuration, the headers of the weight files, the model card and recipe.yaml. The model is not built
    and its weights are not decoded, so this is quick, and safe with files that you do not trust.
    """
    found = inspect_folder(_folder(args))
    if args.json:
        print(found.to_json())
        return
    from .display import show_subnetwork

    show_subnetwork(found)


def export(args: argparse.Namespace) -> None:
    """Write a model that works without vpns_hf.

    With --format transformers or timm, OUT is a new folder with the plain model, the zeros written in, and its image
    processor. With --format onnx, OUT is the file; labels and normalisation are in its metadata.

    A prompt is built into an ONNX file. A plain model can hold it only if it is a ViT and the prompt does not overlap
    the image; where that is not so, export says it and stops, unless --without_prompt leaves the prompt out. Logits
    are compared with those of the model before anything is written.
    """
    from ..export import export_onnx, export_plain

    if args.opset is not None and args.format != "onnx":
        raise ValueError("`--opset` is for `--format onnx`; leave it out.")
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
        export_plain(model, args.out, model.image_processor, args.use_prompt)
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
    `accelerate launch -m vpns_hf.cli evaluate ...`. A data set without splits is used whole; of one with some splits,
    the missing ones are carved from the training split, the same images every time.
    """
    folder = _folder(args)
    model = PromptedSparseModel.from_pretrained(folder)
    images = _evaluation_images(args, model.config, args.split)
    accuracies = _accuracies(model, model.image_processor, images, args.batch_size)
    if accuracies is None:
        return
    if args.json:
        facts = {"dataset": str(args.dataset_name), "split": args.split, "images": len(images), **accuracies}
        print(json.dumps(facts, indent=2))
        return
    from .display import show_accuracies

    show_accuracies(f"{args.dataset_name}, {args.split}", len(images), accuracies.values())


def benchmark(args: argparse.Namespace) -> None:
    """Measure how fast a subnetwork is on this machine's CPU, in several runtimes.

    Runtimes are processes of their own that take turns: torch with dense kernels, which take the same time for dense
    and for pruned weights, sparse (`model.for_inference`), ONNX Runtime in float32 and int8, and OpenVINO. Those that
    are not installed are named and left out; `pip install "vpns-hf[benchmark]"` installs all. Close other programs
    first.

    With a data set the accuracy is measured in every runtime, and int8 is calibrated on training images. With --save
    the result is written beside the model as latency.json and figures/latency.png and into its model card, which a
    push publishes.
    """
    if args.save and not Path(args.model).is_dir():
        raise ValueError(
            f"`--save` writes beside the model, and {args.model} is no local folder; download it first, with "
            f"`hf download {args.model} --local-dir DIR`."
        )
    from ..latency.benchmark import benchmark as measure
    from ..report.latency_saving import save_latency

    folder = _folder(args)
    report = measure(folder, args.runtimes, args.batch, args.threads, args.rounds, _labelled_images(args, folder))
    if args.dataset_name is None:
        report = _with_known_accuracy(report, folder)
    if args.save:
        save_latency(report, folder)
    if args.json:
        print(report.to_json(), end="")
        return
    from .display import show_latency

    show_latency(report)


def _labelled_images(args: argparse.Namespace, folder: Path) -> LabelledImages | None:
    """Load the images to measure accuracy on, and those to calibrate int8 with; None without a data set."""
    if args.dataset_name is None:
        return None
    from torch.utils.data import DataLoader

    from ..data import ImageTransforms, collate_images, matching_image_processor
    from ..latency.benchmark import LabelledImages

    config = PromptedSparseConfig.from_pretrained(folder)
    processor = matching_image_processor(_image_processor(folder), *config.geometry)
    transforms = ImageTransforms(processor, *config.geometry)

    def batches(images: Dataset) -> DataLoader[Any]:
        return DataLoader(images.with_transform(transforms.eval), batch_size=64, collate_fn=collate_images)

    images = _evaluation_images(args, config, args.split)
    others = _evaluation_images(args, config, "validation" if args.split == "train" else "train")
    chosen = others.shuffle(seed=0).select(range(min(CALIBRATION_IMAGES, len(others))))
    name = f"{args.dataset_name}, {args.split} split, {len(images):,} images"
    return LabelledImages(name, batches(images), batches(chosen))


def _with_known_accuracy(report: LatencyReport, folder: Path) -> LatencyReport:
    """Add the accuracy that the model card states, and with the facts of the card that of the dense model."""
    from ..report.latency_saving import dense_accuracy

    results = inspect_folder(folder).provenance.get("results", {})
    for data, accuracy in results.items():
        if isinstance(accuracy, float) and 0 <= accuracy <= 1:
            return report.with_accuracy(accuracy, f"{data}, as the model card says", dense_accuracy(folder))
    return report


def _evaluation_images(args: argparse.Namespace, config: PromptedSparseConfig, split: str) -> Dataset:
    """Load a split of the data set that the arguments name, with classes numbered as the model numbers them."""
    from ..data.loading import load_evaluation_split

    images = load_evaluation_split(
        args.dataset_name,
        split,
        name=args.dataset_config_name,
        revision=args.dataset_revision,
        image_column=args.image_column_name,
        label_column=args.label_column_name,
        train_split=args.train_split,
        validation_split=args.validation_split,
        test_split=args.test_split,
        validation_fraction=args.validation_fraction,
        seed=args.split_seed,
        token=args.token,
    )
    return _with_labels_of(config, images)


def _accuracies(
    model: PromptedSparseModel, processor: BaseImageProcessor | None, images: Dataset, batch_size: int
) -> dict[str, float | None] | None:
    """Measure the accuracy without and with the prompt; None on all processes but the main one."""
    import torch
    from transformers import Trainer, TrainingArguments

    from ..data import ImageTransforms, collate_images, matching_image_processor
    from ..metrics import compute_metrics

    processor = matching_image_processor(processor, *model.config.geometry)
    transforms = ImageTransforms(processor, *model.config.geometry)
    accuracies: dict[str, float | None] = {"accuracy": None, "accuracy_prompted": None}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                scratch,
                per_device_eval_batch_size=batch_size,
                remove_unused_columns=False,
                dataloader_pin_memory=torch.cuda.is_available(),
                disable_tqdm=not sys.stderr.isatty(),
                report_to="none",
            ),
            data_collator=collate_images,
            compute_metrics=compute_metrics,
        )
        for name, use_prompt in (("accuracy", False), ("accuracy_prompted", True)):
            if use_prompt and model.prompt is None:
                continue
            model.config.use_prompt = use_prompt
            accuracies[name] = trainer.predict(images.with_transform(transforms.eval)).metrics["test_accuracy"]
    return accuracies if trainer.is_world_process_zero() else None


def _folder(args: argparse.Namespace) -> Path:
    """Return the local folder, or download the files of the repository."""
    if Path(args.model).is_dir():
        return Path(args.model)
    with clear_errors(f"Could not read {args.model}", args.revision):
        return Path(
            snapshot_download(
                args.model, revision=args.revision, token=args.token, allow_patterns=list(PUBLISHED_FILES)
            )
        )


def _image_processor(folder: Path) -> BaseImageProcessor | None:
    from ..model.loading import load_image_processor

    return load_image_processor(str(folder), {})


def _with_labels_of(config: PromptedSparseConfig, images: Dataset) -> Dataset:
    """Return the images with classes numbered as the model numbers them, where both name the same classes."""
    from ..data.columns import align_labels

    names, own = images.features["label"].names, list(config.id2label.values())
    if set(names) <= set(own):
        return align_labels(images, own)
    if len(names) != len(own):
        raise ValueError(
            f"The model tells {len(own)} classes apart and the data set has {len(names)}; name the data set that the "
            "model was pruned for."
        )
    if own != [f"LABEL_{index}" for index in range(len(own))]:
        print(
            f"vpns-hf: the model's classes ({own[0]}, ...) have other names than those of the data set "
            f"({names[0]}, ...); they are matched by number.",
            file=sys.stderr,
        )
    return images
