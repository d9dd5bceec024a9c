"""VPNsTrainer: stages, exact resume, accumulation, reproducibility."""

import copy
import json
import shutil

import pytest
import torch
from helpers.models import tiny_backbone
from helpers.states import assert_same_state
from helpers.training import Images, StopAt, fresh, history, make_trainer
from transformers import TrainerCallback

from vpns_hf import PromptedSparseModel, VPNsTrainingArguments


@pytest.mark.parametrize("family", ["vit", "swin", "resnet", "timm_vgg"])
def test_search_keeps_weights_and_tune_keeps_masks(family, tmp_path):
    model = fresh(family)
    pretrained = {name: p.detach().clone() for name, p in model.named_parameters() if not name.endswith(".scores")}
    del pretrained["prompt.top"], pretrained["prompt.bottom"], pretrained["prompt.left"], pretrained["prompt.right"]
    seen = {}

    class Watch(TrainerCallback):
        def on_train_end(self, args, state, control, model, **kwargs):
            if args.output_dir.endswith("search"):
                seen["weights"] = {
                    name: p.detach().clone() for name, p in model.named_parameters() if name in pretrained
                }
                seen["masks"] = {name: mask.clone() for name, mask in model.masks().items()}
                seen["prompt"] = model.prompt.top.detach().clone()

        def on_step_end(self, args, state, control, model, **kwargs):
            if args.output_dir.endswith("tune"):
                weights = dict(model.backbone.named_parameters())
                assert all((weights[name][~mask] == 0).all() for name, mask in model.masks().items())
                if state.global_step == 1:
                    assert (model.prompt.top - seen["prompt"]).abs().max() < 0.1

    trainer = make_trainer(tmp_path, model, callbacks=[Watch()])
    trainer.train()
    assert set(seen["weights"]) == set(pretrained)
    assert all(torch.equal(seen["weights"][name], value) for name, value in pretrained.items())
    assert seen["prompt"].abs().max() > 0
    assert model.config.state == "frozen"
    assert all(torch.equal(mask, seen["masks"][name]) for name, mask in model.masks().items())
    weights = dict(model.backbone.named_parameters())
    assert any(
        not torch.equal(weights[name], pretrained[f"backbone.{name}"])
        for name in weights
        if f"backbone.{name}" in pretrained
    )


