"""Run a method on a tiny model."""

from helpers.training import Images, fresh, make_trainer
from vpns_hf.methods import get_method

SPARSITY = 0.9


def build(method, family="vit", **kwargs):
    """A tiny model as the method needs it, with a new head unless it maps labels."""
    backbone = dict(get_method(method).backbone)
    labels = {"num_labels": 4} if backbone else {"num_labels": 6, "new_head": True}
    return fresh(family, sparsity=SPARSITY, scope="global", **labels | backbone | kwargs)


def run(folder, method, model=None, **kwargs):
    model = model or build(method)
    classes = model.config.num_labels
    data = {"train_dataset": Images(classes=classes), "prompted_train_dataset": Images(classes=classes, augment=False)}
    settings = {"total_max_steps": 12, "head_warm_up_epochs": 0.5, "calibration_images_per_class": 2}
    trainer = make_trainer(folder, model, method=method, **data | settings | kwargs)
    trainer.train()
    return trainer
