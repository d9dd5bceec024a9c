"""Where learned scores start, and the learning rate at which they can change a mask."""

import pytest
import torch
from helpers.models import tiny_model
from helpers.training import Images, fresh
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from vpns_hf.masking import select_masks
from vpns_hf.scores import SCORE_STARTS, score_weights
from vpns_hf.scores.starts import StartInputs, reaching_rate, score_threshold
from vpns_hf.training.optimizers import learning_rate_factor


class Weights:
    """Stands for a model whose prunable weights are these."""

    def __init__(self, **weights):
        self.weights = {name: torch.tensor(weight) for name, weight in weights.items()}

    def prunable_weights(self):
        return self.weights


def start(name, model, batches=()):
    return SCORE_STARTS[name](StartInputs(model, lambda: batches))


def test_magnitude_scales_every_layer_alike():
    scores = start("magnitude", Weights(a=[1.0, -2.0, 4.0, 0.0], b=[[0.1], [-0.05]]))
    torch.testing.assert_close(scores["a"], torch.tensor([0.05, -0.1, 0.2, 0.0]))
    torch.testing.assert_close(scores["b"], torch.tensor([[0.2], [-0.1]]))


def test_the_largest_scores_are_those_at_the_percentile():
    """Of 3,000 weights 1 to 3000 the three largest lie at or above the 99.9th percentile, which is 2,998."""
    weight = torch.arange(1.0, 3001.0)[torch.randperm(3000, generator=torch.Generator().manual_seed(0))]
    scores = start("magnitude", Weights(a=weight.tolist()))["a"]
    torch.testing.assert_close(scores, weight * (0.2 / 2998))


def test_lamp_vector():
    """Weights 3, -4, 0: LAMP 9/25, 16/16, 0."""
    model = tiny_model()
    (name, weight), *_ = model.prunable_weights().items()
    with torch.no_grad():
        weight.zero_()
        weight.view(-1)[:2] = torch.tensor([3.0, -4.0])
    scores = start("lamp", model)
    expected = torch.zeros_like(weight)
    expected.view(-1)[:2] = torch.tensor([0.6, -1.0])
    torch.testing.assert_close(scores[name], expected)


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_first_mask_of_a_start_is_that_of_the_score(sparsity):
    """Starting from LAMP keeps what one-shot LAMP keeps, starting from SNIP what one-shot SNIP keeps."""
    model, data = fresh(), Images(8, augment=False)
    batches = [{"pixel_values": data.images, "labels": data.labels}]
    for name in ("lamp", "snip"):
        scores = start(name, model, batches)
        expected = select_masks(score_weights(name, model, batches), sparsity)
        masks = select_masks({name: score.abs() for name, score in scores.items()}, sparsity)
        assert all(torch.equal(mask, expected[name]) for name, mask in masks.items())


def test_snip_start_by_an_independent_computation():
    model, data = fresh(), Images(8, augment=False)
    scores = start("snip", model, [{"pixel_values": data.images, "labels": data.labels}])
    dense = fresh()
    dense.detach_scores()
    plain = dense.backbone.eval()
    loss = F.cross_entropy(plain(data.images).logits, data.labels)
    weights = dict(plain.named_parameters())
    gradients = dict(zip(scores, torch.autograd.grad(loss, [weights[name] for name in scores]), strict=True))
    roots = {name: (weights[name] * gradients[name]).abs().sqrt() * weights[name].sign() for name in scores}
    ordered = torch.cat([root.abs().flatten() for root in roots.values()]).sort(descending=True).values
    scale = 0.2 / ordered[round(0.001 * len(ordered)) - 1]
    for name, score in scores.items():
        torch.testing.assert_close(score, roots[name] * scale, rtol=1e-3, atol=1e-6)


def test_the_papers_start_is_what_a_wrapped_model_has():
    model = fresh()
    scores = start("hydra", model)
    assert all(torch.equal(score, scores[name]) for name, score in model.scores().items())


@pytest.mark.parametrize("name", sorted(SCORE_STARTS))
@pytest.mark.parametrize("family", ["vit", "resnet", "timm_vgg"])
def test_every_start_has_the_signs_of_the_weights(name, family):
    model, data = fresh(family), Images(8, augment=False)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
    scores = start(name, model, [{"pixel_values": data.images, "labels": data.labels}])
    assert list(scores) == list(model.masks())
    for key, weight in model.prunable_weights().items():
        assert scores[key].shape == weight.shape
        assert scores[key].dtype == torch.float32
        assert not (scores[key] * weight < 0).any()
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in model.named_buffers())
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())


def test_snip_follows_the_loss_that_is_given():
    model, data = fresh(), Images(8, augment=False)
    batches = [{"pixel_values": data.images, "labels": data.labels}]

    def first_logit(logits, labels):
        return logits[:, 0].sum()

    found = SCORE_STARTS["snip"](StartInputs(model, lambda: batches, first_logit))
    expected = select_masks(score_weights("snip", model, batches, loss=first_logit), 0.9)
    masks = select_masks({name: score.abs() for name, score in found.items()}, 0.9)
    assert all(torch.equal(mask, expected[name]) for name, mask in masks.items())
    other = start("snip", model, batches)
    assert any(not torch.equal(score, other[name]) for name, score in found.items())


def test_threshold_is_the_smallest_kept_score():
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.randn(shape, generator=generator) for name, shape in (("a", (7, 5)), ("b", (40,)))}
    for sparsity in (0.0, 0.3, 0.9, 0.98):
        masks = select_masks({name: score.abs() for name, score in scores.items()}, sparsity)
        kept = torch.cat([score[masks[name]].abs() for name, score in scores.items()])
        assert score_threshold(scores, sparsity) == pytest.approx(float(kept.min()))
    assert score_threshold({"a": torch.tensor([1.0, -3.0])}, 0.99) == 3


def test_rate_vectors():
    assert reaching_rate(0.05, 4, 100) == pytest.approx(0.002)
    # The paper's: 11,700 steps, of whose cosine half count.
    assert reaching_rate(0.05, 12, 11700 / 2) == pytest.approx(1e-4, rel=0.03)
    for threshold, steps in ((0.0, 10), (0.1, 0)):
        with pytest.raises(ValueError, match="choose another `score_start`"):
            reaching_rate(threshold, 4, steps)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_adam_moves_a_score_by_as_many_thresholds(schedule):
    """A score whose gradient never changes its sign travels exactly as far as it was said to."""
    factor = learning_rate_factor(schedule, 3 if schedule == "linear" else 0, 40)
    rate = reaching_rate(0.05, 4, sum(map(factor, range(40))))
    score = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([score], lr=rate)
    scheduler = LambdaLR(optimizer, factor)
    for _ in range(40):
        score.grad = torch.full((1,), -0.3)
        optimizer.step()
        scheduler.step()
    assert score.item() == pytest.approx(4 * 0.05, rel=1e-4)
