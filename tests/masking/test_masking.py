"""Selection, scores, straight-through gradients and frozen zeros, against hand-computed vectors."""

import math

import pytest
import timm.optim
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vpns_hf import masking
from vpns_hf.masking import erk_densities, kept_count, select_masks
from vpns_hf.masking.search import initial_scores
from vpns_hf.masking.zeros import masked, write_zeros


def bits(text):
    return torch.tensor([character == "1" for character in text])


@pytest.mark.parametrize(
    ("total", "sparsity", "kept"),
    [
        (10, 0.1, 9),
        (10, 0.2, 8),
        (100, 0.1, 90),
        (10, 0.9, 1),
        (5, 0.5, 2),
        (15, 0.5, 8),
        (10, 0, 10),
        (10, 1, 0),
        (1000, 0.999, 1),
    ],
)
def test_kept_count_rounds_half_to_even(total, sparsity, kept):
    assert kept_count(total, sparsity) == kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_zeros_are_written_bit_for_bit(dtype, channels_last):
    tensor = torch.randn(6, 5, 3, 2, dtype=dtype)
    tensor.view(-1)[:4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0], dtype=dtype)
    mask = torch.rand(6, 5, 3, 2) < 0.5
    mask.view(-1)[:4] = bits("0001")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    tensor = tensor.to(memory_format=layout)
    expected = torch.where(mask, tensor, 0)
    result = masked(tensor, mask)
    write_zeros(tensor, mask)
    for found in (result, tensor):
        assert found.contiguous().view(torch.uint8).equal(expected.contiguous().view(torch.uint8))
        assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(6, 10, 4)[:, ::2, 1:3],
        torch.randn(1, 5).expand(4, 5),
        torch.randn(4, 5).t(),
        torch.tensor(1.5),
        torch.zeros(0, 3),
        torch.randn(4, 5).to(torch.float8_e4m3fn),
        torch.empty(4, 5, device="meta"),
    ],
    ids=["sliced", "expanded", "transposed", "single", "empty", "float8", "meta"],
)
def test_zeros_in_tensors_of_any_layout(tensor):
    mask = (torch.rand(tensor.shape[::-1]) < 0.5).permute(tuple(range(tensor.ndim))[::-1]).to(tensor.device)
    result = masked(tensor, mask)
    assert (result.shape, result.dtype, result.device) == (tensor.shape, tensor.dtype, tensor.device)
    if not tensor.is_meta:
        expected = torch.where(mask, tensor.float(), 0)
        assert torch.equal(result.float(), expected)
        tensor = tensor.clone()
        version = tensor._version
        write_zeros(tensor, mask)
        assert torch.equal(tensor.float(), expected)
        assert tensor._version > version


def masked_layer(state):
    layer = nn.Linear(5, 4)
    prunables = masking.find_prunable_weights(layer)
    if state == "search":
        masking.attach_scores(prunables)
        masking.update_masks(prunables, 0.5, "global")
        return layer, masking.masked_weights(prunables)["weight"].mask
    mask = torch.rand(4, 5) < 0.5
    masking.freeze(prunables, {"weight": mask})
    masking.mask_gradients(prunables)
    return layer, mask


@pytest.mark.parametrize("state", ["search", "frozen"])
def test_second_derivatives_go_through_masked_gradients(state):
    layer, mask = masked_layer(state)
    x, weight = torch.randn(3, 5), masking.stored_weight(masking.find_prunable_weights(layer)["weight"])
    (gradient,) = torch.autograd.grad(layer(x).pow(3).sum(), weight, create_graph=True)
    (found,) = torch.autograd.grad(gradient.square().sum(), weight)

    plain = (weight.detach() * mask).requires_grad_()
    (gradient,) = torch.autograd.grad((x @ plain.t() + layer.bias.detach()).pow(3).sum(), plain, create_graph=True)
    (expected,) = torch.autograd.grad((gradient * mask).square().sum(), plain)
    torch.testing.assert_close(found, expected * mask)


