"""Collators, losses, metrics and arguments that users hand to Trainer: used, or refused in one sentence."""

import dataclasses
import inspect
import json

import numpy as np
import pytest
import torch
from helpers.models import tiny_model
from helpers.states import assert_same_state, make_batches
from helpers.training import Images, StopAt, fresh, make_trainer
from torch.nn import functional as F
from torch.utils.data import WeightedRandomSampler, default_collate
from torchvision.transforms import v2
from transformers import DefaultDataCollator, Trainer, TrainingArguments

from vpns_hf import PromptedSparseModel, VPNsTrainer, VPNsTrainingArguments
from vpns_hf.scores import score_weights
from vpns_hf.training.losses import scoring_loss
from vpns_hf.training.trainer_arguments import (
    HONOURED,
    HONOURED_OBJECTS,
    REFUSED,
    REFUSED_OBJECTS,
    WITHOUT_EFFECT,
)

# Collators ----------------------------------------------------------------------------------------------------------


def stacked(examples):
    """As in transformers' example of image classification."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


class Renamed(Images):
    """The class under `label`, and a column that the model does not take."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {"pixel_values": item["pixel_values"], "label": item["labels"], "weight": 0.5}


def prompt_size(model):
    return max(float(parameter.detach().abs().max()) for parameter in model.prompt.parameters())


@pytest.mark.parametrize("collate", [stacked, DefaultDataCollator(), default_collate])
def test_any_collator_trains_the_prompt_as_our_own_does(collate, tmp_path):
    expected = make_trainer(tmp_path / "ours", fresh())
    expected.train()
    trainer = make_trainer(tmp_path / "theirs", fresh(), data_collator=collate)
    trainer.train()
    assert prompt_size(trainer.model) > 0
    assert_same_state(trainer.model, expected.model)


def test_other_names_and_columns(tmp_path):
    expected = make_trainer(tmp_path / "ours", fresh(), eval_dataset=Images(8, augment=False))
    expected.train()
    data = {"train_dataset": Renamed(), "prompted_train_dataset": Renamed(augment=False)}
    data["eval_dataset"] = Renamed(8, augment=False)
    trainer = make_trainer(tmp_path / "theirs", fresh(), data_collator=default_collate, **data)
    trainer.train()
    assert_same_state(trainer.model, expected.model)
    assert trainer.finished_stages[-1].metrics["eval_loss"] == expected.finished_stages[-1].metrics["eval_loss"]


def test_a_collator_that_mixes_images(tmp_path):
    cutmix = v2.CutMix(num_classes=6)

    def collate(examples):
        images, labels = cutmix(*stacked(examples).values())
        return {"pixel_values": images, "labels": labels}

    trainer = make_trainer(tmp_path, fresh(), data_collator=collate)
    trainer.train()
    assert prompt_size(trainer.model) > 0


def test_a_collator_without_a_dictionary_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, fresh(), data_collator=lambda examples: tuple(stacked(examples).values()))
    with pytest.raises(ValueError, match="gave a tuple; expected a dictionary with `pixel_values`"):
        trainer.train()


def test_a_loader_without_roles_is_refused(tmp_path):
    class Own(VPNsTrainer):
        def get_train_dataloader(self):
            return self.accelerator.prepare(torch.utils.data.DataLoader(Images(), 4, collate_fn=stacked))

    with pytest.raises(ValueError, match="does not say whether it is prompted"):
        make_trainer(tmp_path, fresh(), cls=Own).train()


# Losses -------------------------------------------------------------------------------------------------------------


def documented_loss(outputs, labels, num_items_in_batch=None):
    """As transformers documents it: the sum over the items of all accumulated batches, over their number."""
    return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


def doubled_loss(outputs, labels, num_items_in_batch=None):
    return 2 * documented_loss(outputs, labels, num_items_in_batch)


def first_gradient(folder, accumulation, **kwargs):
    trainer = make_trainer(
        folder,
        PromptedSparseModel.from_backbone(fresh().merge_and_unload(), sparsity=0.0, prompt=None),
        method="dense",
        train_dataset=Images(16, augment=False),
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=16 // accumulation,
        learning_rate=0.0,
        max_grad_norm=1e9,
        logging_steps=1,
        max_steps=1,
        **kwargs,
    )
    trainer.train()
    return next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry)


