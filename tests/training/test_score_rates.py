"""Start and learning rate of scores in a run: what the method says, what the arguments say, and what follows."""

import logging
import math

import pytest
import torch
from helpers.methods import build, run, with_masks
from helpers.training import Images, fresh, make_trainer
from transformers import TrainerCallback

from vpns_hf import VPNsTrainingArguments
from vpns_hf.masking import kept_count, select_masks
from vpns_hf.methods import METHODS
from vpns_hf.methods.mask_schedules import GradualSparsity, LearnedMasks, StageProgress
from vpns_hf.scores import SCORE_STARTS
from vpns_hf.scores.starts import StartInputs


@pytest.mark.parametrize("start", ["lamp", "snip", "magnitude"])
def test_a_run_begins_where_it_is_asked_to(start, tmp_path):
    """The scores at the first step of the search are those of the start, of the model after its warm-up."""
    checked = []

    def compare(model, folder):
        if folder.endswith("search"):
            expected = SCORE_STARTS[start](StartInputs(model, trainer.calibration_batches))
            checked.extend(torch.equal(score, expected[name]) for name, score in model.scores().items())
            masks = select_masks({name: score.detach().abs() for name, score in model.scores().items()}, 0.9)
            checked.extend(torch.equal(mask, masks[name]) for name, mask in model.masks().items())

    model, trainer = build("hydra"), None

    class Keep(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            compare(model, args.output_dir)

    data = {"train_dataset": Images(), "prompted_train_dataset": Images(augment=False)}
    trainer = make_trainer(tmp_path, model, method="hydra", score_start=start, callbacks=[Keep()], max_steps=1, **data)
    trainer.train()
    assert checked
    assert all(checked)


class Rates(TrainerCallback):
    """Keeps, by stage, the initial learning rate of the scores and their threshold."""

    def __init__(self, sparsity):
        self.sparsity, self.seen = sparsity, {}

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        part = optimizer.optimizer.parts.get("scores")
        if part is not None:
            values = torch.cat([score.detach().abs().flatten() for score in model.scores().values()])
            kept = kept_count(len(values), self.sparsity)
            threshold = float(values.sort(descending=True).values[kept - 1])
            self.seen[args.output_dir.split("-")[-1]] = (part.param_groups[0]["initial_lr"], threshold)


def test_auto_follows_from_threshold_steps_and_schedule(tmp_path):
    rates = Rates(0.9)
    trainer = run(tmp_path, "hydra_joint", callbacks=[rates], score_learning_rate="auto", score_travel=3.0)
    (rate, threshold) = rates.seen["joint"]
    cosine = sum(0.5 * (1 + math.cos(math.pi * step / 12)) for step in range(12))
    assert rate == pytest.approx(3 * threshold / cosine, rel=1e-6)
    logged = [entry["score_learning_rate"] for entry in trainer.logs()["joint"] if "loss" in entry]
    assert logged == [pytest.approx(rate)] * 6
    assert trainer.stage_settings()[-1].roles["scores"] == ("adam", pytest.approx(rate))
    assert "scores: adam at auto" in trainer.planned_stages()[-1].row()[1]


def test_a_number_means_that_number(tmp_path):
    rates = Rates(0.9)
    trainer = run(tmp_path, "vpns_joint", callbacks=[rates], score_learning_rate=2e-3)
    assert rates.seen["joint"][0] == 2e-3
    assert not any("score_learning_rate" in entry for entry in trainer.logs()["joint"])
    assert trainer.stage_settings()[-1].roles["scores"] == ("adam", 2e-3)


def test_only_steps_that_can_change_the_mask_count(tmp_path):
    """BiP steps its scores in half of the steps; a mask that settles after half of the stage leaves six of twelve."""
    rates = Rates(0.9)
    auto = dict(score_learning_rate="auto", lr_scheduler_type="constant")
    run(tmp_path / "bip", "bip", callbacks=[rates], **auto)
    rate, threshold = rates.seen["search"]
    assert rate == pytest.approx(4 * threshold / 6, rel=1e-6)
    rates = Rates(0.9)
    settled = LearnedMasks(gradual=GradualSparsity(end=0.5), until=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "settled", with_masks("hydra_joint", settled))
        run(tmp_path / "settled", "settled", callbacks=[rates], **auto)
    rate, threshold = rates.seen["joint"]
    assert rate == pytest.approx(4 * threshold / 6, rel=1e-6)


def test_vpns_is_the_papers(tmp_path):
    args = VPNsTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    search, tune = METHODS["vpns"].stages[1:]
    assert args.role_settings("scores", search).learning_rate == 1e-4
    assert args.role_settings("prompt", search).learning_rate == 1e-4
    assert search.masks == LearnedMasks()
    assert (args.score_settings(search).start, tune.masks.is_settled(StageProgress(1, 2, 0.9))) == ("hydra", False)


@pytest.mark.parametrize(("rate", "warns"), [(1e-6, True), (1.0, False), ("auto", False)])
def test_scores_that_cannot_reach_the_threshold_are_warned_of(rate, warns, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="vpns_hf.training.score_rates"):
        run(tmp_path, "hydra", score_learning_rate=rate, total_max_steps=4)
    assert ("set `score_learning_rate='auto'`, or train for more steps" in caplog.text) == warns


def test_refusals(tmp_path):
    wrong = [("score_learning_rate", "fast"), ("score_learning_rate", -1.0), ("score_start", "lump")]
    for name, value in (*wrong, ("score_travel", 0.0)):
        with pytest.raises(ValueError, match=f"`{name}` is .*; expected"):
            VPNsTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: value})
    with pytest.raises(ValueError, match="leave one of the two out"):
        VPNsTrainingArguments(output_dir=str(tmp_path), use_cpu=True, score_travel=4.0, score_learning_rate=1e-3)
    with pytest.raises(ValueError, match="starts its scores at zero"):
        make_trainer(tmp_path, fresh(), method="movement", score_learning_rate="auto")
    with pytest.raises(ValueError, match="starts its scores at zero"):
        make_trainer(tmp_path, fresh(), method="movement", score_start="lamp")
    with pytest.raises(ValueError, match="needs steps of about the learning rate"):
        make_trainer(tmp_path, fresh(), score_learning_rate="auto", score_optim="sgd")
    assert VPNsTrainingArguments(str(tmp_path), use_cpu=True, score_learning_rate="1e-3").score_learning_rate == 1e-3
