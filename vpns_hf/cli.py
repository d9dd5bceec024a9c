"""The `vpns-hf` command: look into a subnetwork, export, publish and evaluate it."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import snapshot_download
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError
from transformers import AutoImageProcessor, BaseImageProcessor, Trainer, TrainingArguments
from transformers.utils import IMAGE_PROCESSOR_NAME, logging

from .batches import collate_images
from .data import load_transfer_dataset
from .export import export_onnx, export_plain
from .hub import PUBLISHED_FILES, clear_errors, push_folder
from .inspection import StoredSubnetwork, inspect_folder
from .metrics import compute_metrics
from .modeling import PromptedSparseModel
from .report import percent, terminal_table
from .transforms import ImageTransforms, matching_image_processor
from .version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows `vpns-hf`; None: `sys.argv[1:]`.

    Returns:
        The exit code: 0, or 1 where the work failed, with the reason in one sentence on stderr.

    Raises:
        SystemExit: 2 for wrong usage, 0 for `--help` and `--version`.
    """
    parsed = _parser().parse_args(arguments)
    logging.disable_progress_bar()  # those of loading weights; evaluation keeps its own
    try:
        parsed.run(parsed)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        print(f"vpns-hf {parsed.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


# Subcommands ---------------------------------------------------------------------------------------------------------


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


# What they share -----------------------------------------------------------------------------------------------------


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
    return AutoImageProcessor.from_pretrained(folder) if (folder / IMAGE_PROCESSOR_NAME).is_file() else None


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
    """Without the control characters by which a file of others could steer the terminal."""
    return [tuple("".join(c if c.isprintable() else "?" for c in cell) for cell in row) for row in rows]


# Arguments -----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vpns-hf",
        description="Look into, export, publish and evaluate models that vpns_hf has pruned.",
        epilog="Exit codes: 0 done, 1 the work failed, 2 wrong usage. `vpns-hf COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"vpns-hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = _add(commands, inspect, "vpns-hf inspect me/vit-cifar100-vpns-90")
    _add_model(command)
    command.add_argument("--json", action="store_true", help="print a JSON object instead of tables")

    command = _add(
        commands,
        export,
        "vpns-hf export me/vit-cifar100-vpns-90 plain",
        "vpns-hf export me/vit-cifar100-vpns-90 model.onnx --format onnx",
    )
    _add_model(command)
    command.add_argument("out", metavar="OUT", help="folder to make, or the .onnx file")
    command.add_argument("--format", choices=("transformers", "timm", "onnx"), default="transformers")
    command.add_argument("--opset", type=int, help="version of the ONNX operators (default: torch's choice)")
    prompt = command.add_mutually_exclusive_group()
    prompt.add_argument(
        "--with_prompt", dest="use_prompt", action="store_const", const=True, help="logits are those with the prompt"
    )
    prompt.add_argument(
        "--without_prompt", dest="use_prompt", action="store_const", const=False, help="the prompt is left out"
    )

    command = _add(commands, push, "vpns-hf push vpns-demo me/vit-cifar100-vpns-90")
    command.add_argument("folder", metavar="DIR", help="folder that a run or an export left")
    command.add_argument("repo_id", metavar="REPO_ID", help="repository on the Hub, user/name; made if needed")
    command.add_argument("--private", action="store_true", help="make it a private one")
    command.add_argument("--commit_message", default="Upload subnetwork")
    command.add_argument("--revision", help="branch to commit to (default: main)")
    command.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    command.add_argument("--token", help="Hub token (default: the one of `hf auth login`)")

    command = _add(
        commands,
        evaluate,
        "vpns-hf evaluate me/vit-cifar100-vpns-90 --dataset_name cifar100",
        "vpns-hf evaluate vpns-demo --dataset_name ./my_images --split validation",
    )
    _add_model(command)
    command.add_argument(
        "--dataset_name", required=True, help="a task such as cifar100, an id on the Hub, or a local folder"
    )
    command.add_argument("--dataset_config_name", help="configuration of the data set, where it has several")
    command.add_argument("--dataset_revision", help="commit, tag or branch of the data set")
    command.add_argument("--image_column_name", help="column of the images (default: found)")
    command.add_argument("--label_column_name", help="column of the classes (default: found)")
    command.add_argument("--test_split", help="what the data set calls its test split (default: test)")
    command.add_argument("--split", choices=("train", "validation", "test"), default="test")
    command.add_argument("--batch_size", type=_positive, default=64, help="images a device takes at a time")
    command.add_argument("--json", action="store_true", help="print a JSON object instead of a table")
    return parser


def _add(commands: Any, run: Callable[[argparse.Namespace], None], *examples: str) -> argparse.ArgumentParser:
    """A subcommand whose help is the docstring of the function that runs it."""
    summary, _, details = (run.__doc__ or "").partition("\n\n")
    text = "\n".join(line.removeprefix("    ") for line in f"{summary}\n\n{details}".splitlines())
    command = commands.add_parser(
        run.__name__,
        help=summary[0].lower() + summary[1:].rstrip("."),
        description=text.strip(),
        epilog="\n  ".join(["Examples:" if len(examples) > 1 else "Example:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="REPO_OR_DIR", help="id on the Hub, or local folder")
    command.add_argument("--revision", help="branch, tag or commit on the Hub")
    command.add_argument("--token", help="Hub token (default: the one of `hf auth login`)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
