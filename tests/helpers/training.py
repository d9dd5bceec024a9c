"""Trainers of tiny models on tiny data."""

import json

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from vpns_hf import VPNsTrainer, VPNsTrainingArguments
from vpns_hf.training.trainer_arguments import HONOURED_OBJECTS, REFUSED_OBJECTS

from .models import tiny_model

SMALL = dict(
    method="vpns",
    per_device_train_batch_size=4,
    search_epochs=1,
    num_train_epochs=1,
    score_learning_rate=1e-2,
    search_prompt_learning_rate=1e-2,
    report_to="none",
    disable_tqdm=True,
    logging_steps=2,
    use_cpu=True,
)


class Images(Dataset):
    """Random images with a class that shows in their brightness; augmentation draws from torch's global generator."""

    def __init__(self, length=16, classes=6, augment=True):
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.arange(length) % classes
        self.images = torch.rand(length, 3, 32, 32, generator=generator) - 1 + self.labels.view(-1, 1, 1, 1) / classes
        self.augment = augment

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        noise = 0.1 * torch.randn(3, 32, 32) if self.augment else 0
        return {"pixel_values": self.images[index] + noise, "labels": int(self.labels[index])}


def make_trainer(folder, model, **kwargs):
    callbacks = kwargs.pop("callbacks", None)
    data = {
        name: kwargs.pop(name)
        for name in (*HONOURED_OBJECTS, *REFUSED_OBJECTS, "prompted_train_dataset")
        if name in kwargs
    }
    data = {"train_dataset": Images(), "prompted_train_dataset": Images(augment=False)} | data
    cls = kwargs.pop("cls", VPNsTrainer)
    args = VPNsTrainingArguments(output_dir=str(folder), **SMALL | {"eval_strategy": "no"} | kwargs)
    return cls(model=model, args=args, callbacks=callbacks, **data)


def fresh(family="vit", **kwargs):
    torch.manual_seed(0)
    return tiny_model(family, **kwargs)


class StopAt(TrainerCallback):
    """Leaves the run as a kill would, right after a step of a stage."""

    def __init__(self, stage, step):
        self.stage, self.step = stage, step

    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith(self.stage) and state.global_step == self.step:
            raise KeyboardInterrupt


def history(folder):
    """Everything logged in all stages, times aside."""
    logs = [
        entry
        for path in sorted(folder.glob("*/trainer_state.json"))
        for entry in json.loads(path.read_text())["log_history"]
        if "train_runtime" not in entry
    ]
    timed = ("runtime", "per_second")
    return [{name: value for name, value in entry.items() if not name.endswith(timed)} for entry in logs]
