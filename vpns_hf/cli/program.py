"""The `vpns-hf` command: prune, compare and transfer; look into, evaluate, export and publish what was pruned."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

from transformers.utils import logging

from ..latency.runtimes import RUNTIMES
from ..values import BETWEEN_0_AND_1, SEED, Check, count
from ..version import __version__
from .commands import benchmark, evaluate, export, inspect, push
from .errors import exit_in_one_sentence

# Programs with the arguments of a recipe, each `main` of a module of `vpns_hf.experiments`, by their summary.
EXPERIMENTS = {
    "prune": "prune a backbone for a task, with references, figures and a model card",
    "compare": "compare pruning methods on one backbone and data set",
    "transfer": "find subnetworks on one task and tune them on others",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the command line after `vpns-hf`; None: `sys.argv[1:]`.

    Returns:
        The exit code 0.

    Raises:
        SystemExit: 2 for wrong usage and expected errors, after one sentence on stderr; 130 for Ctrl-C; 0 for
            `--help` and `--version`.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in EXPERIMENTS:
        name, *flags = arguments
        with exit_in_one_sentence(f"vpns-hf {name}"):
            import_module(f"vpns_hf.experiments.{name}").main(flags)
        return 0
    parsed = _parser().parse_args(arguments)
    logging.disable_progress_bar()  # of loading weights; evaluation keeps its own
    with exit_in_one_sentence(f"vpns-hf {parsed.command}"):
        parsed.run(parsed)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vpns-hf",
        description="Prune vision models with masks and prompts; inspect, evaluate, export and publish the result.",
        epilog="Exit codes: 0 done, 2 an error, explained in a sentence. `vpns-hf COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"vpns-hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in EXPERIMENTS.items():
        commands.add_parser(name, help=summary)

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
    command.add_argument(
        "--opset", type=_number(int, count()), help="version of the ONNX operators (default: torch's choice)"
    )
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
    _add_data(command, required=True)
    command.add_argument(
        "--batch_size", type=_number(int, count()), default=64, help="images a device takes at a time"
    )
    command.add_argument("--json", action="store_true", help="print a JSON object instead of a table")

    command = _add(
        commands,
        benchmark,
        "vpns-hf benchmark vpns-demo --batch 1 8 --threads 1 2",
        "vpns-hf benchmark vpns-demo --dataset_name cifar100 --save",
    )
    _add_model(command)
    _add_data(command, required=False)
    command.add_argument(
        "--batch", nargs="+", type=_number(int, count()), default=[1, 8], help="images at a time (default: 1 8)"
    )
    command.add_argument(
        "--threads",
        nargs="+",
        type=_number(int, count()),
        default=sorted({1, min(2, os.cpu_count() or 1)}),
        help="threads to compute with (default: 1 and 2)",
    )
    command.add_argument(
        "--runtimes", nargs="+", choices=tuple(RUNTIMES), default=tuple(RUNTIMES), help="runtimes (default: all)"
    )
    command.add_argument(
        "--rounds", type=_number(int, count()), default=15, help="turns of each runtime (default: 15)"
    )
    command.add_argument("--save", action="store_true", help="write latency.json, a figure and the card's section")
    command.add_argument("--json", action="store_true", help="print a JSON object instead of a table")
    return parser


def _add(commands: Any, run: Callable[[argparse.Namespace], None], *examples: str) -> argparse.ArgumentParser:
    """Add a subcommand whose help is the docstring of the function that runs it."""
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


def _add_data(command: argparse.ArgumentParser, required: bool) -> None:
    command.add_argument(
        "--dataset_name", required=required, help="a task such as cifar100, an id on the Hub, or a local folder"
    )
    command.add_argument("--dataset_config_name", help="configuration of the data set, where it has several")
    command.add_argument("--dataset_revision", help="commit, tag or branch of the data set")
    command.add_argument("--image_column_name", help="column of the images (default: found)")
    command.add_argument("--label_column_name", help="column of the classes (default: found)")
    for split in ("train", "validation", "test"):
        command.add_argument(f"--{split}_split", help=f"what the data set calls its {split} split (default: {split})")
    command.add_argument(
        "--validation_fraction",
        type=_number(float, BETWEEN_0_AND_1),
        default=0.1,
        help="share of train that a carved split takes",
    )
    command.add_argument("--split_seed", type=_number(int, SEED), default=42, help="seed of that carving")
    command.add_argument("--split", choices=("train", "validation", "test"), default="test")


def _number(kind: type, check: Check) -> Callable[[str], Any]:
    """Return a function that parses a number and refuses those that a check does not take."""

    def parse(text: str) -> Any:
        with suppress(ValueError):
            if check.accepts(number := kind(text)):
                return number
        raise argparse.ArgumentTypeError(f"{text!r} is not {check.expected}")

    return parse
