"""Compare pruning methods on one backbone and data set, fairly: one line a cell of (method, sparsity, seed).

    python recipes/compare_methods.py                                         # the embedded demo
    accelerate launch recipes/compare_methods.py --config my.yaml --methods dense vpns hydra omp+prompt \
        --sparsities 0.8 0.9 --seeds 7 17 27 --total_max_steps 400

Each cell appends its line to `output_dir/results.jsonl` when it is done; cells that are there already are skipped, so
the command can be killed and started again, and several may share one folder. Once all cells are done, or with
`--only_report`, it writes `results.md` and `accuracy.png`. With `--total_max_steps` every method makes the same number
of optimizer steps after the warm-up of a new head. The test split is evaluated once a cell, with the last weights.
"""

import runpy
from pathlib import Path

from vpns_hf.cli import exit_in_one_sentence
from vpns_hf.experiments.compare import main

HERE = Path(__file__).parent

if __name__ == "__main__":
    runpy.run_path(str(HERE / "comparison" / "controls.py"))  # adds its methods to `METHODS`
    with exit_in_one_sentence(Path(__file__).name):
        main(default_config=HERE / "comparison" / "demo.yaml")
