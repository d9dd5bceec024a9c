"""Tables and pictures: their content, read back from the rich tables and matplotlib figures."""

import math
from itertools import pairwise

import matplotlib.image
import numpy as np
import pytest
import torch
from helpers.models import tiny_model
from matplotlib.colors import to_hex
from rich.console import Console
from transformers import AutoModelForImageClassification, ViTConfig

from vpns_hf import SparsityReport
from vpns_hf.model.sparsity import LayerSparsity
from vpns_hf.report import Result, plot_density, plot_prompt, plot_training, results_markdown, results_table
from vpns_hf.report.confusion import confusion_figure
from vpns_hf.report.density import density_figure
from vpns_hf.report.prompt import prompt_figure
from vpns_hf.report.tables import TerminalTable, blocks_table
from vpns_hf.report.training import training_figure

RESULTS = [
    Result("dense fine-tuned", 0.0, 0.8, None, 6000, 343_210_000),
    Result("VPNs before tuning", 0.9, 0.6, 0.62, 1200, None),
    Result("VPNs after tuning", 0.9, 0.76, 0.758, 12000, 21_349),
]


def cells(table):
    """The text of every cell, row by row, without the header."""
    return [list(row) for row in (*table.rows, *([table.total] if table.total else []))]


def printed(table, width=80):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def layer(name, kept, total, macs=0):
    return LayerSparsity(name, kept, total, macs, macs * kept // total)


def make_report(*layers):
    return SparsityReport(tuple(layers), 0, 0, 0)


def deep_report(blocks=25):
    names = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
    layers = [layer(f"vit.layers.{b}.{n}.weight", 10 + b + i, 100) for b in range(blocks) for i, n in enumerate(names)]
    patches = layer("vit.embeddings.patch_embeddings.projection.weight", 9, 10)
    return make_report(patches, *layers, layer("classifier.weight", 7, 10))


def labels(axes):
    """The text of each tick by its position."""
    return {float(y): text.get_text() for y, text in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}


def texts(axes):
    return [text.get_text() for text in axes.texts]


# Tables


def test_results_table_shows_shares_of_the_dense_accuracy():
    rows = cells(results_table(RESULTS))
    assert rows == [
        ["dense fine-tuned", "0.00%", "80.00%", "–", "100.00%", "6,000", "343.2 MB"],  # noqa: RUF001
        ["VPNs before tuning", "90.00%", "60.00%", "62.00%", "75.00%", "1,200", "–"],  # noqa: RUF001
        ["VPNs after tuning", "90.00%", "76.00%", "75.80%", "95.00%", "12,000", "21.3 kB"],
    ]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_tables_show_whole_numbers_or_name_the_columns_that_are_left_out(width):
    table = results_table(RESULTS, title="Fashion-MNIST")
    text = printed(table, width)
    assert "Fashion-MNIST" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    note = " ".join(text.split()).partition("Too narrow for: ")[2].removesuffix(".")
    left_out = note.split(", ") if note else []
    shown = len(table.columns) - len(left_out)
    assert left_out == list(table.columns[shown:])
    assert shown >= {20: 1, 40: 3, 60: 5, 80: 7, 120: 7}[width]
    for row in cells(table):
        assert all(cell in text for cell in row[1:shown])
        assert not any(cell in text for cell in row[shown:] if cell.endswith("B"))


def test_text_columns_fold():
    table = TerminalTable(("what", "value"), [("data", "a long sentence that needs two lines")], text_columns=2)
    text = printed(table, 30)
    assert all(word in text for word in ["a", "long", "sentence", "that", "needs", "two", "lines"])
    assert "Too narrow" not in text


def test_results_without_a_dense_row_have_no_share():
    assert [row[4] for row in cells(results_table(RESULTS[1:]))] == ["–", "–"]  # noqa: RUF001
    untrained = Result("dense", 0.0, 0.0, None, 0, 0)
    assert cells(results_table([untrained]))[0][4:] == ["–", "0", "0 B"]  # noqa: RUF001


def test_the_first_dense_row_is_the_reference():
    other = Result("dense, other seed", 0.0, 0.4, None, 1, None)
    assert [row[4] for row in cells(results_table([*RESULTS, other]))][-1] == "50.00%"


def test_results_markdown():
    assert results_markdown(RESULTS[:2]) == (
        "| model | sparsity | accuracy | accuracy with prompt "
        "| share of dense accuracy | optimizer steps | file size |\n"
        "|---|---:|---:|---:|---:|---:|---:|\n"
        "| dense fine-tuned | 0.00% | 80.00% | – | 100.00% | 6,000 | 343.2 MB |\n"  # noqa: RUF001
        "| VPNs before tuning | 90.00% | 60.00% | 62.00% | 75.00% | 1,200 | – |"  # noqa: RUF001
    )


def test_names_are_shown_as_they_are():
    result = Result("a|b [bold]c", 0.0, 1.0, None, 1, None)
    assert "a|b [bold]c" in printed(results_table([result]), width=120)
    assert r"| a\|b [bold]c |" in results_markdown([result])


def test_no_results():
    assert cells(results_table([])) == []
    assert len(results_markdown([]).splitlines()) == 2


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (10**9, "1.0 GB"),
        (10**16, "10000.0 TB"),
    ],
)
def test_file_sizes(size, text):
    assert cells(results_table([Result("", 0.0, 1.0, None, 1, size)]))[0][-1] == text


