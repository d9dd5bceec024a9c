"""Label mappings: the choice, and how a model reads its head through them."""

import copy
from itertools import permutations

import pytest
import torch
from helpers.models import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import ViTImageProcessor, pipeline

from vpns_hf import PromptedSparseConfig, PromptedSparseModel
from vpns_hf.label_mapping import LABEL_MAPPINGS, count_predictions, map_labels

ONE_TO_ONE = [name for name in LABEL_MAPPINGS if name != "bayesian"]
IMAGES, LABELS = torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])

counts_of_images = st.integers(1, 4).flatmap(
    lambda targets: st.integers(targets, 5).flatmap(
        lambda sources: st.lists(
            st.lists(st.integers(0, 9), min_size=targets, max_size=targets), min_size=sources, max_size=sources
        ).map(torch.tensor)
    )
)


def total(counts, mapping):
    return int(counts[mapping, torch.arange(counts.shape[1])].sum())


# Choosing


def test_frequency_is_greedy_and_one_to_one():
    """Column-wise argmax would give source 0 twice."""
    counts = torch.tensor([[9, 8, 0], [3, 1, 0], [2, 7, 1], [0, 0, 1], [1, 0, 5]])
    assert counts.argmax(0).tolist() == [0, 0, 4]
    assert map_labels(counts).tolist() == [0, 2, 4]
    assert map_labels(counts, "iterative").tolist() == [0, 2, 4]


def test_greedy_is_not_optimal():
    counts = torch.tensor([[10, 9], [9, 6]])
    assert total(counts, map_labels(counts, "frequency")) == 16
    assert total(counts, map_labels(counts, "optimal")) == 18


def plain_greedy(counts):
    counts, mapping = counts.clone(), [-1] * counts.shape[1]
    for _ in mapping:
        source, target = divmod(int(counts.argmax()), counts.shape[1])
        mapping[target] = source
        counts[source, :], counts[:, target] = -1, -1
    return mapping


@settings(deadline=None)
@given(counts_of_images)
def test_frequency_repeats_the_global_maximum(counts):
    mapping = map_labels(counts, "frequency")
    assert mapping.tolist() == plain_greedy(counts)
    assert mapping.dtype == torch.long


@settings(deadline=None)
@given(counts_of_images)
def test_optimal_beats_every_other_matching(counts):
    mapping = map_labels(counts, "optimal")
    assert len(set(mapping.tolist())) == counts.shape[1]
    best = max(total(counts, torch.tensor(other)) for other in permutations(range(counts.shape[0]), counts.shape[1]))
    assert total(counts, mapping) == best
    assert torch.equal(mapping, map_labels(counts, "optimal"))


@settings(deadline=None)
@given(counts_of_images)
def test_bayesian_columns_are_distributions(counts):
    weights = map_labels(counts, "bayesian")
    assert weights.dtype == torch.float32
    assert weights.shape == counts.shape
    torch.testing.assert_close(weights.sum(0), torch.ones(counts.shape[1]))
    assert (weights >= 0).all()
    absent = counts.sum(0) == 0
    assert (weights[:, absent] == torch.tensor(1 / len(counts))).all()
    assert ((weights > 0) == (counts > 0))[:, ~absent].all()


def test_bayesian_smooths_each_source_class():
    """C / (row sum + 1): [[3/5, 1/5], [0, 2/3], [1/2, 0]]; the columns sum to 11/10 and 13/15."""
    weights = map_labels(torch.tensor([[3, 1], [0, 2], [1, 0]]), "bayesian")
    torch.testing.assert_close(weights, torch.tensor([[6 / 11, 3 / 13], [0, 10 / 13], [5 / 11, 0]]))


@pytest.mark.parametrize("method", ["frequency", "optimal", "iterative"])
def test_ties_and_absent_classes(method):
    assert map_labels(torch.zeros(4, 3, dtype=torch.long), method).tolist() == [0, 1, 2]
    assert map_labels(torch.tensor([[0, 0, 0], [0, 7, 0], [0, 0, 0], [0, 0, 0]]), method).tolist() == [0, 1, 2]
    assert map_labels(torch.tensor([[2, 2], [2, 2]]), method).tolist() == [0, 1]


