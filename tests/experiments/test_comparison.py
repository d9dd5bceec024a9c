"""Results of a comparison: the file that processes share, statistics, tables and the picture."""

import json
import logging
import multiprocessing
import os
import signal
from dataclasses import asdict, replace
from itertools import pairwise

import matplotlib.image
import pytest
from matplotlib.colors import to_hex
from rich.console import Console

from vpns_hf.experiments.figure import comparison_figure, plot_comparison
from vpns_hf.experiments.results import Cell, CellResult, append_result, claim, read_results
from vpns_hf.experiments.tables import (
    comparison_markdown,
    comparison_table,
    differences_markdown,
    paired_differences,
    summary_markdown,
    transfer_markdown,
)
from vpns_hf.report.tables import MISSING

FORK = multiprocessing.get_context("fork")


def result(method="hydra", sparsity=0.9, seed=0, accuracy=0.5, **changes):
    values = dict(
        accuracy_prompted=None,
        validation_accuracy=0.4,
        measured_sparsity=sparsity,
        steps=100,
        warm_up_steps=10,
        images=3200,
        forward_images=4000,
        backward_images=3200,
        seconds=12.5,
        trained_weights=1000,
        splits={"masks": "train"},
        settings="a1",
    )
    return CellResult(method, sparsity, seed, accuracy, **(values | changes))


def runs(method, sparsity, *accuracies, **changes):
    return [result(method, sparsity, seed, accuracy, **changes) for seed, accuracy in enumerate(accuracies)]


DENSE = runs("dense", 0.0, 0.80, 0.82, 0.84)
HYDRA = runs("hydra", 0.9, 0.70, 0.74, 0.72)
VPNS = runs("vpns", 0.9, 0.71, 0.77, accuracy_prompted=0.78)


# Results as lines


def test_line_holds_everything():
    one = result(accuracy_prompted=0.51)
    assert CellResult.from_line(one.to_line()) == one
    assert "\n" not in result(method="two\nlines").to_line()
    assert one.cell == Cell("hydra", 0.9, 0)


@pytest.mark.parametrize(
    "line",
    ["", "nonsense", "[1]", "3", "{}", '{"method": "hydra"}', json.dumps(asdict(result()) | {"more": 1})],
)
def test_line_that_is_no_result(line):
    with pytest.raises(ValueError, match=r"result|Expecting"):
        CellResult.from_line(line)


def test_text_instead_of_a_number_is_no_result():
    with pytest.raises(ValueError, match="no result"):
        CellResult.from_line(json.dumps(asdict(result()) | {"accuracy": "high"}))


@pytest.mark.parametrize(
    "changes", [{"accuracy": 71.0}, {"accuracy": float("nan")}, {"measured_sparsity": -0.1}, {"seconds": -1}]
)
def test_numbers_out_of_range(changes):
    with pytest.raises(ValueError, match=f"`{next(iter(changes))}`"):
        result(**changes)


# The file of results


def test_append_and_read(tmp_path):
    path = tmp_path / "run" / "results.jsonl"
    assert read_results(path) == []
    for one in HYDRA:
        append_result(path, one)
    assert read_results(path) == HYDRA
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("length", [1, 40, -1])
def test_cut_off_last_line_is_skipped_and_ended(tmp_path, caplog, length):
    path = tmp_path / "results.jsonl"
    append_result(path, HYDRA[0])
    with path.open("a") as file:
        file.write((HYDRA[1].to_line() + "\n")[:length])
    with caplog.at_level(logging.WARNING):
        assert read_results(path) == HYDRA[:1]
    assert "last line" in caplog.text
    append_result(path, HYDRA[2])
    caplog.clear()
    assert read_results(path) == [HYDRA[0], HYDRA[2]]
    assert "Line 2" in caplog.text


def test_damaged_line_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(f"{HYDRA[0].to_line()}\n{HYDRA[1].to_line()[:-3]}\n{HYDRA[2].to_line()}\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*results\.jsonl is damaged"):
        read_results(path)


