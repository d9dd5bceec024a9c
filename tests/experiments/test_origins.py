"""Names, licences and sources that data sets and backbones state, on the card of a run."""

import pytest

from vpns_hf.experiments.arguments import PruneArguments
from vpns_hf.experiments.origins import Origin, backbone_origin, dataset_origin


def folder(path, text=None):
    path.mkdir(parents=True)
    if text is not None:
        (path / "README.md").write_text(text, encoding="utf-8")
    return str(path)


def test_a_data_set_is_called_as_its_folder_says(tmp_path):
    stated = "---\npretty_name: Days\nlicense: mit\nsource: https://example.org/days\n---\n# Days\n"
    name = folder(tmp_path / "in/data", stated)
    assert dataset_origin(name) == Origin("Days", "mit", "https://example.org/days")
    assert dataset_origin(name, "My days") == Origin("My days", "mit", "https://example.org/days")
    assert dataset_origin("me/days") == Origin("me/days")


@pytest.mark.parametrize(
    "text", [None, "# Days\n\n---\npretty_name: x\n---\n", "---\n: not closed", "---\na: 1\n---\n"]
)
def test_without_a_name_a_folder_is_called_by_its_path(tmp_path, text):
    assert dataset_origin(folder(tmp_path / "in/data", text)) == Origin("in/data")


def test_several_licences(tmp_path):
    assert dataset_origin(folder(tmp_path / "a", "---\nlicense: [mit, cc0-1.0]\n---\n")).license == "mit, cc0-1.0"


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("pretty_name: 3", "`pretty_name` in .*README.md is 3; expected text"),
        ("license: {a: b}", "`license` in .* expected text"),
        ("pretty_name: [", "README.md is no sound YAML"),
        ("- a\n- b", "metadata that are no names with values"),
    ],
)
def test_metadata_that_cannot_be_used_are_refused(tmp_path, block, message):
    with pytest.raises(ValueError, match=message):
        dataset_origin(folder(tmp_path / "a", f"---\n{block}\n---\n"))


def test_a_backbone_is_called_as_its_card_says(tmp_path):
    index = "model-index:\n- name: small\n  results:\n  - task: {type: image-classification}\n"
    index += "    dataset: {name: Days, type: days}\n    metrics: [{type: accuracy, value: 0.5}]\n"
    assert backbone_origin(folder(tmp_path / "m", f"---\nlicense: mit\n{index}---\n")) == Origin("small", "mit")
    assert backbone_origin(folder(tmp_path / "in/n", "---\nlicense: mit\n---\n")) == Origin("in/n", "mit")
    assert backbone_origin(folder(tmp_path / "in/o")) == Origin("in/o")


def test_a_wrong_title_is_refused():
    with pytest.raises(ValueError, match="`dataset_title` is ''; expected None or a name"):
        PruneArguments(dataset_title="")