def test_gradients_of_several_outputs_at_once_are_masked():
    layer, mask = masked_layer("frozen")
    output = layer(torch.randn(3, 5)).sum(0)
    one_by_one = torch.stack([torch.autograd.grad(part, layer.weight, retain_graph=True)[0] for part in output])
    (together,) = torch.autograd.grad(output, layer.weight, torch.eye(4), retain_graph=True, is_grads_batched=True)
    mapped = torch.func.vmap(lambda grad: torch.autograd.grad(output, layer.weight, grad, retain_graph=True)[0])
    for found in (together, mapped(torch.eye(4))):
        torch.testing.assert_close(found, one_by_one)
        assert not found[:, ~mask].any()


@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_search_can_be_traced_and_compiled(with_gradients):
    layer, _ = masked_layer("search")
    x = torch.randn(3, 5)
    with torch.set_grad_enabled(with_gradients):
        expected = layer(x)
        torch.testing.assert_close(torch.jit.trace(layer, x, check_trace=False)(x), expected)
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)
        exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), expected)
    # Other programs, such as ONNX, have no operation that reads the bits of a number.
    assert "view" not in {str(node.target).split(".")[1] for node in exported.graph.nodes if "." in str(node.target)}


@pytest.mark.parametrize("sparsity", [-0.1, 1.2, math.nan])
def test_sparsity_outside_the_unit_interval_is_refused(sparsity):
    with pytest.raises(ValueError, match="fraction in"):
        select_masks({"a": torch.ones(3)}, sparsity)


def test_global_and_layer_selection():
    """The one-shot magnitude vector: global [0100|1011], layer [0110|1001]."""
    scores = {"a": torch.tensor([0.1, 0.5, 0.3, 0.2]), "b": torch.tensor([1, 0.05, 0.45, 0.7])}
    found = select_masks(scores, 0.5)
    assert torch.equal(found["a"], bits("0100"))
    assert torch.equal(found["b"], bits("1011"))
    found = select_masks(scores, 0.5, "layer")
    assert torch.equal(found["a"], bits("0110"))
    assert torch.equal(found["b"], bits("1001"))


def test_ties_go_to_earlier_tensors_and_lower_indices():
    scores = {"b": torch.ones(2, 3), "a": torch.ones(4)}
    found = select_masks(scores, 0.3)
    assert torch.equal(found["b"], torch.ones(2, 3, dtype=torch.bool))
    assert torch.equal(found["a"], bits("1000"))


def test_memory_format_does_not_matter():
    torch.manual_seed(0)
    score = torch.randint(0, 5, (4, 3, 2, 2)).float()
    expected = select_masks({"a": score}, 0.4)["a"]
    for variant in (
        score.to(memory_format=torch.channels_last),
        score.transpose(0, 1).contiguous().transpose(0, 1),
        score.bfloat16(),
        score.half(),
        score.double(),
    ):
        assert torch.equal(select_masks({"a": variant}, 0.4)["a"], expected)


def test_erk_vectors():
    shapes = {"a": torch.Size([10, 5]), "b": torch.Size([20, 10])}
    assert erk_densities(shapes, 0.8) == pytest.approx({"a": 1 / 3, "b": 1 / 6})
    shapes = {"a": torch.Size([8, 1, 1, 1]), "b": torch.Size([64, 64])}
    assert erk_densities(shapes, 0.9) == pytest.approx({"a": 1, "b": 0.0982421875})
    counts = {
        name: int(mask.sum())
        for name, mask in select_masks({n: torch.rand(s) for n, s in shapes.items()}, 0.9, "erk").items()
    }
    assert counts == {"a": 8, "b": 402}


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    sparsity=st.floats(0, 1),
    levels=st.integers(1, 6),
    scope=st.sampled_from(("global", "layer", "erk")),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None, max_examples=150)