def test_the_gradient_of_an_own_loss_does_not_depend_on_accumulation(tmp_path):
    norms = [
        first_gradient(tmp_path / str(accumulation), accumulation, compute_loss_func=documented_loss)
        for accumulation in (1, 2, 4)
    ]
    assert norms[1:] == pytest.approx(norms[:1] * 2, rel=1e-4)
    assert norms[0] == pytest.approx(first_gradient(tmp_path / "model", 2), rel=1e-4)
    doubled = first_gradient(tmp_path / "doubled", 4, compute_loss_func=doubled_loss)
    assert doubled == pytest.approx(2 * norms[0], rel=1e-4)


@pytest.mark.parametrize(("name", "factor"), [("snip", 2), ("grasp", 4)])
def test_scores_follow_the_own_loss(name, factor):
    model, batches = tiny_model("vit"), make_batches()
    scores = score_weights(name, model, batches, loss=scoring_loss(doubled_loss))
    for weight, score in score_weights(name, model, batches).items():
        torch.testing.assert_close(scores[weight], factor * score, rtol=1e-4, atol=1e-9)


def test_one_shot_methods_score_by_the_own_loss(tmp_path):
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        seen.append((torch.is_grad_enabled(), len(labels)))
        return documented_loss(outputs, labels, num_items_in_batch)

    model = fresh()
    trainer = make_trainer(tmp_path, model, method="snip", compute_loss_func=loss, num_train_epochs=1)
    trainer.train()
    calibration = sum(len(batch["labels"]) for batch in trainer.calibration_batches())
    assert sum(size for _, size in seen) == calibration + 16 * 1


def test_several_labels_an_image_get_binary_cross_entropy():
    backbone = tiny_model("vit").merge_and_unload()
    backbone.config.problem_type = "multi_label_classification"
    model = tiny_model(backbone)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([[1.0, 1, 0, 0, 0, 1]] * 4)
    output = model(images, labels=labels)
    expected = F.binary_cross_entropy_with_logits(output.logits, labels)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(model.loss(output.logits, labels.long()), expected)


def test_regression_is_refused(tmp_path):
    backbone = tiny_model("vit").merge_and_unload()
    backbone.config.problem_type = "regression"
    with pytest.raises(ValueError, match="trains classifiers, and this model has `problem_type='regression'`"):
        make_trainer(tmp_path, tiny_model(backbone))


# Metrics ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metrics",
    [
        {"accuracy": {"accuracy": 0.5}},
        {"accuracy": 0.5, "accuracy_per_class": {"cat": 0.5}},
        {"accuracy": None},
        {"accuracy": 0.5, "confusion": np.eye(2), "note": "text", "tensor": torch.ones(2)},
        {"accuracy": np.float32(0.5), "other": object()},
        {"accuracy": float("nan")},
    ],
)
def test_metrics_of_any_kind_do_not_end_the_run(metrics, tmp_path):
    trainer = make_trainer(
        tmp_path,
        fresh(),
        eval_dataset=Images(8),
        eval_strategy="epoch",
        save_strategy="epoch",
        compute_metrics=lambda prediction: dict(metrics),
    )
    trainer.train()
    record = json.loads((tmp_path / "stages.json").read_text())["finished"]
    assert len(record) == 2
    assert all(isinstance(value, (int, float)) for stage in record for value in stage["metrics"].values())
    if metrics.get("accuracy") == {"accuracy": 0.5}:
        assert record[0]["metrics"]["eval_accuracy_accuracy"] == 0.5


def test_metrics_that_raise_after_a_stage_lose_nothing(tmp_path, caplog):
    def fail(prediction):
        raise KeyError("no such metric")

    trainer = make_trainer(tmp_path, fresh(), eval_dataset=Images(8), compute_metrics=fail)
    trainer.train()
    expected = make_trainer(tmp_path / "expected", fresh())
    expected.train()
    assert_same_state(trainer.model, expected.model)
    assert "The evaluation after the stage search failed; the run continues." in caplog.text


# Arguments ----------------------------------------------------------------------------------------------------------


def test_every_argument_of_the_installed_transformers_is_in_one_table():
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    tables = [set(HONOURED), set(REFUSED), set(WITHOUT_EFFECT)]
    assert sum(map(len, tables)) == len(set.union(*tables))
    assert names - set.union(*tables) == set(), "new in transformers: add it to a table of trainer_arguments.py"
    objects = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert objects - HONOURED_OBJECTS - set(REFUSED_OBJECTS) == set()
    assert not HONOURED_OBJECTS & set(REFUSED_OBJECTS)


