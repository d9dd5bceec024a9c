"""Exact selection against a stable sort, whatever the sample and the pieces."""

import math

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vpns_hf.masking import topk as selection
from vpns_hf.masking.topk import overwrite_masks, top_k_mask


def by_sorting(values, count, magnitude=False):
    flat = torch.cat([value.reshape(-1) for value in values]).double()
    order = (flat.abs() if magnitude else flat).sort(descending=True, stable=True).indices[:count]
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order] = True
    parts = mask.split([value.numel() for value in values])
    return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]


@pytest.fixture
def small_pieces(monkeypatch):
    """A sample and pieces so small that little tensors need the bracket, and that it often misses."""
    monkeypatch.setattr(selection, "_SAMPLE", 24)
    monkeypatch.setattr(selection, "_PIECE", 11)
    monkeypatch.setattr(selection, "_DEVIATIONS", 0.5)


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


FEW_VALUES = st.sampled_from([-math.inf, -2.0, -1.0, -0.0, 0.0, 1.0, 1.0 + 1e-12, 2.0, math.inf])
CONTENTS = arrays.arrays(np.float64, st.integers(0, 90), elements=st.one_of(FEW_VALUES, st.floats(-4, 4)))
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@pytest.mark.usefixtures("small_pieces", "threads")
@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(CONTENTS, DTYPES), min_size=1, max_size=4),
    st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
    st.booleans(),
)
def test_the_largest_are_kept_and_ties_go_to_the_first(contents, share, magnitude):
    values = [torch.from_numpy(content).to(dtype) for content, dtype in contents]
    count = round(share * sum(value.numel() for value in values))
    found = top_k_mask(values, count, magnitude)
    for mask, expected in zip(found, by_sorting(values, count, magnitude), strict=True):
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("count", [0, 1, 150_000, 700_000, 1_499_999, 1_500_000])
def test_a_selection_large_enough_for_the_bracket(count):
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(1000, 1000, generator=generator)
    thin = 0.01 * torch.randn(500_000, generator=generator)
    found = top_k_mask([wide.t(), thin], count, magnitude=True)
    expected = by_sorting([wide.t(), thin], count, magnitude=True)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert found[0].is_contiguous()


def test_tensors_of_different_precision_are_ranked_in_the_wider():
    close = 1 + 1e-12 * torch.arange(5, dtype=torch.float64)
    found = top_k_mask([torch.ones(3), -close], 2, magnitude=True)
    assert [mask.int().tolist() for mask in found] == [[0, 0, 0], [0, 0, 0, 1, 1]]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("size", [2**16 - 1, 2**16, 2**16 + 1, 2**17 - 1, 2**17, 2**17 + 1])
@pytest.mark.parametrize("kind", ["random", "equal", "many tensors"])
def test_sizes_around_those_of_the_sample_and_of_a_piece(size, kind):
    generator = torch.Generator().manual_seed(size)
    values = torch.ones(size) if kind == "equal" else torch.randn(size, generator=generator)
    parts = values.split(500) if kind == "many tensors" else [values]
    for count in (0, size // 10, size):
        found, expected = top_k_mask(parts, count), by_sorting(parts, count)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_the_bracket_leaves_little_to_rank(monkeypatch):
    ranked = []
    keep = selection._keep_in_vector
    monkeypatch.setattr(
        selection, "_keep_in_vector", lambda values, count: ranked.append(len(values)) or keep(values, count)
    )
    top_k_mask([torch.randn(2_000_000)], 200_000)
    assert len(ranked) == 1
    assert ranked[0] < 0.02 * 2_000_000


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("position", [0, 57, 199])
@pytest.mark.parametrize("count", [0, 20, 200])
def test_nan_is_refused_wherever_it_is(position, count):
    values = torch.randn(200)
    values[position] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        top_k_mask([values], count)


@pytest.mark.usefixtures("small_pieces")
def test_overwriting_counts_what_changed():
    masks = {"a": torch.rand(37, 5) < 0.5, "b": torch.zeros(0, dtype=torch.bool), "c": torch.tensor(True)}
    selected = {"a": torch.rand(37, 5) < 0.5, "b": torch.zeros(0, dtype=torch.bool), "c": torch.tensor(False)}
    expected = int((masks["a"] != selected["a"]).sum()) + 1
    assert overwrite_masks(masks, selected) == expected
    assert all(torch.equal(masks[name], selected[name]) for name in masks)
    assert overwrite_masks(masks, selected) == 0
