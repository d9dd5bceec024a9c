import pytest
import torch

from vpns_hf.label_mapping import count_predictions, map_labels


def test_frequency_is_greedy_and_one_to_one():
    """Column-wise argmax would give source 0 twice."""
    counts = torch.tensor([[9, 8, 0], [3, 1, 0], [2, 7, 1], [0, 0, 1], [1, 0, 5]])
    assert map_labels(counts).tolist() == [0, 2, 4]


def test_ties_go_to_the_lower_flat_index_and_absent_classes_get_what_is_left():
    assert map_labels(torch.zeros(4, 3, dtype=torch.long)).tolist() == [0, 1, 2]
    assert map_labels(torch.tensor([[0, 5], [0, 5], [0, 1]])).tolist() == [1, 0]


def test_refusals():
    with pytest.raises(ValueError, match="at least as many source"):
        map_labels(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="expected None or one of"):
        map_labels(torch.zeros(3, 2), "optimal")


def test_counts():
    pairs = [(torch.tensor([0, 2, 2]), torch.tensor([0, 1, 1])), (torch.tensor([2]), torch.tensor([0]))]
    assert count_predictions(pairs, 3, 2).tolist() == [[1, 0], [0, 0], [1, 2]]