OTHER = {
    "include_num_input_tokens_seen": "all",
    "label_names": ["target"],
    "neftune_noise_alpha": 5.0,
    "optim_target_modules": "all-linear",
    "train_sampling_strategy": "group_by_length",
}


@pytest.mark.parametrize("name", sorted(set(REFUSED) - {"parallelism_config", "bf16_full_eval", "fp16_full_eval"}))
def test_refused_arguments(name, tmp_path):
    value = OTHER.get(name, REFUSED[name].allowed[0] is False)
    with pytest.raises(ValueError, match=f"`{name}=.*` is not supported: "):
        VPNsTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: value})


@pytest.mark.parametrize(
    "given",
    [
        {"optimizers": (torch.optim.SGD([torch.zeros(1)], lr=1.0), None)},
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})},
        {"model_init": fresh},
    ],
)
def test_refused_objects(given, tmp_path):
    with pytest.raises(ValueError, match=f"VPNsTrainer does not take `{next(iter(given))}`: every stage"):
        make_trainer(tmp_path, fresh(), **given)


def test_an_own_sampler_is_refused(tmp_path):
    class Weighted(VPNsTrainer):
        def _get_train_sampler(self, dataset=None):
            return WeightedRandomSampler([1.0] * 16, 16)

    with pytest.raises(ValueError, match="`_get_train_sampler` is overridden"):
        make_trainer(tmp_path, fresh(), cls=Weighted)


def test_drop_last_and_order_are_honoured(tmp_path):
    data = {"train_dataset": Images(18), "prompted_train_dataset": Images(18)}
    trainer = make_trainer(tmp_path, fresh(), method="hydra", dataloader_drop_last=True, **data)
    assert [len(batch["labels"]) for batch in trainer.get_train_dataloader()] == [4] * 4
    assert trainer.planned_stages()[0].steps == 4
    trainer = make_trainer(tmp_path, fresh(), method="hydra", train_sampling_strategy="sequential", **data)
    labels = torch.cat([batch["labels"] for batch in trainer.get_train_dataloader()])
    assert labels.tolist() == Images(18).labels.tolist()


# Resume -------------------------------------------------------------------------------------------------------------


def stopped(folder, **kwargs):
    saving = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(folder, fresh(), callbacks=[StopAt("search", 2)], **saving | kwargs).train()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"score_learning_rate": 0.5}, "score_learning_rate 0.01 instead of 0.5"),
        ({"optim": "adamw_torch"}, "optim 'sgd' instead of 'adamw_torch'"),
        ({"num_train_epochs": 3}, "num_train_epochs 1 instead of 3"),
        ({"per_device_train_batch_size": 2}, "images per step 4 instead of 2"),
        ({"train_dataset": Images(20), "prompted_train_dataset": Images(20)}, "training data 16 instead of 20"),
        ({"method": "hydra", "seed": 3}, "method 'vpns' instead of 'hydra', seed 42 instead of 3"),
    ],
)
def test_a_run_is_not_resumed_under_other_settings(changed, message, tmp_path):
    stopped(tmp_path)
    with pytest.raises(ValueError, match=f"holds a run with {message}"):
        make_trainer(tmp_path, fresh(), **changed).train(resume_from_checkpoint=True)


def test_another_backbone_or_prompt_is_not_resumed(tmp_path):
    stopped(tmp_path)
    for model, what in ((fresh("resnet"), "model configuration|pretrained weights"), (fresh(prompt_size=2), "model")):
        with pytest.raises(ValueError, match=f"holds a run with .*({what})"):
            make_trainer(tmp_path, model).train(resume_from_checkpoint=True)


def test_what_does_not_change_results_may_change(tmp_path):
    stopped(tmp_path / "run")
    trainer = make_trainer(tmp_path / "run", fresh(), save_strategy="no", logging_steps=1)
    trainer.train(resume_from_checkpoint=True)
    whole = make_trainer(tmp_path / "whole", fresh())
    whole.train()
    assert_same_state(trainer.model, whole.model)


def test_layers_that_were_frozen_by_hand_are_refused(tmp_path):
    """A stage would train them all the same."""
    model = fresh()
    model.freeze_masks()
    model.backbone.vit.embeddings.requires_grad_(False)
    with pytest.raises(ValueError, match=r"1 of 14 prunable weights .*patch_embeddings.*requires_grad_\(True\)"):
        make_trainer(tmp_path, model, method="tune")
    make_trainer(tmp_path, model.requires_grad_(True), method="tune")