def test_counts_are_exact_and_kept_scores_are_the_largest(sizes, sparsity, levels, scope, dtype):
    generator = torch.Generator().manual_seed(sum(sizes))
    scores = {str(i): torch.randint(0, levels, (n,), generator=generator).to(dtype) for i, n in enumerate(sizes)}
    masks = select_masks(scores, sparsity, scope)
    if scope == "layer":
        assert [int(mask.sum()) for mask in masks.values()] == [kept_count(n, sparsity) for n in sizes]
    else:
        assert sum(int(mask.sum()) for mask in masks.values()) == kept_count(sum(sizes), sparsity)
    groups = [(torch.cat(list(scores.values())), torch.cat(list(masks.values())))]
    if scope != "global":
        groups = [(scores[name], masks[name]) for name in scores]
    for score, mask in groups:
        # A stable sort is an independent way to the same rule.
        order = sorted(range(len(score)), key=lambda i: (-float(score[i]), i))
        assert set(order[: int(mask.sum())]) == set(mask.nonzero().flatten().tolist())


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9, 0.999, 1 - 1 / 5000])
def test_exact_counts_with_ties_in_bf16(sparsity):
    scores = {"a": torch.randn(4000).bfloat16(), "b": torch.randn(10, 100).bfloat16()}
    kept = sum(int(mask.sum()) for mask in select_masks(scores, sparsity).values())
    assert kept == round((1 - sparsity) * 5000)


def test_nan_and_wrong_scope_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        select_masks({"a": torch.tensor([1.0, math.nan])}, 0.5)
    with pytest.raises(ValueError, match="global, layer, erk, row"):
        select_masks({"a": torch.ones(2)}, 0.5, "column")
    with pytest.raises(ValueError, match="nothing to select"):
        select_masks({}, 0.5)


def test_score_initialisation():
    weight = torch.tensor([[0.5, -2.0], [1.0, 0.25], [0.0, -1.0]])
    expected = math.sqrt(6 / 2) * weight / 2
    torch.testing.assert_close(initial_scores(weight), expected)
    kernel = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(initial_scores(kernel), math.sqrt(6 / 75) * kernel / kernel.abs().max())
    assert torch.equal(initial_scores(torch.zeros(2, 2)), torch.zeros(2, 2))
    assert initial_scores(weight.half()).dtype == torch.float32


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def test_straight_through_gradient_of_the_hydra_toy():
    """theta = (.5, -2, 1), x = (1, 2, 3), y = 2, k = 2: mask (0, 1, 1), ds = (-1.5, -12, -9), dtheta = (0, -6, -9).

    The scores here start with the signs of the weights; ds carries sign(s).
    """
    layer = linear(torch.tensor([[0.5, -2.0, 1.0]]))
    prunables = masking.find_prunable_weights(layer)
    masking.attach_scores(prunables)
    part = masking.masked_weights(prunables)["weight"]
    masking.update_masks(prunables, 1 / 3, "global")
    assert torch.equal(part.mask, bits("011").view(1, 3))
    loss = (layer(torch.tensor([1.0, 2, 3])) - 2).square().sum() / 2
    loss.backward()
    weight_gradient = torch.tensor([[-3.0, -6, -9]])
    torch.testing.assert_close(masking.stored_weight(prunables["weight"]).grad, weight_gradient * part.mask)
    weight = torch.tensor([[0.5, -2.0, 1.0]])
    torch.testing.assert_close(part.scores.grad, weight * weight_gradient * part.scores.sign())
    torch.testing.assert_close(part.scores.grad.abs(), torch.tensor([[1.5, 12, 9]]))


