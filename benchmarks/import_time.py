"""Time of `import vpns_hf` against that of torch and transformers, each in a process of its own, in turns.

    python benchmarks/import_time.py [--repeats 9]

The reference is `import torch, transformers` with `PreTrainedModel` and `AutoModelForImageClassification`, which
anybody pays who loads a model. The same again with the trainer: `vpns_hf.VPNsTrainer` against `transformers.Trainer`.
Seconds are those that a process computes, user and system together, so that other work on the machine counts little;
files are in the disk cache, from a round that does not count. Shown are medians, and ratios within each round.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

from common import ratio_cells, write_table

MODEL = "import torch, transformers; transformers.PreTrainedModel, transformers.AutoModelForImageClassification"
TRAINER = f"{MODEL}; transformers.Trainer, transformers.TrainingArguments"
PROGRAMS = {
    "transformers": MODEL,
    "vpns_hf": f"{MODEL}; import vpns_hf",
    "transformers, with Trainer": TRAINER,
    "vpns_hf, with VPNsTrainer": f"{TRAINER}; import vpns_hf; vpns_hf.VPNsTrainer, vpns_hf.VPNsTrainingArguments",
}
REFERENCES = {
    "vpns_hf": ("transformers", "1.15"),
    "vpns_hf, with VPNsTrainer": ("transformers, with Trainer", ""),
}


def main() -> None:
    """Start the programs in turns and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    rounds = [{name: seconds(code) for name, code in PROGRAMS.items()} for _ in range(args.repeats + 1)]
    samples = {name: [each[name] for each in rounds[1:]] for name in PROGRAMS}
    rows = [
        (
            name,
            f"{statistics.median(times):.2f}",
            *(ratio_cells(times, samples[REFERENCES[name][0]]) if name in REFERENCES else ("", "")),
            REFERENCES.get(name, ("", ""))[1],
        )
        for name, times in samples.items()
    ]
    write_table("import_time", __doc__ or "", ("imported", "seconds", "ratio", "rounds", "target"), rows)


def seconds(program: str) -> float:
    """Run a program in a fresh interpreter and return its processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
