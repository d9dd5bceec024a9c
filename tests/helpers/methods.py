"""Run a method on a tiny model."""

from dataclasses import replace

from transformers import TrainerCallback

from helpers.training import Images, fresh, make_trainer
from vpns_hf.methods import METHODS, get_method

SPARSITY = 0.9


def build(method, family="vit", **kwargs):
    """A tiny model as the method needs it, with a new head unless it maps labels."""
    backbone = dict(get_method(method).backbone)
    labels = {"num_labels": 4} if backbone else {"num_labels": 6, "new_head": True}
    return fresh(family, **{"sparsity": SPARSITY, "scope": "global"} | labels | backbone | kwargs)


def run(folder, method, model=None, resume=None, **kwargs):
    model = model or build(method)
    classes = model.config.num_labels
    data = {"train_dataset": Images(classes=classes), "prompted_train_dataset": Images(classes=classes, augment=False)}
    settings = {"total_max_steps": 12, "head_warm_up_epochs": 0.5, "calibration_images_per_class": 2}
    trainer = make_trainer(folder, model, method=method, **data | settings | kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def with_masks(method, masks):
    """The method with another mask schedule in its last stage."""
    *first, last = METHODS[method].stages
    return replace(METHODS[method], stages=(*first, replace(last, masks=masks)))


class AtStageBegin(TrainerCallback):
    """Calls a function with the model and the stage's folder as each stage begins to train."""

    def __init__(self, function):
        self.function = function

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.function(model, args.output_dir)
