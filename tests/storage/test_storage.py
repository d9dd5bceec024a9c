"""Tests of `vpns_hf.storage`."""

import json
import math
import random
import resource
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.packed import exact_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from vpns_hf.storage import (
    CODINGS,
    LAYOUT_KEY,
    VERSION_KEY,
    PackedFormatError,
    codings,
    header,
    is_packed,
    load_packed,
    reading,
    save_packed,
    writing,
)

DTYPES = list(header._DTYPES.values())
SHAPES = [(), (0,), (3, 0, 2), (1,), (7,), (8,), (4, 5, 6), (2, 3, 4, 5)]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def bits(tensor):
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def noise(shape, dtype):
    """Any bit pattern there is: NaNs with payloads, infinities, both zeros, subnormals."""
    raw = torch.randint(256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    return (raw % 2 if dtype == torch.bool else raw).view(dtype).view(shape)


def pruned(tensor, mask):
    """The tensor with +0.0 where the mask is False, bit for bit the same elsewhere."""
    kept = mask.contiguous().view(-1).repeat_interleave(tensor.itemsize)
    return (bits(tensor) * kept).view(tensor.dtype).view(tensor.shape)


def masked(shape, sparsity, dtype=torch.float32):
    """A tensor of any bits but NaN, and its mask."""
    mask = torch.rand(shape) >= sparsity
    return pruned(numbers(shape, dtype), mask), mask


def numbers(shape, dtype):
    """Any bit pattern there is, but no NaN."""
    tensor = noise(shape, dtype)
    if not (dtype.is_floating_point or dtype.is_complex):
        return tensor
    nan = (tensor.float() if dtype.itemsize == 1 else tensor).isnan()
    return pruned(tensor, ~nan) if nan.any() else tensor


def assert_round_trip(file, tensors, masks, metadata=None):
    save_packed(file, tensors, masks, metadata or {})
    loaded, loaded_masks, loaded_metadata = load_packed(file)
    assert (list(loaded), list(loaded_masks)) == (list(tensors), list(masks))
    assert loaded_metadata == (metadata or {})
    for name, tensor in tensors.items():
        assert (loaded[name].shape, loaded[name].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(bits(loaded[name]), bits(tensor))
    for name, mask in masks.items():
        assert torch.equal(loaded_masks[name], mask)


# Round trips ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_comes_back_bit_for_bit(file, dtype):
    tensors, masks = {}, {}
    for shape in SHAPES:
        tensors[f"dense {shape}"] = noise(shape, dtype)
        for sparsity in (0, 0.5, 1):
            name = f"masked {shape} {sparsity}"
            tensors[name], masks[name] = masked(shape, sparsity, dtype)
    assert_round_trip(file, tensors, masks)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_mask_comes_back(tmp_path_factory, data):
    shape = data.draw(st.lists(st.integers(0, 40), max_size=3), label="shape")
    sparsity = data.draw(st.floats(0, 1), label="sparsity")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    torch.manual_seed(data.draw(st.integers(0, 2**32), label="seed"))
    tensor, mask = masked(shape, sparsity, dtype)
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    assert_round_trip(file, {"bias": noise((3,), dtype), "weight": tensor}, {"weight": mask})


@pytest.mark.parametrize("chunk", [8, 64, 2**18])
@pytest.mark.parametrize("coding", CODINGS)
@given(mask=st.one_of(st.lists(st.booleans(), max_size=300), st.lists(st.integers(0, 700), max_size=9)))
@settings(max_examples=60, deadline=None)
def test_every_coding_decodes_to_the_mask(monkeypatch_class, chunk, coding, mask):
    monkeypatch_class.setattr(codings, "CHUNK", chunk)
    gaps = [[False] * gap + [True] for gap in mask] if mask and type(mask[0]) is int else [mask]
    bools = np.array([bit for gap in gaps for bit in gap], dtype=np.bool_)
    payload = CODINGS[coding].encode(bools, 10**9)
    if payload is None:
        return
    pieces = list(CODINGS[coding].decode(payload, bools.size, int(bools.sum())))
    assert np.array_equal(np.concatenate([np.zeros(0, dtype=np.int64), *pieces]), np.flatnonzero(bools))


@pytest.mark.parametrize("coding", CODINGS)
@given(
    steps=st.lists(st.one_of(st.sampled_from([0, 1, 0x80, 255]), st.integers(0, 255)), max_size=12),
    deflate=st.booleans(),
    total=st.one_of(st.integers(0, 100), st.integers(0, 4000), st.just(2**62)),
    kept=st.integers(0, 12),
)
@settings(max_examples=300, deadline=None)
def test_any_payload_is_refused_or_a_mask(coding, steps, deflate, total, kept):
    walked = sum(step + (step < 255) for step in steps)
    payload = deflated(steps) if deflate else bytes(steps)
    # The second pair is what the payload stands for, if it is one of gaps.
    for entries, values in [(total, kept), (walked, sum(step < 255 for step in steps))]:
        if values > entries:
            continue
        try:
            pieces = CODINGS[coding].decode(payload, entries, values)
        except ValueError:
            continue
        positions = [int(position) for piece in pieces for position in piece]
        assert len(positions) == values
        assert positions == sorted(set(positions))
        assert not positions or (positions[0] >= 0 and positions[-1] < entries)


@pytest.fixture(scope="session")
def monkeypatch_class():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
        torch.randn(6, 10).T,
        torch.randn(20)[::2],
        torch.randn(1, 4).expand(5, 4),
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.randn(4, dtype=torch.complex64).conj().imag,
        torch.nn.Parameter(torch.randn(4)),
    ],
    ids=["channels_last", "transposed", "strided", "expanded", "conjugated", "negated", "parameter"],
)
def test_memory_format_does_not_matter(file, tensor):
    mask = torch.rand_like(tensor.real) > 0.5
    weight = torch.empty_like(tensor).copy_(tensor * mask).masked_fill_(~mask, 0)
    assert_round_trip(file, {"dense": tensor, "weight": weight}, {"weight": mask})
    assert load_packed(file)[0]["weight"].is_contiguous()


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.is_floating_point or dtype.is_complex], ids=str)
def test_pruned_negative_zeros_come_back_as_zeros(file, dtype):
    sign = torch.zeros(4, dtype=torch.uint8).repeat_interleave(dtype.itemsize)
    sign[dtype.itemsize - 1 :: dtype.itemsize] = 0x80
    tensor, mask = sign.view(dtype), torch.tensor([True, False, True, False])
    if (tensor.to(torch.complex64) != 0).any():
        # In some types of one byte there is no -0.0.
        with pytest.raises(ValueError, match="is not zero"):
            save_packed(file, {"w": tensor}, {"w": mask}, {})
        return
    save_packed(file, {"w": tensor}, {"w": mask}, {})
    assert torch.equal(bits(load_packed(file)[0]["w"]), bits(pruned(tensor, mask)))


