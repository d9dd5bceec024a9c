"""Learning from a teacher: the loss, where the teacher comes from, and what it costs."""

import math

import pytest
import torch
from helpers.methods import build, run
from helpers.models import tiny_backbone
from helpers.states import assert_same_state
from helpers.training import Images, StopAt, fresh, history, make_trainer
from torch.nn import functional as F
from transformers import TrainerCallback, ViTImageProcessor

from vpns_hf import VPNsTrainer, VPNsTrainingArguments
from vpns_hf.methods import METHODS, get_method
from vpns_hf.training.teacher import distillation_loss, load_teacher


def test_loss_vectors():
    """Teacher 3/4 to 1/4, student 1/2 to 1/2; at T = 2 the teacher's odds are the root of 3."""
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert distillation_loss(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-6)
    likely = math.sqrt(3) / (1 + math.sqrt(3))
    expected = 4 * (likely * math.log(2 * likely) + (1 - likely) * math.log(2 * (1 - likely)))
    assert distillation_loss(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-6)
    assert distillation_loss(teacher, teacher, 3.0).item() == pytest.approx(0, abs=1e-7)


def test_gradient_of_the_loss():
    """T * (softmax(student / T) - softmax(teacher / T)) / n."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, generator=generator)
    student.requires_grad_(True)
    (gradient,) = torch.autograd.grad(distillation_loss(student, teacher, 4.0), student)
    torch.testing.assert_close(gradient, 4 * ((student / 4).softmax(-1) - (teacher / 4).softmax(-1)) / 3)


def test_a_step_has_the_loss_that_is_said(tmp_path):
    """Computed again from the logits, and on a batch that a prompt is on, too: the teacher sees none."""
    teacher, checked = fresh(prompt=None), []
    teacher.detach_scores()
    teacher.save_pretrained(tmp_path / "teacher")

    class Trainer(VPNsTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, True, **kwargs)
            targets = teacher.eval()(inputs["pixel_values"]).logits
            log_ratio = (targets / 3).log_softmax(-1) - (outputs.logits / 3).log_softmax(-1)
            divergence = ((targets / 3).softmax(-1) * log_ratio).sum(-1).mean()
            expected = 0.7 * F.cross_entropy(outputs.logits, inputs["labels"]) + 0.3 * 9 * divergence
            torch.testing.assert_close(loss, expected)
            checked.append(inputs.get("use_prompt", True))
            return (loss, outputs) if return_outputs else loss

    taught = dict(teacher=str(tmp_path / "teacher"), teacher_weight=0.3, teacher_temperature=3.0)
    trainer = make_trainer(tmp_path / "run", fresh(), cls=Trainer, **taught)
    trainer.train()
    assert set(checked) == {True, False}
    assert [stage.cost.teacher_images for stage in trainer.finished_stages] == [32, 32]


def test_a_teacher_without_weight_changes_nothing(tmp_path):
    teacher = fresh(prompt=None)
    teacher.detach_scores()
    teacher.save_pretrained(tmp_path / "teacher")
    alone = make_trainer(tmp_path / "alone", fresh(), save_strategy="no")
    alone.train()
    taught = make_trainer(
        tmp_path / "taught", fresh(), save_strategy="no", teacher=str(tmp_path / "teacher"), teacher_weight=0.0
    )
    taught.train()
    assert_same_state(taught.model, alone.model)
    other = make_trainer(tmp_path / "other", fresh(), save_strategy="no", teacher=str(tmp_path / "teacher"))
    other.train()
    assert any(not torch.equal(a, b) for a, b in zip(other.model.parameters(), alone.model.parameters(), strict=True))


@pytest.mark.parametrize("method", ["gmp_teacher", "vpns_joint", "imp"])
def test_self_is_the_dense_reference_of_the_same_seed(method, tmp_path):
    begun = {}

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            stage = args.output_dir.split("-")[-1]
            begun[stage] = {name: tensor.detach().clone() for name, tensor in model.backbone_state().items()}

    model = build(method, "resnet", sparsity=0.5)
    trainer = run(tmp_path / "taught", method, model, teacher="self", total_max_steps=12, callbacks=[Watch()])
    assert [stage.name for stage in trainer.finished_stages][:2] == ["warm_up", "teacher"]
    steps = [stage.steps for stage in trainer.finished_stages]
    assert steps[1] == 12
    assert sum(steps[2:]) == 12
    # The reference has the same steps, and its pupil starts where it has started.
    reference = run(tmp_path / "reference", "dense", build("dense", "resnet"), total_max_steps=12)
    expected = reference.model.backbone_state()
    for name, tensor in trainer.load_stage("teacher").backbone_state().items():
        assert torch.equal(tensor, expected[name]), name
    first = trainer.stages[2].name
    assert all(torch.equal(tensor, begun["teacher"][name]) for name, tensor in begun[first].items())
    assert trainer.finished_stages[1].cost.teacher_images == 0
    assert sum(stage.cost.teacher_images for stage in trainer.finished_stages) == 12 * 4


@pytest.mark.parametrize(("stage", "step"), [("teacher", 5), ("joint", 3), ("joint", 9)])
def test_resume_equals_the_uninterrupted_run(stage, step, tmp_path):
    settings = dict(save_strategy="steps", save_steps=2, teacher="self")
    whole = run(tmp_path / "whole", "vpns_joint", build("vpns_joint", "resnet"), **settings)
    with pytest.raises(KeyboardInterrupt):
        run(
            tmp_path / "stopped",
            "vpns_joint",
            build("vpns_joint", "resnet"),
            callbacks=[StopAt(stage, step)],
            **settings,
        )
    torch.manual_seed(123)
    small = {"total_max_steps": 12, "head_warm_up_epochs": 0.5, "calibration_images_per_class": 2}
    model = build("vpns_joint", "resnet")
    resumed = make_trainer(tmp_path / "stopped", model, method="vpns_joint", **small, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(resumed.model, whole.model)
    assert history(tmp_path / "stopped") == history(tmp_path / "whole")
    for ours, theirs in zip(resumed.finished_stages, whole.finished_stages, strict=True):
        assert ours.cost.teacher_images == theirs.cost.teacher_images


def test_accumulation_equals_one_large_batch(tmp_path):
    settings = dict(save_strategy="no", logging_steps=1, teacher="self")
    large = run(tmp_path / "large", "gmp", per_device_train_batch_size=2, **settings)
    parts = dict(per_device_train_batch_size=1, gradient_accumulation_steps=2)
    small = run(tmp_path / "small", "gmp", **parts, **settings)
    expected = dict(large.model.named_parameters())
    for name, parameter in small.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=1e-5)


def test_bf16_with_a_teacher_keeps_zeros(tmp_path):
    model = run(tmp_path, "gmp_teacher", bf16=True, save_strategy="no").model
    assert all((weight[~model.masks()[name]] == 0).all() for name, weight in model.prunable_weights().items())


def test_where_a_teacher_comes_from(tmp_path):
    """The folder of a run, of one of our models, and of a transformers model."""
    student = fresh()
    trainer = make_trainer(tmp_path / "run", fresh(), method="dense", max_steps=1)
    trainer.train()
    loaded = load_teacher(str(tmp_path / "run"), student)
    images = Images(4, augment=False).images
    torch.testing.assert_close(loaded(images).logits, trainer.model.eval()(images, use_prompt=False).logits)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    backbone = tiny_backbone("vit")
    backbone.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="with its image processor in its folder"):
        load_teacher(str(tmp_path / "plain"), student)
    ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path / "plain")
    loaded = load_teacher(str(tmp_path / "plain"), student)
    torch.testing.assert_close(loaded(images).logits, backbone(images).logits)
    with pytest.raises(ValueError, match="takes images of size, mean and std"):
        load_teacher(str(tmp_path / "plain"), fresh(image_mean=[0.1] * 3))


def test_refusals(tmp_path):
    for wrong in (dict(teacher_weight=1.5), dict(teacher_temperature=0.0)):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` is .*; expected"):
            VPNsTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **wrong)
    with pytest.raises(ValueError, match="trains nothing that could learn"):
        make_trainer(tmp_path, fresh(), method="wanda", teacher="self")
    with pytest.raises(ValueError, match="fixes the label mapping"):
        make_trainer(tmp_path, fresh(label_mapping="iterative", num_labels=3), method="gmp", teacher="self")
    frozen = fresh()
    frozen.freeze_masks()
    with pytest.raises(ValueError, match="starts from a pruned one"):
        make_trainer(tmp_path, frozen, method="tune", teacher="self")
    other = fresh(num_labels=4, new_head=True, prompt=None)
    other.detach_scores()
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has 4 classes"):
        make_trainer(tmp_path, fresh(), teacher=str(tmp_path / "other"))
    with pytest.raises((ValueError, OSError), match="is no local folder with a transformers or timm"):
        make_trainer(tmp_path, fresh(), teacher=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="a `compute_loss_func` replaces the loss"):
        make_trainer(
            tmp_path, fresh(), teacher="self", compute_loss_func=lambda outputs, labels, **_: outputs.logits.sum()
        )
    assert METHODS["gmp_teacher"].teacher == get_method("gmp_teacher+prompt").teacher == "self"
