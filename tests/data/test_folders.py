"""Tests of image folders: which image is in which split and class, and what is said about the others."""

import logging
import os
from pathlib import Path

import datasets
import pytest
from helpers.pictures import in_memory, picture

from vpns_hf.data import load_evaluation_split, load_transfer_dataset
from vpns_hf.data.folders import list_folder, read_image_folder

LOGGERS = ("vpns_hf.data.folders", "vpns_hf.data.loading")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def said(caplog):
    """The warnings of the modules that read folders."""
    for name in LOGGERS:
        caplog.set_level(logging.WARNING, name)
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def write(root: Path, *files: str) -> Path:
    """A folder with a small picture, each another one, at every path."""
    for number, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        picture(number, size=(4, 4)).save(root / file)
    return root


def numbered(folder: str, count: int = 20, name: str = "photo") -> list[str]:
    return [f"{folder}/{name}_{i}.png" for i in range(count)]


def sizes(splits) -> dict[str, int]:
    return {name: len(split) for name, split in splits.items()}


def raw(root: Path, *asked: str):
    """The stored splits of an image folder as {split: [class of each row]}."""
    splits = read_image_folder(root, list_folder(root), asked, None, streaming=False)
    return {name: split.features["label"].int2str(split["label"][:]) for name, split in splits.items()}


class TestWordsInNames:
    """Words such as train and test make no splits where they are parts of file and class names."""

    @pytest.mark.parametrize("word", ["train", "TEST", "valid", "eval", "dev", "bullet-train"])
    def test_in_file_names(self, tmp_path, said, word):
        write(tmp_path / "data", *numbered("bus"), *numbered("car", 15), *numbered("car", 5, word))
        splits = load_transfer_dataset(tmp_path / "data")
        assert sizes(splits) == {"train": 32, "validation": 4, "test": 4}
        assert [line for line in said() if "Left out" in line or "Not used" in line] == []

    @pytest.mark.parametrize("word", ["train", "Test", "valid", "bullet train", "road-test-2"])
    def test_in_the_name_of_a_class(self, tmp_path, word):
        write(tmp_path, *numbered("bus"), *numbered(word))
        splits = load_transfer_dataset(tmp_path)
        assert sizes(splits) == {"train": 32, "validation": 4, "test": 4}
        assert splits["train"].features["label"].names == sorted(["bus", word])

    def test_in_the_name_of_a_class_inside_splits(self, tmp_path):
        write(
            tmp_path,
            "train/train/1.png",
            "train/test/1.png",
            "train/test/2.png",
            "test/train/1.png",
            "test/test/1.png",
        )
        assert raw(tmp_path) == {"train": ["test", "test", "train"], "test": ["test", "train"]}

    def test_in_the_path_of_the_folder(self, tmp_path):
        root = write(tmp_path / "train" / "my test", *numbered("bus"), *numbered("car"))
        assert sizes(load_transfer_dataset(root)) == {"train": 32, "validation": 4, "test": 4}


class TestSplits:
    """Folders that hold class folders are splits."""

    @pytest.mark.parametrize(
        ("train", "validation", "test"),
        [
            ("Training", "Validation", "Testing"),
            ("TRAIN", "VAL", "TEST"),
            ("seg_train", "seg_dev", "seg_test"),
            ("train2017", "valid", "evaluation"),
        ],
    )
    def test_by_their_names(self, tmp_path, train, validation, test):
        write(tmp_path, *(f"{split}/{c}/1.png" for split in (train, validation, test) for c in ("cat", "dog")))
        splits = load_transfer_dataset(tmp_path)
        assert sizes(splits) == {"train": 2, "validation": 2, "test": 2}
        stored = {
            name: Path(split.cast_column("image", datasets.Image(decode=False))[0]["image"]["path"])
            for name, split in splits.items()
        }
        assert {name: path.parts[-3] for name, path in stored.items()} == {
            "train": train, "validation": validation, "test": test
        }  # fmt: skip

    def test_of_other_names_are_asked_for(self, tmp_path, said):
        write(tmp_path, *(f"{s}/{c}/1.png" for s in ("Lernen", "Pruefen", "Rest", "Messen") for c in ("cat", "dog")))
        with pytest.raises(ValueError, match=r"no split 'train' .* its splits are Lernen, Messen, Pruefen, Rest"):
            load_transfer_dataset(tmp_path)
        splits = load_transfer_dataset(tmp_path, train_split="Lernen", validation_split="Pruefen", test_split="Messen")
        assert sizes(splits) == {"train": 2, "validation": 2, "test": 2}
        assert said()[-1] == "Not used: the splits Rest of the data set."

    def test_keep_a_name_that_was_given(self, tmp_path):
        write(tmp_path, *(f"{split}/{c}/1.png" for split in ("Training", "Testing") for c in ("cat", "dog")))
        assert set(raw(tmp_path, "Training")) == {"Training", "test"}

    def test_two_folders_for_one_split_are_not_merged(self, tmp_path):
        write(tmp_path, *(f"{split}/{c}/1.png" for split in ("train1", "train2", "test") for c in ("cat", "dog")))
        with pytest.raises(ValueError, match=r"no split 'train' .* its splits are test, train1, train2"):
            load_transfer_dataset(tmp_path)

    def test_below_a_folder_around_all(self, tmp_path):
        write(
            tmp_path,
            "archive/images/train/a/cat/1.png",
            "archive/images/train/a/dog/1.png",
            "archive/images/test/cat/1.png",
        )
        assert raw(tmp_path) == {"train": ["cat", "dog"], "test": ["cat"]}

    def test_folders_that_only_group_classes(self, tmp_path):
        write(tmp_path, "animals/cat/1.png", "animals/owl/1.png", "vehicles/bus/1.png")
        assert raw(tmp_path) == {"train": ["cat", "owl", "bus"]}

    def test_a_single_split(self, tmp_path):
        write(tmp_path, "test/cat/1.png", "test/dog/1.png")
        assert raw(tmp_path) == {"test": ["cat", "dog"]}