@pytest.mark.parametrize(
    ("sparsity", "text"), [(0.99996, ">99.99%"), (0.00001, "<0.01%"), (1.0, "100.00%"), (0.99994, "99.99%")]
)
def test_percentages_never_round_to_everything_or_nothing(sparsity, text):
    assert cells(results_table([Result("", sparsity, 1.0, None, 1, None)]))[0][1] == text


def test_blocks_table_sums_layers_by_block():
    report = make_report(
        layer("vit.patch.weight", 1, 4, 400),
        layer("vit.layers.0.q.weight", 10, 100, 1000),
        layer("vit.layers.0.fc.weight", 40, 300, 9000),
        layer("classifier.weight", 6, 1596),
    )
    assert cells(blocks_table(report)) == [
        ["vit.patch", "75.00%", "1", "4", "25.00%"],
        ["vit.layers.0", "87.50%", "50", "400", "13.00%"],
        ["classifier", "99.62%", "6", "1,596", "–"],  # noqa: RUF001
        ["total", "97.15%", "57", "2,000", "13.46%"],
    ]


def test_blocks_table_of_a_model():
    report = tiny_model().sparsity_report()
    rows = cells(blocks_table(report))
    assert [row[0] for row in rows] == [*report.blocks(), "total"]
    assert rows[-1][1:4] == ["50.00%", f"{report.kept:,}", f"{report.total:,}"]


# Density


def test_density_bars_are_the_densities_in_network_order():
    report = tiny_model().sparsity_report()
    axes = density_figure(report).axes[0]
    assert len(axes.patches) == len(report.layers)
    for index, (bar, each) in enumerate(zip(axes.patches, report.layers, strict=True)):
        assert bar.get_width() == 100 * each.kept / each.total
        assert bar.get_y() + bar.get_height() / 2 == pytest.approx(index)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first layer is at the top


def test_density_names_each_layer_of_a_small_model():
    axes = density_figure(tiny_model().sparsity_report()).axes[0]
    names = list(labels(axes).values())
    assert names[:3] == ["patch_embeddings.projection", "layers.0.q_proj", "layers.0.k_proj"]
    assert names[-2:] == ["layers.1.fc2", "classifier"]
    assert texts(axes).count("50.00%") == len(names) == 14


def test_density_names_stay_distinct():
    names = ("layers.0.attention.output", "layers.0.output", "layers.0.attention.query")
    axes = density_figure(make_report(*(layer(f"bert.encoder.{name}.dense.weight", 1, 2) for name in names))).axes[0]
    assert list(labels(axes).values()) == [f"{name}.dense" for name in names]


def test_density_line_and_title_give_the_whole():
    figure = density_figure(make_report(layer("a.weight", 20, 100), layer("b.weight", 40, 1100)))
    axes = figure.axes[0]
    (line,) = axes.get_lines()
    assert list(line.get_xdata()) == [5, 5]
    assert line.get_linestyle() == "--"
    assert "overall 5.00%" in texts(axes)
    assert figure.get_suptitle().splitlines()[1] == "95.00% sparse overall: 60 of 1,200 weights kept"
    assert (axes.get_xscale(), axes.get_xlabel()) == ("linear", "weights kept (%)")
    assert axes.get_xlim()[0] == 0


def test_density_is_logarithmic_where_small_bars_would_vanish():
    axes = density_figure(make_report(layer("a.weight", 1, 1000), layer("b.weight", 900, 1000))).axes[0]
    assert axes.get_xscale() == "log"
    assert "logarithmic" in axes.get_xlabel()
    assert axes.get_xlim()[0] < 0.1
    assert axes.get_xlim()[1] > 90


