"""Options of Trainer that could get in the way of masks: each works, or is refused in one sentence."""

import numpy as np
import pytest
import torch
from helpers.models import tiny_backbone
from helpers.states import assert_same_state
from helpers.training import Images, StopAt, fresh, make_trainer
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2
from transformers import EvalPrediction, TrainerCallback

from vpns_hf import PromptedSparseModel, VPNsTrainingArguments
from vpns_hf.data import collate_images
from vpns_hf.metrics import compute_metrics

SHORT = dict(save_strategy="no", max_steps=4)


def trained(folder, model=None, **settings):
    trainer = make_trainer(folder, fresh() if model is None else model, **SHORT | settings)
    trainer.train()
    return trainer.model


def assert_exact_zeros(model):
    """Exactly half of every layer is kept, and the rest is zero."""
    weights = dict(model.backbone.named_parameters())
    for name, mask in model.masks().items():
        assert int(mask.sum()) == round(0.5 * mask.numel())
        assert bool((weights[name][~mask] == 0).all())
        assert bool((weights[name][mask] != 0).any())


def assert_same_masks(model, other):
    masks, expected = model.masks(), other.masks()
    assert [name for name in expected if not torch.equal(masks[name], expected[name])] == []


def differing(model, other):
    """Share of the mask entries that differ."""
    masks, expected = model.masks(), other.masks()
    flips = sum(int((masks[name] != expected[name]).sum()) for name in expected)
    return flips / sum(mask.numel() for mask in expected.values())


# Precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["resnet", pytest.param("vit", marks=pytest.mark.slow)])
def test_bf16(family, tmp_path):
    """bf16 rounds gradients to 3 digits, so few scores change their side of the threshold."""
    model, plain = trained(tmp_path / "bf16", fresh(family), bf16=True), trained(tmp_path / "plain", fresh(family))
    assert_exact_zeros(model)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert differing(model, plain) < 0.02
    assert_same_state(PromptedSparseModel.from_pretrained(tmp_path / "bf16/1-tune/model"), model)


def test_fp16_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        make_trainer(tmp_path, fresh(), fp16=True)


# Memory and speed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "timm_vit", pytest.param("swin", marks=pytest.mark.slow)])
def test_activation_checkpointing_changes_nothing(family, tmp_path):
    model = trained(tmp_path / "on", fresh(family), gradient_checkpointing=True)
    assert_exact_zeros(model)
    assert_same_state(model, trained(tmp_path / "off", fresh(family)))


@pytest.mark.parametrize("family", ["convnext", "mobilenet_v2"])
def test_activation_checkpointing_is_refused_where_there_is_none(family, tmp_path):
    with pytest.raises(ValueError, match=rf"no activation checkpointing for {type(tiny_backbone(family)).__name__}"):
        trained(tmp_path, fresh(family), gradient_checkpointing=True)


@pytest.mark.slow
def test_compiled_training_keeps_zeros_and_masks(tmp_path):
    model = trained(tmp_path / "compiled", torch_compile=True, torch_compile_backend="aot_eager")
    plain = trained(tmp_path / "plain")
    assert_exact_zeros(model)
    assert_same_masks(model, plain)
    state, expected = model.state_dict(), plain.state_dict()
    assert all(torch.allclose(state[name].float(), expected[name].float(), atol=1e-5) for name in expected)


@pytest.mark.parametrize("family", ["resnet", pytest.param("convnext", marks=pytest.mark.slow)])
def test_channels_last(family, tmp_path):
    """Another memory format selects the same entries, although convolutions sum in another order."""
    model, plain = fresh(family).to(memory_format=torch.channels_last), fresh(family)
    weights = model.backbone_state()
    assert any(
        not w.is_contiguous() and w.is_contiguous(memory_format=torch.channels_last)
        for w in weights.values()
        if w.ndim == 4
    )
    assert_same_masks(model, plain)
    model.set_sparsity(0.9)
    plain.set_sparsity(0.9)
    assert_same_masks(model, plain)
    model.set_sparsity(0.5)
    plain.set_sparsity(0.5)
    model, plain = trained(tmp_path / "last", model), trained(tmp_path / "plain", plain)
    assert_exact_zeros(model)
    assert differing(model, plain) < 0.002
    model.save_pretrained(tmp_path / "saved")
    assert_same_state(PromptedSparseModel.from_pretrained(tmp_path / "saved"), model)


