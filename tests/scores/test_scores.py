"""Scores against hand-computed vectors, finite differences and independent double-precision computations."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from helpers.models import tiny_backbone, tiny_model
from helpers.states import assert_same_fingerprint, fingerprint, in_state, make_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, MobileViTConfig

from vpns_hf.masking import find_prunable_weights, select_masks
from vpns_hf.scores import SCORES, score_weights
from vpns_hf.scores import table as scoring
from vpns_hf.scores.layer_inputs import input_columns, observe_inputs
from vpns_hf.scores.table import dense_copy

GRADIENT_FAMILIES = ("vit", "swin", "resnet", "timm_vit", "timm_resnet", "mobilevit")


def noisy_backbone(family):
    """A backbone with every parameter and statistic away from its initial value, so that none is trivial.

    MobileViT has BatchNorm, residual connections and attention in one network.
    """
    if family == "mobilevit":
        config = MobileViTConfig(
            image_size=32,
            hidden_sizes=[8, 12, 16],
            neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 16],
            num_attention_heads=2,
            expand_ratio=2.0,
            num_labels=6,
        )
        backbone = AutoModelForImageClassification.from_config(config).eval()
    else:
        backbone = tiny_backbone(family)
    with torch.no_grad():
        for tensor in (*backbone.parameters(), *backbone.buffers()):
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand_like(tensor)
    return backbone.requires_grad_(False)


def reference_loss(backbone, weights, batches, temperature=1):
    """The summed loss of a double-precision backbone as a function of its prunable weights."""
    logits = [
        functional_call(backbone, weights, kwargs={"pixel_values": batch["pixel_values"].double()}).logits
        for batch in batches
    ]
    return sum(
        F.cross_entropy(found / temperature, batch["labels"]) for found, batch in zip(logits, batches, strict=True)
    )


def reference_gradients(backbone, weights, batches, temperature=1):
    weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    gradients = torch.autograd.grad(
        reference_loss(backbone, weights, batches, temperature), tuple(weights.values()), materialize_grads=True
    )
    return dict(zip(weights, gradients, strict=True))


def assert_scores_close(found, expected, tolerance):
    """Each tensor up to a fraction of its largest entry, or of 1e-4 of the largest of all: some are zero in theory."""
    assert list(found) == list(expected)
    largest = {name: float(tensor.detach().abs().max()) for name, tensor in expected.items()}
    for name, tensor in expected.items():
        scale = max(largest[name], 1e-4 * max(largest.values()))
        assert float((found[name].double() - tensor).abs().max()) <= tolerance * scale, name


# Vectors -------------------------------------------------------------------------------------------------------------

TOY_INPUT = torch.tensor([1.0, 2])


def toy():
    """f = b A x = -10 at x = (1, 2); the loss is (f - y)^2 / 2."""
    return {
        "A": torch.tensor([[1.0, -2], [3, 0.5]], requires_grad=True),
        "b": torch.tensor([[2.0, -1]], requires_grad=True),
    }


def toy_losses(weights, targets, inputs=(TOY_INPUT,)):
    for target, x in zip(targets, inputs, strict=True):
        yield (weights["b"] @ weights["A"] @ x - target).square().sum() / 2


def test_snip_vector():
    weights = toy()
    found = scoring._connection_sensitivity(weights, toy_losses(weights, [-11]))
    torch.testing.assert_close(found["A"], torch.tensor([[2.0, 8], [3, 1]]))
    torch.testing.assert_close(found["b"], torch.tensor([[6.0, 4]]))


def test_signed_losses_are_summed_before_the_absolute_value():
    """Two batches whose gradients point against each other: the toy at x = (1, 2) and at x = (2, -1)."""
    weights, inputs, targets = toy(), (TOY_INPUT, torch.tensor([2.0, -1])), (-11, 5.5)
    together = scoring._connection_sensitivity(weights, toy_losses(weights, targets, inputs))
    torch.testing.assert_close(together["A"], torch.tensor([[10, 20], [15, 2.5]]))
    torch.testing.assert_close(together["b"], torch.tensor([[30, 12.5]]))
    apart = [
        scoring._connection_sensitivity(weights, toy_losses(weights, [y], [x]))
        for x, y in zip(inputs, targets, strict=True)
    ]
    torch.testing.assert_close(apart[0]["A"] + apart[1]["A"], torch.tensor([[14, 20], [21, 2.5]]))
    torch.testing.assert_close(apart[0]["b"] + apart[1]["b"], torch.tensor([[30, 20.5]]))


def test_grasp_vector():
    weights = toy()
    found = scoring._gradient_flow(weights, lambda: toy_losses(weights, [-9]))
    torch.testing.assert_close(found["A"], torch.tensor([[-103.0, 412], [162, 54]]))
    torch.testing.assert_close(found["b"], torch.tensor([[320.0, 205]]))
    masks = select_masks(found, 0.5)
    assert masks["A"].tolist() == [[False, True], [False, False]]
    assert masks["b"].tolist() == [[True, True]]
    masks = select_masks(scoring._gradient_flow(weights, lambda: toy_losses(weights, [-11])), 0.5)
    assert masks["A"].tolist() == [[True, False], [True, True]]
    assert masks["b"].tolist() == [[False, False]]


def test_grasp_vector_with_temperature():
    """Logits over temperature (ln 3, 0) and label 0 give theta * Hg = -3 ln 3 / (32 T^2) for the first logit."""
    temperature = 200
    logits = {"logits": torch.tensor([temperature * math.log(3), 0], dtype=torch.float64, requires_grad=True)}

    def losses():
        yield F.cross_entropy(logits["logits"] / temperature, torch.tensor(0))

    found = scoring._gradient_flow(logits, losses)["logits"]
    torch.testing.assert_close(
        found, torch.tensor([-3 * math.log(3) / 32 / temperature**2, 0], dtype=torch.float64), atol=1e-18, rtol=1e-12
    )


def test_synflow_vector():
    """Ones through |b| |A|: R = 9.5, A = [[2, 4], [3, .5]], b = [[6, 3.5]]; rows of A sum to b."""
    weights = {name: weight.detach().abs().requires_grad_() for name, weight in toy().items()}
    total = (weights["b"] @ weights["A"]).sum()
    assert total.item() == 9.5
    found = scoring._connection_sensitivity(weights, [total])
    torch.testing.assert_close(found["A"], torch.tensor([[2.0, 4], [3, 0.5]]))
    torch.testing.assert_close(found["b"], torch.tensor([[6.0, 3.5]]))
    torch.testing.assert_close(found["A"].sum(1), found["b"][0])


def test_lamp_vector():
    first = scoring.lamp_of(torch.tensor([0.1, -0.5, 0.3, -0.2]))
    second = scoring.lamp_of(torch.tensor([1, -0.05, 0.45, 0.7]))
    torch.testing.assert_close(first, torch.tensor([0.01 / 0.39, 1, 0.09 / 0.34, 0.04 / 0.38]))
    torch.testing.assert_close(second[3], torch.tensor(0.49 / 1.49))
    masks = select_masks({"a": first, "b": second}, 0.5)
    assert masks["a"].tolist() == [False, True, True, False]
    assert masks["b"].tolist() == [True, False, False, True]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_lamp_ranks_one_tensor_as_magnitude_does(values, sparsity):
    weight = torch.tensor(values, dtype=torch.float32)
    kept = select_masks({"a": scoring.lamp_of(weight)}, sparsity)["a"]
    assert torch.equal(kept, select_masks({"a": weight.abs()}, sparsity)["a"])


def test_lamp_of_zeros_is_zero():
    assert torch.equal(scoring.lamp_of(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_woodfisher_vector():
    """Gradients (1, 0) and (1, 1) of two images: F = [[1, .5], [.5, .5]], whose inverse is [[2, -2], [-2, 4]]."""
    fisher, weight = torch.tensor([[[1.0, 0.5], [0.5, 0.5]]]), torch.tensor([3.0, 4.0])
    found = scoring._saliency(weight, fisher, torch.tensor(0.0))
    torch.testing.assert_close(found, torch.tensor([9 / 4, 16 / 8]))


def test_woodfisher_is_the_rise_of_the_quadratic_when_neighbours_make_up():
    """min over d of d F d / 2 with d_i = -w_i, solved for every weight on its own, from gradients of single images."""
    model, batches = tiny_model(prompt=None), make_batches()
    found = score_weights("woodfisher", model, batches, block=5, damping=1e-3)
    dense = dense_copy(model)
    weights = dense.prunable_weights()
    gradients = []
    for batch in batches:
        for image, label in zip(batch["pixel_values"], batch["labels"], strict=True):
            loss = dense(image[None], label[None]).loss
            gradients.append(torch.autograd.grad(loss, tuple(weights.values()), materialize_grads=True))
    mean = sum(float(part.square().sum()) for parts in gradients for part in parts)
    mean /= len(gradients) * sum(weight.numel() for weight in weights.values())
    for index, (name, weight) in enumerate(weights.items()):
        rows = torch.stack([parts[index].flatten()[5:10] for parts in gradients]).double()
        fisher = rows.T @ rows / len(rows) + 1e-3 * mean * torch.eye(5)
        for position in range(5):
            others = [place for place in range(5) if place != position]
            move = torch.zeros(5, dtype=torch.float64)
            move[position] = -weight.detach().flatten()[5 + position]
            move[others] = -torch.linalg.solve(fisher[others][:, others], fisher[others, position] * move[position])
            expected = (move @ fisher @ move / 2).float()
            torch.testing.assert_close(found[name].flatten()[5 + position], expected, rtol=1e-3, atol=1e-12)


def test_wanda_vector():
    weight = torch.tensor([[0.4, -0.3, 0.2, 0.1], [-1, 0.05, 0.6, -0.2]])
    found = scoring._wanda(weight, torch.tensor([[5.0, 5, 3, 10]]).square())
    torch.testing.assert_close(found, torch.tensor([[2, 1.5, 0.6, 1], [5, 0.25, 1.8, 2]]))
    assert select_masks({"a": found}, 0.5, "row")["a"].int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 1]]
    # The second and the eighth weight have the median score.
    assert select_masks({"a": found}, 0.5, "layer")["a"].int().tolist() == [[1, 0, 0, 0], [1, 0, 1, 1]]


# Independent computations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", GRADIENT_FAMILIES)
def test_snip_is_the_gradient_of_explicit_masks(family):
    backbone, batches = noisy_backbone(family), make_batches()
    found = score_weights("snip", tiny_model(copy.deepcopy(backbone)), batches)
    backbone.double()
    weights = {name: backbone.get_parameter(name).detach() for name in found}
    masks = {name: torch.ones_like(weight, requires_grad=True) for name, weight in weights.items()}
    loss = reference_loss(backbone, {name: weights[name] * mask for name, mask in masks.items()}, batches)
    gradients = torch.autograd.grad(loss, tuple(masks.values()))
    expected = {name: gradient.abs() for name, gradient in zip(masks, gradients, strict=True)}
    assert_scores_close(found, expected, 1e-4)

    name = list(found)[len(found) // 2]
    place, step = expected[name].argmax(), 1e-5
    shifted = []
    for sign in (1, -1):
        mask = torch.ones_like(weights[name]).flatten().index_fill(0, place, 1 + sign * step).view_as(weights[name])
        with torch.no_grad():
            shifted.append(reference_loss(backbone, weights | {name: weights[name] * mask}, batches))
    difference = abs(shifted[0] - shifted[1]) / (2 * step)
    assert found[name].flatten()[place].item() == pytest.approx(difference.item(), rel=1e-3)


@pytest.mark.parametrize("family", GRADIENT_FAMILIES)
@pytest.mark.parametrize("temperature", [200.0, 1.0])
def test_grasp_is_a_difference_of_gradients(family, temperature):
    """theta * Hg with Hg from gradients a step along g to either side, without any second derivative."""
    backbone, batches = noisy_backbone(family), make_batches()
    found = score_weights("grasp", tiny_model(copy.deepcopy(backbone)), batches, temperature=temperature)
    backbone.double()
    weights = {name: backbone.get_parameter(name).detach() for name in found}
    flow = reference_gradients(backbone, weights, batches, temperature)
    step = 1e-5 / math.sqrt(sum(float(part.square().sum()) for part in flow.values()))
    sides = [
        reference_gradients(
            backbone, {name: weights[name] + sign * step * flow[name] for name in weights}, batches, temperature
        )
        for sign in (1, -1)
    ]
    expected = {name: weights[name] * (sides[0][name] - sides[1][name]) / (2 * step) for name in weights}
    assert min(float(part.min()) for part in expected.values()) < 0 < max(float(p.max()) for p in expected.values())
    assert_scores_close(found, expected, 3e-3)


def test_grasp_is_half_the_gradient_of_the_squared_flow():
    backbone, batches = noisy_backbone("resnet"), make_batches()
    found = score_weights("grasp", tiny_model(copy.deepcopy(backbone)), batches)
    backbone.double()
    weights = {name: backbone.get_parameter(name).detach() for name in found}

    def squared_flow(weights):
        flow = torch.func.grad(lambda point: reference_loss(backbone, point, batches, 200))(weights)
        return sum(part.square().sum() for part in flow.values())

    half = torch.func.grad(squared_flow)(weights)
    assert_scores_close(found, {name: weights[name] * half[name] / 2 for name in weights}, 1e-3)


@pytest.mark.parametrize("family", ["vit", "swin", "resnet", "mobilevit"])
def test_synflow_is_the_derivative_of_the_summed_logits(family):
    backbone, batches = noisy_backbone(family), make_batches()
    found = score_weights("synflow", tiny_model(copy.deepcopy(backbone)), batches)
    backbone.double()
    with torch.no_grad():
        for tensor in (*backbone.parameters(), *backbone.buffers()):
            if tensor.is_floating_point():
                tensor.abs_()
    weights = {name: backbone.get_parameter(name).detach() for name in found}

    def total(weights):
        image = torch.ones(1, 3, 32, 32, dtype=torch.float64)
        return functional_call(backbone, weights, kwargs={"pixel_values": image}).logits.sum()

    gradients = torch.func.grad(total)(weights)
    expected = {name: (weights[name] * gradients[name]).abs() for name in weights}
    assert all(part.dtype == torch.float64 for part in found.values())
    assert_scores_close(found, expected, 1e-10)
    name = next(iter(weights))
    with torch.no_grad():
        sides = [total(weights | {name: weights[name] * (1 + sign * 1e-5)}) for sign in (1, -1)]
    gradient = (weights[name] * gradients[name]).sum()
    torch.testing.assert_close((sides[0] - sides[1]) / 2e-5, gradient, rtol=1e-4, atol=1e-8)


def test_synflow_leaves_the_range_of_float32():
    model = tiny_model("resnet")
    with torch.no_grad():
        for weight in model.prunable_weights().values():
            weight.mul_(1e12)
    found = score_weights("synflow", model, make_batches(1))
    largest = max(float(part.max()) for part in found.values())
    assert torch.finfo(torch.float32).max < largest < math.inf


@pytest.mark.parametrize("family", ["vit", "resnet", "mobilenet_v2", "convnext", "timm_resnet"])
def test_wanda_norms_are_those_of_unfolded_inputs(family):
    backbone, batches = noisy_backbone(family), make_batches()
    found = score_weights("wanda", tiny_model(copy.deepcopy(backbone)), batches)
    prunables, seen = find_prunable_weights(backbone), {}

    def note(name, inputs, outputs):
        layer = prunables[name].module
        if isinstance(layer, nn.Linear):
            columns = inputs.reshape(-1, inputs.shape[-1])
        else:
            unfolded = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            columns = unfolded.transpose(1, 2).flatten(0, 1)
        seen.setdefault(name, []).append(columns)

    with torch.no_grad(), observe_inputs(prunables, note):
        for batch in batches:
            backbone(pixel_values=batch["pixel_values"])
    for name, score in found.items():
        weight, norms = prunables[name].module.weight.detach(), torch.cat(seen[name]).norm(dim=0)
        groups = prunables[name].module.groups if weight.dim() == 4 else 1
        per_row = norms.view(groups, -1).repeat_interleave(len(weight) // groups, 0).view_as(weight)
        torch.testing.assert_close(score, weight.abs() * per_row, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Linear(4, 3, bias=False), (2, 5, 4)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 9)),
        (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False), (2, 4, 9, 8)),
        (nn.Conv2d(4, 6, 3, padding="same", dilation=2, groups=2, bias=False), (2, 4, 9, 8)),
        (nn.Conv2d(4, 6, 4, padding="same", bias=False), (2, 4, 9, 8)),
        (nn.Conv2d(4, 6, 3, padding="valid", bias=False), (2, 4, 9, 8)),
        (nn.Conv2d(4, 8, 3, padding=1, groups=4, padding_mode="reflect", bias=False), (2, 4, 9, 8)),
        (nn.Conv3d(4, 6, (2, 3, 1), padding=(1, 1, 0), groups=2, bias=False), (2, 4, 3, 5, 6)),
        (Conv2dSame(4, 6, 3, stride=2, bias=False), (2, 4, 9, 8)),
        (Conv2dSame(4, 4, 5, stride=2, groups=4, bias=False), (2, 4, 8, 7)),
        (Conv2dSame(4, 6, 1, stride=2, bias=False), (2, 4, 8, 7)),
    ],
)
def test_columns_times_the_flat_weight_are_the_output(layer, size):
    inputs = torch.randn(size)
    with torch.no_grad():
        outputs = layer(inputs)
        columns = input_columns("weight", layer, inputs, outputs)
        rows = columns @ layer.weight.reshape(len(columns), -1, columns.shape[2]).mT
    dims_last = outputs if isinstance(layer, nn.Linear) else outputs.movedim(1, -1)
    torch.testing.assert_close(rows.transpose(0, 1).flatten(1), dims_last.flatten(0, -2))


# Contract ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["dense", "search", "frozen"])
@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_the_model_is_left_as_it_is(family, state):
    model, batches = in_state(state, family), make_batches()
    image = torch.randn(1, 3, 32, 32)
    logits = model(image).logits
    before = fingerprint(model)
    for name in SCORES:
        found = score_weights(name, model, batches)
        assert list(found) == list(model.masks())
        for weight, score in found.items():
            assert score.shape == model.masks()[weight].shape
            assert score.dtype == (torch.float64 if name == "synflow" else torch.float32)
            assert not score.requires_grad
    assert_same_fingerprint(before, fingerprint(model))
    assert torch.equal(model(image).logits, logits)
    if state == "search":
        model.update_masks()


def test_modes_gradients_and_contexts_do_not_matter():
    model, batches = in_state("search", "resnet"), make_batches()
    expected = {name: score_weights(name, model, batches) for name in SCORES}
    model.train_only("weights")
    model(**{key: batches[0][key] for key in ("pixel_values", "labels")}).loss.backward()
    model.train()
    before = fingerprint(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = {name: score_weights(name, model, batches) for name in SCORES}
    assert_same_fingerprint(before, fingerprint(model))
    for name in SCORES:
        for weight in expected[name]:
            assert torch.equal(found[name][weight], expected[name][weight])


def test_the_state_does_not_matter_where_nothing_is_pruned():
    backbone, batches = tiny_backbone("vit"), make_batches()
    models = [tiny_model(copy.deepcopy(backbone), sparsity=0.5 if i == 0 else 0.0) for i in range(3)]
    models[1].detach_scores()
    models[2].freeze_masks()
    for name in SCORES:
        first, *others = (score_weights(name, model, batches) for model in models)
        for other in others:
            for weight in first:
                assert torch.equal(first[weight], other[weight]), name


def test_prompt_and_prepared_forward_are_bypassed():
    backbone, batches = tiny_backbone("vit"), make_batches()
    expected = score_weights("snip", tiny_model(copy.deepcopy(backbone), prompt=None), batches)
    prompted = tiny_model(copy.deepcopy(backbone))
    with torch.no_grad():
        for parameter in prompted.prompt.parameters():
            parameter.normal_()
    prompted.config.use_prompt = True
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(prompted)
    found = score_weights("snip", prepared, batches)
    for weight in expected:
        assert torch.equal(found[weight], expected[weight])


@pytest.mark.parametrize("name", SCORES)
def test_masks_score_the_weights_that_are_left(name):
    """As if the zeros were written into the weights of a dense model, except that gradients stop at them."""
    backbone, batches = noisy_backbone("resnet"), make_batches()
    model = tiny_model(copy.deepcopy(backbone))
    masks = {weight: mask.clone() for weight, mask in model.masks().items()}
    found = score_weights(name, model, batches, masks=masks)
    with torch.no_grad():
        for weight, mask in masks.items():
            backbone.get_parameter(weight).mul_(mask)
    expected = score_weights(name, tiny_model(backbone), batches)
    for weight, mask in masks.items():
        assert (found[weight][~mask] == 0).all()
        # Those two score a weight by others as well, which are gone.
        if name not in ("grasp", "woodfisher"):
            assert torch.equal(found[weight][mask], expected[weight][mask])


def test_masked_grasp_counts_the_gradient_flow_of_kept_weights():
    backbone, batches = noisy_backbone("resnet"), make_batches()
    model = tiny_model(copy.deepcopy(backbone))
    masks = model.masks()
    found = score_weights("grasp", model, batches, masks=masks)
    backbone.double()
    weights = {name: backbone.get_parameter(name).detach() for name in masks}

    def squared_flow(weights):
        masked = torch.func.grad(
            lambda point: reference_loss(backbone, {n: point[n] * masks[n] for n in masks}, batches, 200)
        )(weights)
        return sum(part.square().sum() for part in masked.values())

    half = torch.func.grad(squared_flow)(weights)
    assert_scores_close(found, {name: masks[name] * weights[name] * half[name] / 2 for name in weights}, 1e-3)


def test_half_precision_models_are_scored_in_float32():
    backbone, batches = tiny_backbone("vit").bfloat16(), make_batches()
    batches = [batch | {"pixel_values": batch["pixel_values"].bfloat16()} for batch in batches]
    rounded = [batch | {"pixel_values": batch["pixel_values"].float()} for batch in batches]
    model = tiny_model(copy.deepcopy(backbone))
    assert model.prunable_weights().popitem()[1].dtype == torch.bfloat16
    for name in SCORES:
        found = score_weights(name, model, batches)
        same = score_weights(name, tiny_model(copy.deepcopy(backbone).float()), rounded)
        for weight in same:
            assert torch.equal(found[weight], same[weight]), name


def test_random_scores_follow_their_seed():
    model = tiny_model("vit")
    first, same, other = (score_weights("random", model, [], seed=seed) for seed in (3, 3, 4))
    for name in first:
        assert torch.equal(first[name], same[name])
        assert not torch.equal(first[name], other[name])
        assert (first[name] >= 0).all()
        assert (first[name] < 1).all()


def test_weights_that_the_loss_does_not_reach_score_zero():
    plain = tiny_model("vit")
    plain.detach_scores()
    plain.backbone.spare = nn.Linear(4, 4)
    for name in ("snip", "grasp", "synflow"):
        found = score_weights(name, plain, make_batches())
        assert torch.equal(found["spare.weight"], torch.zeros(4, 4))
        assert any(bool(score.any()) for score in found.values())


def test_label_mappings_are_followed():
    batches, mapping = make_batches(classes=2), [4, 1]
    backbone = tiny_backbone("vit")
    sliced, whole = (
        tiny_model(copy.deepcopy(backbone), num_labels=2, label_mapping="frequency", keep_source_head=keep)
        for keep in (False, True)
    )
    with pytest.raises(ValueError, match="lacks its label mapping"):
        score_weights("snip", whole, batches)
    for model in (sliced, whole):
        model.set_label_mapping(mapping)
    for name in ("snip", "grasp"):
        first, second = (score_weights(name, model, batches) for model in (sliced, whole))
        torch.testing.assert_close(first["classifier.weight"], second["classifier.weight"][mapping])
        assert not second["classifier.weight"][[0, 2, 3, 5]].any()


def test_layers_that_hooks_do_not_see_are_named():
    model = tiny_model("vit")
    model.detach_scores()
    model.backbone.spare = nn.MultiheadAttention(4, 2)
    with pytest.raises(ValueError, match=r"inputs of spare\.in_proj_weight .* `ignore_modules`"):
        score_weights("wanda", model, make_batches())
    del model.backbone.spare
    assert score_weights("wanda", model, make_batches())
    assert not any(module._forward_hooks for module in model.modules())

    class OwnPadding(nn.Conv2d):
        def forward(self, x):
            return super().forward(F.pad(x, (3, 3, 3, 3)))

    layer = OwnPadding(1, 1, 3)
    images = torch.randn(1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"inputs of conv\.weight .* has 12 output positions for 8"):
        input_columns("conv.weight", layer, images, layer(images))


def test_errors():
    model, batches = tiny_model("resnet"), make_batches()
    with pytest.raises(ValueError, match="no score 'snap'; expected one of magnitude, group_magnitude"):
        score_weights("snap", model, batches)
    for name in ("snip", "grasp", "synflow", "wanda"):
        with pytest.raises(ValueError, match=f"'{name}' needs at least one batch"):
            score_weights(name, model, [])
    for name in ("snip", "grasp"):
        with pytest.raises(ValueError, match="no `labels`"):
            score_weights(name, model, [{"pixel_values": batches[0]["pixel_values"]}])
    for name in ("magnitude", "lamp", "random"):
        assert score_weights(name, model, [])
    for name in ("synflow", "wanda"):
        assert score_weights(name, model, [{"pixel_values": batches[0]["pixel_values"]}])
    masks = model.masks()
    with pytest.raises(ValueError, match="exactly the 7 prunable weights"):
        score_weights("snip", model, batches, masks=dict(list(masks.items())[1:]))
    with pytest.raises(ValueError, match="has shape"):
        score_weights("snip", model, batches, masks=masks | {next(iter(masks)): torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"'snip' score of .* is not finite"):
        score_weights("snip", model, [batches[0] | {"pixel_values": torch.full((3, 3, 32, 32), math.nan)}])
    with pytest.raises(TypeError, match="tempo"):
        score_weights("grasp", model, batches, tempo=1)


def test_a_new_score_is_one_entry(monkeypatch):
    def gradient(model, batches, power=1):
        for batch in batches:
            model(**batch, use_prompt=False).loss.backward()
        return {name: weight.grad.abs() ** power for name, weight in model.prunable_weights().items()}

    monkeypatch.setitem(SCORES, "gradient", gradient)
    model, batches = tiny_model("vit"), make_batches()
    found = score_weights("gradient", model, batches, power=2)
    magnitudes, snip = score_weights("magnitude", model, []), score_weights("snip", model, batches)
    for name in found:
        torch.testing.assert_close(magnitudes[name] * found[name].sqrt(), snip[name])


def test_the_copy_is_plain_and_leaves_the_original_usable():
    """Copies of a parametrized module share its class; changing the copy must not change the original."""
    model, image = tiny_model("vit"), torch.randn(1, 3, 32, 32)
    dense = dense_copy(model)
    assert dense.config.state == "dense"
    assert not dense.training
    assert [name for name, p in dense.backbone.named_parameters() if p.requires_grad] == list(model.masks())
    expected = dense(image, use_prompt=False).logits
    model.detach_scores()
    assert torch.equal(model(image, use_prompt=False).logits, expected)
    frozen = in_state("frozen")
    assert all(not weight._backward_hooks for weight in dense_copy(frozen).prunable_weights().values())


def test_group_magnitude_by_hand():
    """Two layers whose weights differ tenfold get the same scores."""
    model = tiny_model("vit")
    names = list(model.masks())[:2]
    model.detach_scores()
    with torch.no_grad():
        for scale, name in zip((1.0, 10.0), names, strict=True):
            weight = model.prunable_weights()[name]
            weight.fill_(scale)
            weight[0] *= 3
    scores = score_weights("group_magnitude", model, [])
    for name in names:
        rows = len(scores[name])
        mean = (9 + rows - 1) / rows
        torch.testing.assert_close(scores[name][0], torch.full_like(scores[name][0], 9 / mean))
        torch.testing.assert_close(scores[name][1:], torch.full_like(scores[name][1:], 1 / mean))
