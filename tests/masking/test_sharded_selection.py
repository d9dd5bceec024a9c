"""Selection over scores that are split over processes equals selection over whole ones, bit for bit."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vpns_hf.masking import select_masks
from vpns_hf.masking.selection import _ranked_groups
from vpns_hf.masking.sharded_topk import RankedGroup, Shards, select_on_shards


def on_shards(function, size):
    """Call `function(shards)` as each of `size` processes does, threads in their place, and give all results."""
    barrier, given_in = threading.Barrier(size), [None] * size

    def run(rank):
        def total(tensor):
            given_in[rank] = tensor
            barrier.wait(timeout=20)
            result = torch.stack(given_in).sum(0)
            barrier.wait(timeout=20)
            return result

        return function(Shards(rank, size, total))

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        return [future.exception() or future.result() for future in futures]


def split_rows(tensor, size):
    """As `fully_shard` splits: rows in equal chunks, of which the last may be short or empty."""
    chunks = list(tensor.chunk(size)) if len(tensor) else []
    return chunks + [tensor[:0]] * (size - len(chunks))


@st.composite
def problems(draw):
    dtypes = draw(st.sampled_from([[torch.float32], [torch.bfloat16], [torch.bfloat16, torch.float32]]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # Few distinct values make ties; zeros of both signs, infinities and subnormals are among them.
    levels = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, float("inf"), float("-inf"), 0.5, 2.0])
    scores = {}
    for index in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
        values = torch.randn(shape, generator=generator)
        if draw(st.booleans()):
            values = levels[torch.randint(len(levels), shape, generator=generator)]
        tensor = values.to(dtypes[index % len(dtypes)])
        if len(shape) == 4 and draw(st.booleans()):
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        scores[f"w{index}"] = tensor
    return scores, draw(st.floats(0, 1)), draw(st.integers(1, 5))


@given(problems(), st.sampled_from(["global", "layer", "erk"]))
@settings(max_examples=120, deadline=None)
def test_selection_on_shards_equals_selection_of_the_whole(problem, scope):
    scores, sparsity, size = problem
    expected = select_masks(scores, sparsity, scope)
    groups = _ranked_groups(scores, sparsity, scope)
    parts = {name: split_rows(score, size) for name, score in scores.items()}
    results = on_shards(
        lambda shards: select_on_shards({name: part[shards.rank] for name, part in parts.items()}, groups, shards),
        size,
    )
    for name, mask in expected.items():
        assert torch.equal(torch.cat([result[name] for result in results]), mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_widths(dtype):
    scores = torch.randn(1000, 7, dtype=dtype).round(decimals=2)
    (group,) = _ranked_groups({"w": scores}, 0.37, "global")
    results = on_shards(lambda s: select_on_shards({"w": split_rows(scores, 3)[s.rank]}, [group], s)["w"], 3)
    assert torch.equal(torch.cat(results), select_masks({"w": scores}, 0.37)["w"])


def test_ties_go_to_the_first_name_then_the_first_row():
    """Eight equal scores in two tensors on two processes; five are kept."""
    parts = {"first": torch.ones(1, 2), "second": torch.ones(1, 2)}
    group = RankedGroup(["first", "second"], 5)
    one, other = on_shards(lambda shards: select_on_shards(parts, [group], shards), 2)
    assert one["first"].tolist() == other["first"].tolist() == [[True, True]]
    assert one["second"].tolist() == [[True, False]]
    assert other["second"].tolist() == [[False, False]]


def test_nan_on_one_process_is_refused_on_all():
    parts = [torch.tensor([[1.0, 2.0]]), torch.tensor([[float("nan"), 0.0]])]
    group = RankedGroup(["w"], 2)
    errors = on_shards(lambda shards: select_on_shards({"w": parts[shards.rank]}, [group], shards), 2)
    assert [str(error).startswith("Scores contain NaN") for error in errors] == [True, True]