@pytest.mark.parametrize("family", ["vit", "resnet"])
@pytest.mark.parametrize(("stage", "step"), [("search", 3), ("search", 7), ("tune", 1), ("tune", 6)])
def test_resume_equals_the_uninterrupted_run(family, stage, step, tmp_path):
    settings = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=4)
    whole = make_trainer(tmp_path / "whole", fresh(family), eval_dataset=Images(8, augment=False), **settings)
    whole.train()

    stopped = make_trainer(
        tmp_path / "stopped",
        fresh(family),
        eval_dataset=Images(8, augment=False),
        callbacks=[StopAt(stage, step)],
        **settings,
    )
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    torch.manual_seed(123)
    resumed = make_trainer(tmp_path / "stopped", fresh(family), eval_dataset=Images(8, augment=False), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(resumed.model, whole.model)
    assert history(tmp_path / "stopped") == history(tmp_path / "whole")


def test_resume_at_a_stage_boundary_and_after_the_end(tmp_path):
    whole = make_trainer(tmp_path / "whole", fresh(), save_strategy="no")
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    record = json.loads((tmp_path / "cut/stages.json").read_text())
    record["finished"] = record["finished"][:1]
    (tmp_path / "cut/stages.json").write_text(json.dumps(record))
    shutil.rmtree(tmp_path / "cut/1-tune")
    for folder in ("cut", "whole"):
        resumed = make_trainer(tmp_path / folder, fresh(), save_strategy="no")
        resumed.train(resume_from_checkpoint=True)
        assert_same_state(resumed.model, whole.model)


def test_half_written_checkpoint_is_passed_over(tmp_path):
    settings = dict(save_strategy="steps", save_steps=2)
    whole = make_trainer(tmp_path / "whole", fresh(), **settings)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped", fresh(), callbacks=[StopAt("search", 7)], **settings)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    (tmp_path / "stopped/0-search/checkpoint-6/trainer_state.json").write_text('{"global_step": ')
    resumed = make_trainer(tmp_path / "stopped", fresh(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(resumed.model, whole.model)


def test_resume_from_a_named_checkpoint(tmp_path, monkeypatch):
    """A relative path to a checkpoint of the search goes back there, although the run had ended."""
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "run", fresh(), **settings)
    whole.train()
    monkeypatch.chdir(tmp_path)
    resumed = make_trainer(tmp_path / "run", fresh(), **settings)
    resumed.train(resume_from_checkpoint="run/0-search/checkpoint-4")
    assert_same_state(resumed.model, whole.model)
    assert [stage.name for stage in resumed.finished_stages] == ["search", "tune"]


def test_a_second_run_does_not_overwrite_the_first(tmp_path):
    make_trainer(tmp_path, fresh(), max_steps=1, save_strategy="no").train()
    with pytest.raises(ValueError, match="holds an earlier run"):
        make_trainer(tmp_path, fresh()).train()
    with pytest.raises(ValueError, match="method 'vpns' instead of 'hydra'"):
        make_trainer(tmp_path, fresh(), method="hydra").train(resume_from_checkpoint=True)


def test_gradient_accumulation_equals_one_large_batch(tmp_path):
    settings = dict(save_strategy="no", logging_steps=1)
    large = make_trainer(tmp_path / "large", fresh(), per_device_train_batch_size=2, **settings)
    large.train()
    small = make_trainer(
        tmp_path / "small", fresh(), per_device_train_batch_size=1, gradient_accumulation_steps=2, **settings
    )
    small.train()
    masks = small.model.masks()
    assert all(torch.equal(mask, masks[name]) for name, mask in large.model.masks().items())
    expected = dict(large.model.named_parameters())
    for name, parameter in small.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-6)


def test_accumulated_loss_of_resnet_is_not_scaled(tmp_path):
    class Bright(Images):
        def __getitem__(self, index):
            return super().__getitem__(0)

    losses = {}
    for steps in (1, 4):
        model = fresh("resnet")
        trainer = make_trainer(
            tmp_path / str(steps),
            model,
            train_dataset=Bright(augment=False),
            prompted_train_dataset=Bright(augment=False),
            gradient_accumulation_steps=steps,
            logging_steps=1,
            max_steps=1,
            save_strategy="no",
        )
        trainer.train()
        losses[steps] = json.loads((tmp_path / str(steps) / "0-search/trainer_state.json").read_text())["log_history"][
            0
        ]
    assert losses[4]["loss"] / losses[1]["loss"] == pytest.approx(1, abs=1e-3)
    assert losses[4]["grad_norm"] / losses[1]["grad_norm"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("workers", [0, 2])
def test_same_seed_same_masks_whatever_the_workers(workers, tmp_path):
    trainers = [
        make_trainer(tmp_path / str(index), fresh(), save_strategy="no", dataloader_num_workers=count)
        for index, count in enumerate((0, workers))
    ]
    for trainer in trainers:
        trainer.train()
    assert_same_state(trainers[0].model, trainers[1].model)
    other = make_trainer(tmp_path / "other", fresh(), save_strategy="no", seed=7)
    other.train()
    masks = other.model.masks()
    assert any(not torch.equal(mask, masks[name]) for name, mask in trainers[0].model.masks().items())


def test_new_head_is_warmed_up_alone_and_carried_over(tmp_path):
    model = fresh(num_labels=3, sparsity=0.5)
    body = {name: p.detach().clone() for name, p in model.named_parameters() if "classifier" not in name}
    snapshots = {}

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            snapshots[f"{args.output_dir.split('-')[-1]} begins"] = (
                model.backbone.classifier.weight.detach().clone(),
                model.sparsity,
            )

        def on_train_end(self, args, state, control, model, **kwargs):
            name = args.output_dir.split("-")[-1]
            snapshots[f"{name} ends"] = (model.backbone.classifier.weight.detach().clone(), model.sparsity)
            if name == "warm_up":
                assert all(torch.equal(p, body[n]) for n, p in model.named_parameters() if n in body)

    data = Images(classes=3)
    make_trainer(
        tmp_path, model, callbacks=[Watch()], train_dataset=data, prompted_train_dataset=data, save_strategy="no"
    ).train()
    assert [path.name for path in sorted(tmp_path.glob("?-*"))] == ["0-warm_up", "1-search", "2-tune"]
    assert snapshots["warm_up begins"][1] == 0
    assert not torch.equal(snapshots["warm_up begins"][0], snapshots["warm_up ends"][0])
    for before, after in (("warm_up", "search"), ("search", "tune")):
        assert torch.equal(snapshots[f"{before} ends"][0], snapshots[f"{after} begins"][0])
    assert not torch.equal(snapshots["search begins"][0], snapshots["search ends"][0])
    assert snapshots["search begins"][1] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("method", ["vpns", "vpns_zero_prompt", "hydra", "dense"])
def test_methods(method, tmp_path):
    model = fresh()
    trainer = make_trainer(tmp_path, model, method=method, eval_dataset=Images(8, augment=False), save_strategy="no")
    trainer.train()
    metrics = trainer.evaluate()
    moved = max(float(p.detach().abs().max()) for p in model.prompt.parameters())
    assert (moved > 0) == (method == "vpns")
    assert ("eval_accuracy_prompted" in metrics) == (method == "vpns")
    assert model.sparsity == pytest.approx(0 if method == "dense" else 0.5, abs=1e-3)
    assert model.config.state == ("dense" if method == "dense" else "frozen")
    steps = [stage["steps"] for stage in json.loads((tmp_path / "stages.json").read_text())["finished"]]
    assert steps == {"vpns": [8, 8], "vpns_zero_prompt": [8, 8], "hydra": [4, 4], "dense": [8]}[method]


def test_zero_prompt_control_differs_from_vpns_only_by_the_prompt(tmp_path):
    """With a prompt that cannot move, VPNs and its control are the same run."""
    runs = []
    for method, rate in (("vpns", 0.0), ("vpns_zero_prompt", 1e-2)):
        trainer = make_trainer(
            tmp_path / method,
            fresh(),
            method=method,
            search_prompt_learning_rate=rate,
            prompt_learning_rate=rate,
            save_strategy="no",
        )
        trainer.train()
        runs.append(trainer.model)
    # A prompt of zeros still takes the image through pixel space and back, which rounds.
    states = [model.state_dict() for model in runs]
    assert all(torch.allclose(states[0][name].float(), states[1][name].float(), atol=1e-4) for name in states[0])


def test_logs_and_evaluation(tmp_path, capsys):
    trainer = make_trainer(tmp_path, fresh(), eval_dataset=Images(8, augment=False), save_strategy="no")
    output = trainer.train()
    history = json.loads((tmp_path / "0-search/trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6, 8]
    assert all(entry["sparsity"] == pytest.approx(0.5, abs=1e-3) for entry in logged)
    assert sum(entry["mask_flips"] for entry in logged) > 0
    assert all(entry["prompt_max"] > 0 for entry in logged)
    assert output.global_step == 16
    assert {"search_train_loss", "tune_train_loss"} <= set(output.metrics)
    lines = [line for line in capsys.readouterr().out.splitlines() if " steps, density" in line]
    assert len(lines) == 2
    assert "search: 8 steps, density 50.0" in lines[0]
    assert "accuracy prompted" in lines[1]


def test_prompted_evaluation_is_the_models_own(tmp_path):
    model, data = fresh(), Images(8, augment=False)
    trainer = make_trainer(tmp_path, model, eval_dataset=data, save_strategy="no", search_prompt_learning_rate=0.1)
    trainer.train()
    metrics, batch = trainer.evaluate(), torch.stack([data[i]["pixel_values"] for i in range(8)])
    with torch.no_grad():
        for use_prompt, name in ((False, "eval_accuracy"), (True, "eval_accuracy_prompted")):
            hits = model(batch, use_prompt=use_prompt).logits.argmax(-1) == data.labels
            assert metrics[name] == pytest.approx(hits.float().mean().item())


def test_best_model_of_the_tune_stage_is_loaded(tmp_path):
    trainer = make_trainer(
        tmp_path,
        fresh(),
        eval_dataset=Images(8, augment=False),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        learning_rate=0.5,
        save_total_limit=1,
    )
    trainer.train()
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluations[:4]), rel=1e-5)
    best = PromptedSparseModel.from_pretrained(trainer.state.best_model_checkpoint)
    assert_same_state(trainer.model, best)


def test_bf16_keeps_zeros_and_masks(tmp_path):
    trainer = make_trainer(tmp_path, fresh(), bf16=True, save_strategy="no")
    trainer.train()
    weights = dict(trainer.model.backbone.named_parameters())
    assert all((weights[name][~mask] == 0).all() for name, mask in trainer.model.masks().items())
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    images = Images(4, augment=False).images
    copied, logits = copy.deepcopy(trainer.model), trainer.model(images).logits
    assert logits.dtype == torch.float32
    with torch.no_grad():
        trainer.model.backbone.classifier.bias.add_(1)
    assert torch.equal(copied(images).logits, logits)


def test_max_steps_bound_the_stages(tmp_path):
    trainer = make_trainer(
        tmp_path,
        fresh(num_labels=3),
        train_dataset=Images(classes=3),
        prompted_train_dataset=None,
        max_steps=2,
        search_max_steps=3,
        save_strategy="no",
    )
    trainer.train()
    steps = [stage["steps"] for stage in json.loads((tmp_path / "stages.json").read_text())["finished"]]
    assert steps == [2, 3, 2]


def test_roles_have_their_own_optimizer_rate_and_schedule(tmp_path):
    seen = {}

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer, lr_scheduler, **kwargs):
            parts = optimizer.optimizer.parts
            seen[args.output_dir.split("-")[-1]] = {
                role: (type(part).__name__, part.param_groups[0]["initial_lr"], part.param_groups[0].get("momentum"))
                for role, part in parts.items()
            }

    trainer = make_trainer(
        tmp_path,
        fresh(),
        callbacks=[Watch()],
        save_strategy="no",
        score_learning_rate=3e-3,
        prompt_learning_rate=5e-2,
        optim="adamw_torch",
        score_lr_scheduler_type="constant",
    )
    trainer.train()
    assert seen["search"] == {"scores": ("Adam", 3e-3, None), "prompt": ("Adam", 1e-2, None)}
    assert {role: value[:2] for role, value in seen["tune"].items()} == {
        "prompt": ("AdamW", 5e-2),
        "weights": ("AdamW", 1e-2),
    }


def test_frequency_mapping_slices_the_head(tmp_path):
    model = fresh(label_mapping="frequency", num_labels=3)
    before, data = model.backbone.classifier.weight.detach().clone(), Images(classes=3, augment=False)
    model.set_sparsity(0)
    predicted = model(data.images).logits.argmax(-1).detach()
    model.set_sparsity(0.5)
    trainer = make_trainer(
        tmp_path, model, train_dataset=data, prompted_train_dataset=data, save_strategy="no", max_steps=1
    )
    trainer.train()
    mapped = model.config.mapped_labels
    assert len(set(mapped)) == 3
    assert (
        mapped[0] == torch.bincount(predicted[data.labels == 0], minlength=6).argmax()
        or len(set(predicted.tolist())) > 1
    )
    assert model.backbone.classifier.weight.shape == (3, 32)
    assert model(data.images).logits.shape == (16, 3)
    assert before.shape == (6, 32)
    resumed = make_trainer(
        tmp_path,
        fresh(label_mapping="frequency", num_labels=3),
        train_dataset=data,
        prompted_train_dataset=data,
        max_steps=1,
    )
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(resumed.model, model)


def test_clear_refusals(tmp_path):
    with pytest.raises(ValueError, match="needs a prompt"):
        make_trainer(tmp_path, fresh(prompt=None))
    with pytest.raises(ValueError, match="wrap it with"):
        make_trainer(tmp_path, tiny_backbone("vit"))
    with pytest.raises(ValueError, match="expected one of dense, vpns"):
        VPNsTrainingArguments(output_dir=str(tmp_path), method="vpn")
    with pytest.raises(ValueError, match=r"`sparsity` is 1.2"):
        VPNsTrainingArguments(output_dir=str(tmp_path), sparsity=1.2)
    with pytest.raises(ValueError, match="is no checkpoint of the run"):
        make_trainer(tmp_path, fresh()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_torch_compile(tmp_path):
    settings = {"save_strategy": "no", "max_steps": 2}
    compiled = make_trainer(
        tmp_path / "compiled", fresh(), torch_compile=True, torch_compile_backend="aot_eager", **settings
    )
    compiled.train()
    plain = make_trainer(tmp_path / "plain", fresh(), **settings)
    plain.train()
    assert type(compiled.model) is PromptedSparseModel
    masks = plain.model.masks()
    assert all(torch.equal(mask, masks[name]) for name, mask in compiled.model.masks().items())