def test_density_shade_changes_with_the_block():
    names = ("patch.weight", "layers.0.a.weight", "layers.0.b.weight", "layers.1.a.weight")
    axes = density_figure(make_report(*(layer(name, 1, 2) for name in names))).axes[0]
    assert [a == b for a, b in pairwise(to_hex(bar.get_facecolor()) for bar in axes.patches)] == [False, True, False]


def test_density_of_many_layers_names_blocks_only():
    figure = density_figure(deep_report())
    axes = figure.axes[0]
    assert len(axes.patches) == 152
    named = labels(axes)
    assert named[0.0] == "patch_embeddings.projection"
    assert named[3.5] == "layers.0"  # in the middle of layers 1 to 6
    assert named[151.0] == "classifier"
    assert set(named.values()) >= {f"layers.{block}" for block in range(25)}
    assert 8 <= figure.get_figheight() <= 20


def test_density_labels_of_many_small_blocks_do_not_overlap():
    report = make_report(*(layer(f"net.stages.{index}.conv.weight", 1, 2) for index in range(300)))
    figure = density_figure(report)
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].get_yticklabels()), key=lambda box: box.y0)
    assert len(boxes) > 30
    assert all(low.y1 <= high.y0 for low, high in pairwise(boxes))


def test_density_marks_layers_without_weights():
    figure = density_figure(make_report(layer("a.weight", 0, 10), layer("b.weight", 5, 10), layer("c.weight", 0, 10)))
    crosses = next(line for line in figure.axes[0].get_lines() if line.get_marker() == "x")
    assert list(crosses.get_ydata()) == [0, 2]
    assert figure.legends[0].get_texts()[0].get_text() == "no weight left (2 of 3 layers)"
    assert not density_figure(make_report(layer("b.weight", 5, 10))).legends


def test_density_of_an_empty_network(tmp_path):
    plot_density(make_report(layer("a.weight", 0, 10)), tmp_path / "density.png")
    assert (tmp_path / "density.png").is_file()


# Prompt


def gray_model():
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=16,
        patch_size=8,
        num_labels=2,
        num_channels=1,
    )
    backbone = AutoModelForImageClassification.from_config(config)
    return tiny_model(backbone, image_size=16, image_mean=[0.5], image_std=[0.5])


def with_prompt(model, scale=0.2):
    with torch.no_grad():
        for parameter in model.prompt.parameters():
            parameter.uniform_(-scale, scale)
    return model


def shown(axes):
    """The picture of a panel as [3, h, w]."""
    return torch.from_numpy(np.array(axes.images[0].get_array())).permute(2, 0, 1)


def strip_of(figure):
    return next(child for child in figure.axes[1].child_axes if child.get_xlabel())


def test_prompt_panels_show_image_prompt_and_sum():
    model, pixels = with_prompt(tiny_model()), torch.rand(3, 32, 32)
    figure = prompt_figure(model, (pixels - 0.5) / 0.5)
    delta = model.prompt.delta().detach()
    largest = delta.abs().max()
    torch.testing.assert_close(shown(figure.axes[0]), pixels)
    torch.testing.assert_close((2 * shown(figure.axes[1]) - 1) * largest, delta)
    torch.testing.assert_close(shown(figure.axes[2]), (pixels + delta).clamp(0, 1))
    assert all(panel.images[0].get_interpolation() == "nearest" for panel in figure.axes[:3])


def test_prompt_scale_is_symmetric_in_pixel_units():
    model = tiny_model()
    with torch.no_grad():
        model.prompt.top[0, 0, 0] = -51 / 255
        model.prompt.left[2, 0, 0] = 20 / 255
    figure = prompt_figure(model, torch.zeros(3, 32, 32))
    assert "largest change 51/255" in figure.axes[1].get_title()
    strip = strip_of(figure)
    assert strip.get_xlim() == pytest.approx((-51, 51))
    assert strip.get_xlabel() == "added to each colour channel, in 1/255"
    assert shown(figure.axes[1])[0, 0, 0] == pytest.approx(0)
    assert shown(figure.axes[1])[0, 16, 16] == 0.5


