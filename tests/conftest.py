"""Tests run on the CPU, without network, on tiny models."""

import gc
import os
from types import SimpleNamespace

from helpers import hub_server

# Read when the clients are imported. The address answers only where a test asks for the fixture `hub`.
os.environ["HF_ENDPOINT"] = hub_server.ENDPOINT
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from helpers.models import tiny_backbone
from PIL import Image as PILImage
from transformers import ViTImageProcessor, set_seed
from transformers.utils import logging

from vpns_hf.methods import METHODS

ENVIRONMENT = os.environ


def pytest_collection_finish():
    """Leave what was imported out of garbage collection: accelerate collects after every stage, a second each time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_environment():
    """`Dataset.map(num_proc=...)` puts a copy in the place of `os.environ`, which libraries hold already."""
    yield
    os.environ = ENVIRONMENT  # noqa: B003


@pytest.fixture(autouse=True)
def _seeded():
    torch.set_num_threads(1)
    set_seed(0)
    # The precision that one test asked for must not be that of the next.
    AcceleratorState._reset_state()


@pytest.fixture(autouse=True)
def _verbosity():
    """`log_level` of a trainer is that of the whole process."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture(autouse=True)
def _methods():
    """Keep the methods that a test adds from the tests that follow."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on loopback that the clients of this process and of its children talk to, signed in as "me"."""
    cache = str(tmp_path / "hub-cache")
    for name, value in {"HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": cache, "HF_TOKEN": "hf_me"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))
    # The client waits for seconds between its attempts.
    for module in (huggingface_hub.utils._http, huggingface_hub.file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
    with hub_server.running() as server:
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def task(tmp_path):
    """A folder with a tiny pretrained ViT and one with images whose brightness tells the class."""
    tiny_backbone("vit").save_pretrained(tmp_path / "backbone")
    size = {"height": 32, "width": 32}
    ViTImageProcessor(size=size, image_mean=[0.4] * 3, image_std=[0.3] * 3).save_pretrained(tmp_path / "backbone")
    features = Features({"image": Image(), "label": ClassLabel(names=["dark", "grey", "bright"])})
    rng = np.random.default_rng(0)

    def rows(count):
        for index in range(count):
            pixels = rng.integers(0, 80, (28, 28)) + 80 * (index % 3)
            yield {"image": PILImage.fromarray(pixels.astype(np.uint8)), "label": index % 3}

    splits = {name: Dataset.from_list(list(rows(n)), features=features) for name, n in (("train", 60), ("test", 30))}
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    return tmp_path