def test_update_counts_flips():
    layer = linear(torch.tensor([[1.0, 2, 3, 4]]))
    prunables = masking.find_prunable_weights(layer)
    masking.attach_scores(prunables)
    assert masking.update_masks(prunables, 0.5, "global") == 2
    assert masking.update_masks(prunables, 0.5, "global") == 0
    with torch.no_grad():
        masking.masked_weights(prunables)["weight"].scores.copy_(torch.tensor([[4.0, 3, 2, 1]]))
    assert masking.update_masks(prunables, 0.5, "global") == 4


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, groups=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.embedding = nn.Embedding(4, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.norm(self.depthwise(self.conv(x))).flatten(2).transpose(1, 2) + self.token
        return self.head(self.attention(x, x, x)[0].mean(1))


def test_prunable_weights_are_those_of_linear_and_convolution_layers():
    names = ["conv.weight", "depthwise.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"]
    assert list(masking.find_prunable_weights(Mixed())) == names
    assert list(masking.find_prunable_weights(Mixed(), ["attention"])) == [
        n for n in names if not n.startswith("attention")
    ]
    assert list(masking.find_prunable_weights(Mixed(), ["out_proj"], skip=["head.weight"])) == names[:3]
    with pytest.raises(ValueError, match="names 'headd'"):
        masking.find_prunable_weights(Mixed(), ["headd"])


def test_shared_weights_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight share"):
        masking.find_prunable_weights(model)


@pytest.mark.parametrize("training", [True, False])
def test_bare_parameters_are_masked_in_forward(training):
    """The projection of nn.MultiheadAttention is no layer of its own; its mask must reach the output all the same."""
    torch.manual_seed(0)
    model, images = Mixed().train(training), torch.randn(2, 3, 8, 8)
    prunables = masking.find_prunable_weights(model)
    masking.attach_scores(prunables)
    masking.update_masks(prunables, 0.5, "layer")
    searched = model(images)
    masks = {name: part.mask.clone() for name, part in masking.masked_weights(prunables).items()}
    masking.detach_scores(prunables)
    dense = model(images)
    masking.freeze(prunables, masks)
    torch.testing.assert_close(model(images), searched)
    assert (searched - dense).abs().max() > 1e-4


def frozen_mixed(sparsity=0.7):
    torch.manual_seed(0)
    model = Mixed()
    prunables = masking.find_prunable_weights(model)
    magnitudes = {name: masking.stored_weight(prunable).abs() for name, prunable in prunables.items()}
    masks = select_masks(magnitudes, sparsity, "layer")
    masking.freeze(prunables, masks)
    masking.mask_gradients(prunables)
    return model, masks


def weights_of(model):
    prunables = masking.find_prunable_weights(model)
    return {name: masking.stored_weight(prunable).detach().clone() for name, prunable in prunables.items()}


def assert_only_kept_weights_moved(before, model, masks):
    for name, weight in weights_of(model).items():
        assert (weight[~masks[name]] == 0).all()
        assert (weight[masks[name]] != before[name][masks[name]]).any()


TORCH_OPTIMIZERS = (
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon", "NAdam", "RAdam"),
    *("RMSprop", "Rprop", "SGD"),
)
# Those of bitsandbytes and apex need a GPU; kron compiles for minutes.
TIMM_OPTIMIZERS = [
    pytest.param(name, marks=pytest.mark.slow) if name.startswith("kron") else name
    for name in timm.optim.list_optimizers()
    if not name.startswith(("bnb", "fused"))
]


def optimizers_of(model, name):
    """Return the optimizers of a model; Muon takes matrices alone."""
    parameters = list(model.parameters())
    if name == "Muon":
        matrices = [parameter for parameter in parameters if parameter.ndim == 2]
        others = [parameter for parameter in parameters if parameter.ndim != 2]
        return torch.optim.Muon(matrices, lr=0.1, weight_decay=0.1), torch.optim.AdamW(others, lr=0.1)
    if name in TORCH_OPTIMIZERS:
        return (getattr(torch.optim, name)(parameters, lr=0.1),)
    return (timm.optim.create_optimizer_v2(parameters, opt=name, lr=0.1, weight_decay=0.1, momentum=0.9),)


@pytest.mark.parametrize("name", [*TORCH_OPTIMIZERS, *TIMM_OPTIMIZERS])
@pytest.mark.filterwarnings("ignore")
def test_every_optimizer_keeps_frozen_zeros(name):
    model, masks = frozen_mixed()
    steppers, before = optimizers_of(model, name), weights_of(model)
    second_order = any(getattr(stepper, "is_second_order", False) for stepper in steppers)
    for _ in range(3):
        images = torch.randn(2, 3, 8, 8)

        def closure(images=images):
            model.zero_grad()
            loss = model(images).square().sum()
            loss.backward(create_graph=second_order)
            return loss

        closure()
        for stepper in steppers:
            stepper.step(closure if name == "LBFGS" else None)
    assert_only_kept_weights_moved(before, model, masks)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_frozen_weights_stay_exactly_zero_under_autocast(optimizer):
    model, masks = frozen_mixed()
    (stepper,), before = optimizers_of(model, optimizer), weights_of(model)
    for _ in range(5):
        stepper.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, 3, 8, 8)).square().sum().backward()
        stepper.step()
    assert_only_kept_weights_moved(before, model, masks)


