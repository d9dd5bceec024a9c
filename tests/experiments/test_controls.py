"""`recipes/comparison/controls.py`: methods that are added to the table from outside of the package."""

import functools
import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers.methods import SPARSITY, build, run
from helpers.recipes import RECIPES, add_controls
from helpers.states import assert_same_state
from helpers.training import Images, StopAt, fresh, history, make_trainer
from transformers import TrainerCallback

from vpns_hf.masking import kept_count, select_masks
from vpns_hf.methods import METHODS, get_method
from vpns_hf.scores import score_weights

PRUNING = [
    *("hydra_augmented", "vpns_noise_prompt", "vpns_augmented_prompt", "vpns_sliced_head", "vpns_source_head"),
    *("vpns_joint_uphill", "snip_prompted", "snip_unprompted", "gmp_prompted_teacher"),
]


@pytest.fixture(autouse=True)
def controls():
    return add_controls()


def test_the_package_knows_one_control_and_the_file_adds_the_others(controls):
    program = "from vpns_hf.methods import METHODS; print(*(name for name in METHODS if METHODS[name].is_control))"
    known = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert known == ["vpns_zero_prompt"]
    added = [name for name, method in METHODS.items() if method.is_control and name != "vpns_zero_prompt"]
    assert added == list(controls)
    assert {name for name, method in controls.items() if not method.needs_pruned} == {*PRUNING, "wanda_prompted"}


@pytest.mark.parametrize("method", PRUNING)
def test_every_control_ends_with_exact_counts_and_zeros(method, tmp_path):
    model = run(tmp_path, method).model
    assert model.config.state == "frozen"
    masks, weights = model.masks(), model.prunable_weights()
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == kept_count(total, SPARSITY)
    assert all((weights[name][~mask] == 0).all() for name, mask in masks.items())


def test_noise_prompt_is_drawn_anew_with_the_size_asked_for(tmp_path, controls, monkeypatch):
    drawn = []
    noise = controls["vpns_noise_prompt"]
    louder = tuple(functools.partial(make, std=0.25) for make in noise.stages[-1].callbacks)
    stages = tuple(replace(stage, callbacks=louder) if stage.callbacks else stage for stage in noise.stages)
    monkeypatch.setitem(METHODS, "vpns_noise_prompt", replace(noise, stages=stages))

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if not args.output_dir.endswith("warm_up"):
                drawn.append(torch.cat([p.detach().flatten() for p in model.prompt.parameters()]))

    run(tmp_path, "vpns_noise_prompt", callbacks=[Watch()])
    assert all(float(noise.std()) == pytest.approx(0.25, rel=0.15) for noise in drawn)
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(drawn))


def test_augmented_prompt_shows_prompted_batches_augmented(tmp_path):
    for method, expected in (("vpns", False), ("vpns_augmented_prompt", True)):
        trainer = make_trainer(tmp_path / method, build(method), method=method)
        trainer.plan = trainer.plan_stages()[-1]
        views = {
            batch["use_prompt"]: trainer.train_dataset.images.unsqueeze(1)
            .sub(batch["pixel_values"])
            .flatten(2)
            .norm(dim=2)
            for batch in trainer.get_train_dataloader()
        }
        assert bool((views[True].amin(0) > 0).all()) is expected
        assert (views[False].amin(0) > 0).all()


class Prompts(TrainerCallback):
    """Keeps the prompt after each step of a stage."""

    def __init__(self, stage):
        self.stage, self.seen = stage, []

    def on_step_end(self, args, state, control, model, **kwargs):
        if args.output_dir.endswith(self.stage):
            self.seen.append(torch.cat([parameter.detach().flatten() for parameter in model.prompt.parameters()]))


def test_a_prompt_uphill_moves_against_the_learned_one(tmp_path):
    """Both start at zero, so the first step of Adam is the same with another sign."""
    down, up = Prompts("joint"), Prompts("joint")
    run(tmp_path / "down", "vpns_joint", callbacks=[down])
    run(tmp_path / "up", "vpns_joint_uphill", callbacks=[up])
    assert down.seen[0].abs().max() > 0
    assert torch.equal(down.seen[0], -up.seen[0])


@pytest.mark.parametrize(("method", "score", "scope"), [("snip", "snip", "global"), ("wanda", "wanda", "row")])
def test_prompted_scores_are_those_of_prompted_images(method, score, scope, tmp_path):
    trainer = run(tmp_path, f"{method}_prompted", prompt_learning_rate=20.0, search_prompt_learning_rate=20.0)
    dense = trainer.load_stage("prompt")
    images = trainer.calibration_batches()
    with torch.no_grad():
        prompted = [batch | {"pixel_values": dense.prompt(batch["pixel_values"])} for batch in images]
    found = trainer.model.masks()
    for batches, expected in ((prompted, True), (images, False)):
        masks = select_masks(score_weights(score, dense, batches), SPARSITY, scope)
        assert all(torch.equal(mask, found[name]) for name, mask in masks.items()) is expected


