"""Tests of `vpns_hf.images`: any stored image is RGB, or an error with its name."""

import io
import struct
import warnings
import zlib
from datetime import timedelta

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from helpers.pictures import picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessor, ViTImageProcessor
from transformers.image_utils import load_image

from vpns_hf.data import CorruptImageError, ImageTransforms
from vpns_hf.data.images import LONGEST_TO_SHORTEST, RGB_IMAGE, usable_rgb
from vpns_hf.data.splits import SplitView, StoredRows

SIZE = {"height": 16, "width": 16}
TRANSFORMS = [
    ImageTransforms(processor, (16, 16), processor.image_mean, processor.image_std, augmentation)
    for processor, augmentation in (
        (ViTImageProcessor(size=SIZE), "paper"),
        (CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SIZE), "randaugment"),
    )
]


def stored(content: bytes | None, path: str | None = None) -> Dataset:
    features = Features({"image": RGB_IMAGE})
    return Dataset.from_dict({"image": [{"bytes": content, "path": path}]}, features=features)


def file(image: Image.Image, kind: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def shown(content: bytes) -> np.ndarray:
    """What comes out of a data set."""
    image = stored(content)[0]["image"]
    assert image.mode == "RGB"
    return np.asarray(image)


class TestUsableRGB:
    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
    @pytest.mark.parametrize("white", [65535, 4095, 256])
    def test_16_bit_grey_that_a_pipeline_would_cut_off(self, kind, white):
        values = np.linspace(0, white, 64).reshape(8, 8).astype(np.uint16)
        with pytest.raises(CorruptImageError, match=rf"bit numbers from 0 to {white}, .* store it with 8 bits"):
            shown(file(Image.fromarray(values), kind))

    @pytest.mark.parametrize(
        ("kind", "dtype"),
        [("PNG", np.uint16), ("PPM", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32), ("TIFF", np.float32)],
    )
    def test_wide_numbers_up_to_255_are_what_a_pipeline_shows(self, kind, dtype):
        values = np.arange(256).reshape(16, 16)
        content = file(Image.fromarray(values.astype(dtype)), kind)
        assert (shown(content)[..., 0] == values).all()
        assert (shown(content) == np.asarray(load_image(Image.open(io.BytesIO(content))))).all()

    def test_32_bit_numbers_without_a_known_white(self):
        grey = np.array([[0, 100, 255]])
        for values in (grey * 2, -grey, grey / 255, grey + np.nan):
            kind = np.int32 if values.dtype == int else np.float32
            with pytest.raises(CorruptImageError, match=r"32-bit numbers from .* store it with 8 bits"):
                shown(file(Image.fromarray(values.astype(kind)), "TIFF"))

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV"])
    def test_every_mode_is_what_a_pipeline_shows(self, mode):
        image = picture(0, "P").convert(mode) if mode == "PA" else picture(0, mode)
        assert (np.asarray(usable_rgb(image)) == np.asarray(load_image(image))).all()

    def test_16_bit_colour_keeps_its_upper_bits_as_in_a_pipeline(self):
        """A PNG of one pixel, 16 bits per channel, written by hand."""
        pixel = struct.pack(">3H", 0x1234, 0x80FF, 0xFFFF)
        chunks = (
            b"IHDR" + struct.pack(">2I5B", 1, 1, 16, 2, 0, 0, 0),
            b"IDAT" + zlib.compress(b"\0" + pixel),
            b"IEND",
        )
        content = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
        )
        assert shown(content).tolist() == [[[0x12, 0x80, 0xFF]]]
        assert np.asarray(load_image(Image.open(io.BytesIO(content)))).tolist() == [[[0x12, 0x80, 0xFF]]]

    def test_grey_palette_and_cmyk(self):
        grey = picture(0, "L")
        assert (shown(file(grey, "PNG")) == np.asarray(grey)[..., None]).all()
        palette = picture(1, "P")
        assert (shown(file(palette, "GIF")) == np.asarray(palette.convert("RGB"))).all()
        cmyk = Image.new("CMYK", (4, 4), (0, 255, 0, 0))
        assert shown(file(cmyk, "TIFF"))[0, 0].tolist() == [255, 0, 255]

    def test_alpha_is_dropped_without_blending(self):
        image = picture(0)
        clear = image.copy()
        clear.putalpha(0)
        assert (shown(file(clear, "PNG")) == np.asarray(image)).all()

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_rotated_as_exif_says(self, orientation):
        image = picture(0, size=(10, 6))
        exif = Image.Exif()
        exif[274] = orientation
        pixels = np.asarray(image)
        upright = {
            1: pixels,
            2: pixels[:, ::-1],
            3: pixels[::-1, ::-1],
            4: pixels[::-1],
            5: pixels.swapaxes(0, 1),
            6: np.rot90(pixels, 3),
            7: np.rot90(pixels, 2).swapaxes(0, 1),
            8: np.rot90(pixels),
        }[orientation]
        assert (shown(file(image, "PNG", exif=exif)) == upright).all()

    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
    def test_of_an_animation_the_first_frame(self, kind):
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
        options = {"lossless": True} if kind == "WEBP" else {}
        animation = file(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert shown(animation)[0, 0].tolist() == [255, 0, 0]

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "0 bytes without a file name: no image that Pillow can read"),
            (b"GIF89a", "6 bytes without a file name: "),
            (file(picture(0, size=(64, 64)), "PNG")[:900], "900 bytes without a file name: "),
            (file(picture(0, size=(64, 64)), "JPEG")[:900], "900 bytes without a file name: image file is truncated"),
            (file(Image.new("L", (5000, 3)), "PNG"), "5000 x 3 pixels: one side is more than 200 times the other"),
        ],
    )
    def test_what_cannot_be_shown(self, content, reason):
        with pytest.raises(CorruptImageError, match=reason):
            shown(content)

    def test_missing_file(self, tmp_path):
        with pytest.raises(CorruptImageError, match=r"missing.png: .*No such file"):
            stored(None, str(tmp_path / "missing.png"))[0]
        with pytest.raises(CorruptImageError, match="no image in this row"):
            usable_rgb(None)

    def test_saved_data_sets_need_no_class_of_ours(self, tmp_path):
        stored(file(picture(0, "L"), "PNG")).save_to_disk(tmp_path / "data")
        loaded = datasets.load_from_disk(tmp_path / "data")
        assert loaded.features["image"] == datasets.Image(mode="RGB")
        assert loaded[0]["image"].mode == "RGB"