@pytest.mark.parametrize("stage", ["tune", pytest.param("search", marks=pytest.mark.slow)])
def test_channels_last_resumes_exactly(stage, tmp_path):
    def model():
        return fresh("resnet").to(memory_format=torch.channels_last)

    saving = {"save_strategy": "steps", "save_steps": 2}
    expected = trained(tmp_path / "whole", model(), **saving)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", model(), callbacks=[StopAt(stage, 3)], **saving)
    resumed = make_trainer(tmp_path / "stopped", model(), **SHORT | saving)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(resumed.model, expected)


# Gradients -----------------------------------------------------------------------------------------------------------


def test_gradient_clipping(tmp_path):
    """A norm that is never reached changes nothing; one that is keeps the zeros."""
    assert_same_state(trained(tmp_path / "high", max_grad_norm=1e9), trained(tmp_path / "off"))
    clipped = trained(tmp_path / "low", max_grad_norm=1e-2)
    assert_exact_zeros(clipped)
    assert_same_masks(trained(tmp_path / "low_again", max_grad_norm=1e-2), clipped)


# Averages and the best model -----------------------------------------------------------------------------------------


class MovingAverage(TrainerCallback):
    """Exponential moving average of the tuned weights, as torch has it."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        if args.output_dir.endswith("tune"):
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
            self.by_hand = {name: p.detach().clone() for name, p in model.named_parameters()}
            self.steps = 0

    def on_step_end(self, args, state, control, model, **kwargs):
        if args.output_dir.endswith("tune"):
            self.average.update_parameters(model)
            for name, parameter in model.named_parameters():
                mean = (self.by_hand[name] + parameter.detach()) / 2 if self.steps else parameter.detach().clone()
                self.by_hand[name] = mean
            self.steps += 1


def test_moving_average_keeps_zeros_and_masks(tmp_path):
    callback = MovingAverage()
    model = trained(tmp_path, callbacks=[callback])
    average = callback.average.module
    assert_exact_zeros(average)
    assert_same_masks(average, model)
    assert callback.steps == 4
    for name, parameter in average.named_parameters():
        assert torch.allclose(parameter, callback.by_hand[name], atol=1e-6)
    assert not torch.equal(average.backbone.classifier.weight, model.backbone.classifier.weight)
    average.save_pretrained(tmp_path / "average")
    assert_same_state(PromptedSparseModel.from_pretrained(tmp_path / "average"), average)


def test_best_model_keeps_zeros_and_masks_of_the_search(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 0.5}
    model = trained(tmp_path, eval_dataset=Images(8, augment=False), **settings)
    assert_exact_zeros(model)
    searched = PromptedSparseModel.from_pretrained(tmp_path / "0-search/model")
    assert_same_masks(model, searched)


# Labels --------------------------------------------------------------------------------------------------------------


def losses(trainer):
    return [entry["loss"] for stage in trainer.logs().values() for entry in stage if "loss" in entry]


def test_label_smoothing(tmp_path):
    """The first loss is the smoothed cross-entropy, computed here by its definition."""
    data = Images(4, augment=False)
    settings = SHORT | {"max_steps": 1, "logging_steps": 1, "train_dataset": data, "prompted_train_dataset": data}
    trainer = make_trainer(
        tmp_path, fresh(), label_smoothing_factor=0.2, prompt_mixing="never", eval_dataset=data, **settings
    )
    with torch.no_grad():
        log_probabilities = fresh()(data.images).logits.log_softmax(-1)
    targets = 0.8 * F.one_hot(data.labels, 6) + 0.2 / 6
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(-(targets * log_probabilities).sum(-1).mean().item(), rel=1e-5)
    assert_exact_zeros(trainer.model)
    with torch.no_grad():
        log_probabilities = trainer.model.eval()(data.images).logits.log_softmax(-1)
    smoothed = -(targets * log_probabilities).sum(-1).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(smoothed, rel=1e-5)


@pytest.mark.parametrize("settings", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0, "label_smoothing_factor": 0.1}])
def test_mixup(settings, tmp_path):
    """Training sees mixed images with the labels mixed alike, evaluation does not."""
    seen = []

    class Watched(PromptedSparseModel):
        def forward(self, pixel_values, labels=None, use_prompt=None):
            seen.append((self.training, pixel_values, labels))
            return super().forward(pixel_values, labels, use_prompt)

    model, data = fresh(), Images(8, augment=False)
    model.__class__ = Watched
    model = trained(tmp_path, model, train_dataset=data, prompted_train_dataset=data, eval_dataset=data, **settings)
    assert_exact_zeros(model)

    def is_original(image):
        return bool((data.images == image).flatten(1).all(1).any())

    assert all(is_original(image) for training, images, _ in seen if not training for image in images)
    assert not all(is_original(image) for training, images, _ in seen if training for image in images)
    if "label_smoothing_factor" in settings:
        return  # Trainer takes the labels out before the model
    for training, images, labels in seen:
        if training:
            # An image that is mixed of two with weights lam and 1 - lam has these two labels.
            candidates = F.one_hot(data.labels, 6).float()
            for image, label in zip(images, labels, strict=True):
                shares = torch.linalg.lstsq(data.images.flatten(1).T, image.flatten()[:, None]).solution[:, 0]
                assert torch.allclose(shares @ candidates, label, atol=1e-3)


def test_mixup_resumes_exactly_and_ignores_workers(tmp_path):
    settings = {"mixup_alpha": 0.4, "cutmix_alpha": 1.0, "save_strategy": "steps", "save_steps": 2}
    expected = trained(tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", callbacks=[StopAt("tune", 3)], **settings)
    resumed = make_trainer(tmp_path / "stopped", fresh(), **SHORT | settings)
    torch.manual_seed(123)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(resumed.model, expected)
    assert_same_state(trained(tmp_path / "workers", dataloader_num_workers=1, **settings), expected)
    plain = trained(tmp_path / "plain")
    assert not torch.equal(plain.backbone.classifier.weight, expected.backbone.classifier.weight)


def test_class_probabilities_as_labels(tmp_path):
    """A data set may give probabilities: for training, accuracy, label mapping and calibration."""

    class Soft(Images):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return item | {"labels": 0.9 * F.one_hot(torch.tensor(item["labels"]), 6) + 0.1 / 6}

    data = Soft(12, augment=False)
    hard = Images(12, augment=False)
    for method, model in (("vpns", fresh(label_mapping="frequency", num_labels=6)), ("snip", fresh())):
        folder = tmp_path / method
        trainer = make_trainer(
            folder, model, method=method, train_dataset=data, prompted_train_dataset=data, eval_dataset=data, **SHORT
        )
        trainer.train()
        assert_exact_zeros(trainer.model)
        assert trainer.evaluate()["eval_accuracy"] == trainer.evaluate(hard)["eval_accuracy"]


def test_accuracy_of_probabilities():
    logits = np.array([[0.1, 0.9, 0.0], [0.8, 0.1, 0.1], [0.0, 0.2, 0.9]])
    soft = np.array([[0.2, 0.7, 0.1], [0.0, 0.6, 0.4], [0.1, 0.0, 0.9]])
    for labels in (soft, soft.argmax(-1)):
        assert compute_metrics(EvalPrediction(logits, labels))["accuracy"] == pytest.approx(2 / 3)


def test_collator_that_mixes_trains(tmp_path):
    """torchvision's own recipe: MixUp in the collator."""
    mixup = v2.MixUp(num_classes=6)

    class Mixing(type(make_trainer(tmp_path / "plain", fresh()))):
        def __init__(self, **kwargs):
            super().__init__(**kwargs, data_collator=self.collate)

        @staticmethod
        def collate(examples):
            batch = collate_images(examples)
            batch["pixel_values"], batch["labels"] = mixup(batch["pixel_values"], batch["labels"])
            return batch

    trainer = make_trainer(tmp_path / "run", fresh(), cls=Mixing, method="snip", **SHORT)
    trainer.train()
    assert_exact_zeros(trainer.model)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_clear_refusals(tmp_path):
    with pytest.raises(
        ValueError, match="`enable_jit_checkpoint=True` is not supported: it saves in the middle of a step"
    ):
        VPNsTrainingArguments(output_dir=str(tmp_path), enable_jit_checkpoint=True)
    with pytest.raises(ValueError, match="`mixup_alpha` is -1"):
        VPNsTrainingArguments(output_dir=str(tmp_path), mixup_alpha=-1)
