"""Tests of the rows of each split: seeded, stratified, published, disjoint, and named where an image is corrupt."""

import io
import json
import pickle
from itertools import chain

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from helpers.pictures import in_memory, picture, pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor

from vpns_hf.data import (
    CorruptImageError,
    ImageTransforms,
    collate_images,
    find_corrupt_images,
    find_duplicates,
    load_transfer_dataset,
)
from vpns_hf.data.splits import shared_between_splits


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.fixture
def transforms() -> ImageTransforms:
    return ImageTransforms(ViTImageProcessor(size={"height": 16, "width": 16}), (16, 16), (0.5,) * 3, (0.5,) * 3)


def encoded(labels: list[int], files: dict[int, bytes | None] | None = None, paths: bool = False) -> Dataset:
    """Pictures as PNG files in memory, some of them replaced."""
    rows = []
    for i, label in enumerate(labels):
        file = io.BytesIO()
        picture(i).save(file, "PNG")
        content = (files or {}).get(i, file.getvalue())
        stored = {"bytes": content, "path": f"photo{i}.png" if paths else None}
        rows.append({"image": None if content is None else stored, "label": label})
    features = Features({"image": datasets.Image(decode=False), "label": Value("int64")})
    return Dataset.from_list(rows, features=features).cast_column("image", datasets.Image())


