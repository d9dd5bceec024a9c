"""Patterns against hand-computed vectors, and selection in groups against one written out block by block."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vpns_hf import masking
from vpns_hf.masking import get_pattern, kept_count, select_masks

SHAPES = [(4, 8), (6, 4), (3, 8, 1, 1), (5, 4, 3, 2), (1, 12), (7, 16)]


def sizes(mask):
    return int(mask.sum()), mask.numel()


@st.composite
def scores(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))
    # Few distinct values make ties.
    levels = draw(st.sampled_from([2, 4, 1000]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    found = {}
    for index, shape in enumerate(shapes):
        values = (torch.randn(shape, generator=generator) * levels).round().to(dtype) / 8
        if len(shape) == 4 and draw(st.booleans()):
            values = values.contiguous(memory_format=torch.channels_last)
        found[f"w{index}"] = values
    return found


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("4:2", "n from 1 to m - 1"),
        ("0:4", "n from 1 to m - 1"),
        ("2:65", "m up to 64"),
        ("block:1", "a side from 2 to 1024"),
        ("block:", "'unstructured', n:m such as '2:4'"),
        ("²:4", "'unstructured', n:m such as '2:4'"),
        ("2:4 ", "'unstructured', n:m such as '2:4'"),
        ("x" * 10**6, "expected 'unstructured'"),
    ],
)
def test_names_that_are_no_pattern(name, reason):
    with pytest.raises(ValueError, match=reason) as error:
        get_pattern(name)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("name", ["unstructured", "2:4", "1:32", "block:32"])
def test_names_come_back(name):
    assert get_pattern(name).name == name


def test_the_two_largest_of_every_four():
    """The vector of the table of baselines."""
    weight = torch.tensor([[0.1, -0.4, 0.3, 0.2, 1.0, 0.5, -0.6, 0.7]])
    mask = select_masks({"w": weight.abs()}, 0.5, pattern=get_pattern("2:4"))["w"]
    assert mask.int().tolist() == [[0, 1, 1, 0, 1, 0, 0, 1]]


def test_ties_within_a_group_go_to_the_lower_input():
    mask = select_masks({"w": torch.ones(2, 4)}, 0.75, pattern=get_pattern("1:4"))["w"]
    assert mask.int().tolist() == [[1, 0, 0, 0]] * 2


def test_groups_of_a_convolution_are_input_channels_at_one_position():
    """Four input channels on two positions: at the first, channels 0 and 3 are largest, at the second, 1 and 2."""
    weight = torch.tensor([[[[4.0, 0.1]], [[0.2, 3.0]], [[0.3, 2.0]], [[5.0, 0.4]]]])
    mask = select_masks({"w": weight}, 0.5, pattern=get_pattern("2:4"))["w"]
    assert mask[0, :, 0].int().tolist() == [[1, 0], [0, 1], [0, 1], [1, 0]]
    assert mask.is_contiguous()


def test_a_rising_sparsity_removes_the_lowest_that_no_group_is_promised():
    """Of 1:4, three of each group may go; 3 of 8 weights: 0.1 and 0.2 of the first group, then 3.5 of the second."""
    weight = torch.tensor([[0.1, 9.0, 0.2, 8.0, 4.0, 3.5, 7.0, 6.0]])
    found = select_masks({"w": weight}, 3 / 8, pattern=get_pattern("1:4"))["w"]
    assert found.int().tolist() == [[0, 1, 0, 1, 1, 0, 1, 1]]


def test_a_small_weight_stays_where_its_group_needs_it():
    weight = torch.tensor([[0.1, 0.2, 0.3, 0.4, 7.0, 8.0, 9.0, 10.0]])
    found = select_masks({"w": weight}, 0.25, pattern=get_pattern("2:4"))["w"]
    assert found.int().tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]]


@given(scores(), st.sampled_from(["1:2", "2:4", "1:4", "3:4"]), st.sampled_from(["global", "layer", "row"]))
@settings(max_examples=60, deadline=None)
def test_exactly_n_of_every_m_and_the_largest(values, name, scope):
    kept, group = map(int, name.split(":"))
    masks = select_masks(values, 1 - kept / group, scope, get_pattern(name))
    for weight, mask in masks.items():
        for row, part in zip(values[weight].movedim(1, -1).flatten(1), mask.movedim(1, -1).flatten(1), strict=True):
            for start in range(0, len(row), group):
                numbers = row[start : start + group].tolist()
                best = sorted(range(group), key=lambda index: (-numbers[index], index))[:kept]
                assert part[start : start + group].nonzero().flatten().tolist() == sorted(best)


@given(scores(), st.sampled_from(["2:4", "1:4"]), st.floats(0, 1), st.sampled_from(["global", "layer"]))
@settings(max_examples=60, deadline=None)
def test_counts_are_exact_on_the_way_to_n_of_m(values, name, share, scope):
    pattern = get_pattern(name)
    sparsity = share * pattern.sparsity
    masks = select_masks(values, sparsity, scope, pattern)
    assert all(pattern.follows(mask) for mask in masks.values())
    if scope == "layer":
        assert all(sizes(mask)[0] == kept_count(mask.numel(), sparsity) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    if scope == "global":
        assert sum(sizes(mask)[0] for mask in masks.values()) == kept_count(total, sparsity)


def blocks_of(shape, side):
    """Index lists of the weights of every block, row-major, by plain loops."""
    rows, columns = shape[0], math.prod(shape[1:])
    for top, left in itertools.product(range(0, rows, side), range(0, columns, side)):
        yield [
            row * columns + column
            for row in range(top, min(top + side, rows))
            for column in range(left, min(left + side, columns))
        ]


@given(scores(), st.integers(2, 5), st.floats(0, 1), st.sampled_from(["global", "layer"]))
@settings(max_examples=60, deadline=None)
def test_blocks_of_the_largest_sums_are_kept(values, side, sparsity, scope):
    masks = select_masks(values, sparsity, scope, get_pattern(f"block:{side}"))
    sums = {
        (name, index): values[name].reshape(-1)[block].float().double().sum().item()
        for name in values
        for index, block in enumerate(blocks_of(values[name].shape, side))
    }
    chosen = set()
    for part in [list(values)] if scope == "global" else [[name] for name in values]:
        keys = [key for key in sums if key[0] in part]
        # Sums of eighths are exact, so ties are; sorting is stable.
        chosen |= set(sorted(keys, key=lambda key: -sums[key])[: kept_count(len(keys), sparsity)])
    for name, mask in masks.items():
        expected = torch.zeros(mask.numel(), dtype=torch.bool)
        for index, block in enumerate(blocks_of(mask.shape, side)):
            expected[block] = (name, index) in chosen
        assert torch.equal(mask, expected.view(mask.shape))
        assert mask.is_contiguous()


@pytest.mark.parametrize("name", ["2:4", "block:4"])
@pytest.mark.parametrize("shape", [(1, 4), (4, 8), (2, 4, 1, 1)])
def test_scores_are_left_as_they_are(name, shape):
    """One group of four is contiguous as a row and as a column."""
    values = torch.rand(shape).contiguous(
        memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format
    )
    before = values.clone()
    select_masks({"w": values}, 0.5, pattern=get_pattern(name))
    assert torch.equal(values, before)


def test_rows_and_erk_count_blocks():
    values = torch.arange(32.0).view(4, 8)
    pattern = get_pattern("block:2")
    mask = select_masks({"w": values}, 0.5, "row", pattern)["w"]
    assert mask.int().tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 4
    masks = select_masks({"w": values, "v": torch.rand(6, 6)}, 0.4, "erk", pattern)
    assert sum(sizes(mask)[0] for mask in masks.values()) == 4 * kept_count(8 + 9, 0.4)


@pytest.mark.parametrize("name", ["2:4", "block:2"])
@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_nan_is_refused(name, scope):
    values = torch.zeros(4, 8)
    values[1, 2] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        select_masks({"w": values}, 0.5, scope, get_pattern(name))


def test_what_n_of_m_cannot_have():
    values = {"w": torch.rand(4, 8)}
    with pytest.raises(ValueError, match=r"removes at most 0\.5"):
        select_masks(values, 0.6, pattern=get_pattern("2:4"))
    with pytest.raises(ValueError, match=r"'erk'.*gives all the same"):
        select_masks(values, 0.5, "erk", get_pattern("2:4"))


@pytest.mark.parametrize(
    ("name", "mask", "follows"),
    [
        ("2:4", [[1, 1, 0, 0]], True),
        ("2:4", [[1, 1, 1, 0]], True),
        ("2:4", [[0, 1, 0, 0]], False),
        ("block:2", [[1, 1, 0], [1, 1, 0], [0, 0, 1]], True),
        ("block:2", [[1, 1, 0], [1, 0, 0], [0, 0, 1]], False),
    ],
)
def test_masks_are_recognised(name, mask, follows):
    assert get_pattern(name).follows(torch.tensor(mask).bool()) == follows


@pytest.mark.parametrize(("given", "expected"), [(None, 2 / 3), (0.667, 2 / 3), (2 / 3, 2 / 3), (0.0, 0.0)])
def test_the_sparsity_that_a_pattern_fixes(given, expected):
    assert get_pattern("1:3").final_sparsity(given) == pytest.approx(expected, abs=1e-15)


def test_another_sparsity_is_refused():
    with pytest.raises(ValueError, match="`sparsity` is nan, but"):
        get_pattern("2:4").final_sparsity(math.nan)
    with pytest.raises(ValueError, match=r"`sparsity` is 0.9, but `pattern='1:3'` fixes it at 0.6667"):
        get_pattern("1:3").final_sparsity(0.9)
    assert [get_pattern(name).final_sparsity(None) for name in ("unstructured", "block:8")] == [0.9, 0.9]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("implicit", [0.0, 0.5])
def test_the_score_of_a_block_gets_the_gradients_of_its_weights(signed, implicit):
    """Against the same with one score a weight, summed by hand; 3 x 5 weights in blocks of 2, some incomplete."""
    torch.manual_seed(0)
    layer, inputs, side = nn.Linear(5, 3, bias=False), torch.randn(4, 5), 2
    weight = layer.weight.detach().clone()
    masking.attach_scores({"w": masking.PrunableWeight(layer, "weight")}, signed, get_pattern(f"block:{side}"))
    (part,) = masking.masked_weights({"w": masking.PrunableWeight(layer, "weight")}).values()
    assert part.scores.shape == (2, 3)
    with torch.no_grad():
        part.scores.copy_(torch.tensor([[1.0, -2.0, 0.5], [-1.0, 3.0, 0.25]]))
    part.implicit_gradient = implicit
    update = {"w": masking.PrunableWeight(layer, "weight")}
    masking.update_masks(update, 0.5, "global", get_pattern(f"block:{side}"))
    kept = [[-1 if signed else 1, 1, 0], [0, 1, 0]]
    if signed:
        kept = [[1, 0, 1], [0, 1, 0]]
    assert part.mask[::2, ::2].int().tolist() == kept
    layer(inputs).square().sum().backward()
    masked = (weight * part.mask).requires_grad_(True)
    (inputs @ masked.T).square().sum().backward()
    response = masked.grad * (weight - implicit * masked.grad * part.mask)
    expected = torch.zeros(2, 3)
    for row, column in itertools.product(range(3), range(5)):
        sign = 1 if signed else part.scores[row // side, column // side].sign()
        expected[row // side, column // side] += (sign * response[row, column]).detach()
    torch.testing.assert_close(part.scores.grad, expected)


def test_scores_of_blocks_start_at_the_sum_over_a_whole_block():
    layer = nn.Linear(3, 2, bias=False)
    weights = {"w": masking.PrunableWeight(layer, "weight")}
    single = masking.search.initial_scores(layer.weight).abs()
    masking.attach_scores(weights, pattern=get_pattern("block:2"))
    (part,) = masking.masked_weights(weights).values()
    expected = torch.stack([single[:, :2].sum() / 4, single[:, 2:].sum() / 4]).view(1, 2)
    torch.testing.assert_close(part.scores.detach(), expected)


def test_rows_take_their_share_of_the_scores_of_blocks():
    """Rows 4, 0 and 1 of five, in blocks of 2: the last block is one row, the first of the new ones mixes two."""
    pattern, scores = get_pattern("block:2"), torch.tensor([[8.0, 4.0], [1.0, 1.0], [6.0, 3.0]])
    taken = pattern.take_rows(scores, torch.Size([5, 3]), torch.tensor([4, 0, 1]))
    assert taken.tolist() == [[6.0 + 4.0, 3.0 + 2.0], [4.0, 2.0]]
    whole = pattern.take_rows(scores, torch.Size([5, 3]), torch.arange(5))
    torch.testing.assert_close(whole, scores)
