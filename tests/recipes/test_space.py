"""`recipes/space`: what the app finds, measures and shows. The interface itself is in `test_space_in_a_browser.py`."""

import dataclasses
import re
import tomllib

import numpy as np
import pytest
import torch
import yaml
from datasets import Image, load_dataset
from helpers import space
from helpers.pictures import picture
from PIL import Image as PILImage

from vpns_hf import PromptedSparseModel
from vpns_hf.data import CorruptImageError
from vpns_hf.inference import FastModel, InferenceReport, LayerChoice, Spread

side_by_side, subnetworks = space.module("side_by_side"), space.module("subnetworks")


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards")
    space.save_cards(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("run") / "dense"
    space.save(folder, "dense", prompt=None)
    return folder


@pytest.fixture(scope="module")
def models(cards):
    return subnetworks.load_models([cards / "quarter", cards / "half"])


@pytest.fixture
def image():
    return picture(3, size=(32, 32))


def expected(folder, image, **options):
    """Probabilities of a saved model, without the image processor."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    model = PromptedSparseModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return model((pixels - 0.5) / 0.5, **options).logits[0].softmax(-1).tolist()


def test_folders_with_weights_are_found(cards):
    assert subnetworks.find_folders(cards) == [cards / "half", cards / "quarter"]


def test_models_of_another_task_are_left_out_and_named(cards, tmp_path, caplog):
    for name in ("half", "quarter"):
        (tmp_path / name).symlink_to(cards / name)
    space.save(tmp_path / "another", labels={0: "cat", 1: "dog", 2: "cow"})
    assert [folder.name for folder in subnetworks.find_folders(tmp_path)] == ["half", "quarter"]
    assert "Left out, of another backbone or task: another." in caplog.text
    with pytest.raises(ValueError, match="are not of one backbone, task and image size"):
        subnetworks.load_models([tmp_path / "half", tmp_path / "another"])


def test_no_folder_with_weights(tmp_path):
    with pytest.raises(ValueError, match=r"No folder in .* holds weights"):
        subnetworks.find_folders(tmp_path)


def test_subnetworks_come_by_sparsity_with_the_bytes_of_their_files(models, cards):
    assert [each.name for each in models.subnetworks] == ["half", "quarter"]
    assert [round(each.model.sparsity, 2) for each in models.subnetworks] == [0.5, 0.75]
    sizes = [(cards / name / "model.safetensors").stat().st_size for name in ("half", "quarter")]
    assert [each.file_bytes for each in models.subnetworks] == sizes
    assert models.dense is None


def test_a_dense_model_is_known_by_its_state(cards, dense, tmp_path):
    loaded = subnetworks.load_models([dense, cards / "half"])
    assert (loaded.dense.name, [each.name for each in loaded.subnetworks]) == ("dense", ["half"])
    space.save(tmp_path / "second", "dense")
    for folders in ([dense], [dense, tmp_path / "second", cards / "half"]):
        with pytest.raises(ValueError, match=f"{len(folders) // 3} of the models are pruned and"):
            subnetworks.load_models(folders)


def test_masks_that_still_move_are_refused(tmp_path):
    space.save(tmp_path / "searching", "search")
    with pytest.raises(ValueError, match="Only frozen masks"):
        subnetworks.load_models([tmp_path / "searching"])


@pytest.mark.parametrize("with_prompt", [False, True])
def test_without_a_dense_model_the_subnetwork_stands_for_it(models, cards, image, with_prompt):
    result = side_by_side.compare(models, models.subnetworks[1], image, with_prompt)
    probabilities = expected(cards / "quarter", image, use_prompt=with_prompt)
    for column in (result.dense, result.pruned):
        assert column.probabilities == pytest.approx(dict(zip(space.LABELS.values(), probabilities, strict=True)))
        assert 0 < column.milliseconds.lower <= column.milliseconds.median <= column.milliseconds.upper
        assert column.heading.endswith(", with prompt") == with_prompt
    parameters = sum(parameter.numel() for parameter in models.subnetworks[1].model.backbone.parameters())
    assert result.dense.size == 4 * parameters
    assert result.pruned.size == (cards / "quarter/model.safetensors").stat().st_size
    assert "There is no dense model here" in result.remarks


def test_the_prompt_changes_the_prediction(cards, image):
    assert expected(cards / "half", image, use_prompt=True) != expected(cards / "half", image, use_prompt=False)


def test_a_dense_model_gives_its_own_predictions(cards, dense, image):
    loaded = subnetworks.load_models([cards / "half", dense])
    result = side_by_side.compare(loaded, loaded.subnetworks[0], image, with_prompt=True)
    assert list(result.dense.probabilities.values()) == pytest.approx(expected(dense, image))
    assert list(result.pruned.probabilities.values()) == pytest.approx(
        expected(cards / "half", image, use_prompt=True)
    )
    assert result.dense.size == (dense / "model.safetensors").stat().st_size
    assert "no dense model" not in result.remarks


def test_facts_of_a_column():
    column = side_by_side.Column("Dense", {}, Spread(5.987, 5.8, 12.34), 7_303_464, "on disk")
    assert column.facts() == "### Dense\n**5.99 ms** an image (5.80 to 12.3)\n\n**7.3 MB** on disk"


@pytest.mark.parametrize(
    ("kernels", "kept_dense", "words"),
    [
        (["csr", "dense", "csr"], None, "On the right, 2 of 3 layers run on sparse kernels"),
        (["csr", "dense", "csr"], "the whole model was not faster", "both sides run on dense ones"),
        (["dense", "dense", "dense"], None, "both sides run on dense ones"),
    ],
)
def test_the_remarks_say_which_kernels_run(models, kernels, kept_dense, words):
    layers = tuple(LayerChoice(str(number), (4, 4), 0.5, kernel, {}) for number, kernel in enumerate(kernels))
    report = InferenceReport(layers, {"dense": 2.0, "fast": 1.0}, kept_dense, (1, 3, 32, 32), 1)
    fast = FastModel(models.subnetworks[0].model, report)
    remarks = side_by_side.remarks_on(models, dataclasses.replace(models.subnetworks[0], fast=fast))
    assert words in remarks
    assert "with 1 thread." in remarks


def test_a_broken_image_is_named_with_the_reason(tmp_path, image):
    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(CorruptImageError, match=r"^notes\.png: no image that Pillow can read$"):
        side_by_side.open_image(tmp_path / "notes.png")
    image.save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-500])
    with pytest.raises(CorruptImageError, match=r"^half\.png: "):
        side_by_side.open_image(tmp_path / "half.png")
    assert side_by_side.open_image(tmp_path / "whole.png").tobytes() == image.tobytes()


def test_what_the_model_sees(models):
    """A grey image of 0.6; the ramps of the four strips, -0.4 to 0.2, are added at the border alone."""
    model = models.subnetworks[0].model
    pixels = torch.full((1, 3, 32, 32), (0.6 - 0.5) / 0.5)
    plain, prompted = (np.array(side_by_side.seen_picture(model, pixels, use)) for use in (False, True))
    assert plain.shape == prompted.shape == (256, 256, 3)
    assert (plain == 153).all()
    inside = slice(4 * 8, 28 * 8)
    assert (prompted[inside, inside] == 153).all()
    assert prompted[0, 0, 0] == 51  # (0.6 - 0.4) * 255, the first number of the strip on top
    assert prompted[4 * 8 - 1, 255, 2] == 204  # (0.6 + 0.2) * 255, its last one


def test_the_prompt_is_shown_around_grey(models):
    shown = np.array(side_by_side.prompt_picture(models.subnetworks[0].model))
    assert shown.shape == (256, 256, 3)
    assert (shown[4 * 8 : 28 * 8, 4 * 8 : 28 * 8] == 128).all()
    assert shown[0, 0, 0] == 0  # -0.4 is the largest change
    assert shown[4 * 8 - 1, 255, 2] == 191  # (0.2 / 0.4 + 1) / 2 * 255
    assert side_by_side.prompt_caption(models.subnetworks[0].model) == "Prompt, up to ±102/255"


def test_a_model_without_a_prompt_has_no_picture_of_it(tmp_path):
    space.save(tmp_path / "plain", prompt=None)
    model = subnetworks.load_models([tmp_path / "plain"]).subnetworks[0].model
    assert side_by_side.prompt_picture(model) is None
    assert side_by_side.prompt_caption(model) == "No visual prompt"
    assert side_by_side.seen_picture(model, torch.zeros(1, 3, 32, 32), False).getpixel((0, 0)) == (128, 128, 128)


def test_the_figure_has_a_bar_for_every_layer(models):
    subnetwork = models.subnetworks[1]
    figure = side_by_side.kept_figure(subnetwork)
    layers = subnetwork.model.sparsity_report().layers
    assert [bar.get_width() for bar in figure.axes[0].patches] == [100 * each.kept / each.total for each in layers]
    assert figure.get_figwidth() < 5


def test_the_label_of_the_slider(models):
    assert side_by_side.sparsity_label(models, models.subnetworks[1]) == "Sparsity: 75% (there are 50%, 75%)"


def test_examples_are_one_image_of_each_class_of_the_test_split():
    files = str(space.CLONE / "recipes/demo/data/test.parquet")
    rows = load_dataset("parquet", data_files=files, split="train").cast_column("image", Image(decode=False))
    labels = {row["image"]["bytes"]: rows.features["label"].int2str(row["label"]) for row in rows}
    found = {path.stem: labels[path.read_bytes()] for path in (space.SPACE / "examples").iterdir()}
    assert all(name == re.sub(r"\W+", "_", label.lower()) for name, label in found.items())
    assert len(found) == 10


def test_the_front_matter_is_that_of_a_space():
    _, front, text = (space.SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    fields = yaml.safe_load(front)
    assert (fields["sdk"], fields["license"]) == ("gradio", "apache-2.0")
    assert (space.SPACE / fields["app_file"]).is_file()
    assert len(fields["short_description"]) <= 60
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {fields["colorFrom"], fields["colorTo"]} <= colours
    project = tomllib.loads((space.CLONE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    low, high = re.fullmatch(r"gradio>=(\d+),<(\d+)", *project["optional-dependencies"]["space"]).groups()
    assert int(low) <= int(fields["sdk_version"].split(".")[0]) < int(high)
    assert all(f"`{path.name}" in text for path in space.SPACE.iterdir() if path.suffix == ".py")
    assert PILImage.open(next((space.SPACE / "examples").iterdir())).size == (28, 28)