def test_a_prompted_teacher_sees_its_prompt_and_the_student_does_not(tmp_path):
    taught = []

    class Watch(TrainerCallback):
        def on_train_end(self, args, state, control, model, **kwargs):
            if args.output_dir.endswith("tune"):
                taught.append(model.config.use_prompt)

    trainer = run(tmp_path, "gmp_prompted_teacher", callbacks=[Watch()])
    teacher = trainer.load_stage("teacher")
    image = Images(augment=False).images[:1]
    assert taught == [False]
    assert not trainer.model.config.use_prompt
    with torch.no_grad():
        assert torch.equal(teacher(image).logits, teacher(image, use_prompt=True).logits)
        assert not torch.equal(teacher(image).logits, teacher(image, use_prompt=False).logits)
    assert [stage.name for stage in trainer.stages] == ["warm_up", "teacher", "tune"]


def test_controls_that_need_another_head_say_so(tmp_path):
    with pytest.raises(ValueError, match="label_mapping='frequency', keep_source_head=True"):
        make_trainer(tmp_path, fresh(), method="vpns_source_head")


def test_augmented_hydra_sees_augmented_images_alone(tmp_path):
    """Also with `mix_unaugmented`, which shows HYDRA the batches of VPNs."""
    clean = Images(augment=False).images
    trainer = make_trainer(tmp_path, build("hydra_augmented"), method="hydra_augmented", mix_unaugmented=True)
    trainer.plan = trainer.plan_stages()[-1]
    shown = torch.cat([batch["pixel_values"] for batch in trainer.get_train_dataloader()])
    assert len(shown) == 16
    assert not (shown.unsqueeze(1) == clean).flatten(2).all(2).any()


def test_resume_of_a_noise_prompt_equals_the_uninterrupted_run(tmp_path):
    method = "vpns_noise_prompt"
    settings = dict(method=method, save_strategy="steps", save_steps=2, total_max_steps=14, head_warm_up_epochs=0.5)
    whole = make_trainer(tmp_path / "whole", build(method), **settings)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped", build(method), callbacks=[StopAt("search", 3)], **settings)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    torch.manual_seed(123)
    resumed = make_trainer(tmp_path / "stopped", build(method), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(resumed.model, whole.model)
    assert history(tmp_path / "stopped") == history(tmp_path / "whole")


def test_prompt_alone_on_a_pruned_network(tmp_path):
    """Only the prompt moves, BatchNorm statistics included; recalibrating changes them and nothing else."""
    pruned = run(tmp_path / "omp", "omp", build("omp", "resnet")).model
    before = {name: tensor.clone() for name, tensor in pruned.backbone_state().items()}
    run(tmp_path / "prompt", "prompt_only", pruned)
    after = pruned.backbone_state()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert max(float(parameter.detach().abs().max()) for parameter in pruned.prompt.parameters()) > 0

    run(tmp_path / "recalibrated", "prompt_only_recalibrated", pruned)
    after = pruned.backbone_state()
    changed = {name.rsplit(".", 1)[-1] for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}


def test_recalibration_equals_the_statistics_of_the_images(tmp_path):
    model = run(tmp_path / "omp", "omp", build("omp", "resnet")).model
    trainer = run(tmp_path / "again", "recalibrate_only", model, calibration_images_per_class=1)
    images = torch.cat([batch["pixel_values"] for batch in trainer.calibration_batches()])
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    inputs = []
    with torch.no_grad(), norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0])):
        model.eval()(images)
    assert torch.allclose(norm.running_mean, inputs[0].mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(norm.running_var, inputs[0].var((0, 2, 3)), rtol=1e-5)


def test_recalibration_after_a_prompt_was_trained_on_the_same_model(tmp_path):
    pruned = run(tmp_path / "omp", "omp", build("omp", "resnet")).model
    run(tmp_path / "prompt", "prompt_only", pruned)
    run(tmp_path / "recalibrated", "recalibrate_only", pruned)
    norms = [module for module in pruned.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all(norm.running_mean.abs().max() > 0 for norm in norms)


@pytest.mark.parametrize("method", ["prompt_only", "prompt_only_recalibrated", "recalibrate_only"])
def test_methods_for_pruned_models_refuse_others(method, tmp_path):
    with pytest.raises(ValueError, match="needs a model that is pruned already"):
        make_trainer(tmp_path, fresh(), method=method)


def test_a_prompt_alone_finds_no_mask():
    with pytest.raises(ValueError, match="finds no mask of its own"):
        get_method("prompt_only:mask")


def test_the_recipes_readme_names_every_control(controls):
    text = (RECIPES / "comparison/README.md").read_text(encoding="utf-8")
    assert {name for name in controls if f"`{name}`" not in text} == set()