def test_kept_zeros_stay_kept(file):
    assert_round_trip(file, {"w": torch.tensor([0.0, -0.0, 1, 0])}, {"w": torch.tensor([True, True, True, False])})


def test_tensors_that_share_memory_are_independent(file):
    weight, mask = masked((5, 5), 0.5)
    assert_round_trip(file, {"a": weight, "b": weight, "c": weight}, {"a": mask, "b": mask})
    loaded, masks, _ = load_packed(file)
    loaded["a"].zero_()
    masks["a"].zero_()
    assert torch.equal(bits(loaded["b"]), bits(weight))
    assert torch.equal(masks["b"], mask)
    assert loaded["b"].untyped_storage().nbytes() == weight.nbytes


@pytest.mark.parametrize("metadata", [{}, {"note": "ü\n\0"}, {"format": "pt", "a": ""}])
def test_metadata_comes_back(file, metadata):
    assert_round_trip(file, {}, {}, metadata)


def test_threads_do_not_matter(file):
    torch.set_num_threads(4)
    tensors, masks = {}, {}
    for index in range(30):
        tensors[f"w{index}"], masks[f"w{index}"] = masked((40, index), index / 30)
    assert_round_trip(file, tensors, masks)


def test_the_header_of_many_large_masks_fits_its_room(file):
    """Offsets here take as many digits as the longest that the room is reckoned for."""
    tensors, masks = {}, {}
    for index in range(48):
        tensors[f"w{index}"], masks[f"w{index}"] = masked((103_000,), 0.25, torch.uint8)
    assert_round_trip(file, tensors, masks)


