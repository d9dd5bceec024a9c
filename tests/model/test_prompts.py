"""The prompts in pixel space."""

import copy
from itertools import pairwise

import matplotlib.image
import pytest
import torch
from helpers.models import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from vpns_hf import PromptedSparseConfig, PromptedSparseModel
from vpns_hf.model import PROMPTS
from vpns_hf.model.prompts import PadPrompt, build_prompt
from vpns_hf.report import plot_prompt

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def make(name, height=32, width=32, size=4, inner=None):
    config = PromptedSparseConfig(
        prompt=name,
        prompt_size=size,
        image_size=[height, width],
        image_mean=MEAN,
        image_std=STD,
        prompt_inner_size=inner,
    )
    return build_prompt(config).eval()


def pad(*args, **kwargs):
    return make("pad", *args, **kwargs)


def normalise(pixels):
    return (pixels - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)


def denormalise(values):
    return values * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)


def parameter_count(prompt):
    return sum(parameter.numel() for parameter in prompt.parameters())


def fill(prompt, value):
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.fill_(value)
    return prompt


sizes = st.tuples(st.integers(8, 40), st.integers(8, 40), st.integers(1, 19)).filter(
    lambda drawn: 2 * drawn[2] < min(drawn[:2])
)


# All prompts


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("pad", 16, 39_936),
        ("fixed", 115, 39_675),
        ("random", 115, 3 * 224 * 224),
        ("expand", 16, 39_936),
        ("stripe", 16, 3 * 59 * 224),
        ("lowrank", 4, 5_376),
    ],
)
def test_parameter_counts(name, size, count):
    assert parameter_count(make(name, 224, 224, size)) == count


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize(("height", "width"), [(24, 40), (41, 17)])
def test_initial_values(name, height, width):
    prompt, pixels = make(name, height, width), torch.full((1, 3, height, width), 0.25)
    delta = prompt.delta()
    assert delta.shape == (3, height, width)
    added = {"fixed": 0.5, "random": 0.5, "expand": 0.5}.get(name, 0.0)
    assert set(delta.unique().tolist()) == {0.0, added}
    shown = denormalise(prompt(normalise(pixels)))
    torch.testing.assert_close(shown, prompt.place(pixels) + delta, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PROMPTS)
