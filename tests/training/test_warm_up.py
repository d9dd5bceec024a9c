"""Why a new head is warmed up before the search: scores learned under a random head mean nothing."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from torch.nn import functional as F
from transformers import AutoImageProcessor

from vpns_hf import PromptedSparseModel

DEMO = Path(__file__).parents[2] / "recipes" / "demo"


@pytest.fixture(scope="module")
def batch():
    rows = load_dataset("parquet", data_files=str(DEMO / "data/test.parquet"), split="train[:256]")
    processor = AutoImageProcessor.from_pretrained(DEMO / "model")
    images = processor([image.convert("RGB") for image in rows["image"]], return_tensors="pt")["pixel_values"]
    return images, torch.tensor(rows["label"])


def score_gradient(seed, warmed, images, labels):
    """Gradient of the task's loss to all scores, under a head drawn from this seed, as it is or trained alone."""
    torch.manual_seed(seed)
    model = PromptedSparseModel.from_backbone(str(DEMO / "model"), sparsity=0, prompt=None, new_head=True).eval()
    if warmed:
        with torch.no_grad():
            features = model.backbone.vit(images).last_hidden_state[:, 0]
        optimizer = torch.optim.Adam(model.backbone.classifier.parameters(), lr=1e-2)
        for _ in range(100):
            optimizer.zero_grad()
            F.cross_entropy(model.backbone.classifier(features), labels).backward()
            optimizer.step()
    model(images, labels=labels).loss.backward()
    return torch.cat([score.grad.flatten() for score in model.scores().values()])


@pytest.mark.parametrize(("warmed", "low", "high"), [(False, -0.3, 0.3), (True, 0.6, 1.0)])
def test_heads_agree_on_the_scores_only_after_warm_up(warmed, low, high, batch):
    gradients = [score_gradient(seed, warmed, *batch) for seed in (1, 2, 3)]
    for one, other in combinations(gradients, 2):
        assert low < F.cosine_similarity(one, other, dim=0) < high