def test_source_classes_that_tie_for_one_target():
    counts = torch.tensor([[0, 5], [0, 5], [0, 1]])
    assert map_labels(counts, "frequency").tolist() == [1, 0]
    target_0, target_1 = map_labels(counts, "optimal").tolist()
    assert target_1 in (0, 1)
    assert target_0 == 1 - target_1


def test_random_is_one_to_one_and_follows_the_global_generator():
    counts = torch.zeros(5, 3)
    torch.manual_seed(0)
    drawn = [map_labels(counts, "random") for _ in range(400)]
    assert {tuple(mapping.tolist()) for mapping in drawn} == set(permutations(range(5), 3))
    torch.manual_seed(0)
    assert torch.equal(map_labels(counts, "random"), drawn[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", LABEL_MAPPINGS)
def test_counts_of_any_type_are_left_alone(method, dtype):
    counts = torch.tensor([[9, 8, 0], [3, 1, 0], [2, 7, 1], [0, 0, 1], [1, 0, 5]], dtype=dtype)
    before = counts.clone()
    torch.manual_seed(0)
    mapping = map_labels(counts, method)
    assert torch.equal(counts, before)
    torch.manual_seed(0)
    assert torch.equal(mapping, map_labels(counts.long(), method))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", LABEL_MAPPINGS)
def test_counts_on_a_gpu(method):
    counts = torch.tensor([[9, 8, 0], [3, 1, 0], [2, 7, 1], [0, 0, 1], [1, 0, 5]])
    torch.manual_seed(0)
    mapping = map_labels(counts, method)
    torch.manual_seed(0)
    assert torch.equal(map_labels(counts.cuda(), method), mapping)


@pytest.mark.parametrize("method", ONE_TO_ONE)
def test_too_few_source_classes(method):
    with pytest.raises(ValueError, match=r"at least as many source .* use `label_mapping=\"bayesian\"`"):
        map_labels(torch.zeros(2, 3), method)


def test_bayesian_takes_fewer_source_classes():
    assert map_labels(torch.tensor([[4, 0, 0], [0, 0, 4]]), "bayesian").tolist() == [[1, 0.5, 0], [0, 0.5, 1]]


@pytest.mark.parametrize("method", LABEL_MAPPINGS)
@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([[1.0, -1.0], [0.0, 2.0]], "not negative"),
        ([[1.0, float("nan")], [0.0, 2.0]], "finite"),
        ([[1.0, float("inf")], [0.0, 2.0]], "finite"),
        ([1.0, 2.0], r"got \(2,\)"),
        ([[], []], r"got \(2, 0\)"),
        ([[[1.0]]], r"got \(1, 1, 1\)"),
    ],
)
def test_unfit_counts_are_refused(method, counts, message):
    with pytest.raises(ValueError, match=message):
        map_labels(torch.tensor(counts), method)


def test_unknown_method():
    with pytest.raises(ValueError, match="one of random, frequency, optimal, iterative, bayesian"):
        map_labels(torch.zeros(3, 2), "semantic")


def test_counts():
    pairs = [(torch.tensor([0, 2, 2]), torch.tensor([0, 1, 1])), (torch.tensor([2]), torch.tensor([0]))]
    assert count_predictions(pairs, 3, 2).tolist() == [[1, 0], [0, 0], [1, 2]]


# Models


def mapped_model(method, state="search", **kwargs):
    torch.manual_seed(0)
    model = tiny_model("vit", label_mapping=method, num_labels=3, **kwargs)
    if state == "frozen":
        model.freeze_masks()
    elif state == "dense":
        model.detach_scores()
    return model


def some_matrix(targets=3):
    torch.manual_seed(1)
    return map_labels(torch.randint(0, 9, (6, targets)), "bayesian")