def test_reset_brings_the_initial_values_back(name):
    torch.manual_seed(0)
    prompt = make(name)
    fresh = copy.deepcopy(prompt.state_dict())
    fill(prompt, 3)
    torch.manual_seed(0)
    prompt.reset_parameters()
    assert all(torch.equal(tensor, fresh[key]) for key, tensor in prompt.state_dict().items())


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 41)])
def test_gradient_reaches_exactly_the_pixels_of_the_prompt(name, height, width):
    prompt = fill(make(name, height, width, size=5), 0.1)
    touched = prompt.delta().detach() != 0
    for channel, row, column in [(0, 0, 0), (1, height // 2, width // 2), (2, height - 1, width - 2)]:
        prompt.zero_grad(set_to_none=False)
        prompt.delta()[channel, row, column].backward()
        moved = sum(int((parameter.grad != 0).sum()) for parameter in prompt.parameters())
        assert moved == (2 * 5 if name == "lowrank" else int(touched[channel, row, column]))
    prompt.zero_grad(set_to_none=False)
    prompt(normalise(torch.full((2, 3, height, width), 0.2))).sum().backward()
    moved = sum(int((parameter.grad != 0).sum()) for parameter in prompt.parameters())
    assert moved == (parameter_count(prompt) if name == "lowrank" else int(touched.sum()))


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_prompt_learns_on_black_and_on_white_images(name, value):
    """At its bounds torch's own clamp passes the gradient or stops it, depending on the torch version."""
    if name in ("fixed", "random") and value == 1:
        pytest.skip("brightens only, and white has no room")
    torch.manual_seed(0)
    model = tiny_model("vit", prompt=name, image_mean=MEAN, image_std=STD)
    images, labels = normalise(torch.full((4, 3, 32, 32), value)), torch.zeros(4, dtype=torch.long)
    optimizer = torch.optim.Adam(model.prompt.parameters(), lr=1e-2)
    start, first = model(images, labels=labels, use_prompt=True).loss.item(), model.prompt.delta().detach()
    for step in range(10):
        optimizer.zero_grad()
        model(images, labels=labels, use_prompt=True).loss.backward()
        # The zero factor of a low-rank product keeps the gradient of the other one at zero until it has moved.
        assert all(p.grad.abs().max() > 0 for p in model.prompt.parameters()) or (name, step) == ("lowrank", 0)
        optimizer.step()
    assert (model.prompt.delta().detach() - first).abs().max() > 0.001
    assert model(images, labels=labels, use_prompt=True).loss.item() < start


@pytest.mark.parametrize("name", ["fixed", "random"])
def test_prompts_that_only_brighten_stand_still_on_white(name):
    prompt = make(name)
    prompt(normalise(torch.ones(1, 3, 32, 32))).sum().backward()
    assert all((parameter.grad == 0).all() for parameter in prompt.parameters())


@pytest.mark.parametrize("name", PROMPTS)
def test_half_precision_images_and_autocast(name):
    torch.manual_seed(0)
    prompt, pixels = make(name), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = prompt(normalise(pixels))
    halved = prompt(normalise(pixels).bfloat16())
    assert halved.dtype == torch.bfloat16
    torch.testing.assert_close(halved.float(), expected, rtol=0, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prompt(normalise(pixels)), expected)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_survives_saving_and_copies(name, tmp_path):
    model, images = tiny_model("vit", prompt=name), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for parameter in model.prompt.parameters():
            parameter.normal_()
    expected = model(images, use_prompt=True).logits
    torch.testing.assert_close(copy.deepcopy(model)(images, use_prompt=True).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = PromptedSparseModel.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(loaded(images, use_prompt=True).logits, expected)
    halved = PromptedSparseModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(p, halved.prompt.get_parameter(key)) for key, p in model.prompt.named_parameters())


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_can_be_drawn(name, tmp_path):
    model = tiny_model("vit", prompt=name).train()
    state = torch.get_rng_state()
    plot_prompt(model, torch.zeros(3, 32, 32), tmp_path / "prompt.png")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.prompt.training
    assert matplotlib.image.imread(tmp_path / "prompt.png")[..., :3].min() < 0.2


@pytest.mark.parametrize(
    ("name", "largest"), [("pad", 11), ("fixed", 24), ("random", 24), ("expand", 11), ("stripe", 11), ("lowrank", 24)]
)
def test_size_limits(name, largest):
    images = torch.zeros(1, 3, 24, 40)
    for size in (1, largest):
        assert make(name, 24, 40, size)(images).shape == images.shape
    for size in (0, -1, largest + 1):
        with pytest.raises(ValueError, match=rf"`prompt_size` is {size}; \w+ takes 1 to {largest} on images"):
            make(name, 24, 40, size)


def test_refusals():
    with pytest.raises(ValueError, match="`prompt_size` is 16"):
        pad(size=16)
    with pytest.raises(ValueError, match="`prompt_inner_size`"):
        pad(inner=[40, 20])
    with pytest.raises(ValueError, match="made for images of"):
        pad()(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="The image mean is needed"):
        PadPrompt(PromptedSparseConfig(image_size=[32, 32], image_std=STD))
    with pytest.raises(ValueError, match="expected None or one of pad, fixed, random, expand, stripe, lowrank"):
        build_prompt(PromptedSparseConfig(prompt="frame", image_size=[32, 32], image_mean=MEAN, image_std=STD))


# Pad


@settings(deadline=None)
@given(sizes)
def test_pad_is_a_frame(drawn):
    height, width, size = drawn
    prompt = fill(pad(height, width, size), 1)
    frame = torch.ones(3, height, width)
    frame[:, size:-size, size:-size] = 0
    assert torch.equal(prompt.delta(), frame)
    assert parameter_count(prompt) == int(frame.sum())


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


@pytest.mark.parametrize("name", PROMPTS)
def test_image_is_shrunk_inside_the_frame(name):
    prompt = make(name, inner=[24, 20])
    with torch.no_grad():
        without = denormalise(prompt(normalise(torch.ones(1, 3, 32, 32)))) - prompt.delta()
    expected = torch.zeros(1, 3, 32, 32)
    expected[..., 4:28, 6:26] = 1
    if name in ("fixed", "random"):
        expected = (expected + prompt.delta().detach()).clamp(0, 1) - prompt.delta().detach()
    torch.testing.assert_close(without, expected, rtol=0, atol=1e-5)


def test_gradient_passes_within_bounds_only():
    prompt, pixels = pad(8, 8, 2), torch.full((1, 3, 8, 8), 0.5)
    with torch.no_grad():
        prompt.top.fill_(0.9), prompt.bottom.fill_(0.5), prompt.left.fill_(-0.5)
    prompt(normalise(pixels)).sum().backward()
    assert (prompt.top.grad == 0).all()
    for inside in (prompt.bottom, prompt.left, prompt.right):
        assert (inside.grad > 0).all()


# Fixed


@settings(deadline=None)
@given(sizes)
def test_fixed_is_a_patch_at_the_top_left(drawn):
    height, width, size = drawn
    expected = torch.zeros(3, height, width)
    expected[:, :size, :size] = torch.tensor(2.0).sigmoid()
    assert torch.equal(fill(make("fixed", height, width, size), 2).delta(), expected)


# Random


def window_of(delta):
    rows, columns = (delta[0] != 0).any(1).nonzero(), (delta[0] != 0).any(0).nonzero()
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def test_random_draws_every_window_in_training_and_the_middle_one_in_evaluation():
    torch.manual_seed(0)
    prompt = make("random", 6, 8, size=4).train()
    with torch.no_grad():
        prompt.program.normal_()
    drawn = [prompt.delta().detach() for _ in range(300)]
    for delta in drawn:
        top, bottom, left, right = window_of(delta)
        assert (bottom - top, right - left) == (4, 4)
        assert torch.equal(delta[:, top:bottom, left:right], prompt.program[:, top:bottom, left:right].sigmoid())
    assert {window_of(delta)[::2] for delta in drawn} == {(top, left) for top in range(3) for left in range(5)}
    prompt.eval()
    state = torch.get_rng_state()
    assert {window_of(prompt.delta()) for _ in range(20)} == {(1, 5, 2, 6)}
    assert torch.equal(torch.get_rng_state(), state)


def test_random_draws_one_window_a_call_from_the_global_generator():
    prompt, black = make("random", 16, 16, size=3).train(), normalise(torch.zeros(8, 3, 16, 16))
    torch.manual_seed(3)
    first, second = prompt(black), prompt(black)
    assert (first == first[0]).all()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(prompt(black), first)


def test_random_window_may_be_as_large_as_the_image():
    assert (make("random", 12, 12, size=12).train().delta() == 0.5).all()


# Expand


@settings(deadline=None)
@given(sizes)
def test_expand_keeps_the_image_inside_a_border(drawn):
    height, width, size = drawn
    prompt, pixels = make("expand", height, width, size), torch.rand(1, 3, height, width)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.uniform_(-8, 8)
    values = normalise(pixels).requires_grad_()
    shown = denormalise(prompt(values))
    inside = shown[0, :, size:-size, size:-size]
    torch.testing.assert_close(inside, prompt.place(pixels)[0, :, size:-size, size:-size], rtol=0, atol=1e-5)
    border = prompt.delta()[prompt.delta() != 0]
    assert len(border) == parameter_count(prompt) == 3 * (height * width - inside[0].numel())
    assert border.min() > 0
    assert border.max() < 1
    inside.sum().backward()
    assert all((parameter.grad == 0).all() for parameter in prompt.parameters())


def test_expand_takes_an_inner_size():
    prompt = make("expand", 32, 32, size=999, inner=[21, 30])
    assert window_of((prompt.delta() == 0).float()) == (5, 26, 1, 31)
    with pytest.raises(ValueError, match=r"a border on every side, so at most \(30, 30\)"):
        make("expand", 32, 32, inner=[32, 20])


# Stripe


@settings(deadline=None)
@given(sizes)
def test_stripes_are_even_and_have_the_area_of_the_frame(drawn):
    height, width, size = drawn
    striped = fill(make("stripe", height, width, size), 1).delta()
    assert (striped == striped[:1, :, :1]).all()
    rows = striped[0, :, 0]
    frame = 2 * size * width + 2 * size * (height - 2 * size)
    assert rows.sum() * width <= frame < (rows.sum() + 1) * width
    if height == width:
        assert int(rows.sum()) == 4 * size * (width - size) // width
    covered = rows.nonzero().flatten().tolist()
    starts = [row for row in covered if row - 1 not in covered]
    ends = [row + 1 for row in covered if row + 1 not in covered]
    gaps = [b - a for a, b in zip([0, *ends], [*starts, height], strict=True)]
    bands = [end - start for start, end in zip(starts, ends, strict=True)]
    if min(gaps) > 0:
        assert max(gaps) - min(gaps) <= 1
        assert max(bands) - min(bands) <= 1
        assert max(bands) <= size


def test_stripes_of_a_frame_of_16():
    rows = make("stripe", 224, 224, 16).rows
    breaks = [index + 1 for index, (a, b) in enumerate(pairwise(rows)) if b != a + 1]
    assert breaks == [14, 29, 44]
    assert rows[0] == 33
    assert rows[-1] == 223 - 33


# Low rank


@settings(deadline=None, max_examples=30)
@given(st.integers(4, 24), st.integers(4, 24), st.integers(1, 4))
def test_rank_of_lowrank(height, width, rank):
    prompt = make("lowrank", height, width, rank)
    assert parameter_count(prompt) == 3 * rank * (height + width)
    assert (prompt.delta() == 0).all()
    torch.manual_seed(0)
    with torch.no_grad():
        prompt.left.normal_(), prompt.right.normal_()
    assert torch.linalg.matrix_rank(prompt.delta()).tolist() == [rank] * 3


def test_lowrank_draws_its_right_factor_from_the_global_generator():
    torch.manual_seed(1)
    first, second = make("lowrank", 224, 224), make("lowrank", 224, 224)
    torch.manual_seed(1)
    assert torch.equal(make("lowrank", 224, 224).right, first.right)
    assert not torch.equal(first.right, second.right)
    assert first.right.std().item() == pytest.approx(0.01, rel=0.05)
