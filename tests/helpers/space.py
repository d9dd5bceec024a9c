"""Saved models for the app in `recipes/space`, and the app's modules."""

import importlib
import sys
from pathlib import Path

import torch
from transformers import ViTImageProcessor

from .states import in_state

CLONE = Path(__file__).parents[2]
SPACE = CLONE / "recipes/space"
LABELS = {0: "dark", 1: "grey", 2: "bright"}


def module(name):
    """Import a module of the app as the app itself does: from its own folder."""
    if str(SPACE) not in sys.path:
        sys.path.append(str(SPACE))
    return importlib.import_module(name)


def save(folder, state="frozen", labels=LABELS, **settings):
    """Save a tiny model with its image processor; in the frozen state its prompt is a ramp."""
    model = in_state(state, id2label=labels, new_head=True, **settings)
    if model.prompt is not None:
        for parameter in model.prompt.parameters():
            values = torch.linspace(-0.4, 0.2, parameter.numel())
            parameter.data = values.reshape(parameter.shape)
    size = {"height": 32, "width": 32}
    model.image_processor = ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    model.save_pretrained(folder)


def save_cards(parent):
    """Save two subnetworks of one backbone, and a card without weights, as `model_cards` holds them."""
    torch.manual_seed(0)
    save(parent / "half", sparsity=0.5)
    save(parent / "quarter", sparsity=0.75)
    (parent / "described").mkdir()
    (parent / "described/README.md").write_text("A card.")