def known_labels(count: int) -> list[int]:
    """Ten classes of unequal size in an order without a pattern, from arithmetic alone."""
    return [(i * i + i // 7) % 97 % 10 for i in range(count)]


class TestRows:
    def test_digests_of_a_known_split(self, tmp_path):
        """Written down once: another version of scikit-learn or numpy, or another machine, must give the same rows."""
        splits = load_transfer_dataset(in_memory(known_labels(500), Value("int64")))
        assert splits.digests() == {
            "train": "train be68fb37b6b1216a2d47593c65cf445e7a61c60c30d1e48b2b2fe9bba0e35d14",
            "validation": "train bf0cc67901ff07d641579436af04b10fbcd81efebc6dfe2d082e65eaaea30567",
            "test": "train ea53a17a85ee270e82fb97b9eb7c5205ef30ea670a8d5a339703971586411b60",
        }
        few = load_transfer_dataset(in_memory(known_labels(500), Value("int64")), shots=4)
        assert few.digests()["train"] == "train 5bb05a281d801c40b01f504caa2646c574a8b49ad09317fc94d0f0343dce2115"
        share = load_transfer_dataset(in_memory(known_labels(500), Value("int64")), fraction=0.2)
        assert share.digests()["train"] == "train 3d7af563afaa7cfaf87cca3ea5100f7f6c505627dc9d06ea5754af0260531eeb"
        splits.save_rows(tmp_path / "rows.json")
        published = json.loads((tmp_path / "rows.json").read_text())
        assert published["validation"]["rows"] == splits.rows["validation"].rows.tolist()
        assert f"{published['test']['split']} {published['test']['sha256']}" == splits.digests()["test"]

    def test_rows_say_where_each_image_is_stored(self):
        train, test = encoded(known_labels(200)), encoded([3, 1, 2])
        splits = load_transfer_dataset(DatasetDict(train=train, test=test), shots=5)
        for name, stored in (("train", train), ("validation", train), ("test", test)):
            rows = splits.rows[name]
            assert pixels(splits[name]) == [stored[int(row)]["image"].tobytes() for row in rows.rows]
        assert splits.rows["test"].place(1) == "test[1]"
        copy = pickle.loads(pickle.dumps(splits))
        assert copy.digests() == splits.digests()
        assert pixels(copy["test"]) == pixels(splits["test"])

    @pytest.mark.parametrize("num_proc", [None, 2])
    def test_rows_do_not_depend_on_the_number_of_processes(self, tmp_path, num_proc):
        encoded(known_labels(120)).to_parquet(str(tmp_path / "train.parquet"))
        splits = load_transfer_dataset(tmp_path, num_proc=num_proc, corrupt_images="skip", cache_dir=tmp_path / "c")
        assert splits.digests() == load_transfer_dataset(encoded(known_labels(120))).digests()

    @settings(max_examples=25, deadline=None)
    @given(
        counts=st.lists(st.integers(4, 30), min_size=1, max_size=6),
        shots=st.integers(1, 20),
        fraction=st.floats(0.2, 1.0),
        seed=st.integers(0, 2**32 - 1),
        order=st.randoms(use_true_random=False),
    )
    def test_sampling(self, counts, shots, fraction, seed, order):
        labels = [label for label, count in enumerate(counts) for _ in range(count)]
        order.shuffle(labels)
        data = Dataset.from_dict(
            {"image": [{"bytes": b"", "path": str(i)} for i in range(len(labels))], "label": labels}
        )
        raw = DatasetDict(train=data, validation=data, test=data)

        def load(**options):
            loaded = load_transfer_dataset(raw, image_column="image", seed=seed, **options)
            assert [len(loaded[name]) for name in ("validation", "test")] == [len(labels)] * 2
            kept = np.asarray(labels)[loaded.rows["train"].rows]
            assert kept.tolist() == loaded["train"]["label"][:]
            return set(loaded.rows["train"].rows.tolist()), np.bincount(kept, minlength=len(counts))

        few, of_class = load(shots=shots)
        assert of_class.tolist() == [min(shots, count) for count in counts]
        assert few <= load(shots=shots + 3)[0]
        share, of_class = load(fraction=fraction)
        assert len(share) == -int(-fraction * len(labels) // 1)
        assert all(abs(kept - fraction * count) < 2 for kept, count in zip(of_class, counts, strict=True))
        assert share <= load(fraction=(1 + fraction) / 2)[0]

    def test_sampling_that_cannot_be(self, caplog):
        data = encoded([0, 1] * 10)
        assert len(load_transfer_dataset(data, shots=100)["train"]) == 16
        assert "2 classes have fewer than 100 training images" in caplog.text
        with pytest.raises(ValueError, match=r"fraction=0.01 keeps 1 of 16 .* 2 classes: use at least 0.125"):
            load_transfer_dataset(data, fraction=0.01)
        for options, message in (
            ({"shots": 0}, "`shots` is 0"),
            ({"shots": 1.5}, "`shots` is 1.5"),
            ({"stream_images": 2.5}, "`stream_images` is 2.5"),
            ({"fraction": 1.5}, "`fraction` is 1.5"),
            ({"shots": 1, "fraction": 0.5}, "give one of the two"),
            ({"corrupt_images": "drop"}, "expected one of error, skip"),
        ):
            with pytest.raises(ValueError, match=message):
                load_transfer_dataset(data, **options)


class TestDuplicates:
    def test_no_image_is_in_two_splits(self):
        """By the content of the images, and not by their rows."""
        splits = load_transfer_dataset(encoded(known_labels(300)), fraction=0.5)
        contents = {name: set(pixels(split)) for name, split in splits.items()}
        assert [len(contents[name]) for name in contents] == [len(split) for split in splits.values()]
        assert not contents["train"] & contents["validation"] | contents["train"] & contents["test"]
        assert not contents["validation"] & contents["test"]
        assert find_duplicates(splits) == []

    @pytest.mark.parametrize("num_proc", [None, 2])
    def test_copies_are_found_wherever_they_are(self, tmp_path, num_proc):
        files = encoded(list(range(12))).cast_column("image", datasets.Image(decode=False))["image"][:]
        train = encoded([0, 1] * 5, {4: files[11]["bytes"], 6: files[1]["bytes"]})
        test = encoded([0, 1], {0: files[1]["bytes"], 1: files[11]["bytes"]})
        raw = DatasetDict(train=train, validation=encoded([0], {0: files[10]["bytes"]}), test=test)
        splits = load_transfer_dataset(raw)
        found = [[tuple(copy) for copy in copies] for copies in find_duplicates(splits, num_proc)]
        assert found == [
            [("train", "train[1]"), ("train", "train[6]"), ("test", "test[0]")],
            [("train", "train[4]"), ("test", "test[1]")],
        ]
        inside = encoded([0, 1] * 5, {6: files[1]["bytes"]})
        splits = load_transfer_dataset(
            DatasetDict(train=inside, validation=encoded([0], {0: b"x"}), test=test.select([1]))
        )
        assert shared_between_splits(find_duplicates(splits)) == []

    def test_files_on_disk(self, tmp_path):
        for i, name in enumerate(("a", "b")):
            (tmp_path / "train" / name).mkdir(parents=True)
            for j in range(10):
                picture(0 if (i, j) in ((0, 3), (1, 4)) else 1 + 10 * i + j).save(tmp_path / f"train/{name}/{j}.png")
        (copies,) = find_duplicates(load_transfer_dataset(tmp_path, cache_dir=tmp_path / "cache"))
        assert {copy.place for copy in copies} == {"train[3]", "train[14]"}


class TestCorruptImages:
    BROKEN = {3: b"", 5: b"no image", 8: None}

    def splits(self, paths: bool = False, **options):
        train = encoded([0, 1] * 10, self.BROKEN, paths)
        return load_transfer_dataset(
            DatasetDict(train=train, validation=encoded([0, 1]), test=encoded([1])), **options
        )

    def test_an_image_is_named_when_it_is_read(self, transforms):
        view = self.splits(paths=True).view("train", transforms.eval)
        assert view[4]["pixel_values"].shape == (3, 16, 16)
        with pytest.raises(CorruptImageError, match=r"image train\[5\] cannot be used \(photo5.png: no image that"):
            view[5]
        with pytest.raises(CorruptImageError, match=r"train\[3\] .*corrupt_images='skip'"):
            view.__getitems__([0, 3, 5])
        with pytest.raises(CorruptImageError, match=r"train\[8\] cannot be used"):
            view[8]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_in_a_loader(self, transforms, workers):
        view = self.splits().view("train", transforms.train)
        loader = DataLoader(view, batch_size=4, collate_fn=collate_images, num_workers=workers)
        with pytest.raises(CorruptImageError, match=r"image train\[3\] cannot be used \(0 bytes without a file"):
            list(loader)

    @pytest.mark.parametrize("num_proc", [None, 2])
    def test_skipped_only_if_asked_and_counted(self, transforms, caplog, num_proc):
        assert len(self.splits()["train"]) == 20
        splits = self.splits(corrupt_images="skip", num_proc=num_proc)
        assert splits.rows["train"].rows.tolist() == [i for i in range(20) if i not in self.BROKEN]
        assert "3 of the 20 images of the split 'train' cannot be read and are left out" in caplog.text
        assert all(f"Left out: the image train[{row}]" in caplog.text for row in self.BROKEN)
        view = splits.view("train", transforms.train)
        assert collate_images([view[i] for i in range(len(view))])["pixel_values"].shape == (17, 3, 16, 16)

    def test_found_without_loading(self):
        found = find_corrupt_images(encoded([0] * 10, self.BROKEN))
        assert set(found) == set(self.BROKEN)
        assert found[5] == "8 bytes without a file name: no image that Pillow can read"

    def test_a_null_image(self, transforms):
        rows = [{"image": None, "label": 0}, *({"image": picture(i), "label": 0} for i in range(2))]
        data = Dataset.from_list(rows, features=Features({"image": datasets.Image(), "label": Value("int64")}))
        raw = DatasetDict(train=data, validation=data, test=data)
        view = load_transfer_dataset(raw).view("test", transforms.eval)
        with pytest.raises(CorruptImageError, match=r"test\[0\] cannot be used \(there is no image in this row"):
            view[0]
        skipped = load_transfer_dataset(raw, corrupt_images="skip")
        assert {name: len(split) for name, split in skipped.items()} == {"train": 2, "validation": 2, "test": 2}


def test_class_names_reach_the_splits_unchanged():
    raw = in_memory([0, 1] * 20, ClassLabel(names=["zebra", "ant"]))
    splits = load_transfer_dataset(raw)
    assert all(split.features["label"].names == ["zebra", "ant"] for split in splits.values())
    rows = sorted(chain.from_iterable(part.rows.tolist() for part in splits.rows.values()))
    assert rows == list(range(40))