def test_prompt_on_a_shrunk_image_shows_it_as_it_is_placed():
    model, pixels = with_prompt(tiny_model(prompt_inner_size=24)), torch.rand(3, 32, 32)
    figure = prompt_figure(model, (pixels - 0.5) / 0.5)
    placed = model.prompt.place(pixels[None])[0]
    torch.testing.assert_close(shown(figure.axes[0]), placed)
    torch.testing.assert_close(shown(figure.axes[2]), (placed + model.prompt.delta().detach()).clamp(0, 1))
    assert "shrunk to 24 x 24 pixels" in figure.axes[0].get_title()


def test_prompt_of_one_channel_is_grey():
    model = with_prompt(gray_model())
    figure = prompt_figure(model, torch.zeros(1, 16, 16))
    delta = model.prompt.delta().detach()
    torch.testing.assert_close((2 * shown(figure.axes[1]) - 1) * delta.abs().max(), delta.expand(3, -1, -1))
    assert strip_of(figure).get_xlabel() == "added to each pixel, in 1/255"


def test_prompt_of_zero_is_mid_grey():
    figure = prompt_figure(tiny_model(), torch.zeros(3, 32, 32))
    assert (shown(figure.axes[1]) == 0.5).all()
    assert "largest change 0/255" in figure.axes[1].get_title()


def test_prompt_title_and_half_precision_images():
    figure = prompt_figure(tiny_model(), torch.zeros(3, 32, 32, dtype=torch.bfloat16), title="VPNs on Flowers")
    assert figure.get_suptitle() == "VPNs on Flowers"


def test_prompt_leaves_the_model_alone():
    model = with_prompt(tiny_model()).train()
    prompt_figure(model, torch.zeros(3, 32, 32))
    assert model.training
    assert all(parameter.grad is None for parameter in model.prompt.parameters())


def test_prompt_needs_a_prompt_and_one_image_that_fits():
    with pytest.raises(ValueError, match="has no prompt to show"):
        prompt_figure(tiny_model(prompt=None), torch.zeros(3, 32, 32))
    for shape in ((1, 3, 32, 32), (1, 32, 32), (3, 16, 32)):
        with pytest.raises(ValueError, match=r"expected \(3, 32, 32\)"):
            prompt_figure(tiny_model(), torch.zeros(shape))


# Training

STAGES = {
    "warm_up": [{"step": 2, "loss": 2.0, "sparsity": 0.0}, {"step": 4, "train_loss": 2.0}],
    "search": [
        {"step": 10, "loss": 1.5, "sparsity": 0.9, "mask_flips": 300},
        {"step": 10, "eval_accuracy": 0.5, "eval_accuracy_prompted": 0.55},
        {"step": 20, "loss": 1.0, "sparsity": 0.9, "mask_flips": 100},
        {"step": 20, "eval_accuracy": 0.6, "eval_accuracy_prompted": 0.65},
    ],
    "tune": [
        {"step": 10, "loss": 0.5, "sparsity": 0.9},
        {"step": 16, "eval_accuracy": 0.8, "eval_accuracy_prompted": 0.75},
    ],
}


def points(line):
    return [(x, y) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True) if not math.isnan(x)]


def lines(axes):
    """The points of the plotted series by label; the lines between stages are left out."""
    return {line.get_label(): points(line) for line in axes.get_lines() if line.get_label() != "_stage"}


def test_training_accuracies_over_the_steps_of_all_stages():
    accuracy = training_figure(STAGES).axes[0]
    assert lines(accuracy) == {
        "without prompt (last: 80.00%)": [(14, 0.5), (24, 0.6), (40, 0.8)],
        "with prompt (last: 75.00%)": [(14, 0.55), (24, 0.65), (40, 0.75)],
    }
    assert "(%)" in accuracy.get_ylabel()


def test_training_loss_and_mask_changes():
    figure = training_figure(STAGES)
    assert list(lines(figure.axes[1]).values()) == [[(2, 2.0), (14, 1.5), (24, 1.0), (34, 0.5)]]
    assert list(lines(figure.axes[2]).values()) == [[(14, 300), (24, 100)]]
    assert [axes.get_ylabel() for axes in figure.axes[1:]] == ["training loss", "mask entries\nchanged per log"]
    assert figure.axes[2].get_xlabel().startswith("optimizer steps")


def test_training_lines_break_between_stages():
    (line,) = (line for line in training_figure(STAGES).axes[1].get_lines() if line.get_label() != "_stage")
    assert np.isnan(line.get_xdata()).tolist() == [False, True, False, False, True, False]


