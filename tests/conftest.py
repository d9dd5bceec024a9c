"""Tests run on the CPU, without network, on tiny models."""

import os
from types import SimpleNamespace

import hub_server

# Read when the clients are imported. The address answers only where a test asks for the fixture `hub`.
os.environ["HF_ENDPOINT"] = hub_server.ENDPOINT
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import datasets
import huggingface_hub
import pytest
import torch
from transformers import set_seed


@pytest.fixture(autouse=True)
def _seeded():
    torch.set_num_threads(1)
    set_seed(0)


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
