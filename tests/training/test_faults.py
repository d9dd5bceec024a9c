"""What goes wrong outside the code: full disks, read-only folders, lost files, divergence, collapsed layers."""

import errno
import json
import logging
import os
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from helpers.killed_run import finished_stages, leftovers
from helpers.models import tiny_model
from helpers.states import assert_same_state
from helpers.training import Images, fresh, make_trainer
from transformers import TrainerCallback

from vpns_hf import PromptedSparseModel
from vpns_hf.training.checkpoints import damage, last_complete_checkpoint

SAVING = dict(save_strategy="steps", save_steps=2)


def resumed(folder, **settings):
    trainer = make_trainer(folder, fresh(), **SAVING | settings)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def whole(folder, **settings):
    trainer = make_trainer(folder, fresh(), **SAVING | settings)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return whole(tmp_path_factory.mktemp("faults")).model


# Disks ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_files():
    """Limits the size of files that this process may write, which fails as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class LimitedAt(Images):
    """A data set from whose n-th item on files may not grow."""

    def __init__(self, limit, item, **kwargs):
        super().__init__(**kwargs)
        self.limit, self.left = limit, item

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            self.limit()
        return super().__getitem__(index)


@pytest.mark.parametrize("size", [20_000, 200_000])
def test_full_disk_at_a_checkpoint(size, small_files, tmp_path, uninterrupted):
    """Files of 20 kB stop the weights, files of 200 kB the optimizer."""
    data = LimitedAt(lambda: small_files(size), 10)
    trainer = make_trainer(tmp_path, fresh(), train_dataset=data, **SAVING)
    with pytest.raises(OSError, match=r"The checkpoint of step \d in .*0-search could not be written: .*make room"):
        trainer.train()
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert leftovers(tmp_path) == []
    assert damage(last_complete_checkpoint(tmp_path / "0-search")) is None
    assert_same_state(resumed(tmp_path).model, uninterrupted)


def test_full_disk_at_the_end_of_a_stage(small_files, tmp_path, monkeypatch, uninterrupted):
    trainer = make_trainer(tmp_path, fresh(), **SAVING)
    monkeypatch.setattr(trainer, "evaluate", lambda: small_files(20_000) or {})
    trainer.eval_dataset = Images(4)
    with pytest.raises(OSError, match=r"The model of the stage search, .* could not be written: .*make room"):
        trainer.train()
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert leftovers(tmp_path) == []
    assert finished_stages(tmp_path) == 0
    assert_same_state(resumed(tmp_path).model, uninterrupted)


def test_full_disk_when_the_model_is_saved(small_files, tmp_path):
    """The model that is there already stays whole."""
    trainer = whole(tmp_path, max_steps=1)
    trainer.save_model()
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*") if path.is_file()}
    small_files(10_000)
    with pytest.raises(Exception, match=r"(?i)file too large|27"):
        trainer.save_model()
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*") if path.is_file()} == before
    assert leftovers(tmp_path) == []
    assert_same_state(PromptedSparseModel.from_pretrained(tmp_path), trainer.model)


def test_folder_that_cannot_be_written_fails_before_training(tmp_path, monkeypatch):
    """On a read-only folder nothing is trained first."""
    trainer = make_trainer(tmp_path, fresh(), train_dataset=None)

    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr("io.open", refuse)
    with pytest.raises(OSError, match=r"run\.lock may not be written: .* its folder may only be read"):
        trainer.train()


def test_checkpoints_rotate_by_step_and_not_by_the_clock(tmp_path):
    """A clock that is set back after each save makes the newest checkpoint the oldest."""

    class Clock(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            for path in Path(args.output_dir).glob("checkpoint-*"):
                future = time.time() + 86_400 * (1000 - int(path.name.split("-")[1]))
                os.utime(path, (future, future))

    trainer = make_trainer(tmp_path, fresh(), **SAVING, max_steps=6, save_total_limit=2, callbacks=[Clock()])
    trainer.train()
    for stage in ("0-search", "1-tune"):
        kept = sorted(path.name for path in (tmp_path / stage).glob("checkpoint-*"))
        assert kept == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(tmp_path):
    trainer = make_trainer(tmp_path, fresh(), **SAVING)
    tmp_path.chmod(0o555)
    with pytest.raises(OSError, match=r"run\.lock may not be written"):
        trainer.train()


# Data ----------------------------------------------------------------------------------------------------------------


class Files(Images):
    """Images that are read from files."""

    def __init__(self, folder, **kwargs):
        super().__init__(**kwargs)
        self.folder = folder
        for index, image in enumerate(self.images):
            torch.save(image, folder / f"{index}.pt")

    def __getitem__(self, index):
        return super().__getitem__(index) | {"pixel_values": torch.load(self.folder / f"{index}.pt")}


@pytest.mark.parametrize("workers", [0, 1])
def test_vanished_file_of_the_data(workers, tmp_path):
    (tmp_path / "images").mkdir()
    data = Files(tmp_path / "images")
    settings = {"train_dataset": data, "prompted_train_dataset": None}
    settings |= {"dataloader_num_workers": workers, "search_max_steps": 10, "max_steps": 1}
    expected = whole(tmp_path / "whole", **settings)

    class Vanishing(Images):
        """As a validation set, which is read in the middle of a stage, it takes the training images away."""

        def __getitem__(self, index):
            if (tmp_path / "images").is_dir():
                shutil.move(tmp_path / "images", tmp_path / "lost")
            return super().__getitem__(index)

    during = {"eval_dataset": Vanishing(4), "eval_strategy": "steps", "eval_steps": 4}
    trainer = make_trainer(tmp_path / "run", fresh(), **SAVING, **settings, **during)
    with pytest.raises(FileNotFoundError, match=r"images/\d+\.pt"):
        trainer.train()
    checkpoint = last_complete_checkpoint(tmp_path / "run/0-search")
    # Some images were read ahead.
    assert checkpoint.name in ("checkpoint-4", "checkpoint-6")
    shutil.move(tmp_path / "lost", tmp_path / "images")
    assert_same_state(resumed(tmp_path / "run", **settings).model, expected.model)


def test_batch_of_one_image(tmp_path):
    """A ResNet's last features are 1 x 1 pixels on small images; five images leave one over."""
    trainer = make_trainer(
        tmp_path, fresh("timm_resnet"), train_dataset=Images(5), prompted_train_dataset=None, **SAVING
    )
    with pytest.raises(ValueError, match=r"batch of one image .* there is one in 5 images in batches of 4; choose"):
        trainer.train()
    fine = make_trainer(
        tmp_path / "fine",
        fresh("timm_resnet"),
        train_dataset=Images(5),
        prompted_train_dataset=None,
        per_device_train_batch_size=3,
        max_steps=2,
        **SAVING,
    )
    fine.train()
    assert finished_stages(tmp_path / "fine") == 2


