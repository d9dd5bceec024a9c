"""The pad prompt in pixel space."""

import pytest
import torch
from models import tiny_model

from vpns_hf import PromptedSparseConfig
from vpns_hf.prompts import PadPrompt, build_prompt

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def pad(height=32, width=32, size=4, inner=None):
    config = PromptedSparseConfig(
        prompt="pad",
        prompt_size=size,
        image_size=[height, width],
        image_mean=MEAN,
        image_std=STD,
        prompt_inner_size=inner,
    )
    return build_prompt(config)


def normalise(pixels):
    return (pixels - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)


def denormalise(values):
    return values * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)


def test_parameter_count_of_the_paper():
    assert sum(p.numel() for p in pad(224, 224, 16).parameters()) == 39_936


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 4), (24, 40, 3), (41, 17, 8)])
def test_delta_is_a_frame(height, width, size):
    prompt = pad(height, width, size)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.fill_(1)
    frame = torch.ones(3, height, width)
    frame[:, size:-size, size:-size] = 0
    assert torch.equal(prompt.delta(), frame)
    assert sum(p.numel() for p in prompt.parameters()) == int(frame.sum())


def test_zero_prompt_changes_nothing_and_inner_pixels_never_change():
    torch.manual_seed(0)
    prompt, pixels = pad(), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(prompt(normalise(pixels)), normalise(pixels), rtol=0, atol=2e-6)
    with torch.no_grad():
        prompt.top.add_(0.3), prompt.right.sub_(0.7)
    shown = denormalise(prompt(normalise(pixels)))
    torch.testing.assert_close(shown[..., 4:-4, 4:-4], pixels[..., 4:-4, 4:-4], rtol=0, atol=1e-6)
    torch.testing.assert_close(shown[..., :4, :], (pixels[..., :4, :] + 0.3).clamp(0, 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(shown[..., 4:-4, -4:], (pixels[..., 4:-4, -4:] - 0.7).clamp(0, 1), rtol=0, atol=1e-6)


def test_image_is_shrunk_inside_the_frame():
    prompt = pad(inner=[24, 20])
    shown = denormalise(prompt(normalise(torch.ones(1, 3, 32, 32))))
    expected = torch.zeros(1, 3, 32, 32)
    expected[..., 4:28, 6:26] = 1
    torch.testing.assert_close(shown, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_prompt_learns_on_black_and_on_white_images(value):
    """At its bounds torch's own clamp passes the gradient or stops it, depending on the torch version."""
    model = tiny_model("vit", image_mean=MEAN, image_std=STD)
    images = normalise(torch.full((4, 3, 32, 32), value))
    optimizer = torch.optim.Adam(model.prompt.parameters(), lr=1e-2)
    start = model(images, labels=torch.zeros(4, dtype=torch.long), use_prompt=True).loss.item()
    for _ in range(10):
        optimizer.zero_grad()
        model(images, labels=torch.zeros(4, dtype=torch.long), use_prompt=True).loss.backward()
        assert all(p.grad.abs().max() > 0 for p in model.prompt.parameters())
        optimizer.step()
    moved = model.prompt.delta().detach()
    assert moved.abs().max() > 0.01
    assert model(images, labels=torch.zeros(4, dtype=torch.long), use_prompt=True).loss.item() < start


def test_gradient_passes_within_bounds_only():
    prompt, pixels = pad(8, 8, 2), torch.full((1, 3, 8, 8), 0.5)
    with torch.no_grad():
        prompt.top.fill_(0.9), prompt.bottom.fill_(0.5), prompt.left.fill_(-0.5)
    prompt(normalise(pixels)).sum().backward()
    assert (prompt.top.grad == 0).all()
    for inside in (prompt.bottom, prompt.left, prompt.right):
        assert (inside.grad > 0).all()


def test_half_precision_in_half_precision_out():
    prompt, pixels = pad(), torch.rand(1, 3, 32, 32)
    assert prompt(normalise(pixels).bfloat16()).dtype == torch.bfloat16


def test_refusals():
    with pytest.raises(ValueError, match="`prompt_size` is 16"):
        pad(size=16)
    with pytest.raises(ValueError, match="`prompt_inner_size`"):
        pad(inner=[40, 20])
    with pytest.raises(ValueError, match="made for images of"):
        pad()(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="The image mean is needed"):
        PadPrompt(PromptedSparseConfig(image_size=[32, 32], image_std=STD))
    with pytest.raises(ValueError, match="expected None or one of pad"):
        build_prompt(PromptedSparseConfig(prompt="frame", image_size=[32, 32], image_mean=MEAN, image_std=STD))
