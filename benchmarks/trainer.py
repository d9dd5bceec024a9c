"""Time of VPNsTrainer against a bare loop that makes the same optimizer steps.

    python benchmarks/trainer.py [--model vit_tiny] [--steps 200] [--batch_size 8] [--repeats 3] [--threads 2]

Both tune the same frozen model on the same batches, held in memory, with the same optimizer; the trainer logs every 50
steps and saves nothing.
"""

from __future__ import annotations

import argparse
import copy
import tempfile

import torch
from common import ratio_cells, time_in_turns, write_table
from models import CLASSES, VITS, wrap
from torch.utils.data import Dataset

from vpns_hf import PromptedSparseModel, VPNsTrainer, VPNsTrainingArguments


class Images(Dataset):
    """Random images in memory."""

    def __init__(self, count: int):
        self.images, self.labels = torch.randn(count, 3, 224, 224), torch.randint(CLASSES, (count,))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def main() -> None:
    """Measure both and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(VITS), default="vit_tiny")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images = Images(8 * args.batch_size)
    model = wrap(VITS[args.model]())

    runs = {
        "trainer": lambda: with_trainer(copy.deepcopy(model), images, args),
        "loop": lambda: bare_loop(copy.deepcopy(model), images, args),
    }
    seconds = time_in_turns(runs, args.repeats)
    row = (
        args.model,
        str(args.steps),
        str(args.batch_size),
        "1.05",
        *ratio_cells(seconds["trainer"], seconds["loop"]),
    )
    columns = ("trainer / bare loop", "steps", "batch size", "target", "median ratio", "range")
    write_table("trainer", __doc__ or "", columns, [row])


def with_trainer(model: PromptedSparseModel, images: Images, args: argparse.Namespace) -> None:
    """Tune the mask of `omp`, a method of one stage."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = VPNsTrainingArguments(
            folder,
            method="omp",
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=1e-5,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        VPNsTrainer(model=model, args=arguments, train_dataset=images).train()


def bare_loop(model: PromptedSparseModel, images: Images, args: argparse.Namespace) -> None:
    """The same steps without a trainer."""
    model.freeze_masks()
    model.train()
    optimizer = torch.optim.AdamW(model.backbone.parameters(), lr=1e-5, fused=True)
    for step in range(args.steps):
        rows = torch.arange(step * args.batch_size, (step + 1) * args.batch_size) % len(images)
        model(images.images[rows], labels=images.labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.zero_masked_weights()


if __name__ == "__main__":
    main()
