"""Figures, table, sentences and picture of what was measured."""

import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from vpns_hf.hub import BEGIN, END
from vpns_hf.latency import Latency, LatencyReport, Machine
from vpns_hf.report.latency import latency_markdown, latency_notes, latency_section, latency_table, with_latency
from vpns_hf.report.latency_figure import latency_figure
from vpns_hf.report.tables import MISSING

DRAWN = np.random.default_rng(0).uniform(0.01, 0.02, size=(3, 9))
MACHINE = Machine("Abacus 3", 2, 0.5, {"torch": "2.9.0"})


def row(runtime, seconds, batch=1, threads=1, **facts):
    return Latency(runtime, batch, threads, tuple(seconds), **dict(file_bytes=2000, memory_bytes=3_000_000) | facts)


def report(*rows, **facts):
    return LatencyReport(MACHINE, 0.9, (32, 32), rows, **facts)


def steady(**milliseconds):
    """Rows of one batch size and number of threads whose rounds are all alike."""
    return [row(name.replace("_", "-"), [each / 1000] * 4) for name, each in milliseconds.items()]


def test_figures_are_those_of_numpy():
    found = report(row("torch", DRAWN[0]), row("sparse", DRAWN[1], batch=1), row("sparse", DRAWN[2], batch=8))
    time = found.rows[1].milliseconds
    quartiles = 1000 * np.quantile(DRAWN[1], [0.25, 0.5, 0.75])
    assert [time.lower, time.median, time.upper] == pytest.approx(quartiles)
    assert found.rows[2].images_per_second == pytest.approx(8 / np.median(DRAWN[2]))
    speedup = found.speedup(found.rows[1])
    by_round = np.quantile(DRAWN[0] / DRAWN[1], [0.25, 0.5, 0.75])
    assert [speedup.lower, speedup.median, speedup.upper] == pytest.approx(by_round)
    assert found.speedup(found.rows[2]) is None  # torch has no row with this batch size


def test_it_survives_json():
    rows = steady(torch=4.0, sparse=2.0)
    found = report(
        *rows, left_out={"openvino": "not installed"}, int8="static", accuracy_of="days", dense_accuracy=0.9
    )
    facts = json.loads(found.to_json())
    assert LatencyReport.from_dict(facts) == found
    assert facts["rows"][1]["milliseconds"]["median"] == 2.0
    assert facts["rows"][1]["times_as_fast_as_dense_torch"]["median"] == 2.0
    assert facts["rows"][1]["images_per_second"] == 500


def test_the_table():
    rows = [*steady(torch=4.0, sparse=20.0), row("onnxruntime", [0.2] * 4, accuracy=0.875, memory_bytes=None)]
    assert latency_markdown(report(*rows)).splitlines() == [
        "| runtime | batch | threads | ms | quartiles | images/s | speed-up | file | memory | accuracy |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| torch | 1 | 1 | 4.00 | 4.00-4.00 | 250.0 | 1.00 | 2.0 kB | 3.0 MB | {MISSING} |",
        f"| sparse | 1 | 1 | 20.0 | 20.0-20.0 | 50.0 | 0.20 | 2.0 kB | 3.0 MB | {MISSING} |",
        f"| onnxruntime | 1 | 1 | 200 | 200-200 | 5.0 | 0.02 | 2.0 kB | {MISSING} | 87.50% |",
    ]


def test_the_table_fits_a_terminal():
    console = Console(width=80, record=True)
    console.print(latency_table(report(*steady(torch=4.0, sparse=2.0))))
    text = console.export_text()
    assert "sparse" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def sentence(found, other):
    (line,) = [line for line in latency_notes(found) if f"dense one in {other}" in line]
    return line


def test_it_says_where_the_model_is_not_faster():
    found = report(
        *steady(torch=4.0, onnxruntime=1.0, sparse=2.0, onnxruntime_int8=0.5),
        row("torch", [0.01] * 4, batch=8),
        row("sparse", [0.02] * 4, batch=8),
    )
    assert sentence(found, "torch") == (
        "In sparse kernels the pruned model is faster than the dense one in torch with batch 1 and 1 thread (2.00 "
        "times as fast, quartiles 2.00 to 2.00), and NOT faster than the dense one in torch with batch 8 and 1 thread "
        "(0.50 times as fast, quartiles 0.50 to 0.50)."
    )
    assert "NOT faster than the dense one in onnxruntime with batch 1 and 1 thread (0.50" in sentence(
        found, "onnxruntime"
    )
    assert not any("in onnxruntime-int8" in line for line in latency_notes(found))