# Divergence ----------------------------------------------------------------------------------------------------------


class Spoiled(Images):
    """One image is not a number, or too large a one, from its n-th use on."""

    def __init__(self, value, use, **kwargs):
        super().__init__(**kwargs)
        self.value, self.left = value, use

    def __getitem__(self, index):
        item = super().__getitem__(index)
        if index == 3:
            self.left -= 1
        return item if index != 3 or self.left > 0 else item | {"pixel_values": item["pixel_values"] * self.value}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stage", ["search", "tune"])
def test_loss_that_is_not_finite(value, stage, tmp_path):
    data = Spoiled(value, {"search": 2, "tune": 5}[stage])
    trainer = make_trainer(
        tmp_path, fresh(), train_dataset=data, prompted_train_dataset=data, search_epochs=2, **SAVING
    )
    rate = {"search": "score_learning_rate", "tune": "learning_rate"}[stage]
    with pytest.raises(FloatingPointError, match=rf"at step \d+ of the stage {stage}: .* nan.* lower `{rate}`"):
        trainer.train()
    for checkpoint in tmp_path.glob("*/checkpoint-*"):
        assert all(p.isfinite().all() for p in PromptedSparseModel.from_pretrained(checkpoint).parameters())
    assert finished_stages(tmp_path) == {"search": 0, "tune": 1}[stage]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The loss before the step was finite, so only the weights show it."""
    trainer = make_trainer(tmp_path, fresh(), method="dense", learning_rate=1e38, save_strategy="steps", save_steps=1)
    with pytest.raises(FloatingPointError, match=r"Training diverged at step \d of the stage tune"):
        trainer.train()
    for checkpoint in tmp_path.glob("*/checkpoint-*"):
        assert all(p.isfinite().all() for p in PromptedSparseModel.from_pretrained(checkpoint).parameters())


# Layers without weights ----------------------------------------------------------------------------------------------


def test_collapsed_layers_are_named_once(caplog):
    model = tiny_model("vit", sparsity=0.5)
    masks = {name: mask.clone() for name, mask in model.masks().items()}
    first, second, *_ = masks
    masks[second].zero_()
    with caplog.at_level(logging.WARNING):
        model.apply_masks(masks)
        model.apply_masks(masks)
        assert len(caplog.messages) == 1
        assert f"no weight is left in {second}. " in caplog.messages[0]
        masks[first].zero_()
        model.apply_masks(masks)
    assert len(caplog.messages) == 2
    assert f"no weight is left in {first}. " in caplog.messages[1]


@pytest.mark.parametrize("step", ["build", "select", "freeze"])
def test_collapse_is_seen_when_masks_are_selected_and_frozen(step, caplog):
    with caplog.at_level(logging.WARNING):
        model = tiny_model("vit", scope="global", sparsity=0.999 if step == "build" else 0.5)
        if step == "select":
            model.set_sparsity(0.999)
        elif step == "freeze":
            with torch.no_grad():
                model.scores()["classifier.weight"].zero_()
            model.update_masks()
            assert "collapse" not in caplog.text
            model.freeze_masks()
    empty = [name for name, mask in model.masks().items() if not mask.any()]
    assert empty
    assert "Layer collapse" in caplog.text
    assert all(name in caplog.text for name in empty)


def test_no_warning_without_collapse(caplog):
    with caplog.at_level(logging.WARNING):
        tiny_model("vit", sparsity=0.9).freeze_masks()
    assert "collapse" not in caplog.text


# Nothing left to do --------------------------------------------------------------------------------------------------


def test_resume_after_the_end_warns_and_changes_nothing(tmp_path, caplog):
    first = whole(tmp_path, max_steps=2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with caplog.at_level(logging.WARNING):
        again = resumed(tmp_path, max_steps=2)
    assert "has ended, so nothing is trained" in caplog.text
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert_same_state(again.model, first.model)


def test_stage_without_steps_left(tmp_path, caplog):
    """Killed between the last checkpoint and the end of the stage, in the middle of an epoch; or asked for fewer."""
    first = whole(tmp_path, max_steps=6)
    record = first._record()
    record.finished.pop()
    record.save()
    with pytest.raises(ValueError, match="max_steps 6 instead of 4"):
        resumed(tmp_path, max_steps=4)
    with caplog.at_level(logging.WARNING):
        again = resumed(tmp_path, max_steps=6)
    assert "No step of the stage tune is left" in caplog.text
    assert again.state.global_step == 6
    assert_same_state(again.model, first.model)


def test_stages_of_no_epochs(tmp_path):
    """Nothing to tune: the model of the search, frozen."""
    trainer = make_trainer(tmp_path, fresh(), num_train_epochs=0)
    trainer.train()
    steps = [stage["steps"] for stage in json.loads((tmp_path / "stages.json").read_text())["finished"]]
    assert steps == [8, 0]
    assert trainer.model.config.state == "frozen"
    pretrained, weights = fresh().backbone_state(), trainer.model.backbone_state()
    assert all(torch.equal(weights[name], pretrained[name] * mask) for name, mask in trainer.model.masks().items())