def test_stock_safetensors_opens_the_file(file):
    weight, mask = masked((16, 16), 0.9, torch.bfloat16)
    odd = torch.ones(3, dtype=torch.uint8)
    save_packed(file, {"odd": odd, "w": weight, "b": torch.ones(3)}, {"w": mask}, {"note": "x"})
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        assert (metadata["format"], metadata["note"], metadata[VERSION_KEY]) == ("pt", "x", "2")
        assert torch.equal(bits(opened.get_tensor("w")), bits(weight[mask]))
        assert torch.equal(opened.get_tensor("odd"), odd)
        assert set(opened.keys()) == {"odd", "w", "b", "w:mask"}


# Size and memory -----------------------------------------------------------------------------------------------------


def entropy(sparsity):
    return -sparsity * math.log2(sparsity) - (1 - sparsity) * math.log2(1 - sparsity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("sparsity", "slack"), [(0.5, 1.02), (0.6, 1.02), (0.7, 1.02), (0.8, 1.02), (0.9, 1.02), (0.95, 1.02), (0.99, 1.1)]
)
def test_size_is_near_the_bound(file, dtype, sparsity, slack):
    shape = (768, 768)
    weight, mask = masked(shape, sparsity, dtype)
    save_packed(file, {"w": weight}, {"w": mask}, {})
    measured = 1 - float(mask.float().mean())
    bound = math.prod(shape) * (entropy(measured) + (1 - measured) * dtype.itemsize * 8) / 8
    assert file.stat().st_size <= slack * bound


@pytest.mark.parametrize(("sparsity", "coding"), [(0, "dense"), (0.5, "bits"), (0.7, "huffman"), (0.95, "gaps")])
def test_the_shortest_coding_is_taken(sparsity, coding):
    mask = np.random.default_rng(0).random(200_000) >= sparsity
    payloads = {name: entry.encode(mask, 10**9) for name, entry in CODINGS.items()}
    assert codings.shortest_coding(mask) == (coding, payloads[coding])
    assert len(payloads[coding]) == min(len(payload) for payload in payloads.values() if payload is not None)


def peak_memory(function):
    tracemalloc.start()
    try:
        result = function()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_saving_takes_little_memory(file, sparsity):
    tensors, masks = {}, {}
    for name in "abcdef":
        tensors[name], masks[name] = masked((1024, 512), sparsity)
    _, peak = peak_memory(lambda: save_packed(file, tensors, masks, {}))
    assert peak < 2 * tensors["a"].nbytes


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_loading_takes_little_more_than_what_is_loaded(file, monkeypatch, sparsity):
    # Blocks are only taken by the system where they are used, which tracemalloc does not see.
    monkeypatch.setattr(reading, "_ARENA", 0)
    tensors, masks = {}, {}
    for name in "abcdef":
        tensors[name], masks[name] = masked((1024, 512), sparsity)
    save_packed(file, tensors, masks, {})
    (loaded, loaded_masks, _), peak = peak_memory(lambda: load_packed(file))
    size = sum(tensor.nbytes for tensor in [*loaded.values(), *loaded_masks.values()])
    assert peak - size < 2 * tensors["a"].nbytes