class TestSentences:
    """Images that fit no class are reported, folders that are not clear are refused."""

    def test_loose_images(self, tmp_path, said):
        write(tmp_path, "sample.png", *numbered("cat"), *numbered("dog"))
        assert sizes(load_transfer_dataset(tmp_path)) == {"train": 32, "validation": 4, "test": 4}
        assert f"Left out: 1 files of '{tmp_path}' (in no class folder): sample.png." in said()

    def test_loose_images_of_a_split(self, tmp_path, said):
        write(tmp_path, "train/cat/1.png", "train/dog/1.png", "train/3.png", "test/cat/1.png", "4.png")
        assert raw(tmp_path) == {"train": ["cat", "dog"], "test": ["cat"]}
        assert said() == [f"Left out: 2 files of '{tmp_path}' (in no class folder): 4.png, train/3.png."]

    def test_unlabelled_test_images(self, tmp_path, said):
        write(tmp_path, "train/cat/1.png", "train/dog/1.png", *numbered("test", 5))
        assert raw(tmp_path) == {"train": ["cat", "dog"]}
        assert said() == [
            f"Left out: 5 files of '{tmp_path}' (the folder 'test' has no class folders): "
            "test/photo_0.png, test/photo_1.png, test/photo_2.png, ...."
        ]

    def test_hidden_images_and_files_that_are_none(self, tmp_path, said):
        write(
            tmp_path, "cat/1.png", "dog/1.png", "__background__/1.png", "cat/.ipynb_checkpoints/1.png", "dog/._1.png"
        )
        (tmp_path / "dog" / "2.heic").write_bytes(b"")
        (tmp_path / "labels.txt").write_text("cat dog")
        assert raw(tmp_path) == {"train": ["cat", "dog"]}
        assert said() == [
            f"Left out: 3 files of '{tmp_path}' (hidden): "
            "__background__/1.png, cat/.ipynb_checkpoints/1.png, dog/._1.png.",
            f"Left out: 1 files of '{tmp_path}' (no image by its suffix): dog/2.heic.",
        ]

    @pytest.mark.parametrize(
        ("files", "sentence"),
        [
            (["1.png", "2.png"], "holds images but no folders of classes"),
            (["train/1.png", "test/1.png"], "folders test, train .* named like splits and hold images without"),
            (["train/1.png", "test/1.png", "cat/1.png"], "folders test, train .* named like splits"),
            (["train/1.png"], "folders train .* named like splits"),
            (["cat/1.png", "cat/sub/2.png", "dog/1.png"], r"different depths \('cat/1.png', 'cat/sub/2.png'\)"),
            (["cat/1.png", "dogs/poodle/1.png"], r"different depths \('cat/1.png', 'dogs/poodle/1.png'\)"),
            (["train/cat/1.png", "train/x/dog/1.png", "test/cat/1.png"], "different depths"),
            (
                ["train/a/cat/1.png", "train/b/cat/1.png", "test/a/owl/1.png"],
                "'train/a/cat' and 'train/b/cat' .* same",
            ),
        ],
    )
    def test_folders_that_are_not_clear(self, tmp_path, files, sentence):
        with pytest.raises(ValueError, match=sentence):
            load_transfer_dataset(write(tmp_path, *files))

    def test_brackets_in_the_path(self, tmp_path):
        root = write(tmp_path / "set [1]*?", *numbered("cat [old]"), *numbered("dog"))
        splits = load_transfer_dataset(root)
        assert sizes(splits) == {"train": 32, "validation": 4, "test": 4}
        assert splits["train"].features["label"].names == ["cat [old]", "dog"]
        assert splits["train"][0]["image"].size == (4, 4)
        tables = tmp_path / "tables [1]"
        tables.mkdir()
        in_memory(["a", "b"] * 10).to_parquet(str(tables / "train.parquet"))
        with pytest.raises(ValueError, match=r"has one of the characters \* \? \[.*: rename the folder"):
            load_transfer_dataset(tables)

    @pytest.mark.parametrize("argument", ["name", "revision"])
    def test_what_only_other_data_sets_have(self, tmp_path, argument):
        with pytest.raises(ValueError, match=f"{argument} .*is 'v2' and .* has no {argument}: leave it out"):
            load_transfer_dataset(write(tmp_path, "cat/1.png", "dog/1.png"), **{argument: "v2"})

    def test_images_that_metadata_does_not_name(self, tmp_path, said):
        write(tmp_path, *numbered("images"), *numbered("images", 3, "forgotten"))
        rows = "".join(f"photo_{i}.png,{'cat' if i % 2 else 'dog'}\n" for i in range(20))
        (tmp_path / "images" / "metadata.csv").write_text("file_name,label\n" + rows)
        assert sum(sizes(load_transfer_dataset(tmp_path)).values()) == 20
        assert any(line.startswith(f"Left out: 3 of the 23 image files of '{tmp_path}'") for line in said())