@pytest.mark.parametrize("state", ["search", "frozen", "dense"])
@pytest.mark.parametrize("method", ONE_TO_ONE)
@pytest.mark.parametrize("keep_source_head", [False, True])
def test_one_to_one_mapping_in_every_state(method, state, keep_source_head, tmp_path):
    model = mapped_model(method, state, keep_source_head=keep_source_head, sparsity=0.5 if state == "frozen" else 0)
    source, masks = model(IMAGES).logits, {name: mask.clone() for name, mask in model.masks().items()}
    assert source.shape == (4, 6)
    model.set_label_mapping([4, 0, 5])
    torch.testing.assert_close(model(IMAGES).logits, source[:, [4, 0, 5]])
    rows = [0, 1, 2, 3, 4, 5] if keep_source_head else [4, 0, 5]
    masks["classifier.weight"] = masks["classifier.weight"][rows]
    assert all(torch.equal(mask, masks[name]) for name, mask in model.masks().items())
    assert model.config.label_mapping_state == "final"
    assert model.config.mapped_labels == [4, 0, 5]
    model.save_pretrained(tmp_path)
    loaded = PromptedSparseModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(IMAGES).logits, source[:, [4, 0, 5]])
    for final in (model, loaded, copy.deepcopy(model)):
        with pytest.raises(ValueError, match="a final one is already set"):
            final.set_label_mapping([1, 2, 3])


def test_slicing_frozen_masks_keeps_the_zeros_and_tells_the_sparsity():
    model = mapped_model("optimal", "frozen", scope="global")
    model.set_label_mapping(torch.tensor([1, 5, 2]))
    assert model.config.sparsity == model.sparsity
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(IMAGES, labels=LABELS).loss.backward()
        optimizer.step()
    weights = dict(model.backbone.named_parameters())
    assert all((weights[name][~mask] == 0).all() for name, mask in model.masks().items())
    assert (~model.masks()["classifier.weight"]).any()


@pytest.mark.parametrize("state", ["search", "frozen", "dense"])
def test_iterative_mapping_is_renewed_and_ends_as_frequency(state, tmp_path):
    iterative, frequency = mapped_model("iterative", state), mapped_model("frequency", state)
    source = iterative(IMAGES).logits
    torch.testing.assert_close(source, frequency(IMAGES).logits)
    for mapping in ([0, 1, 2], [5, 3, 1]):
        iterative.set_label_mapping(mapping, final=False)
        torch.testing.assert_close(iterative(IMAGES).logits, source[:, mapping])
        torch.testing.assert_close(iterative.head_logits(IMAGES), source)
    iterative.save_pretrained(tmp_path)
    loaded = PromptedSparseModel.from_pretrained(tmp_path)
    for model in (iterative, loaded):
        assert model.config.label_mapping_state == "open"
        torch.testing.assert_close(model(IMAGES).logits, source[:, [5, 3, 1]])
        model.set_label_mapping([4, 0, 5])
    frequency.set_label_mapping([4, 0, 5])
    expected = frequency.state_dict()
    for model in (iterative, loaded):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
        assert model.backbone.classifier.out_features == 3


def test_iterative_mapping_may_keep_the_source_head():
    model = mapped_model("iterative", keep_source_head=True)
    model.set_label_mapping([0, 1, 2], final=False)
    source = model.head_logits(IMAGES)
    model.set_label_mapping([4, 0, 5])
    assert model.backbone.classifier.out_features == 6
    torch.testing.assert_close(model(IMAGES).logits, source[:, [4, 0, 5]])
    with pytest.raises(ValueError, match="a final one is already set"):
        model.set_label_mapping([0, 1, 2], final=False)


