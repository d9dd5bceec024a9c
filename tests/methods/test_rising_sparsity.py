"""Methods whose sparsity rises while scores are learned or weights trained."""

import itertools

import pytest
import torch
from helpers.methods import AtStageBegin, build, run, with_masks
from helpers.states import assert_same_state
from helpers.training import Images, StopAt, fresh, history, make_trainer
from transformers import TrainerCallback

from vpns_hf.masking import kept_count, select_masks
from vpns_hf.methods import METHODS
from vpns_hf.methods.mask_schedules import GradualSparsity, LearnedMasks, StageProgress
from vpns_hf.scores import score_weights


def test_until_comes_after_the_sparsity_has_risen():
    with pytest.raises(ValueError, match=r"`until` is 0.5; expected a share of the stage from 0.75"):
        LearnedMasks(gradual=GradualSparsity(end=0.75), until=0.5)
    settled = [LearnedMasks(until=0.3).is_settled(StageProgress(step, 10, 0.9)) for step in range(1, 11)]
    assert settled == [False] * 3 + [True] * 7


class Masks(TrainerCallback):
    """Keeps the masks after every step of the last stage."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model, **kwargs):
        if not args.output_dir.endswith("warm_up"):
            self.seen.append({name: mask.clone() for name, mask in model.masks().items()})


def test_joint_sparsity_rises_and_the_mask_settles(tmp_path, monkeypatch):
    masks = LearnedMasks(gradual=GradualSparsity(end=0.5, updates=10), until=0.75)
    monkeypatch.setitem(METHODS, "settling", with_masks("hydra_joint", masks))
    watch, model = Masks(), build("hydra_joint")
    run(tmp_path, "settling", model, callbacks=[watch], total_max_steps=20, score_learning_rate=0.1)
    total = sum(mask.numel() for mask in model.masks().values())
    for step, seen in enumerate(watch.seen, start=1):
        expected = 0.9 * (1 - (1 - min(step / 10, 1)) ** 3)
        assert sum(int(mask.sum()) for mask in seen.values()) == kept_count(total, expected)
    same = [
        all(torch.equal(mask, before[name]) for name, mask in now.items())
        for before, now in itertools.pairwise(watch.seen)
    ]
    assert not any(same[:14])
    assert all(same[14:])
    assert all(torch.equal(mask, watch.seen[-1][name]) for name, mask in model.masks().items())


def test_joint_trains_weights_and_scores_together(tmp_path):
    changed = set()

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            self.before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

        def on_step_end(self, args, state, control, model, **kwargs):
            if args.output_dir.endswith("joint"):
                for role, parameters in model.parameters_by_role().items():
                    if any(not torch.equal(parameter, self.before[name]) for name, parameter in parameters.items()):
                        changed.add(role)

    run(tmp_path, "vpns_joint", callbacks=[Watch()], total_max_steps=4)
    assert changed == {"scores", "weights", "head", "prompt"}


@pytest.mark.parametrize("method", ["vpns_gradual", "vpns_joint"])
def test_controls_differ_only_by_the_prompt(method, tmp_path):
    """With a prompt that cannot move, a method and its control are the same run."""
    runs = []
    for name, rate in ((method, 0.0), (method.replace("vpns", "hydra"), 1e-2)):
        model = fresh(sparsity=0.9, scope="global")
        rates = dict(search_prompt_learning_rate=rate, prompt_learning_rate=rate)
        runs.append(run(tmp_path / name, name, model, save_strategy="no", **rates).model.state_dict())
    assert all(torch.allclose(runs[0][name].float(), runs[1][name].float(), atol=1e-4) for name in runs[0])


@pytest.mark.parametrize("method", ["vpns_joint", "gmp_lamp", "platon"])
@pytest.mark.parametrize("step", [3, 7, 10])
@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_resume_equals_the_uninterrupted_run(family, method, step, tmp_path):
    """While the sparsity rises, after it, and under the settled mask."""
    settings = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=4)
    if method == "vpns_joint":
        settings |= dict(score_start="snip", score_learning_rate="auto")
    data = {"eval_dataset": Images(8, augment=False)}
    whole = run(tmp_path / "whole", method, build(method, family), **settings, **data)
    stage = whole.stages[-1].name
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", method, build(method, family), callbacks=[StopAt(stage, step)], **settings, **data)
    torch.manual_seed(123)
    small = {"total_max_steps": 12, "head_warm_up_epochs": 0.5, "calibration_images_per_class": 2}
    resumed = make_trainer(tmp_path / "stopped", build(method, family), method=method, **small, **settings, **data)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(resumed.model, whole.model)
    assert history(tmp_path / "stopped") == history(tmp_path / "whole")
    assert resumed.stage_settings() == whole.stage_settings()


def test_accumulation_equals_one_large_batch(tmp_path):
    settings = dict(save_strategy="no", logging_steps=1, score_learning_rate="auto")
    large = run(tmp_path / "large", "vpns_joint", per_device_train_batch_size=2, **settings)
    parts = dict(per_device_train_batch_size=1, gradient_accumulation_steps=2)
    small = run(tmp_path / "small", "vpns_joint", **parts, **settings)
    masks = small.model.masks()
    assert all(torch.equal(mask, masks[name]) for name, mask in large.model.masks().items())
    expected = dict(large.model.named_parameters())
    for name, parameter in small.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=1e-5)


def test_bf16_keeps_zeros_and_scores_in_float32(tmp_path):
    seen = []

    def look(model, folder):
        seen.extend(score.dtype for score in model.scores().values())

    trainer = run(
        tmp_path,
        "vpns_joint",
        bf16=True,
        score_learning_rate="auto",
        save_strategy="no",
        callbacks=[AtStageBegin(look)],
    )
    assert set(seen) == {torch.float32}
    weights = dict(trainer.model.backbone.named_parameters())
    assert all((weights[name][~mask] == 0).all() for name, mask in trainer.model.masks().items())
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_gmp_lamp_prunes_by_lamp_of_the_present_weights(tmp_path):
    """At every update the mask is that of one-shot LAMP on the weights that the step left."""
    watch, checked = Masks(), []

    class Compare(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model, **kwargs):
            progress = StageProgress(state.global_step + 1, state.max_steps, 0.9)
            if args.output_dir.endswith("tune") and progress.step > 1:
                scores = score_weights("lamp", model, [])
                masks = select_masks(scores, GradualSparsity().sparsity(progress))
                now = model.masks()
                checked.append(all(torch.equal(mask, now[name]) for name, mask in masks.items()))

    run(tmp_path, "gmp_lamp", callbacks=[watch, Compare()], total_max_steps=12)
    assert len(checked) == 11
    assert all(checked)
    assert all((before[name] | ~now[name]).all() for before, now in itertools.pairwise(watch.seen) for name in now)


def test_platon_scores_by_an_independent_computation(tmp_path):
    """Both averages over a run, from the weights and their own gradients while nothing is pruned."""
    seen = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            if args.output_dir.endswith("search") and state.global_step < 3:
                (weight, *_), (score, *_) = model.prunable_weights().values(), model.scores().values()
                self.now = (weight.detach() * weight.grad).abs()
                torch.testing.assert_close(score.grad.abs(), self.now)

        def on_step_end(self, args, state, control, model, **kwargs):
            if args.output_dir.endswith("search") and state.global_step <= 3:
                seen.append((self.now, next(iter(model.scores().values())).detach().clone()))

    run(tmp_path, "platon", callbacks=[Watch()], total_max_steps=40)
    mean = spread = torch.zeros_like(seen[0][0])
    assert len(seen) == 3
    for now, score in seen:
        mean = 0.85 * mean + 0.15 * now
        spread = 0.975 * spread + 0.025 * (now - mean).abs()
        torch.testing.assert_close(score, mean * spread)