def test_faster_in_half_of_the_rounds_is_not_faster():
    found = report(row("torch", [0.02] * 4), row("sparse", [0.01, 0.01, 0.03, 0.03]))
    assert "is NOT faster" in sentence(found, "torch")
    found = report(row("torch", [0.02] * 5), row("sparse", [0.01, 0.01, 0.01, 0.01, 0.09]))
    assert "is faster" in sentence(found, "torch")


def test_it_says_on_what_and_what_is_missing():
    rows = [*steady(torch=4.0), row("sparse", [0.002] * 4, threads=2, note="3 of 4 layers sparse")]
    found = report(*rows, left_out={"openvino": "not installed (openvino)"}, int8="dynamic", accuracy_of="days, test")
    text = "\n".join(latency_notes(found))
    assert "Measured on Abacus 3, 2 cores, load average 0.5, torch 2.9.0; images of 32 x 32 pixels, float32." in text
    assert "batch 1 and 2 threads: 3 of 4 layers sparse." in text
    assert "onnxruntime-int8 is dynamic" in text
    assert "Accuracy: days, test." in text
    assert "Not measured: openvino, not installed (openvino)." in text
    assert "hold for the dense model, too" in text


def test_a_known_accuracy_is_not_that_of_int8():
    found = report(*steady(torch=4.0, onnxruntime_int8=1.0)).with_accuracy(0.8, "days, as the card says", 0.9)
    assert [each.accuracy for each in found.rows] == [0.8, None]
    assert (found.accuracy_of, found.dense_accuracy) == ("days, as the card says", 0.9)


CARD = f"---\ntags: [a]\n---\n# Mine\n{BEGIN}\n## Use\n\nSo.\n\n## Limits\n\nMany.\n{END}\nMy words.\n"


def test_the_section_comes_before_the_limits_and_replaces_an_earlier_one():
    first, second = report(*steady(torch=4.0)), report(*steady(torch=5.0))
    once = with_latency(CARD, first)
    assert once == CARD.replace("## Limits", f"{latency_section(first)}\n\n## Limits")
    assert with_latency(once, second) == with_latency(CARD, second)
    assert with_latency(once, first) == once
    with pytest.raises(ValueError, match="has no part between"):
        with_latency("# Mine", first)


def test_the_picture_shows_medians_quartiles_and_accuracies():
    rows = [row("torch", DRAWN[0], accuracy=0.75), row("sparse", DRAWN[1], accuracy=0.7)]
    (axes,) = latency_figure(report(*rows, dense_accuracy=0.8)).axes
    points = {each.get_label(): each.lines[0].get_xydata()[0] for each in axes.containers}
    assert points["torch"] == pytest.approx([1000 * np.median(DRAWN[0]), 75])
    assert points["sparse"] == pytest.approx([1000 * np.median(DRAWN[1]), 70])
    ((left, _), (right, _)) = axes.containers[0].lines[2][0].get_segments()[0]
    assert [left, right] == pytest.approx(1000 * np.quantile(DRAWN[0], [0.25, 0.75]))
    (line,) = [each for each in axes.get_lines() if each.get_label() == "dense (80.00%)"]
    assert list(line.get_ydata()) == [80, 80]


def test_the_picture_without_accuracies_names_the_runtimes():
    rows = [*steady(torch=4.0, sparse=2.0), *(replace(each, batch=8) for each in steady(torch=9.0, sparse=8.0))]
    panels = latency_figure(report(*rows, *(replace(each, threads=2) for each in steady(torch=1.0)))).axes
    assert [axes.get_title() for axes in panels if axes.get_visible()] == [
        "batch 1, 1 thread",
        "batch 8, 1 thread",
        "batch 1, 2 threads",
    ]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["torch", "sparse"]
