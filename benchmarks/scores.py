"""Time of one-shot scores against one forward and backward pass over the same images.

    python benchmarks/scores.py [--model vit_small] [--batch_size 16] [--batches 2] [--repeats 5] [--threads 2]

SynFlow is one round, on a single image of ones in double precision, against a pass over one batch. GraSP takes a
gradient and the gradient of a gradient: three and nine products of matrices for each layer, where a pass has three, so
four passes are the least that it can cost.
"""

from __future__ import annotations

import argparse

import torch
from common import ratio_cells, time_in_turns, write_table
from models import CLASSES, VITS, wrap

from vpns_hf.scores import score_weights

TARGETS = {"snip": "1.1", "grasp": "4", "synflow": "1.1"}


def main() -> None:
    """Measure every score and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(VITS), default="vit_small")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = wrap(VITS[args.model]())
    backbone = VITS[args.model]()
    batches = [
        {
            "pixel_values": torch.randn(args.batch_size, 3, 224, 224),
            "labels": torch.randint(CLASSES, (args.batch_size,)),
        }
        for _ in range(args.batches)
    ]

    def passes() -> None:
        for batch in batches:
            backbone(**batch).loss.backward()
        backbone.zero_grad()

    runs = {"pass": passes} | {
        name: lambda name=name: score_weights(name, model, batches[:1] if name == "synflow" else batches)
        for name in TARGETS
    }
    seconds = time_in_turns(runs, args.repeats)
    one_batch = [value / args.batches for value in seconds["pass"]]
    rows = [
        (name, target, *ratio_cells(seconds[name], one_batch if name == "synflow" else seconds["pass"]))
        for name, target in TARGETS.items()
    ]
    write_table("scores", __doc__ or "", ("score / forward and backward", "target", "median ratio", "range"), rows)


if __name__ == "__main__":
    main()