def test_training_stages_are_shaded_and_named():
    figure = training_figure(STAGES)
    for axes in figure.axes:
        spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
        assert spans == [(0, 4), (4, 24), (24, 40)]
    # A narrow stage only has room for its name.
    assert texts(figure.axes[0]) == ["warm up", "search\n90.00% sparse", "tune\n90.00% sparse"]
    assert [text.get_rotation() for text in figure.axes[0].texts] == [90, 0, 0]


def test_training_of_a_dense_model_says_so():
    figure = training_figure({"tune": [{"step": 5, "loss": 1.0, "sparsity": 0.0}]})
    assert "tune\ndense" in texts(figure.axes[0])
    assert len(figure.axes) == 2  # no mask changes, no panel for them


def test_training_reference_is_a_grey_line():
    figure = training_figure(STAGES, dense={"dense fine-tuned": 0.93})
    line = next(line for line in figure.axes[0].get_lines() if line.get_label() == "dense fine-tuned (93.00%)")
    assert list(line.get_ydata()) == [0.93, 0.93]
    red, green, blue = (to_hex(line.get_color())[start : start + 2] for start in (1, 3, 5))
    assert red == green == blue
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "dense fine-tuned (93.00%)"


def test_training_legend_does_not_cover_data():
    figure = training_figure(STAGES, dense={"dense fine-tuned": 0.93})
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert all(not legend.overlaps(axes.get_window_extent()) for axes in figure.axes)
    assert all(axes.get_legend() is None for axes in figure.axes)


@pytest.mark.parametrize(
    ("stages", "missing"),
    [
        ({}, ["no evaluation was logged", "no training loss was logged"]),
        ({"search": [], "tune": []}, ["no evaluation was logged", "no training loss was logged"]),
        ({"tune": [{"step": 0, "eval_accuracy": 0.5}]}, ["no training loss was logged"]),
        ({"search": [{"step": 1, "loss": 1.0, "mask_flips": 3}], "tune": []}, ["no evaluation was logged"]),
        ({"tune": [{"step": 3, "eval_accuracy_prompted": 0.5}]}, ["no training loss was logged"]),
    ],
)
def test_training_says_what_was_not_logged(stages, missing):
    figure = training_figure(stages)
    figure.draw_without_rendering()
    assert [text for axes in figure.axes for text in texts(axes) if text.startswith("no ")] == missing


def test_training_stage_without_logs_takes_no_room():
    search, tune = ([{"step": 10, "eval_accuracy": accuracy}] for accuracy in (0.5, 0.7))
    figure = training_figure({"warm_up": [], "search": search, "tune": tune})
    assert list(lines(figure.axes[0]).values()) == [[(10, 0.5), (20, 0.7)]]
    assert texts(figure.axes[0]) == ["search", "tune"]


# Files


def test_pictures_are_written_whole_into_new_folders(tmp_path):
    folder = tmp_path / "run" / "figures"
    plot_density(deep_report(2), folder / "density.png")
    plot_prompt(tiny_model(), torch.zeros(3, 32, 32), str(folder / "prompt.png"), title="A prompt")
    plot_training(STAGES, folder / "training.png", dense={"dense": 0.9})
    assert sorted(path.name for path in folder.iterdir()) == ["density.png", "prompt.png", "training.png"]
    for path in folder.iterdir():
        picture = matplotlib.image.imread(path)
        assert min(picture.shape[:2]) > 600
        assert picture[..., :3].min() < 0.2


def test_a_failed_picture_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "training.png"
    path.write_bytes(b"old")

    def fail(self, file, **kwargs):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_training(STAGES, path)
    assert path.read_bytes() == b"old"


def test_confusion_counts_and_shades_rows():
    figure = confusion_figure([0, 0, 0, 1, 2, 2], [0, 0, 1, 1, 0, 2], ["cat", "dog", "emu"])
    axes = figure.axes[0]
    counts = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert counts == {(0, 0): "2", (0, 1): "1", (1, 1): "1", (2, 0): "1", (2, 2): "1"}
    shares = axes.images[0].get_array()
    assert np.allclose(shares, [[2 / 3, 1 / 3, 0], [0, 1, 0], [0.5, 0, 0.5]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "emu"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert figure.get_suptitle() == "66.67% of 6 images are right"


def test_confusion_of_classes_without_images_and_of_too_many():
    shares = confusion_figure([0], [1], ["a", "b", "c"]).axes[0].images[0].get_array()
    assert np.array_equal(shares, [[0, 1, 0], [0, 0, 0], [0, 0, 0]])
    with pytest.raises(ValueError, match="21 classes cannot be read; at most 20"):
        confusion_figure([0], [0], [str(index) for index in range(21)])
