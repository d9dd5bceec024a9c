"""A runtime in a process of its own."""

import numpy as np
import pytest
import torch
from helpers.models import tiny_model

from vpns_hf.latency.benchmark import _Files, _Turns
from vpns_hf.latency.processes import RuntimeFailure, runtime_processes

IMAGES = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)


def test_a_process_runs_the_model_and_tells_why_it_cannot(tmp_path):
    model = tiny_model(sparsity=0.75)
    model.freeze_masks()
    model.save_pretrained(tmp_path / "model")
    sources = {"torch": tmp_path / "model", "sparse": tmp_path / "nothing"}
    with runtime_processes(sources, threads=1) as processes:
        logits, note = processes["torch"].load(IMAGES[:2])
        with torch.no_grad():
            expected = model(torch.from_numpy(IMAGES)).logits.numpy()
        np.testing.assert_allclose(logits, expected[:2], atol=1e-6)
        np.testing.assert_allclose(processes["torch"].logits(IMAGES), expected, atol=1e-6)
        assert note is None
        assert 0 < processes["torch"].time() < 60
        with pytest.raises(RuntimeFailure, match=r"OSError: .*nothing"):
            processes["sparse"].load(IMAGES)
        processes["torch"]._process.kill()
        with pytest.raises(RuntimeFailure, match="its process ended with exit code -9"):
            processes["torch"].time()
    assert not any(process._process.is_alive() for process in processes.values())


class Runtime:
    """Stands for a process: logits that are off by a number, and times that were drawn."""

    def __init__(self, off=0.0, seconds=()):
        self.off, self.seconds, self.closed = off, iter(seconds), False

    def load(self, example):
        return example[:, :, 0, 0] + self.off, None

    def close(self):
        self.closed = True


def test_other_logits_than_those_of_torch_are_refused_except_of_int8():
    processes = {"torch": Runtime(), "sparse": Runtime(1e-6), "openvino": Runtime(0.5), "onnxruntime-int8": Runtime(9)}
    wrong, left_out = processes["openvino"], {}
    turns = _Turns(processes, _Files({}, {}, {}), IMAGES, 2, left_out)
    turns._refuse_other_logits({name: each.load(IMAGES)[0] for name, each in processes.items()})
    assert list(processes) == ["torch", "sparse", "onnxruntime-int8"]
    assert left_out == {"openvino": "its logits differ from those of torch by 0.5"}
    assert wrong.closed