def test_noise_on_gradients_and_gradients_of_functions_keep_frozen_zeros():
    model, masks = frozen_mixed()
    stepper, before = torch.optim.SGD(model.parameters(), lr=0.1), weights_of(model)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight) + (0 if weight.grad is None else weight.grad)  # as DP-SGD adds noise
    stepper.step()
    parameters = dict(model.named_parameters())
    model.eval()  # torch.func forbids the update of BatchNorm's statistics
    detached = {name: parameter.detach() for name, parameter in parameters.items()}
    images = torch.randn(2, 3, 8, 8)
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, images).square().sum())(detached)
    for name, gradient in gradients.items():
        parameters[name].grad = gradient
    stepper.step()
    assert_only_kept_weights_moved(before, model, masks)


def test_momentum_of_an_older_optimizer_moves_no_pruned_weight():
    layer = linear(torch.tensor([[1.0, 2.0]]))
    stepper = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(2)).sum().backward()
    stepper.step()
    prunables = masking.find_prunable_weights(layer)
    masking.freeze(prunables, {"weight": bits("01").view(1, 2)})
    masking.mask_gradients(prunables)
    stepper.zero_grad()
    layer(torch.ones(2)).sum().backward()
    stepper.step()
    # 2 - 0.1 * 1, then the momentum 0.9 + 1: the first weight would be at -0.09.
    assert layer.weight.tolist() == [[0.0, pytest.approx(1.71)]]


def test_optimizers_of_other_models_are_left_alone():
    frozen_mixed()
    layer = linear(torch.tensor([[1.0, 2.0]]))
    layer(torch.ones(2)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    assert layer.weight.tolist() == [[0.0, 1.0]]


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 20),
    sparsity=st.floats(0, 1),
    levels=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None, max_examples=100)
def test_row_scope_keeps_the_largest_of_each_row(rows, columns, sparsity, levels, dtype):
    generator = torch.Generator().manual_seed(rows * columns)
    score = torch.randint(0, levels, (rows, columns), generator=generator).to(dtype)
    found = select_masks({"a": score}, sparsity, "row")["a"]
    for row in range(rows):
        # One row alone is what layer-wise selection sees.
        assert torch.equal(found[row], select_masks({"a": score[row]}, sparsity, "layer")["a"])


def test_row_scope_flattens_all_but_the_first_dimension():
    torch.manual_seed(0)
    score = torch.randint(0, 5, (4, 3, 2, 2)).float()
    expected = select_masks({"a": score.flatten(1)}, 0.4, "row")["a"].view(4, 3, 2, 2)
    assert (expected.flatten(1).sum(1) == kept_count(12, 0.4)).all()
    for variant in (score, score.to(memory_format=torch.channels_last), score.bfloat16(), score.double()):
        found = select_masks({"a": variant}, 0.4, "row")["a"]
        assert torch.equal(found, expected)
        assert found.is_contiguous()


def test_row_scope_refuses_nan():
    with pytest.raises(ValueError, match="NaN"):
        select_masks({"a": torch.tensor([[1.0, 2], [math.nan, 0]])}, 0.5, "row")
