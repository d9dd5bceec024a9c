"""Tests of labels: what each class is called and numbered, and which labels are refused before training."""

import logging

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Image, Value
from helpers.pictures import in_memory, picture, write_images

from vpns_hf.data import load_transfer_dataset
from vpns_hf.data.columns import align_labels

XY = ClassLabel(names=["x", "y"])


def three(train, validation, test, feature=None) -> DatasetDict:
    rows = {"train": train, "validation": validation, "test": test}
    return DatasetDict({name: in_memory(labels, feature) for name, labels in rows.items()})


def unchecked(labels: list[int], feature: ClassLabel) -> Dataset:
    """A data set whose labels its `ClassLabel` does not name, as files written by other programs hold them."""
    stored = in_memory(labels, Value("int64"))
    features = Features({"image": Image(), "label": feature})
    table = stored.data.table.replace_schema_metadata(features.arrow_schema.metadata)
    return Dataset(table, info=DatasetInfo(features=features))


class TestClassesWithoutTrainingImages:
    @pytest.mark.parametrize(
        ("raw", "sentence"),
        [
            (
                three(["a", "b"], ["a", "c"], ["a"]),
                r"'validation' has images of 1 classes .* \(c\): .*validation_split",
            ),
            (three(["a", "b"], ["a"], ["d", "c", "a"]), r"'test' has images of 2 classes .* \(c, d\): .*test_split"),
            (three([0, 0], [0, 1], [0], XY), r"'validation' has images of 1 classes .* \(y\)"),
            (three([1, 2], [1, 2], [0], Value("int64")), r"'test' has images of 1 classes .* \(0\)"),
        ],
    )
    def test_are_refused(self, raw, sentence):
        with pytest.raises(ValueError, match=sentence):
            load_transfer_dataset(raw)

    def test_in_an_image_folder(self, tmp_path):
        write_images(tmp_path / "train", 2)
        write_images(tmp_path / "test", 2, ("cat", "dog", "owl"))
        with pytest.raises(ValueError, match=r"'test' has images of 1 classes without any training image \(owl\)"):
            load_transfer_dataset(tmp_path)

    def test_are_reported_where_a_stream_was_cut(self, tmp_path, caplog):
        (tmp_path / "data").mkdir()
        for name, labels in {"train": [0] * 40, "test": [0, 1]}.items():
            in_memory(labels, XY).to_parquet(str(tmp_path / "data" / f"{name}.parquet"))
        caplog.set_level(logging.WARNING, "vpns_hf.data.columns")
        load_transfer_dataset(tmp_path / "data", stream_images=30, cache_dir=tmp_path / "cache")
        assert "The split 'test' has images of 1 classes without any training image (y)" in caplog.text

    def test_classes_that_nothing_has_stay(self):
        splits = load_transfer_dataset(three([0, 1], [0], [1], ClassLabel(names=["x", "y", "never"])))
        assert splits["train"].features["label"].names == ["x", "y", "never"]


class TestNames:
    @pytest.mark.parametrize(
        ("one", "other"), [("cat", "Cat"), ("dog", "dog "), ("big  owl", "big owl"), ("caf\u00e9", "cafe\u0301")]
    )
    def test_that_hardly_differ(self, tmp_path, one, other):
        with pytest.raises(ValueError, match=r"class names .* and .* differ only in letter case, spaces or accents"):
            load_transfer_dataset(in_memory([one, other, "bus"] * 10))
        write_images(tmp_path, 10, (one, other))
        with pytest.raises(ValueError, match=r"class names .* and .* differ only in letter case, spaces or accents"):
            load_transfer_dataset(tmp_path)

    def test_that_differ_between_splits(self, tmp_path):
        write_images(tmp_path / "train", 4)
        write_images(tmp_path / "test", 1, ("cat", "Dog"))
        with pytest.raises(ValueError, match="class names 'Dog' and 'dog' differ only"):
            load_transfer_dataset(tmp_path)

    def test_that_the_data_set_declares(self):
        """EMNIST has the classes A and a; a space is no name of its own."""
        letters = in_memory([0, 1] * 20, ClassLabel(names=["A", "a"]))
        assert load_transfer_dataset(letters)["train"].features["label"].names == ["A", "a"]
        with pytest.raises(ValueError, match="class names 'A' and 'A ' differ only"):
            load_transfer_dataset(in_memory([0, 1] * 20, ClassLabel(names=["A", "A "])))

    def test_align_exactly(self):
        data = in_memory([0, 1, 2, 3], ClassLabel(names=["a", "A", "b", "B"]))
        aligned = align_labels(data, ["A", "B", "a", "b"])
        assert aligned["label"][:] == [2, 0, 3, 1]
        assert aligned.features["label"].names == ["A", "B", "a", "b"]
        assert [image.tobytes() for image in aligned["image"]] == [picture(i).tobytes() for i in range(4)]
        with pytest.raises(ValueError, match="has classes b: expected only A, B, a, c"):
            align_labels(data, ["A", "B", "a", "c"])
        assert align_labels(data, ["z", "B", "a", "A", "b"])["label"][:] == [2, 3, 4, 1]


class TestNumbers:
    @pytest.mark.parametrize(("labels", "shown"), [([0, 1, 2] * 10, "2"), ([1, 5, -3] * 10, "-3, 5")])
    def test_out_of_range(self, labels, shown):
        with pytest.raises(ValueError, match=f"'train' has labels {shown} and its ClassLabel names 2 .* from 0 to 1"):
            load_transfer_dataset(unchecked(labels, XY))

    def test_from_one_and_with_gaps(self):
        splits = load_transfer_dataset(three([1, 2, 40], [2], [40], Value("int64")))
        assert splits["train"].features["label"].names == ["1", "2", "40"]
        assert [splits[name]["label"][:] for name in splits] == [[0, 1, 2], [1], [2]]

    @pytest.mark.parametrize("blank", ["", "  "])
    def test_a_blank_is_no_label(self, blank):
        with pytest.raises(ValueError, match="'train' has no labels for 10 of its 30 images"):
            load_transfer_dataset(in_memory(["a", "b", blank] * 10))
