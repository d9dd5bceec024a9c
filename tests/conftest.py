"""Tests run on the CPU, without network, on tiny models."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import set_seed


@pytest.fixture(autouse=True)
def _seeded():
    torch.set_num_threads(1)
    set_seed(0)
    # The precision that one test asked for must not be that of the next.
    AcceleratorState._reset_state()
