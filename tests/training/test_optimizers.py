"""Optimizers by role, schedules and methods."""

import math

import pytest
import torch
from torch import nn

from vpns_hf import VPNsTrainingArguments
from vpns_hf.methods import METHODS, RoleSettings, get_method
from vpns_hf.training.optimizers import OptimizerByRole, Platon, build_optimizer, learning_rate_factor, weight_groups


@pytest.fixture
def args(tmp_path):
    return VPNsTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", adam_beta1=0.8)


def parameter(value=1.0):
    return nn.Parameter(torch.full((2,), value))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adam", torch.optim.Adam),
        ("adamw_torch", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("adagrad", torch.optim.Adagrad),
    ],
)
def test_optimizers_by_name(name, kind, args):
    built = build_optimizer([{"params": [parameter()]}], RoleSettings(name, 0.5, "cosine"), args, momentum=0.7)
    assert type(built) is kind
    assert built.param_groups[0]["lr"] == 0.5
    if "adam" in name:
        assert built.param_groups[0]["betas"] == (0.8, 0.999)
    if name == "sgd":
        assert built.param_groups[0]["momentum"] == 0.7


def test_unknown_optimizer_is_named(args):
    with pytest.raises(ValueError, match="optimizer 'sdg' is unknown; expected one of adam"):
        build_optimizer([{"params": [parameter()]}], RoleSettings("sdg", 0.5, "cosine"), args, momentum=0)


def two_roles():
    a, b = parameter(), parameter(2.0)
    parts = {"scores": torch.optim.Adam([a], lr=0.1), "prompt": torch.optim.SGD([b], lr=0.5, momentum=0.9)}
    return a, b, OptimizerByRole(parts)


def test_parts_step_as_alone_and_skip_what_has_no_gradient():
    a, b, joint = two_roles()
    c, d = parameter(), parameter(2.0)
    alone = torch.optim.Adam([c], lr=0.1), torch.optim.SGD([d], lr=0.5, momentum=0.9)
    for step in range(4):
        for x in (a, b, c, d):
            x.grad = torch.tensor([1.0, -step])
        if step % 2:
            b.grad = d.grad = None
        joint.step()
        for optimizer in alone:
            optimizer.step()
    assert torch.equal(a, c)
    assert torch.equal(b, d)
    joint.zero_grad()
    assert a.grad is None


def test_state_survives_a_round_trip_and_shares_its_groups():
    a, _, joint = two_roles()
    a.grad = torch.ones(2)
    joint.step()
    _, _, other = two_roles()
    other.load_state_dict(joint.state_dict())
    other.param_groups[0]["lr"] = 0.25
    assert other.parts["scores"].param_groups[0]["lr"] == 0.25
    assert [group["role"] for group in other.param_groups] == ["scores", "prompt"]
    with pytest.raises(ValueError, match="this stage trains"):
        OptimizerByRole({"weights": torch.optim.SGD([a], lr=1)}).load_state_dict(joint.state_dict())


def test_weight_groups():
    parameters = {"w": parameter(), "bias": parameter()}
    groups = weight_groups(parameters, {"w"}, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert groups[1]["params"][0] is parameters["bias"]
    assert len(weight_groups(parameters, {"w", "bias"}, 0.1)) == 1


def test_cosine_factor():
    factor = learning_rate_factor("cosine", 2, 12)
    assert [factor(step) for step in (0, 1, 2, 7, 12)] == pytest.approx(
        [0, 0.5, 1, (1 + math.cos(math.pi / 2)) / 2, 0]
    )
    with pytest.raises(ValueError, match="more than the step"):
        learning_rate_factor("reduce_lr_on_plateau", 0, 10)


def test_methods_are_lists_of_stages():
    assert [stage.name for stage in get_method("vpns").stages_for(False, 0.9)] == ["search", "tune"]
    assert [stage.name for stage in get_method("vpns").stages_for(True, 0.9)] == ["warm_up", "search", "tune"]
    control = zip(METHODS["vpns"].stages, METHODS["vpns_zero_prompt"].stages, strict=True)
    for stage, held in control:
        assert stage.roles - held.roles <= {"prompt"}
        assert (stage.length, stage.masks) == (held.length, held.masks)
    with pytest.raises(ValueError, match="expected one of dense, vpns"):
        get_method("vnps")


def test_a_resting_role_is_not_moved_by_momentum():
    """Where gradients of zero are filled in, as DeepSpeed does, a role that rests stays as it is."""
    prompt, scores = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = OptimizerByRole({"prompt": torch.optim.Adam([prompt]), "scores": torch.optim.Adam([scores])})
    prompt.grad, scores.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    before = prompt.detach().clone(), scores.detach().clone()
    prompt.grad, scores.grad = torch.zeros(3), torch.zeros(3)
    optimizer.skipped_roles = ("prompt",)
    optimizer.step()
    assert torch.equal(prompt, before[0])
    assert not torch.equal(scores, before[1])


def test_platon_vector():
    """Importance 1, then 3, with both averages of factor 1/2."""
    score = torch.zeros(1, requires_grad=True)
    optimizer = Platon([score], betas=(0.5, 0.5))
    for gradient, expected in ((-1.0, 0.5 * 0.25), (3.0, 1.75 * 0.75)):
        score.grad = torch.tensor([gradient])
        optimizer.step()
        assert score.item() == pytest.approx(expected)


def test_platon_is_for_its_own_method(tmp_path):
    with pytest.raises(ValueError, match="use `method='platon'`"):
        VPNsTrainingArguments(output_dir=str(tmp_path), use_cpu=True, score_optim="platon")
    with pytest.raises(ValueError, match="platon"):
        VPNsTrainingArguments(output_dir=str(tmp_path), use_cpu=True, optim="platon")