# What cannot be saved ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (1, torch.float32),
        (1e-45, torch.float32),
        (5e-324, torch.float64),
        (float("nan"), torch.bfloat16),
        (0.5, torch.float8_e4m3fn),
        (1j, torch.complex64),
        (1, torch.int8),
        (2**63, torch.uint64),
        (True, torch.bool),
    ],
    ids=str,
)
def test_values_that_would_be_lost_are_refused(file, value, dtype):
    tensor, mask = torch.zeros(300, dtype=dtype), torch.ones(300, dtype=torch.bool)
    tensor[7], mask[7] = torch.tensor(value, dtype=dtype), False
    with pytest.raises(ValueError, match=r"'block\.weight' is not zero in every entry that its mask prunes"):
        save_packed(file, {"block.weight": tensor}, {"block.weight": mask}, {})
    assert list(file.parent.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_kept_nans_are_refused(file, dtype):
    tensor, mask = torch.zeros(300, dtype=dtype), torch.zeros(300, dtype=torch.bool)
    tensor[7], mask[7] = float("nan"), True
    with pytest.raises(ValueError, match="'w' holds NaN in entries that its mask keeps"):
        save_packed(file, {"w": tensor}, {"w": mask}, {})
    assert list(file.parent.iterdir()) == []
    save_packed(file, {"w": tensor}, {}, {})
    assert torch.equal(bits(load_packed(file)[0]["w"]), bits(tensor))


@pytest.mark.parametrize(
    ("tensors", "masks", "metadata", "message"),
    [
        ({}, {"w": torch.ones(2) > 0}, {}, "a mask of 'w', but no tensor"),
        ({"w": torch.ones(2)}, {"w": torch.ones(3) > 0}, {}, r"mask of 'w' is torch.bool of shape \(3,\)"),
        ({"w": torch.ones(2)}, {"w": torch.ones(2)}, {}, "mask of 'w' is torch.float32"),
        ({"w:mask": torch.ones(2)}, {}, {}, "stored as 'w:mask'"),
        ({"__metadata__": torch.ones(2)}, {}, {}, "stored as '__metadata__'"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, {}, {}, "'w' cannot be stored: it is torch.complex128"),
        ({"w": torch.ones(2).to_sparse()}, {}, {}, "'w' cannot be stored: .* torch.sparse_coo"),
        ({"w": torch.ones(2, device="meta")}, {}, {}, "'w' cannot be stored: .* on meta"),
        ({}, {}, {"format": "tf"}, "'format' cannot be 'tf'"),
        ({}, {}, {VERSION_KEY: "1"}, f"'{VERSION_KEY}' cannot be '1'"),
        ({}, {}, {"a": 1}, "'a' cannot be 1"),
        ({}, {}, {"a": "x" * 2**24}, "names and metadata take"),
        ({"\ud800": torch.ones(2)}, {}, {}, "surrogates not allowed"),
    ],
)
def test_what_does_not_fit_is_refused(file, tensors, masks, metadata, message):
    with pytest.raises(ValueError, match=message):
        save_packed(file, tensors, masks, metadata)
    assert list(file.parent.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(file):
    save_packed(file, {"w": torch.ones(2)}, {}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_packed(file, {"w": torch.ones(10_000)}, {}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(file.parent.iterdir()) == [file]
    assert torch.equal(load_packed(file)[0]["w"], torch.ones(2))


# Files that were not written here ------------------------------------------------------------------------------------


def test_is_packed(file, tmp_path):
    save_packed(file, {}, {}, {})
    assert is_packed(file)
    stored = split(file)
    stored[0]["__metadata__"][VERSION_KEY] = "3"
    assert is_packed(join(file, *stored))
    headers = [b"[]", b"{", b'{"__metadata__":[]}', b"[" * 10**5]
    for content in [b"", b"{}", b"\xff" * 100, *map(framed, headers)]:
        file.write_bytes(content)
        assert not is_packed(file)
    save_file({"w": torch.ones(2)}, file)
    assert not is_packed(file)
    with pytest.raises(FileNotFoundError):
        is_packed(tmp_path / "missing")


def framed(header, data=b""):
    return len(header).to_bytes(8, "little") + header + data


def split(file):
    """Header, with the layout parsed, and data of a packed file."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"][LAYOUT_KEY] = json.loads(header["__metadata__"][LAYOUT_KEY])
    return header, content[end:]


def join(file, header, data):
    layout = header["__metadata__"].get(LAYOUT_KEY)
    metadata = header["__metadata__"] | ({} if layout is None else {LAYOUT_KEY: json.dumps(layout)})
    file.write_bytes(framed(json.dumps(header | {"__metadata__": metadata}).encode(), data))
    return file


def by_hand(file, coding="bits", payload=b"\xa0", values=(1.0, 2.0), shape=(3,)):
    """A file with the one masked tensor `w`; as it stands, [1, 0, 2] with the mask 101."""
    data = np.array(values, dtype=np.float32).tobytes()
    header = {
        "__metadata__": {
            VERSION_KEY: "1",
            LAYOUT_KEY: {"metadata": [], "packed": {"w": {"coding": coding, "shape": list(shape)}}},
        },
        "w": {"dtype": "F32", "shape": [len(values)], "data_offsets": [0, len(data)]},
        "w:mask": {"dtype": "U8", "shape": [len(payload)], "data_offsets": [len(data), len(data) + len(payload)]},
    }
    join(file, header, data + payload)
    return split(file)


def deflated(data):
    stream = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return stream.compress(bytes(data)) + stream.flush()


def assert_refused(file, message):
    with pytest.raises(PackedFormatError, match=message) as caught:
        load_packed(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_by_hand_are_as_the_library_writes_them(file):
    for coding, payload in [
        ("bits", b"\xa0"),
        ("huffman", deflated(b"\xa0")),
        ("gaps", deflated([0, 1])),
    ]:
        by_hand(file, coding, payload)
        tensors, masks, _ = load_packed(file)
        assert tensors["w"].tolist() == [1, 0, 2]
        assert masks["w"].tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("coding", "payload", "values", "shape", "message"),
    [
        ("bits", b"\xa0\0", (1, 2), (3,), "mask of 2 bytes, which does not fit its 3"),
        ("bits", b"", (1, 2), (3,), "mask of 0 bytes"),
        ("bits", b"\xb0", (1, 2), (3,), "more bits than entries"),
        ("bits", b"\xe0", (1, 2), (3,), "2 values and a mask that keeps 3"),
        ("bits", b"\x80", (1, 2), (3,), "2 values and a mask that keeps 1"),
        ("bits", b"\xe0", (1, 2, 3, 4), (3,), "more values than entries"),
        ("bits", b"\xa0", (1, 2), (2**40,), "mask of 1 bytes, which does not fit"),
        ("dense", b"", (1, 2), (3,), "stored dense"),
        ("dense", b"\0", (1, 2), (2,), "stored dense"),
        ("huffman", deflated(b"\xe0"), (1, 2), (3,), "a mask that keeps 3"),
        ("huffman", deflated(b"\xa0\0"), (1, 2), (3,), "decodes to more than 1"),
        ("huffman", deflated(b""), (1, 2), (3,), "decodes to 0 of 1 bytes"),
        ("huffman", deflated(b"\xa0") + b"\0", (1, 2), (3,), "bytes behind its coded mask"),
        ("huffman", deflated(b"\xa0")[:-1], (1, 2), (3,), "cut short"),
        ("huffman", b"\0" * 9, (1, 2), (3,), "cannot be decoded"),
        ("huffman", deflated(b"\xa0")[:-1] + b"\0", (1, 2), (3,), "cannot be decoded"),
        ("huffman", b"", (1, 2), (3,), "cut short"),
        ("huffman", deflated(b"\xa0"), (1, 2), (2**62,), "decodes to 1 of"),
        ("gaps", deflated([0, 1]), (1, 2), (2**62,), "a mask of 3 entries and a shape of"),
        ("gaps", deflated([0, 5]), (1, 2), (3,), "a mask of 7 entries"),
        ("gaps", deflated([0, 1, 0]), (1, 2), (3,), "decodes to more than 2"),
        ("gaps", deflated([0]), (1, 2), (3,), "2 values and a mask that keeps 1"),
        ("gaps", deflated([0, 255]), (1, 2), (3000,), "2 values and a mask that keeps 1"),
        ("gaps", deflated([0, 1]) * 2, (1, 2), (3,), "bytes behind its coded mask"),
        ("gaps", zlib.compress(b"\xff" * 10**7), (), (255 * 10**7,), "decodes to more than"),
        ("huffman", zlib.compress(b"\0" * 10**7), (), (8 * 10**7,), "decodes to more than"),
        ("huffman", zlib.compress(b"\0" * 10**7), (), (8,), "decodes to more than 1"),
    ],
)
def test_masks_that_do_not_fit_are_refused(file, coding, payload, values, shape, message):
    by_hand(file, coding, payload, values, shape)
    _, peak = peak_memory(lambda: assert_refused(file, f"(?s)'w'.*{message}"))
    assert peak < 2**20


def test_kept_values_in_a_file_are_never_nan(file):
    by_hand(file, values=(1, float("nan")))
    assert_refused(file, "'w' has kept values that are NaN")


def edited(*keys, value):
    """An edit of the header of [`by_hand`]: sets, or with `...` deletes, what is found at these keys."""

    def edit(header):
        for key in keys[:-1]:
            header = header[key]
        if value is ...:
            del header[keys[-1]]
        else:
            header[keys[-1]] = value

    return edit


LAYOUT = ("__metadata__", LAYOUT_KEY)


def pack_the_mask(header):
    end = header["w:mask"]["data_offsets"][1]
    header["w:mask:mask"] = {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}
    header["__metadata__"][LAYOUT_KEY]["packed"]["w:mask"] = {"coding": "dense", "shape": [1]}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            edited("__metadata__", VERSION_KEY, value="3"),
            "version is '3' and this release reads 1 and 2; upgrade vpns_hf",
        ),
        (edited("__metadata__", VERSION_KEY, value="2"), "vpns_hf_layout is malformed"),
        (edited("__metadata__", VERSION_KEY, value=...), "an ordinary safetensors file"),
        (edited("__metadata__", value={}), "an ordinary safetensors file"),
        (edited("__metadata__", VERSION_KEY, value=1), "no metadata"),
        (edited(*LAYOUT, value=...), "vpns_hf_layout is no sound JSON"),
        (edited(*LAYOUT, value=[]), "vpns_hf_layout is malformed"),
        (edited(*LAYOUT, "packed", value=[]), "vpns_hf_layout is malformed"),
        (edited(*LAYOUT, "metadata", value=["gone"]), "lists metadata that is not there"),
        (edited(*LAYOUT, "metadata", value="x"), "lists metadata that is not there"),
        (edited(*LAYOUT, "packed", "w", value=[]), "describes tensor 'w' wrongly"),
        (edited(*LAYOUT, "packed", "w", "more", value=1), "describes tensor 'w' wrongly"),
        (edited(*LAYOUT, "packed", "w", "coding", value="rans"), "'w' has a mask in an unknown coding"),
        (edited(*LAYOUT, "packed", "w", "coding", value=[]), "'w' has a mask in an unknown coding"),
        (edited(*LAYOUT, "packed", "w", "shape", value=[3.0]), "'w' has no proper shape"),
        (edited(*LAYOUT, "packed", "w", "shape", value=[True, 3]), "'w' has no proper shape"),
        (edited(*LAYOUT, "packed", "w", "shape", value=[-3, -1]), "'w' has no proper shape"),
        (edited(*LAYOUT, "packed", "w", "shape", value=[float("nan")]), "'w' has no proper shape"),
        (edited(*LAYOUT, "packed", "w", "shape", value=[1] * 65), "'w' has no proper shape"),
        (edited(*LAYOUT, "packed", "w", "shape", value=[0, 2**62, 4]), "'w' has too large a shape"),
        (edited(*LAYOUT, "packed", "v", value={"coding": "bits", "shape": [3]}), "'v' is said to be packed"),
        (edited(*LAYOUT, "packed", value={}), "'w:mask' is a mask of no tensor"),
        (lambda header: header.update(v=header.pop("w:mask")), "'w' is said to be packed, but its .* missing"),
        (lambda header: header.update(v=header.pop("w")), "'w' is said to be packed, but its .* missing"),
        (pack_the_mask, "'w:mask' is said to be packed"),
        (edited("w:mask", value=...), "it has .* bytes and its header describes"),
        (edited("w", value=...), "bytes of tensor 'w:mask' do not follow"),
        (edited("w", value=3), "describes tensor 'w' wrongly"),
        (edited("w", "dtype", value="F31"), "'w' has an unknown dtype"),
        (edited("w", "dtype", value=None), "'w' has an unknown dtype"),
        (edited("w", "dtype", value="F64"), "bytes of tensor 'w' do not fit its shape"),
        (edited("w", "shape", value=[1, 2]), "'w' .* are no vectors"),
        (edited("w", "shape", value=[3]), "bytes of tensor 'w' do not fit its shape"),
        (edited("w", "shape", value="x"), "'w' has no proper shape"),
        (edited("w", "data_offsets", value=[0]), "'w' has no proper offsets"),
        (edited("w", "data_offsets", value=[8, 0]), "bytes of tensor 'w' do not fit its shape"),
        (edited("w", "data_offsets", value=[-8, 0]), "'w' has no proper offsets"),
        (edited("w", "data_offsets", value=[1, 9]), "'w' do not follow"),
        (edited("w:mask", "data_offsets", value=[0, 1]), "do not follow"),
        (edited("w:mask", "dtype", value="I8"), "'w' .* are no vectors"),
    ],
)
def test_headers_that_lie_are_refused(file, edit, message):
    header, data = by_hand(file)
    edit(header)
    join(file, header, data)
    assert_refused(file, message)


def test_files_of_version_1_are_read():
    """The file was written by the last release that wrote this version."""
    tensors, masks, metadata = load_packed(Path(__file__).parent / "files" / "version_1.safetensors")
    expected, expected_masks = exact_tensors()
    assert metadata == {"note": "version 1"}
    assert {name: bits(tensor).tolist() for name, tensor in tensors.items()} == {
        name: bits(tensor).tolist() for name, tensor in expected.items()
    }
    assert all(torch.equal(mask, expected_masks[name]) for name, mask in masks.items())


def test_every_damaged_byte_of_a_value_or_mask_is_noticed(file):
    save_packed(file, *exact_tensors(), {})
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for at in [*range(start, len(content), 97), len(content) - 1]:
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        assert_refused(file, "is damaged: tensor '.*does not have the checksum that it was written with")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edited("bias", "dtype", value="I32"), "'bias' does not have the checksum"),
        (edited("bias", "shape", value=[5, 1]), "'bias' does not have the checksum"),
        (lambda header: header.update(other=header.pop("bias")), "one checksum for each array"),
        (edited("__metadata__", LAYOUT_KEY, "checksums", value=...), "malformed"),
        (edited("__metadata__", LAYOUT_KEY, "checksums", value=[]), "one checksum for each array"),
        (edited("__metadata__", LAYOUT_KEY, "checksums", "bias", value=...), "one checksum for each array"),
        (edited("__metadata__", LAYOUT_KEY, "checksums", "bias", value=None), "'bias' does not have the checksum"),
        (edited("__metadata__", LAYOUT_KEY, "packed", "bits", "shape", value=[80, 60]), "'bits' does not have the"),
    ],
)
def test_a_checksum_covers_name_dtype_and_shape(file, edit, message):
    save_packed(file, *exact_tensors(), {})
    header, data = split(file)
    edit(header)
    join(file, header, data)
    assert_refused(file, message)


@pytest.mark.parametrize("twice", [VERSION_KEY, "w", "dtype", "shape"])
def test_duplicate_names_are_refused(file, twice):
    by_hand(file)
    content = file.read_bytes()[8:]
    end = content.index(b"}}") + 2 if twice == "w" else None
    at = content.index(f'"{twice}"'.encode())
    entry = b'"%s": null, ' % twice.encode()
    assert end is None or end < len(content)
    header_length = int.from_bytes(file.read_bytes()[:8], "little") + len(entry)
    file.write_bytes(header_length.to_bytes(8, "little") + content[:at] + entry + content[at:])
    assert_refused(file, f"it names '{twice}' twice")


def test_truth_values_are_0_or_1(file):
    save_packed(file, {"flag": torch.ones(1, dtype=torch.bool)}, {}, {})
    file.write_bytes(file.read_bytes()[:-1] + b"\2")
    assert_refused(file, "'flag' has truth values that are neither 0 nor 1")


def test_cut_and_extended_files_are_refused(file):
    weight, mask = masked((10, 10), 0.9)
    save_packed(file, {"w": weight, "b": torch.ones(3)}, {"w": mask}, {"note": "x"})
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        assert_refused(file, "cut short|too long|describes")
    file.write_bytes(content + b"\0")
    assert_refused(file, "its header describes")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"[" * 10**6,
        b"\xff\xfe{}",
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"__metadata__":{"vpns_hf_packing":"1","vpns_hf_layout":"\\ud800"}}',
    ],
    ids=lambda header: f"{len(header)} bytes",
)
def test_headers_that_are_no_header_are_refused(file, header):
    file.write_bytes(framed(header))
    assert_refused(file, "is no packed file of vpns_hf that can be read: ")


def test_many_names_twice_are_refused_at_once(file):
    names = ",".join(f'"{index}":0' for index in range(200_000))
    file.write_bytes(framed(f'{{{names},"0":0}}'.encode()))
    assert_refused(file, "it names '0' twice")


def test_files_that_stock_safetensors_wrote_are_refused(file):
    save_file({"w": torch.ones(2)}, file)
    assert_refused(file, "no metadata")


def test_too_little_memory_is_one_clear_error(file, monkeypatch):
    by_hand(file)
    monkeypatch.setattr(reading._Arena, "zeros", lambda *_: (_ for _ in ()).throw(MemoryError()))
    assert_refused(file, r"'w' has the shape \(3,\), for which there is no memory")


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_packed(tmp_path / "missing")


# Mutated files -------------------------------------------------------------------------------------------------------


def flip_bit(content, rng):
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def set_byte(content, rng):
    at = rng.randrange(len(content))
    return content[:at] + bytes([rng.choice([0, 1, 0x7F, 0xFF, *b'0129"{}[],:-e'])]) + content[at + 1 :]


def cut(content, rng):
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.choice([1, 2, 8, len(content)]) :]


def insert(content, rng):
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.randbytes(rng.choice([1, 2, 8, 100])) + content[at:]


def copy_part(content, rng):
    start, at = rng.randrange(len(content)), rng.randrange(len(content))
    part = content[start : start + rng.randrange(1, 40)]
    return content[:at] + part + content[at + len(part) * rng.randrange(2) :]


def edit_header(content, rng):
    """A change of one value somewhere in the header, lengths kept right."""
    end = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:end])
        layout = json.loads(header["__metadata__"][LAYOUT_KEY])
    except (ValueError, KeyError, TypeError):
        return flip_bit(content, rng)
    replace_a_value(rng.choice([header, layout]), rng)
    if isinstance(header.get("__metadata__"), dict) and LAYOUT_KEY in header["__metadata__"]:
        header["__metadata__"][LAYOUT_KEY] = json.dumps(layout)
    return framed(json.dumps(header).encode(), content[end:])


def replace_a_value(node, rng):
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        if not keys:
            return
        key = rng.choice(keys)
        if not isinstance(node[key], dict | list) or rng.random() < 0.1:
            break
        node = node[key]
    value = node[key]
    numbers = [value + rng.randrange(-9, 10), value * 8, -value] if type(value) is int else []
    others = [0, 1, 2**31, 2**63, 10**30, True, None, 1.5, float("nan"), "", "U8", [], {}, *CODINGS]
    node[key] = rng.choice(numbers + others)


MUTATIONS = [flip_bit, set_byte, cut, insert, copy_part, edit_header, edit_header]


def seed_files(folder):
    generator = torch.Generator().manual_seed(0)
    for dtype, shape in [(torch.float32, (20, 30)), (torch.bfloat16, (20, 31)), (torch.bool, (60, 51))]:
        tensors, masks = {"bias": noise((5,), dtype), "empty": noise((0,), dtype)}, {}
        for sparsity in (0, 0.5, 0.8, 0.95, 1):
            mask = torch.rand(shape, generator=generator) >= sparsity
            tensors[f"w{sparsity}"], masks[f"w{sparsity}"] = pruned(numbers(mask.shape, dtype), mask), mask
        save_packed(folder / "seed", tensors, masks, {"note": "x"})
        yield (folder / "seed").read_bytes()


def assert_sound(file, folder):
    """What was loaded is a whole of its own: no more than the file justifies, and it can be saved and loaded again."""
    tensors, masks, metadata = load_packed(file)
    size = sum(tensor.nbytes for tensor in [*tensors.values(), *masks.values()])
    assert size <= 2040 * 9 * file.stat().st_size
    again = folder / "again"
    try:
        save_packed(again, tensors, masks, metadata)
    except UnicodeEncodeError:
        return
    loaded, loaded_masks, loaded_metadata = load_packed(again)
    assert loaded_metadata == metadata
    assert {name: bits(tensor).tolist() for name, tensor in loaded.items()} == {
        name: bits(tensor).tolist() for name, tensor in tensors.items()
    }
    assert all(torch.equal(loaded_masks[name], mask) for name, mask in masks.items())


def fuzz(folder, rounds, first=0):
    """How many of `rounds` mutated files were refused; the others must load as something sound.

    Every round has a seed of its own, so that any range of them can be run alone.
    """
    torch.manual_seed(0)
    seeds, file, refused = list(seed_files(folder)), folder / "mutated", 0
    for seed in range(first, first + rounds):
        rng = random.Random(seed)
        content = rng.choice(seeds)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            content = rng.choice(MUTATIONS)(content or b"\0", rng)
        file.write_bytes(content)
        is_packed(file)
        try:
            assert_sound(file, folder)
        except PackedFormatError:
            refused += 1
    return refused


def test_mutated_files_are_refused_or_sound(tmp_path):
    assert 1000 < fuzz(tmp_path, 2000) < 2000


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 100_000, 10_000))
def test_very_many_mutated_files_are_refused_or_sound(tmp_path, first):
    assert 5000 < fuzz(tmp_path, 10_000, first) < 10_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
def test_nan_is_seen_in_every_type_and_infinity_is_none(dtype):
    numbers = torch.tensor([1.0, -math.inf, math.inf, -0.0, 2.0**-14], dtype=torch.float64)
    unsigned = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[dtype.itemsize]
    for nan, expected in ((1.0, False), (math.nan, True), (-math.nan, True)):
        values = torch.cat([numbers, torch.tensor([nan], dtype=torch.float64)]).to(dtype)
        assert writing.any_nan(values.view(unsigned).numpy(), dtype) is expected
