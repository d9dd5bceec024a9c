"""Find a subnetwork on one task and tune it on others: one line a cell of (target, method, mode, sparsity, seed).

    python recipes/transfer.py                                                # the embedded demo
    accelerate launch recipes/transfer.py --config my.yaml --dataset_name imagenet_1k --targets cifar100 dtd \
        --methods dense vpns hydra omp random --modes full linear_probe --sparsities 0.8 0.9
    accelerate launch recipes/transfer.py --config my.yaml --subnetwork user/pruned --targets cifar100 ./my_images

The mask of each learned method is found on the source task, with the source's head, once for a sparsity and a seed;
masks of a shared subnetwork are loaded. Only masks move, and the prompt where the mode says so: on every target the
weights start from the pretrained backbone again, under the mask, with a head of the target's own. `--modes` says what
is trained there; `--help` lists them.

Lines, claims and resuming are those of `compare_methods.py`: cells that are in `output_dir/results.jsonl` are skipped,
and several launches may share one folder. Found subnetworks stay in `output_dir/subnetworks`.
"""

from pathlib import Path

from vpns_hf.cli import exit_in_one_sentence
from vpns_hf.experiments.transfer import main

HERE = Path(__file__).parent

if __name__ == "__main__":
    with exit_in_one_sentence(Path(__file__).name):
        main(default_config=HERE / "transfer" / "demo.yaml")
