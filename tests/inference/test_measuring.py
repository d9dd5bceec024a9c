"""Times in turns, and the figures that are made of them."""

import statistics

import numpy as np
import pytest

from vpns_hf.inference import Spread, median_milliseconds, ratios, resident_bytes, time_in_turns


def clock_of(seconds):
    """A clock by which the calls take these seconds, one after the other."""
    ticks = [tick for each in seconds for tick in (0.0, each)]
    return iter(ticks).__next__


def test_actions_take_turns_and_warm_up_rounds_do_not_count():
    calls = []
    actions = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    clock = clock_of([9, 9, 8, 8, 1, 2, 3, 4, 5, 6])
    found = time_in_turns(actions, 3, clock, between=lambda: calls.append("between"))
    assert calls == ["between", "a", "between", "b"] * 5
    assert found == {"a": [1, 3, 5], "b": [2, 4, 6]}


def test_medians_are_those_of_numpy():
    seconds = np.random.default_rng(0).uniform(0.1, 2, size=(13, 2))
    found = median_milliseconds({"a": int, "b": int}, 11, clock_of(seconds.flatten()))
    assert list(found.values()) == pytest.approx(1000 * np.median(seconds[2:], axis=0))


@pytest.mark.parametrize("count", [2, 3, 7, 10])
def test_quartiles_are_those_of_numpy(count):
    values = np.random.default_rng(count).uniform(size=count)
    found = Spread.of(values.tolist())
    assert [found.lower, found.median, found.upper] == pytest.approx(np.quantile(values, [0.25, 0.5, 0.75]))


def test_ratios_are_of_one_round_each():
    assert ratios([2.0, 9.0, 1.0], [1.0, 3.0, 2.0]) == [2.0, 3.0, 0.5]
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])
    # A round that is slow for both does not count as a difference.
    assert statistics.median(ratios([1.0, 10.0, 1.0], [2.0, 20.0, 2.0])) == 0.5


def test_resident_memory_peaks_above_what_it_is():
    before, block = resident_bytes("VmHWM"), np.ones(8_000_000)
    if before is None:
        pytest.skip("this system does not tell")
    assert resident_bytes("VmHWM") >= resident_bytes("VmRSS") >= block.nbytes
    assert resident_bytes("VmNothing") is None