class TestEvaluation:
    """A folder without splits is evaluated whole; one with splits as it was trained."""

    def test_all_of_a_folder_without_splits(self, tmp_path):
        write(tmp_path, *numbered("cat", 7), "dog/1.png")
        images = load_evaluation_split(tmp_path)
        assert images["label"][:] == [0] * 7 + [1]
        assert images[0]["image"].mode == "RGB"
        with pytest.raises(ValueError, match="no split 'test': leave test_split out to use all of 'train'"):
            load_evaluation_split(tmp_path, test_split="test")

    def test_a_single_split_of_any_name(self, tmp_path):
        write(tmp_path, "test/cat/1.png", "test/dog/1.png")
        assert load_evaluation_split(tmp_path)["label"][:] == [0, 1]

    @pytest.mark.parametrize("split", ["train", "validation", "test"])
    def test_a_folder_with_splits(self, tmp_path, split):
        write(
            tmp_path, *(f"{top}/{file}" for top in ("train", "test") for c in ("cat", "dog") for file in numbered(c))
        )
        expected = load_transfer_dataset(tmp_path)[split]
        found = load_evaluation_split(tmp_path, split)
        assert [image.tobytes() for image in found["image"]] == [image.tobytes() for image in expected["image"]]
        assert found["label"][:] == expected["label"][:]


class TestSameRows:
    """Folders that `datasets` reads right give the same rows."""

    @pytest.mark.parametrize("with_splits", [False, True])
    def test_as_imagefolder(self, tmp_path, with_splits):
        tops = ("train/", "test/") if with_splits else ("",)
        root = write(
            tmp_path / "data",
            *(
                f"{top}{c}/{i}.{e}"
                for top in tops
                for c in ("b", "B c", "a-1")
                for i in (2, 10)
                for e in ("png", "JPG")
            ),
        )
        expected = datasets.load_dataset("imagefolder", data_dir=str(root))
        read = read_image_folder(root, list_folder(root), (), None, streaming=False)
        assert set(read) == set(expected)
        for name, split in expected.items():
            assert read[name].features == split.features
            stored = [each.cast_column("image", datasets.Image(decode=False))[:] for each in (read[name], split)]
            assert stored[0] == stored[1]

    def test_a_stream_of_a_folder(self, tmp_path):
        root = write(tmp_path / "data", *numbered("cat", 20, "test"), *numbered("dog"))
        splits = load_transfer_dataset(root, stream_images=30)
        assert sizes(splits) == {"train": 24, "validation": 3, "test": 3}

    def test_links_are_followed_but_not_in_circles(self, tmp_path):
        root = write(tmp_path / "store", "cats/1.png", "dogs/1.png") and tmp_path / "data"
        root.mkdir()
        os.symlink(tmp_path / "store" / "cats", root / "cat")
        os.symlink(tmp_path / "store" / "dogs", root / "dog")
        os.symlink(tmp_path / "store" / "dogs", tmp_path / "store" / "dogs" / "again")
        assert raw(root) == {"train": ["cat", "dog"]}

    def test_changed_images_are_read_again(self, tmp_path):
        root = write(tmp_path, *numbered("cat"), *numbered("dog"))
        before = load_transfer_dataset(root)["train"]._fingerprint
        assert load_transfer_dataset(root)["train"]._fingerprint == before
        picture(99, size=(6, 6)).save(root / "cat" / "photo_0.png")
        assert load_transfer_dataset(root)["train"]._fingerprint != before
