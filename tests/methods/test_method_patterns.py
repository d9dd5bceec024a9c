"""Every pruning method with every kind of pattern, and what cannot work with one."""

import pytest
import torch
from helpers.methods import build, run
from helpers.states import assert_same_state
from helpers.training import StopAt, fresh, history, make_trainer

from vpns_hf.masking import get_pattern, kept_count
from vpns_hf.methods import METHODS, get_method

REFUSED = {
    "2:4": {"rigl", "sparsegpt", "random_erk"},
    "block:8": {"rigl", "sparsegpt"},
    "channels": {"rigl", "sparsegpt", "random_erk", "acdc"},
}
REASONS = {
    "rigl": "chooses weights one by one",
    "sparsegpt": "chooses weights one by one",
    "random_erk": "gives all the same|ranks channels",
    "acdc": "lets pruned weights start again at zero",
}
PRUNING = [name for name, method in METHODS.items() if name != "dense" and not method.needs_pruned]
# What the others of a kind say, too.
QUICK = {"vpns", "vpns_gradual", "vpns_joint", "omp", "imp", "gmp", "gmp_lamp", "snip", "grasp", "wanda", "movement"}
SPARSITY = 0.75


def patterned(method, pattern, **kwargs):
    return build(method, pattern=pattern, sparsity=get_pattern(pattern).sparsity or SPARSITY, **kwargs)


def cases():
    for pattern, refused in REFUSED.items():
        for method in PRUNING:
            if method not in refused:
                yield pytest.param(method, pattern, marks=() if method in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(("method", "pattern"), list(cases()))
def test_methods_end_with_exact_counts(method, pattern, tmp_path):
    model = run(tmp_path, method, patterned(method, pattern)).model
    assert model.config.state == "frozen"
    masks, weights, own = model.masks(), model.prunable_weights(), model.pattern
    assert own.broken(masks) is None
    assert all((weights[name][~mask] == 0).all() for name, mask in masks.items())
    if pattern == "2:4":
        # At least two of four by the pattern, and two on average.
        assert model.sparsity == 0.5
        return
    groups = {name: sums > 0 for name, sums in own.sums(masks).items()}
    scope = next(iter(get_method(method).scopes), "global")
    if pattern == "channels" and scope in ("row", "layer"):
        assert all(int(kept.sum()) == max(1, kept_count(len(kept), SPARSITY)) for kept in groups.values())
    elif scope == "row":
        rows = [row for kept in groups.values() for row in kept]
        assert all(int(row.sum()) == kept_count(len(row), SPARSITY) for row in rows)
    elif scope == "layer":
        assert all(int(kept.sum()) == kept_count(kept.numel(), SPARSITY) for kept in groups.values())
    else:
        total = sum(kept.numel() for kept in groups.values())
        assert sum(int(kept.sum()) for kept in groups.values()) == kept_count(total, SPARSITY)


@pytest.mark.parametrize(("method", "pattern"), [(m, p) for p, methods in REFUSED.items() for m in sorted(methods)])
def test_methods_that_cannot_are_refused_before_work_starts(method, pattern, tmp_path):
    with pytest.raises(ValueError, match=f"`method='{method}'.*({REASONS[method]})"):
        run(tmp_path, method, patterned(method, pattern))
    assert not list(tmp_path.iterdir())


def test_another_sparsity_of_the_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`sparsity` is 0\.9, but `pattern='2:4'` fixes it at 0\.5"):
        make_trainer(tmp_path, patterned("omp", "2:4"), method="omp", sparsity=0.9)


@pytest.mark.parametrize("pattern", ["2:4", "block:8", "channels"])
@pytest.mark.parametrize("family", ["resnet", "mobilenet_v2"])
def test_convolutional_networks(family, pattern, tmp_path):
    model = run(tmp_path, "vpns_gradual", patterned("vpns_gradual", pattern, family=family)).model
    assert model.pattern.broken(model.masks()) is None


@pytest.mark.parametrize("pattern", ["2:4", "block:8", "channels"])
@pytest.mark.parametrize("start", ["lamp", "snip", "magnitude"])
def test_starts_of_scores(start, pattern, tmp_path):
    model = run(tmp_path, "hydra", patterned("hydra", pattern), score_start=start).model
    assert model.pattern.broken(model.masks()) is None


@pytest.mark.parametrize("pattern", ["block:8", "channels"])
def test_learned_scores_of_groups_move_masks(pattern, tmp_path):
    trainer = run(tmp_path, "vpns_gradual", patterned("vpns_gradual", pattern), logging_steps=1)
    assert any(entry.get("mask_flips") for entry in trainer.logs()["search"])


@pytest.mark.parametrize("pattern", ["2:4", "block:8", "channels"])
@pytest.mark.parametrize(("method", "stage"), [("vpns_gradual", "search"), ("vpns_joint", "joint"), ("gmp", "tune")])
def test_resume_equals_the_uninterrupted_run(method, stage, pattern, tmp_path):
    settings = dict(method=method, save_strategy="steps", save_steps=2, total_max_steps=14, head_warm_up_epochs=0.5)
    whole = make_trainer(tmp_path / "whole", patterned(method, pattern), **settings)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped", patterned(method, pattern), callbacks=[StopAt(stage, 3)], **settings)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    torch.manual_seed(123)
    resumed = make_trainer(tmp_path / "stopped", patterned(method, pattern), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(resumed.model, whole.model)
    assert history(tmp_path / "stopped") == history(tmp_path / "whole")


def test_a_run_does_not_resume_in_another_pattern(tmp_path):
    run(tmp_path, "omp", patterned("omp", "block:8"))
    with pytest.raises(ValueError, match="pattern 'block:8' instead of 'block:4'"):
        run(tmp_path, "omp", patterned("omp", "block:4"), resume=True)


@pytest.mark.parametrize("mapping", ["frequency", "iterative"])
@pytest.mark.parametrize("method", ["vpns", "omp"])
def test_blocks_under_a_label_mapping(method, mapping, tmp_path):
    model = fresh(sparsity=SPARSITY, scope="global", pattern="block:4", num_labels=3, label_mapping=mapping)
    model = run(tmp_path, method, model).model
    assert model.prunable_weights()["classifier.weight"].shape[0] == 3
    assert all(model.pattern.follows(mask) for mask in model.masks().values())
