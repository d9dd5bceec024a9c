"""Tests of `vpns_hf.data`: any data set as three splits of images and labels."""

import io
from itertools import chain

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Value
from helpers.pictures import in_memory, picture, pixels, write_images

from vpns_hf.data import load_transfer_dataset


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


class TestLoading:
    """What is read, and how splits, columns and classes are found."""

    def test_a_key_stands_for_its_row(self, monkeypatch):
        asked = []

        def load_dataset(path, **options):
            asked.append((path, options["name"], options["revision"]))
            labels = [0] * 10 + [1] * 10
            food = ClassLabel(names=[f"dish {i}" for i in range(101)])
            return DatasetDict(train=in_memory(labels, food), validation=in_memory(labels, food))

        monkeypatch.setattr("vpns_hf.data.loading.load_dataset", load_dataset)
        splits = load_transfer_dataset("food101", revision="main")
        assert asked == [("ethz/food101", None, "main")]
        assert {name: len(split) for name, split in splits.items()} == {"train": 18, "validation": 2, "test": 20}
        assert list(splits) == ["train", "validation", "test"]

    def test_an_argument_wins_over_the_row(self, monkeypatch):
        thing = ClassLabel(names=[f"n{i:08}" for i in range(200)])
        sizes = {"train": 10, "valid": 1, "extra": 3}
        raw = DatasetDict({name: in_memory([i % 2 for i in range(n)], thing) for name, n in sizes.items()})
        monkeypatch.setattr("vpns_hf.data.loading.load_dataset", lambda path, **options: raw)
        splits = load_transfer_dataset("tiny_imagenet", test_split="extra", validation_split="valid")
        assert {name: len(split) for name, split in splits.items()} == {"train": 10, "validation": 1, "test": 3}

    @pytest.mark.parametrize("with_validation", [True, False])
    def test_image_folder(self, tmp_path, with_validation):
        write_images(tmp_path / "data" / "train", 10)
        write_images(tmp_path / "data" / "test", 3)
        if with_validation:
            write_images(tmp_path / "data" / "validation", 2)
        splits = load_transfer_dataset(tmp_path / "data", cache_dir=tmp_path / "cache")
        sizes = (
            {"train": 20, "validation": 4, "test": 6} if with_validation else {"train": 18, "validation": 2, "test": 6}
        )
        assert {name: len(split) for name, split in splits.items()} == sizes
        for split in splits.values():
            assert split.column_names == ["image", "label"]
            assert split.features["label"].names == ["cat", "dog"]
            assert sorted(set(split["label"])) == [0, 1]

    def test_parquet_folder(self, tmp_path):
        (tmp_path / "data").mkdir()
        for name in ("train", "validation", "test"):
            in_memory(["b", "a"], image="img", label="fine").to_parquet(str(tmp_path / "data" / f"{name}.parquet"))
        splits = load_transfer_dataset(str(tmp_path / "data"), label_column="fine", cache_dir=str(tmp_path / "cache"))
        assert splits["test"].column_names == ["image", "label"]
        assert splits["test"]["label"][:] == [1, 0]

    @pytest.mark.parametrize("kind", ["Dataset", "DatasetDict"])
    def test_saved_to_disk(self, tmp_path, kind):
        data = in_memory([0, 1] * 20, ClassLabel(names=["x", "y"]))
        (data if kind == "Dataset" else DatasetDict(train=data)).save_to_disk(tmp_path / "data")
        splits = load_transfer_dataset(tmp_path / "data")
        assert {name: len(split) for name, split in splits.items()} == {"train": 32, "validation": 4, "test": 4}
        assert splits["train"].features["label"].names == ["x", "y"]

    def test_string_labels_are_numbered_over_all_splits_together(self):
        rows = {"train": ["pear", "fig", "apple"], "validation": ["apple"], "test": ["pear"]}
        raw = DatasetDict({name: in_memory(labels) for name, labels in rows.items()})
        splits = load_transfer_dataset(raw)
        assert all(split.features["label"].names == ["apple", "fig", "pear"] for split in splits.values())
        assert [splits[name]["label"][:] for name in ("train", "validation", "test")] == [[2, 1, 0], [0], [2]]

    def test_whole_numbers_keep_their_order(self):
        raw = {name: in_memory(list(range(12)), Value("int32")) for name in ("train", "validation", "test")}
        splits = load_transfer_dataset(DatasetDict(raw))
        assert splits["train"]["label"][:] == list(range(12))
        assert splits["train"].features["label"].names[10] == "10"

    def test_class_labels_that_differ_between_splits_are_made_one(self):
        raw = DatasetDict(
            train=in_memory([0, 1, 2], ClassLabel(names=["b", "a", "c"])),
            validation=in_memory([0], ClassLabel(names=["c"])),
            test=in_memory([0], ClassLabel(names=["a"])),
        )
        splits = load_transfer_dataset(raw)
        assert [splits[name]["label"][:] for name in splits] == [[1, 0, 2], [2], [0]]

    @pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1"])
    def test_every_image_comes_out_rgb(self, tmp_path, mode):
        for i in range(4):
            (tmp_path / "train" / str(i % 2)).mkdir(parents=True, exist_ok=True)
            picture(i, mode).save(tmp_path / "train" / str(i % 2) / f"{i}.{'tiff' if mode == 'CMYK' else 'png'}")
        data = datasets.load_dataset("imagefolder", data_dir=tmp_path, cache_dir=tmp_path / "cache")["train"]
        splits = load_transfer_dataset(DatasetDict(train=data, validation=data, test=data))
        assert splits["train"][0]["image"].mode == "RGB"
        expected = picture(0, mode).convert("RGB")
        assert splits["train"][0]["image"].tobytes() == expected.tobytes()

    def test_the_label_column_is_found_among_several(self):
        data = in_memory([0, 1] * 10, ClassLabel(names=["x", "y"]), label="fine_label")
        data = data.add_column("coarse_label", [0] * 20, feature=ClassLabel(names=["all"]))
        assert sorted(set(load_transfer_dataset(data)["train"]["label"])) == [0, 1]

    def test_columns_that_are_not_there(self):
        data = in_memory(["a", "b"] * 10)
        with pytest.raises(ValueError, match=r"has no column 'photo': its columns are image, label, .*image_column"):
            load_transfer_dataset(data, image_column="photo")
        with pytest.raises(ValueError, match=r"which column holds the images among words, label: .*image_column"):
            load_transfer_dataset(Dataset.from_dict({"words": ["a"], "label": [0]}))
        with pytest.raises(ValueError, match=r"which column holds the labels among image, kind: .*label_column"):
            load_transfer_dataset(data.rename_column("label", "kind"))
        with pytest.raises(ValueError, match="split 'test' has no column 'label': its columns are image"):
            load_transfer_dataset(DatasetDict(train=data, test=data.remove_columns("label")))

    def test_splits_that_are_not_there(self):
        raw = DatasetDict(training=in_memory(["a", "b"]), test=in_memory(["a"]))
        with pytest.raises(ValueError, match=r"no split 'train' .* its splits are training, test, .*train_split"):
            load_transfer_dataset(raw)
        with pytest.raises(ValueError, match=r"no split 'val' .* its splits are training, test, .*validation_split"):
            load_transfer_dataset(raw, train_split="training", validation_split="val")
        with pytest.raises(ValueError, match="used twice"):
            load_transfer_dataset(raw, train_split="training", validation_split="test")

    def test_validation_is_carved_when_the_validation_split_is_the_test_split(self):
        raw = DatasetDict(train=in_memory(["a", "b"] * 10), validation=in_memory(["a", "b"]))
        splits = load_transfer_dataset(raw, test_split="validation")
        assert {name: len(split) for name, split in splits.items()} == {"train": 18, "validation": 2, "test": 2}

    @pytest.mark.parametrize(
        ("labels", "feature"),
        [([-1, -1], ClassLabel(names=["x", "y"])), ([0, -1], Value("int64")), ([None, "a"], Value("string"))],
    )
    def test_unlabelled_split(self, labels, feature):
        data = in_memory(labels, feature)
        with pytest.raises(ValueError, match=r"split 'test' has no labels for \d of its 2 images"):
            load_transfer_dataset(DatasetDict(train=in_memory([0], Value("int64")), test=data))

    def test_labels_that_are_no_classes(self):
        with pytest.raises(ValueError, match="expected one whole number or one string for each image"):
            load_transfer_dataset(in_memory([0.5, 1.5] * 9, Value("float32")))
        with pytest.raises(ValueError, match="expected one whole number or one string for each image"):
            load_transfer_dataset(in_memory([[0], [1]] * 9, datasets.List(Value("int64"))))

    def test_a_row_that_means_another_data_set(self, monkeypatch):
        raw = DatasetDict(train=in_memory([0, 1] * 10, ClassLabel(names=["x", "y"])), test=in_memory([0, 1]))
        monkeypatch.setattr("vpns_hf.data.loading.load_dataset", lambda path, **options: raw)
        with pytest.raises(ValueError, match=r"'tanganke/gtsrb' has 4 classes \(0, 1, x, y\) and its row .* says 43"):
            load_transfer_dataset("gtsrb")
        with pytest.raises(ValueError, match=r"'train' has no column 'img': its columns are image, label, name one"):
            load_transfer_dataset("cifar10")
        with pytest.raises(ValueError, match=r"no split 'valid' to use for test: its splits are train, test, name"):
            load_transfer_dataset("tiny_imagenet")

    def test_no_network(self, monkeypatch, tmp_path):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        with pytest.raises(
            ConnectionError,
            match=r"'uoft-cs/cifar10' is neither .*`hf download uoft-cs/cifar10 --repo-type dataset --revision v1`",
        ):
            load_transfer_dataset("cifar10", revision="v1")

    def test_no_network_but_downloaded(self, monkeypatch, tmp_path, caplog):
        """What `hf download` leaves is read; not if the download was cut off."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        repo = tmp_path / "hub" / "datasets--ethz--food101"
        for folder in ("refs", "blobs", f"snapshots/{'a' * 40}/data"):
            (repo / folder).mkdir(parents=True)
        (repo / "refs/main").write_text("a" * 40)
        food = ClassLabel(names=[f"dish {i}" for i in range(101)])
        for name in ("train", "validation"):
            rows = in_memory([0, 1] * 10, food)
            rows.to_parquet(str(repo / f"snapshots/{'a' * 40}/data/{name}-00000-of-00001.parquet"))
        splits = load_transfer_dataset("food101", cache_dir=tmp_path / "cache")
        assert {name: len(split) for name, split in splits.items()} == {"train": 18, "validation": 2, "test": 20}
        assert "'ethz/food101' is read from" in caplog.text
        (repo / "blobs/0123.incomplete").touch()
        with pytest.raises(ConnectionError, match="hf download ethz/food101"):
            load_transfer_dataset("food101", cache_dir=tmp_path / "other")

    def test_other_ways_to_fail(self, monkeypatch):
        errors = iter(
            [
                ValueError("BuilderConfig 'a' not found. Available: ['b']"),
                RuntimeError("Dataset scripts are no longer supported, but found x.py"),
            ]
        )

        def load_dataset(path, **options):
            raise next(errors)

        monkeypatch.setattr("vpns_hf.data.loading.load_dataset", load_dataset)
        with pytest.raises(ValueError, match=r"'u/d' cannot be read with name='a': .* Available: \['b'\]"):
            load_transfer_dataset("u/d", name="a")
        with pytest.raises(ValueError, match=r"'u/d' cannot be read: Dataset scripts are no longer supported"):
            load_transfer_dataset("u/d")

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="No data set was found at"):
            load_transfer_dataset(tmp_path / "missing")
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match="No data set was found at"):
            load_transfer_dataset(tmp_path / "empty")

    def test_the_carved_splits_are_seeded_stratified_and_disjoint(self, caplog):
        data = in_memory(["a"] * 60 + ["b"] * 30 + ["c"] * 10)
        first, second = load_transfer_dataset(data, seed=1), load_transfer_dataset(data, seed=1)
        other = load_transfer_dataset(data, seed=2)
        assert "no test split" in caplog.text
        parts = {name: pixels(split) for name, split in first.items()}
        assert parts == {name: pixels(split) for name, split in second.items()}
        assert parts["validation"] != pixels(other["validation"])
        assert sorted(chain.from_iterable(parts.values())) == sorted(image.tobytes() for image in data["image"])
        assert np.bincount(first["test"]["label"][:]).tolist() == [6, 3, 1]
        assert np.bincount(first["validation"]["label"][:]).tolist() == [5, 3, 1]

    def test_the_order_of_the_splits_does_not_matter(self):
        train, test = in_memory(["a", "b"] * 20), in_memory(["b", "a"])
        one, other = (
            load_transfer_dataset(DatasetDict(raw))
            for raw in ({"train": train, "test": test}, {"test": test, "train": train})
        )
        assert pixels(one["validation"]) == pixels(other["validation"])

    def test_a_class_too_small_to_be_split(self):
        with pytest.raises(ValueError, match="class 'rare' has only one training image"):
            load_transfer_dataset(in_memory(["a"] * 20 + ["rare"]))
        with pytest.raises(
            ValueError,
            match=r"Carving 1 of 10 .* less than one image per class for 3 classes \(the smallest is 'c' with 2\)",
        ):
            load_transfer_dataset(in_memory(["a"] * 5 + ["b"] * 3 + ["c"] * 2))
        with pytest.raises(ValueError, match="expected a share between 0 and 1"):
            load_transfer_dataset(in_memory(["a", "b"]), validation_fraction=1.0)


class TestStreaming:
    def write(self, folder):
        folder.mkdir()
        for part in range(4):
            rows = in_memory([part] * 50, ClassLabel(names=list("abcd")))
            rows.to_parquet(str(folder / f"train-{part:05}-of-00004.parquet"))
        in_memory([0, 1, 2], ClassLabel(names=list("abcd"))).to_parquet(str(folder / "test-00000-of-00001.parquet"))

    def test_some_images_of_a_stream(self, tmp_path):
        self.write(tmp_path / "data")
        options = dict(stream_images=60, cache_dir=tmp_path / "cache")
        splits = load_transfer_dataset(tmp_path / "data", **options)
        assert {name: len(split) for name, split in splits.items()} == {"train": 54, "validation": 6, "test": 3}
        assert set(splits["train"]["label"]) == {0, 1, 2, 3}
        assert splits["train"][0]["image"].mode == "RGB"
        assert splits.rows["train"].place(0).startswith("train (stream shuffled with seed 42)[")
        again = load_transfer_dataset(tmp_path / "data", **options | {"cache_dir": tmp_path / "other"})
        assert {name: pixels(split) for name, split in again.items()} == {n: pixels(s) for n, s in splits.items()}
        other = load_transfer_dataset(tmp_path / "data", seed=1, **options)
        assert pixels(other["train"]) != pixels(splits["train"])

    def test_a_stream_itself_is_refused_with_the_way_out(self, tmp_path):
        self.write(tmp_path / "data")
        stream = datasets.load_dataset(str(tmp_path / "data"), streaming=True, cache_dir=tmp_path / "cache")
        for each in (stream, stream["train"]):
            with pytest.raises(ValueError, match=r"stream_images=n, .* Dataset.from_generator\(lambda: stream.take"):
                load_transfer_dataset(each)
        stream = stream["train"]
        kept = Dataset.from_generator(lambda: stream.take(30), features=stream.features, cache_dir=tmp_path / "kept")
        assert len(load_transfer_dataset(kept)["train"]) == 24
        with pytest.raises(ValueError, match="`stream_images` is 0"):
            load_transfer_dataset(kept, stream_images=0)


def test_a_png_in_bytes_is_decoded_when_the_column_is_named():
    stored = io.BytesIO()
    picture(0, "L").save(stored, "PNG")
    rows = {"photo": [{"bytes": stored.getvalue(), "path": None}] * 40, "label": [0, 1] * 20}
    splits = load_transfer_dataset(Dataset.from_dict(rows), image_column="photo")
    assert splits["test"][0]["image"].mode == "RGB"