def test_first_result_of_a_cell_counts(tmp_path):
    path = tmp_path / "results.jsonl"
    other = replace(HYDRA[0], settings="b2")
    for one in (HYDRA[0], replace(HYDRA[0], accuracy=0.1), other):
        append_result(path, one)
    assert read_results(path) == [HYDRA[0], other]


def test_line_that_does_not_fit_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", lambda file, data: len(data) - 1)
    with pytest.raises(
        OSError, match=r"A result in .*results\.jsonl could not be written: the disk is full; make room"
    ):
        append_result(tmp_path / "results.jsonl", HYDRA[0])


def write_many(path, method):
    for seed in range(200):
        append_result(path, result(method, seed=seed))


def test_processes_append_whole_lines(tmp_path):
    path = tmp_path / "results.jsonl"
    writers = [FORK.Process(target=write_many, args=(path, method)) for method in ("hydra", "vpns")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(path.read_text().splitlines()) == 400
    assert {one.cell for one in read_results(path)} == {Cell(m, 0.9, s) for m in ("hydra", "vpns") for s in range(200)}


# Claims


def hold(folder, cell, told, end):
    with claim(folder, cell) as won:
        told.send(won)
        end.wait(60)


class Holder:
    """Another process that tries to hold a claim until it is told to end."""

    def __init__(self, folder, cell):
        told, tells = FORK.Pipe(duplex=False)
        self.end = FORK.Event()
        self.process = FORK.Process(target=hold, args=(folder, cell, tells, self.end))
        self.process.start()
        assert told.poll(30)
        self.won = told.recv()


def claimed(folder, cell):
    with claim(folder, cell) as won:
        return won


def test_claim_is_won_by_one_process(tmp_path):
    cell = Cell("hydra", 0.9, 0)
    first = Holder(tmp_path / "claims", cell)
    second = Holder(tmp_path / "claims", cell)
    second.end.set()
    assert (first.won, second.won) == (True, False)
    second.process.join(30)
    assert not claimed(tmp_path / "claims", cell)
    assert claimed(tmp_path / "claims", replace(cell, seed=1))
    first.end.set()
    first.process.join(30)
    assert (first.process.exitcode, second.process.exitcode) == (0, 0)
    assert claimed(tmp_path / "claims", cell)


def test_claim_of_a_killed_process_is_free(tmp_path):
    cell = Cell("hydra", 0.9, 0)
    holder = Holder(tmp_path, cell)
    assert holder.won
    assert not claimed(tmp_path, cell)
    os.kill(holder.process.pid, signal.SIGKILL)
    holder.process.join(30)
    assert claimed(tmp_path, cell)


def test_claim_ends_with_an_error_and_excludes_its_own_process(tmp_path):
    cell = Cell("../a/b", 0.9, 0)

    def fail():
        with claim(tmp_path, cell) as won:
            assert won
            assert not claimed(tmp_path, cell)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert claimed(tmp_path, cell)
    assert not (tmp_path.parent / "a").exists()


# Tables


def table_of(markdown):
    """The cells of each row by column, without the ruler."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    columns, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def test_markdown():
    assert comparison_markdown([*HYDRA, *DENSE, *VPNS], paper={("hydra", 0.9): 0.935, ("vpns", 0.5): 0.1}) == (
        "**90% sparse, mean ± standard deviation of 3 seeds**\n"
        "\n"
        "| method | accuracy (%) | with prompt (%) | vs dense (points) | paper (its own setting, %) | steps "
        "| images forward (k) | images backward (k) | seconds | trained weights |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n"
        "| dense | 82.00 ± 2.00 | – | – | – | 100 | 4.0 | 3.2 | 12 | 1,000 |\n"  # noqa: RUF001
        "| hydra | 72.00 ± 2.00 | – | -10.00 | 93.50 | 100 | 4.0 | 3.2 | 12 | 1,000 |\n"  # noqa: RUF001
        "| vpns | 74.00 ± 4.24 (n=2) | 78.00 ± 0.00 (n=2) | -8.00 | – | 100 | 4.0 | 3.2 | 12 | 1,000 |"  # noqa: RUF001
    )


def test_summary():
    table = summary_markdown([*DENSE, *HYDRA, *VPNS, *runs("vpns", 0.8, 0.75, 0.79, 0.77)], ["vpns", "hydra"])
    assert table.splitlines() == [
        "| test accuracy (%) | 80% sparse | 90% sparse |",
        "|---|---:|---:|",
        "| dense | 82.00 ± 2.00 | 82.00 ± 2.00 |",
        "| vpns | 77.00 ± 2.00 | 74.00 ± 4.24 (n=2) |",
        "| hydra | – | 72.00 ± 2.00 |",  # noqa: RUF001
    ]


def test_differences():
    """By seed: 71 - 70 and 77 - 74."""
    table = differences_markdown([*DENSE, *HYDRA, *VPNS], [("vpns", "hydra"), ("vpns", "vpns"), ("vpns", "omp")])
    assert table.splitlines()[2:] == ["| vpns - hydra | 90% | +2.00 ± 1.41 | 2 |"]


def test_methods_and_sparsities_as_asked():
    half = runs("hydra", 0.5, 0.8, 0.8, 0.8)
    every = comparison_markdown([*HYDRA, *half, *DENSE, *VPNS], methods=["rigl", "vpns", "dense", "hydra"])
    titles = [line for line in every.splitlines() if line.startswith("**")]
    assert [title.split()[0] for title in titles] == ["**50%", "**90%"]
    rows = table_of(comparison_markdown([*HYDRA, *half, *DENSE], methods=["rigl", "hydra"], sparsities=[0.5]))
    assert [row["method"] for row in rows] == ["dense", "rigl", "hydra"]
    assert rows[2]["vs dense (points)"] == "-2.00"
    assert set(list(rows[1].values())[1:]) == {"–"}  # noqa: RUF001


def test_cells_that_were_not_run_are_missing():
    (dense, hydra) = table_of(comparison_markdown(HYDRA))
    assert set(list(dense.values())[1:]) == {"–"}  # noqa: RUF001
    assert hydra["accuracy (%)"] == "72.00 ± 2.00"
    assert hydra["vs dense (points)"] == "–"  # noqa: RUF001


def test_one_seed_shows_no_spread():
    markdown = comparison_markdown([DENSE[0], HYDRA[0]])
    assert markdown.startswith("**90% sparse, 1 seed**")
    assert [row["accuracy (%)"] for row in table_of(markdown)] == ["80.00", "70.00"]
    assert [row["accuracy (%)"] for row in table_of(comparison_markdown([*DENSE, HYDRA[0]]))][1] == "70.00 (n=1)"


def test_columns_that_say_nothing_are_left_out():
    (columns, *_) = table_of(comparison_markdown([*DENSE, *HYDRA], paper={("hydra", 0.5): 0.9}))
    assert not {"with prompt (%)", "paper (its own setting, %)", "measured sparsity"} & set(columns)


def test_measured_sparsity_is_shown_where_it_differs():
    channels = runs("channels", 0.9, 0.6, 0.6, measured_sparsity=0.873)
    rows = table_of(comparison_markdown([*DENSE, *HYDRA, *channels]))
    assert [row["measured sparsity"] for row in rows] == ["0.00%", "90.00%", "87.30%"]


def test_costs_are_means_over_the_seeds():
    pair = [result(steps=100, seconds=10.0, forward_images=2_000_000), result(seed=1, steps=201, seconds=13.6)]
    row = table_of(comparison_markdown(pair))[1]
    assert (row["steps"], row["seconds"], row["images forward (k)"]) == ("150", "12", "1,002.0")


def test_paper_of_the_reference_and_in_percent():
    rows = table_of(comparison_markdown([*DENSE, *HYDRA], paper={("dense", 0.0): 0.9545}))
    assert [row["paper (its own setting, %)"] for row in rows] == ["95.45", "–"]  # noqa: RUF001
    with pytest.raises(ValueError, match="paper"):
        comparison_markdown(DENSE, paper={("hydra", 0.9): 93.5})


def test_nothing_run_yet():
    assert "nothing run yet" in comparison_markdown([])
    assert [row["method"] for row in table_of(comparison_markdown([]))] == ["dense"]
    assert [row["accuracy (%)"] for row in table_of(comparison_markdown(DENSE))] == ["82.00 ± 2.00"]


def test_names_are_shown_as_they_are():
    one = runs("a|b [bold]c", 0.9, 0.5)
    assert r"| a\|b [bold]c |" in comparison_markdown(one)
    assert "a|b [bold]c" in printed(comparison_table(one))


def printed(table, width=120):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_terminal_shows_the_same_cells():
    results = [*DENSE, *HYDRA, *runs("vpns_zero_prompt", 0.5, 0.8, accuracy_prompted=0.81)]
    paper = {("hydra", 0.9): 0.935}
    text = printed(comparison_table(results, paper=paper))
    markdown = comparison_markdown(results, paper=paper)
    assert "…" not in text
    assert text.count("90% sparse") == text.count("50% sparse") == 1
    cells = [cell for line in markdown.splitlines() if line.startswith("| ") for cell in line.strip("|").split(" | ")]
    assert all(word in text for cell in cells for word in cell.split())


def test_results_of_other_settings_are_refused():
    mixed = [*DENSE, replace(HYDRA[0], settings="b2")]
    for show in (comparison_markdown, comparison_table, comparison_figure):
        with pytest.raises(ValueError, match="a1, b2"):
            show(mixed)
    with pytest.raises(ValueError, match="a1, b2"):
        paired_differences(mixed, "hydra", "dense")


def test_a_cell_counts_once():
    twice = comparison_markdown([*DENSE, *HYDRA, replace(HYDRA[0], accuracy=0.1)])
    assert twice == comparison_markdown([*DENSE, *HYDRA])


# Differences by seed


def test_paired_differences():
    (difference,) = paired_differences([*HYDRA, *VPNS, *runs("vpns", 0.5, 0.9)], "vpns", "hydra")
    assert (difference.method, difference.baseline, difference.sparsity) == ("vpns", "hydra", 0.9)
    assert difference.n == 2
    assert difference.mean == pytest.approx(2.0)  # 1 and 3 points
    assert difference.sd == pytest.approx(2**0.5)


def test_paired_differences_to_dense_at_every_sparsity():
    results = [*reversed(DENSE), *HYDRA, *runs("hydra", 0.5, 0.81)]
    half, ninety = paired_differences(results, "hydra", "dense")
    assert (half.sparsity, half.n, half.sd) == (0.5, 1, None)
    assert half.mean == pytest.approx(1)
    assert (ninety.sparsity, ninety.n) == (0.9, 3)
    assert ninety.mean == pytest.approx(-10)  # -10, -8 and -12 points
    assert ninety.sd == pytest.approx(2)


def test_paired_differences_need_common_seeds():
    assert paired_differences([HYDRA[0], VPNS[1]], "vpns", "hydra") == []


# The picture


def many(methods=25, sparsities=(0.8, 0.9, 0.95)):
    means = {
        (index, sparsity): 0.9 - index / 100 - sparsity / 10 for index in range(methods) for sparsity in sparsities
    }
    return [one for (index, s), mean in means.items() for one in runs(f"m{index}", s, mean - 0.005, mean + 0.005)]


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def bars(figure):
    """The error bars of each method: the line and the segments."""
    return {
        container.get_label(): (container.lines[0], container.lines[2][0].get_segments())
        for container in figure.axes[0].containers
    }


def test_figure_shows_means_and_spreads():
    figure = comparison_figure([*DENSE, *HYDRA, *runs("hydra", 0.5, 0.8)])
    axes = figure.axes[0]
    ((line, segments),) = bars(figure).values()
    assert list(line.get_xdata()) == pytest.approx([0.5, 0.1])
    assert list(line.get_ydata()) == pytest.approx([0.8, 0.72])
    assert [tuple(segment[:, 1]) for segment in segments] == [pytest.approx((0.8, 0.8)), pytest.approx((0.7, 0.74))]
    assert axes.get_xlim()[0] > axes.get_xlim()[1]  # dense is on the left
    figure.draw_without_rendering()
    assert [text.get_text() for text in axes.get_xticklabels()] == ["50%", "90%"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("sparsity", "test accuracy without prompt (%)")


def test_figure_shows_dense_as_a_dashed_line_with_a_band():
    figure = comparison_figure([*DENSE, *HYDRA])
    line = next(line for line in figure.axes[0].get_lines() if line.get_label() == "dense (82.00%)")
    assert list(line.get_ydata()) == pytest.approx([0.82, 0.82])
    assert line.get_linestyle() == "--"
    (band,) = figure.axes[0].patches
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((0.80, 0.84))


def test_figure_tells_many_methods_apart():
    figure = comparison_figure(many())
    lines = [line for line, _ in bars(figure).values()]
    assert len(lines) == 25
    assert len({(to_hex(line.get_color()), line.get_marker()) for line in lines}) == 25
    assert len({line.get_linestyle() for line in lines}) == 3


def test_figure_draws_controls_dashed():
    drawn = bars(comparison_figure(many(4), controls={"m1", "m3"}))
    assert [line.get_linestyle() for line, _ in drawn.values()] == ["-", "--", "-", "--"]


def test_figure_legend_is_sorted_at_the_highest_common_sparsity():
    late = [*runs("vpns", 0.95, 0.1), *runs("late", 0.95, 0.9)]
    figure = comparison_figure([*DENSE, *HYDRA, *VPNS, *runs("set", 0.9, 0.1), *late])
    names = ["dense (82.00%)", "vpns (74.00%)", "hydra (72.00%)", "set (10.00%)", "late (–)"]  # noqa: RUF001
    assert legend_of(figure) == names
    assert figure.legends[0].get_title().get_text() == "mean accuracy at 90% sparsity"
    assert [text.split()[0] for text in legend_of(comparison_figure(many()))] == [f"m{index}" for index in range(25)]


def test_figure_legend_covers_nothing_and_every_bar_is_inside():
    figure = comparison_figure([*DENSE, *many()])
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    axes = figure.axes[0]
    assert not legend.overlaps(axes.get_window_extent())
    assert legend.y0 >= 0
    low, high = axes.get_ylim()
    ends = [y for _, segments in bars(figure).values() for segment in segments for y in segment[:, 1]]
    assert low < min(ends) < max(ends) < high


def test_figure_draws_methods_side_by_side():
    figure = comparison_figure(many(3))
    figure.draw_without_rendering()
    shown = [line.get_transform().transform(line.get_xydata())[0, 0] for line, _ in bars(figure).values()]
    assert all(2 < right - left < 10 for left, right in pairwise(shown))


def test_figure_without_methods_or_results(tmp_path):
    assert legend_of(comparison_figure(DENSE)) == ["dense (82.00%)"]
    assert not comparison_figure([]).legends
    for name, results in {"empty": [], "dense": DENSE, "one": HYDRA[:1]}.items():
        plot_comparison(results, tmp_path / f"{name}.png")


def test_picture_is_written_whole_into_a_new_folder(tmp_path):
    path = tmp_path / "figures" / "comparison.png"
    plot_comparison([*DENSE, *many(22)], path, controls=["m3"])
    assert [file.name for file in path.parent.iterdir()] == ["comparison.png"]
    assert min(matplotlib.image.imread(path).shape[:2]) > 600


# Masks tuned on other tasks ------------------------------------------------------------------------------------------


def tuned(task, method, accuracies, mode="full", **changes):
    sparsity = 0.0 if method == "dense" else 0.9
    return runs(method, sparsity, *accuracies, task=task, mode=mode, settings=f"of {task}", **changes)


TUNED = [
    *tuned("dtd", "dense", (0.80, 0.84)),
    *tuned("dtd", "dense", (0.60, 0.60), mode="linear_probe"),
    *tuned("dtd", "vpns", (0.70, 0.72), accuracy_prompted=0.75, mode="full_source_prompt"),
    *tuned("dtd", "omp", (0.60, 0.62)),
    *tuned("pets", "dense", (0.50, 0.50)),
    *tuned("pets", "vpns", (0.51, 0.53), accuracy_prompted=0.5, mode="full_source_prompt"),
    *tuned("pets", "omp", (0.40,)),
]


def test_transfer_table_has_a_column_a_task():
    rows = ["dense", "dense, linear_probe", "vpns, full_source_prompt", "omp", "random"]
    table = transfer_markdown(TUNED, ["dtd", "pets"], rows, [0.9]).replace(MISSING, "none")
    assert table.splitlines() == [
        "**90% sparse**",
        "",
        "| method | dtd (%) | pets (%) | vs dense (points, mean of the tasks) |",
        "|---|---:|---:|---:|",
        "| dense | 82.00 ± 2.83 | 50.00 ± 0.00 | none |",
        "| dense, linear_probe | 60.00 ± 0.00 | none | none |",
        "| vpns, full_source_prompt | 71.00 ± 1.41 | 52.00 ± 1.41 | -4.50 |",
        "| vpns, full_source_prompt, with its prompt | 75.00 ± 0.00 | 50.00 ± 0.00 | -3.50 |",
        "| omp | 61.00 ± 1.41 | 40.00 (n=1) | -15.50 |",
        "| random | none | none | none |",
    ]
    # Without being told, rows and sparsities are those that there are.
    assert transfer_markdown(TUNED, ["dtd", "pets"]).replace(MISSING, "none") == table.rpartition("\n")[0]
    with pytest.raises(ValueError, match="different settings"):
        transfer_markdown([*TUNED, result(task="dtd", mode="full", settings="others")], ["dtd"])


def test_tables_of_one_task_tell_modes_apart():
    of_dtd = [result for result in TUNED if result.task == "dtd"]
    table = comparison_markdown([replace(result, mask_steps=7) for result in of_dtd]).replace(MISSING, "none")
    assert "| dense, linear_probe | 60.00 ± 0.00 | none | -22.00 | 7 |" in table
    assert "| method | accuracy (%) | with prompt (%) | vs dense (points) | steps for the mask |" in table
    assert "steps for the mask" not in comparison_markdown(of_dtd)
    assert "| omp - dense, linear_probe | 90% | +1.00 ± 1.41 | 2 |" in differences_markdown(
        of_dtd, [("omp", "dense, linear_probe")]
    )


def test_other_metrics_get_columns():
    measured = [replace(run, metrics={"mean_per_class_accuracy": 0.5 + 0.1 * run.seed}) for run in HYDRA]
    table = comparison_markdown([*DENSE, *measured]).replace(MISSING, "none").splitlines()
    assert table[2].endswith("| mean per class accuracy (%) |")
    assert table[4].endswith("| none |")
    assert table[5].endswith("| 60.00 ± 10.00 |")


def test_cells_of_a_transfer_are_kept_and_claimed_apart(tmp_path):
    (one,) = tuned("user/data", "vpns", (0.5,), mode="linear_probe", mask_steps=3, metrics={"top5_accuracy": 1.0})
    append_result(tmp_path / "results.jsonl", one)
    append_result(tmp_path / "results.jsonl", replace(one, mode="full"))
    append_result(tmp_path / "results.jsonl", replace(one, task=None, mode=None))
    assert read_results(tmp_path / "results.jsonl") == [
        one,
        replace(one, mode="full"),
        replace(one, task=None, mode=None),
    ]
    assert one.cell == Cell("vpns", 0.9, 0, "user/data", "linear_probe")
    assert str(one.cell) == "user/data, vpns, linear_probe, sparsity 90%, seed 0"
    with claim(tmp_path, one.cell) as first, claim(tmp_path, replace(one.cell, mode="full")) as second:
        assert first
        assert second
    # Lines that were written before there were tasks.
    older = {key: value for key, value in asdict(one).items() if key not in ("task", "mode", "mask_steps", "metrics")}
    assert CellResult.from_line(json.dumps(older)).cell == Cell("vpns", 0.9, 0)
