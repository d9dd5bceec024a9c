"""Peak memory of the search over dense tuning with the same optimizer, each in a process of its own.

    python benchmarks/memory.py [--model vit_base] [--batch_size 8] [--threads 2]

Three steps of AdamW on random images of 224 pixels. The search holds scores beside the weights, four bytes a weight,
and a mask, one byte; its optimizer state is that of the scores in place of that of the weights. Shown is what the
search takes at its peak beyond the dense run and beyond the scores, in bytes a prunable weight. The C library is told
to return free memory at once, so that the peaks are of what is in use and not of how it happens to be laid out.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys

import torch
from common import write_table
from models import CLASSES, VITS, wrap

RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Settings of the GNU C library's allocator; others ignore them."""


def main() -> None:
    """Measure both in processes of their own and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(VITS), default="vit_base")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=("dense", "search"), help="one run, in this process")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only:
        print(*peak(args.model, args.batch_size, search=args.only == "search"))
        return
    dense, weights = measure(args, "dense")
    search, weights = measure(args, "search")
    rows = [
        ("dense tuning, peak", f"{dense / 1e9:.2f} GB", ""),
        ("search, peak", f"{search / 1e9:.2f} GB", ""),
        ("search - dense - scores, bytes a weight", f"{(search - dense - 4 * weights) / weights:.2f}", "1"),
    ]
    write_table("memory", __doc__ or "", ("what", args.model, "target"), rows)


def measure(args: argparse.Namespace, only: str) -> tuple[int, int]:
    """Peak bytes and prunable weights of one run in a fresh process."""
    flags = [f"--model={args.model}", f"--batch_size={args.batch_size}", f"--threads={args.threads}"]
    output = subprocess.run(
        [sys.executable, __file__, *flags, f"--only={only}"],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | RETURN_MEMORY,
    )
    used, weights = output.stdout.split()[-2:]
    return int(used), int(weights)


def peak(name: str, batch_size: int, search: bool) -> tuple[int, int]:
    """Train for three steps; peak resident bytes and prunable weights."""
    model = wrap(VITS[name]())
    weights = sum(mask.numel() for mask in model.masks().values())
    if not search:
        model.detach_scores()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    images, labels = torch.randn(batch_size, 3, 224, 224), torch.randint(CLASSES, (batch_size,))
    for step in range(3):
        model(images, labels=labels, use_prompt=search and step % 2 == 0).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if search:
            model.update_masks()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, weights


if __name__ == "__main__":
    main()
