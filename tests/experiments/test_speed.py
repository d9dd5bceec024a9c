"""How much smaller and faster a run made its model: what is timed, and what is said of it."""

import logging

import pytest
import torch
from helpers.models import tiny_model

from vpns_hf.experiments import speed
from vpns_hf.experiments.speed import measure_milliseconds, smaller_and_faster
from vpns_hf.report.tables import MISSING, Result, results_markdown

PRUNED = Result("vpns after tuning", 0.9, 0.8, None, 10, 2_000, 4.0)


def frozen(**kwargs):
    model = tiny_model(sparsity=0.9, **kwargs)
    model.freeze_masks()
    return model


def test_every_pruned_model_and_dense_kernels_take_turns(monkeypatch):
    models = {"a": frozen(), "b": frozen()}
    asked = []

    def timed(actions, rounds=11):
        asked.append((list(actions), rounds))
        for action in actions.values():
            action()
        return {name: float(index + 1) for index, name in enumerate(actions)}

    monkeypatch.setattr(speed, "median_milliseconds", timed)
    models["b"].train()
    assert measure_milliseconds(models) == {"dense": 1.0, "a": 2.0, "b": 3.0}
    assert asked[-1] == (["dense", "a", "b"], 11)
    assert {rounds for _, rounds in asked[:-1]} == {3}
    assert models["b"].training


def test_measured_times_are_positive():
    found = measure_milliseconds({"a": frozen()})
    assert list(found) == ["dense", "a"]
    assert min(found.values()) > 0


def test_nothing_is_measured_where_there_is_nothing_to_measure(monkeypatch):
    assert measure_milliseconds({}) == {}
    assert measure_milliseconds({"a": frozen(), "b": tiny_model()}) == {}
    assert measure_milliseconds({"a": frozen().to("meta")}) == {}
    monkeypatch.setattr(speed, "_LONGEST", 0.0)
    assert measure_milliseconds({"a": frozen()}) == {}


def test_a_failure_is_a_warning(monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(speed, "median_milliseconds", fail)
    model = frozen()
    with caplog.at_level(logging.WARNING):
        assert measure_milliseconds({"a": model}) == {}
    assert "The speed of the model was not measured: out of memory" in caplog.text


@pytest.mark.parametrize(
    ("dense", "said"),
    [
        (6.0, "4.0 times smaller (2.0 kB for 8.0 kB) and 1.50 times as fast (4.00 ms for 6.00 ms an image, batch 1, "),
        (4.0, "4.0 times smaller (2.0 kB for 8.0 kB) and no faster (4.00 ms for 4.00 ms an image, batch 1, "),
        (2.0, "4.0 times smaller (2.0 kB for 8.0 kB) and no faster (4.00 ms for 2.00 ms an image, batch 1, "),
        (None, "4.0 times smaller (2.0 kB for 8.0 kB)."),
    ],
)
def test_the_line(dense, said, monkeypatch):
    monkeypatch.setattr(speed, "processor_name", lambda: "Abacus 3")
    line = smaller_and_faster(PRUNED, 8_000, dense)
    assert line.startswith(f"On this machine (Abacus 3) the pruned model is {said}")
    threads = torch.get_num_threads()
    assert (f"{threads} thread" in line) == (dense is not None)


def test_the_table_has_milliseconds_where_they_were_measured():
    dense = Result("dense after tuning", 0.0, 0.9, None, 10, 8_000, None)
    head, _, first, second = results_markdown([dense, PRUNED]).splitlines()
    assert head.endswith("| file size | ms an image |")
    assert first.endswith(f"| 8.0 kB | {MISSING} |")
    assert second.endswith("| 2.0 kB | 4.00 |")
    assert "ms an image" not in results_markdown([dense])