# Formats, and the modes in which each is written.
WRITTEN = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("1", "L", "RGB", "CMYK", "YCbCr"),
    "GIF": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"),
    "WEBP": ("L", "RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "TGA": ("L", "LA", "RGB", "RGBA"),
    "ICO": ("L", "RGBA"),
}
ALWAYS_USABLE = {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"}
SIDES = st.one_of(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 3, 300, 900, 5000]))
NAMES = st.sampled_from([None, "photo.jpg", "photo.png", "photo.gif", "notes.txt", "photo", "ünïcode photo.JPEG"])


@st.composite
def pictures(draw) -> tuple[bytes, bool]:
    """A picture as a file, and whether it must be usable."""
    kind = draw(st.sampled_from(sorted(WRITTEN)))
    mode = draw(st.sampled_from(WRITTEN[kind]))
    size = (draw(SIDES), draw(SIDES))
    # A long side is tried with short ones; pictures of many pixels would only take long.
    size = (size[0], max(1, min(size[1], 100_000 // size[0])))
    if kind == "ICO":
        size = (min(size[0], 256), min(size[1], 256))
    image = drawn(mode, size, draw(st.integers(0, 9)))
    options = {}
    if kind in ("PNG", "JPEG", "WEBP", "TIFF") and draw(st.booleans()):
        exif = Image.Exif()
        exif[274] = draw(st.integers(0, 12))
        options["exif"] = exif
    if kind in ("GIF", "WEBP", "PNG", "TIFF") and mode == "RGB" and draw(st.booleans()):
        options |= {"save_all": True, "append_images": [image.rotate(180)] * draw(st.integers(1, 3))}
    content = file(image, kind, **options)
    ordinary = max(size) <= LONGEST_TO_SHORTEST * min(size)
    return content, ordinary and mode in ALWAYS_USABLE and kind != "ICO"


def drawn(mode: str, size: tuple[int, int], seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    shape = (size[1], size[0])
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        return Image.fromarray(rng.integers(0, 2**16, shape).astype(kind))
    image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
    if mode == "LAB":
        return Image.frombytes("LAB", size, image.tobytes())
    return image.convert(mode)


@st.composite
def broken(draw) -> tuple[bytes, bool]:
    """A file of an image, whole or broken, and whether it must be usable."""
    content, usable = draw(pictures())
    way = draw(st.sampled_from(["whole", "cut", "zeros", "flipped", "shifted", "noise", "empty", "header"]))
    if way == "whole":
        return content, usable
    start, length = draw(st.integers(0, len(content))), draw(st.integers(1, 64))
    noise = draw(st.binary(min_size=1, max_size=64))
    middle = bytes(len(content[start : start + length])) if way == "zeros" else noise
    return {
        "cut": content[:start],
        "zeros": content[:start] + middle + content[start + length :],
        "flipped": content[:start] + middle + content[start + len(noise) :],
        "shifted": noise + content,
        "noise": noise,
        "empty": b"",
        # The first bytes say which format it is, its size and how it is packed.
        "header": content[: start % 40] + noise + content[start % 40 + len(noise) :],
    }[way], False


def check_any_file(content: bytes, name: str | None, usable: bool, use: int) -> None:
    """It ends in tensors, or in an error that says which image of which split it is."""
    transforms = TRANSFORMS[use]
    for transform in (transforms.train, transforms.eval):
        view = SplitView(stored(content, name).with_transform(transform), StoredRows("train", np.array([17])))
        error, row = None, {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                row = view[0]
            except CorruptImageError as raised:
                error = raised
        if error is None:
            assert row["pixel_values"].shape == (3, 16, 16)
            assert torch.isfinite(row["pixel_values"]).all()
        else:
            assert not usable, str(error)
            assert str(error).startswith("The image train[17] cannot be used (")
            assert (name or "without a file name") in str(error)


ANY_FILE = given(file=broken(), name=NAMES, use=st.integers(0, len(TRANSFORMS) - 1))
# A decoder that hangs is an error as well.
UNHURRIED = {"deadline": timedelta(seconds=60), "suppress_health_check": list(HealthCheck)}


@settings(max_examples=100, **UNHURRIED)
@ANY_FILE
def test_any_file_is_a_tensor_or_a_named_error(file, name, use):
    check_any_file(file[0], name, file[1], use)


@pytest.mark.slow
@settings(max_examples=10_000, **UNHURRIED)
@ANY_FILE
def test_ten_thousand_files_are_tensors_or_named_errors(file, name, use):
    check_any_file(file[0], name, file[1], use)
