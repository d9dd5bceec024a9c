"""Prune a pretrained image classifier with VPNs, and compare it with references such as the densely tuned model.

    accelerate launch recipes/prune_vit.py                                    # the embedded demo
    accelerate launch recipes/prune_vit.py --config recipes/vit/vit_base_cifar100.yaml --sparsity 0.8

Without `--config` the demo's recipe, `recipes/vit/demo.yaml`, is run. Every choice is made on the validation split;
the test split is evaluated once, at the end. The output folder then holds the model, its image processor, its model
card `README.md`, `recipe.yaml`, `metrics.json`, `results.md`, `sparsity_report.json` and `figures/`. An interrupted
run resumes with `--resume_from_checkpoint true`.
"""

from pathlib import Path

from vpns_hf.cli import exit_in_one_sentence
from vpns_hf.experiments.prune import main

HERE = Path(__file__).parent

if __name__ == "__main__":
    with exit_in_one_sentence(Path(__file__).name):
        main(default_config=HERE / "vit" / "demo.yaml")