@pytest.mark.parametrize("state", ["search", "frozen", "dense"])
def test_bayesian_mapping_weighs_the_source_logits(state, tmp_path):
    model, matrix = mapped_model("bayesian", state), some_matrix()
    source = model(IMAGES).logits
    assert source.shape == (4, 6)
    model.set_label_mapping(torch.ones(6, 3), final=False)
    assert model.config.label_mapping_state == "open"
    model.set_label_mapping(matrix)
    torch.testing.assert_close(model(IMAGES).logits, source @ matrix)
    torch.testing.assert_close(model.head_logits(IMAGES), source)
    model(IMAGES, labels=LABELS).loss.backward()
    for packed in (None, False):
        model.save_pretrained(tmp_path, packed=packed)
        loaded = PromptedSparseModel.from_pretrained(tmp_path)
        assert torch.equal(loaded.label_matrix, matrix)
        torch.testing.assert_close(loaded(IMAGES).logits, source @ matrix)
        assert loaded.config.label_mapping_state == "final"
    halved = PromptedSparseModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(halved.label_matrix, matrix)
    assert halved(IMAGES.bfloat16()).logits.dtype == torch.bfloat16
    assert model.bfloat16()(IMAGES.bfloat16()).logits.shape == (4, 3)


def test_bayesian_mapping_is_exact_under_autocast():
    model, matrix = mapped_model("bayesian"), some_matrix()
    model.set_label_mapping(matrix)
    with torch.autocast("cpu", torch.bfloat16):
        source, logits = model.head_logits(IMAGES), model(IMAGES).logits
    assert torch.equal(logits, (source.float() @ matrix).to(source.dtype))


def test_bayesian_mapping_to_more_classes_than_the_source_has():
    model = tiny_model("vit", label_mapping="bayesian", num_labels=8)
    model.set_label_mapping(some_matrix(8))
    assert model(IMAGES).logits.shape == (4, 8)


def test_unset_mappings_survive_a_reload(tmp_path):
    for method in LABEL_MAPPINGS:
        model = mapped_model(method)
        model.save_pretrained(tmp_path / method)
        loaded = PromptedSparseModel.from_pretrained(tmp_path / method)
        assert loaded.config.label_mapping_state == "unset"
        torch.testing.assert_close(loaded(IMAGES).logits, model(IMAGES).logits)
        loaded.set_label_mapping(some_matrix() if method == "bayesian" else [0, 2, 1])
        assert loaded(IMAGES).logits.shape == (4, 3)


@pytest.mark.parametrize("method", ["frequency", "iterative", "bayesian"])
@pytest.mark.parametrize("keep_source_head", [False, True])
def test_pipelines_tell_the_names_of_the_task(method, keep_source_head):
    names = {0: "cat", 1: "dog", 2: "bird"}
    model = tiny_model("vit", label_mapping=method, id2label=names, keep_source_head=keep_source_head)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    model.set_label_mapping(some_matrix() if method == "bayesian" else [4, 0, 5])
    classify = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    image = torch.randint(0, 255, (32, 32, 3), dtype=torch.uint8).numpy()
    assert {answer["label"] for answer in classify(Image.fromarray(image))} == {"cat", "dog", "bird"}


@pytest.mark.parametrize(
    ("method", "mapping", "message"),
    [
        ("frequency", [0, 1], "one source class"),
        ("frequency", [0, 1, 6], "one source class"),
        ("frequency", [-1, 0, 1], "one source class"),
        ("frequency", torch.ones(6, 3), "one source class"),
        ("iterative", torch.tensor([0.0, 1.0, 2.0]), "one source class"),
        ("bayesian", [0, 1, 2], r"shape \(6, 3\), \[source, target\]; got shape \(3,\)"),
        ("bayesian", torch.ones(3, 6), r"got shape \(3, 6\)"),
        ("bayesian", torch.full((6, 3), float("nan")), "not finite"),
        (None, [0, 1, 2], "built without `label_mapping`"),
    ],
)
def test_unfit_mappings_are_refused_and_change_nothing(method, mapping, message):
    model = tiny_model("vit", label_mapping=method, num_labels=3)
    before = model(IMAGES).logits
    with pytest.raises(ValueError, match=message):
        model.set_label_mapping(mapping, final=False)
    assert model.config.label_mapping_state == "unset"
    torch.testing.assert_close(model(IMAGES).logits, before)


def test_unknown_mapping_state():
    with pytest.raises(ValueError, match="`label_mapping_state` is 'set'; expected one of unset, open, final"):
        PromptedSparseConfig(label_mapping_state="set")
