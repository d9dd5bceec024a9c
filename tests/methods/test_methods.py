"""Every pruning method through the trainer, and the invariants of each."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from helpers.methods import SPARSITY, AtStageBegin, build, run
from helpers.models import tiny_model
from helpers.states import assert_same_state
from helpers.training import Images, StopAt, fresh, history, make_trainer
from transformers import TrainerCallback

from vpns_hf import VPNsTrainer
from vpns_hf.masking import kept_count
from vpns_hf.methods import METHODS, get_method
from vpns_hf.methods.magnitude_schedules import AlternatingCompression, drop_and_grow
from vpns_hf.methods.mask_schedules import GradualSparsity, StageProgress

PRUNING = [name for name, method in METHODS.items() if name != "dense" and not method.needs_pruned]


def slow(*values):
    """Parameters that take long and say little more than their neighbours."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("method", PRUNING)
def test_every_method_ends_with_exact_counts_and_zeros(method, tmp_path):
    model = run(tmp_path, method).model
    assert model.config.state == "frozen"
    masks, weights = model.masks(), model.prunable_weights()
    kept = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    if get_method(method).stages[-1].masks.scope == "layer" or method in ("omp_layer", "random", "sparsegpt"):
        assert all(int(mask.sum()) == kept_count(mask.numel(), SPARSITY) for mask in masks.values())
    elif method == "wanda":
        rows = [row for mask in masks.values() for row in mask.flatten(1)]
        assert all(int(row.sum()) == kept_count(len(row), SPARSITY) for row in rows)
    else:
        assert kept == kept_count(total, SPARSITY)
    assert all((weights[name][~mask] == 0).all() for name, mask in masks.items())
    assert any((weights[name][mask] != 0).any() for name, mask in masks.items())


@pytest.mark.parametrize("family", ["resnet", "timm_resnet"])
@pytest.mark.parametrize(
    "method", ["omp", slow("imp"), "snip", slow("synflow"), "grasp", "rigl", "acdc", "bip", "sparsegpt"]
)
def test_convolutional_networks(method, family, tmp_path):
    model = run(tmp_path, method, build(method, family), total_max_steps=12).model
    total = sum(mask.numel() for mask in model.masks().values())
    assert model.sparsity == pytest.approx(SPARSITY, abs=1 / total * len(model.masks()))


def test_imp_rewinds_bit_exactly_and_its_masks_are_nested(tmp_path):
    """Weights, BatchNorm buffers and the head go back to where the warm-up left them."""
    states, masks = [], []

    def remember(model, folder):
        if not folder.endswith("warm_up"):
            states.append({name: tensor.detach().clone() for name, tensor in model.backbone_state().items()})
            masks.append({name: mask.clone() for name, mask in model.masks().items()})

    density = 0.5
    model = build("imp", "resnet", sparsity=1 - density)
    trainer = run(tmp_path, "imp", model, callbacks=[AtStageBegin(remember)], total_max_steps=12)
    rounds = math.ceil(math.log(density) / math.log(0.8))
    assert len(states) == rounds + 1
    total = sum(mask.numel() for mask in masks[0].values())
    for index, (state, mask) in enumerate(zip(states, masks, strict=True)):
        kept = sum(int(part.sum()) for part in mask.values())
        assert kept == kept_count(total, 1 - density ** (index / rounds))
        for name, tensor in states[0].items():
            expected = tensor * mask[name] if name in mask else tensor
            assert torch.equal(state[name], expected), name
        if index:
            assert all((masks[index - 1][name] | ~part).all() for name, part in mask.items())
    final = trainer.model.backbone_state()
    assert any(not torch.equal(final[name], states[-1][name]) for name in final)
    running = [name for name in final if name.endswith("running_mean")]
    assert running
    assert all(not torch.equal(final[name], states[-1][name]) for name in running)


def test_imp_rounds_of_the_paper():
    """The number of rounds of 20 % that lead to a density."""
    for density, rounds in ((0.5, 4), (0.3, 6), (0.2, 8), (0.1, 11), (0.05, 14), (0.64, 2), (0.8, 1)):
        stages = get_method("imp").stages_for(new_head=False, sparsity=1 - density)
        assert len(stages) == rounds + 1
        assert stages[0].sparsity == 0


def test_learning_rate_rewinding_keeps_the_weights(tmp_path):
    ends, begins = [], []

    class Watch(TrainerCallback):
        def on_train_end(self, args, state, control, model, **kwargs):
            ends.append({name: weight.detach().clone() for name, weight in model.prunable_weights().items()})

    def remember(model, folder):
        begins.append({name: weight.detach() * 1 for name, weight in model.prunable_weights().items()})

    model = fresh(sparsity=0.4)
    run(tmp_path, "imp_lr_rewinding", model, callbacks=[Watch(), AtStageBegin(remember)], learning_rate=0.1)
    masks = model.masks()
    assert all(torch.equal(begins[-1][name], ends[-2][name] * mask) for name, mask in masks.items())


def test_omp_tuned_ranks_tuned_weights_and_prunes_the_pretrained_ones(tmp_path):
    seen = []
    model = build("omp_tuned")
    pretrained = {name: weight.detach().clone() for name, weight in model.prunable_weights().items()}

    def remember(model, folder):
        if folder.endswith("tune"):
            seen.append({name: weight.detach().clone() for name, weight in model.prunable_weights().items()})

    trainer = run(tmp_path, "omp_tuned", model, callbacks=[AtStageBegin(remember)], learning_rate=0.1)
    tuned = trainer.load_stage("dense").prunable_weights()
    flat = torch.cat([weight.detach().abs().flatten() for weight in tuned.values()])
    threshold = flat.sort(descending=True).values[kept_count(len(flat), SPARSITY) - 1]
    for name, mask in model.masks().items():
        assert torch.equal(mask, tuned[name].detach().abs() >= threshold)
        assert torch.equal(seen[0][name], pretrained[name] * mask)


def test_rigl_keeps_the_count_of_every_layer(tmp_path):
    masks = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if not args.output_dir.endswith("warm_up"):
                masks.append({name: mask.clone() for name, mask in model.masks().items()})
                weights = model.prunable_weights()
                assert all((weights[name][~mask] == 0).all() for name, mask in model.masks().items())

    run(tmp_path, "rigl", callbacks=[Watch()], total_max_steps=24)
    counts = [{name: int(mask.sum()) for name, mask in step.items()} for step in masks]
    assert all(count == counts[0] for count in counts)
    changed = [
        any(not torch.equal(now[name], before[name]) for name in now) for before, now in itertools.pairwise(masks)
    ]
    assert any(changed[:17])
    assert not any(changed[18:])


def test_rigl_vector():
    weight = torch.tensor([0.5, -0.1, 0.3, 0, 0, 0])
    gradient = torch.tensor([0.01, 0.05, 0.02, -0.5, 0.2, 0.1])
    mask = torch.tensor([True, True, True, False, False, False])
    assert drop_and_grow(weight, mask, gradient, 0.34).tolist() == [True, False, True, True, False, False]


def test_rigl_update_takes_the_place_of_a_step(tmp_path):
    """Where the mask changes, weights that stay keep their value, and grown ones start at zero without momentum."""
    checked = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            self.before = {name: weight.detach().clone() for name, weight in model.prunable_weights().items()}

        def on_step_end(self, args, state, control, model, optimizer, **kwargs):
            if args.output_dir.endswith("warm_up"):
                return
            now, previous = _copies(model.masks()), getattr(self, "masks", model.masks())
            self.masks = now
            if all(torch.equal(now[name], previous[name]) for name in now):
                return
            momentum = optimizer.optimizer.parts["weights"].state
            for name, weight in model.prunable_weights().items():
                both, grown = now[name] & previous[name], now[name] & ~previous[name]
                assert torch.equal(weight[both], self.before[name][both])
                assert (weight[grown] == 0).all()
                if weight in momentum and momentum[weight]["momentum_buffer"] is not None:
                    assert (momentum[weight]["momentum_buffer"][grown] == 0).all()
                checked.append(int(grown.sum()))

    run(tmp_path, "rigl", callbacks=[Watch()], total_max_steps=24)
    assert sum(checked) > 0


def test_gradual_sparsity_follows_the_cubic_curve():
    gradual = GradualSparsity(start=0.0, end=1.0, updates=4)
    values = [gradual.sparsity(StageProgress(step, 4, 0.9)) for step in range(5)]
    assert values == pytest.approx([0, 0.5203125, 0.7875, 0.8859375, 0.9])
    assert GradualSparsity(end=0.75, updates=30).sparsity(StageProgress(75, 100, 0.9)) == 0.9
    assert GradualSparsity(end=0.75, updates=30).sparsity(StageProgress(1, 1, 0.9)) == 0.9


def test_gmp_is_monotone_and_exact_at_every_step(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if not args.output_dir.endswith("warm_up"):
                seen.append(
                    (StageProgress(state.global_step, state.max_steps, SPARSITY), dict(_copies(model.masks())))
                )

    run(tmp_path, "gmp", callbacks=[Watch()], total_max_steps=20)
    total = sum(mask.numel() for mask in seen[0][1].values())
    for progress, masks in seen:
        kept = sum(int(mask.sum()) for mask in masks.values())
        assert kept == kept_count(total, GradualSparsity().sparsity(progress))
    for (_, before), (_, now) in itertools.pairwise(seen):
        assert all((before[name] | ~now[name]).all() for name in now)
    assert len({sum(int(mask.sum()) for mask in masks.values()) for _, masks in seen}) > 5


def _copies(masks):
    return {name: mask.clone() for name, mask in masks.items()}


def test_acdc_phases():
    """The authors' schedule of 100 epochs: compressed at 10, 20, ..., 70 and 85, opened at 15, 25, ..., 65 and 75."""
    schedule = AlternatingCompression()
    phases = [schedule.compressed(StageProgress(step, 100, 0.9)) for step in range(100)]
    assert [step for step in range(1, 100) if phases[step] and not phases[step - 1]] == [*range(10, 80, 10), 85]
    assert [step for step in range(1, 100) if phases[step - 1] and not phases[step]] == [*range(15, 75, 10), 75]


def test_acdc_alternates_in_training(tmp_path):
    sparsities = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if not args.output_dir.endswith("warm_up"):
                sparsities.append(round(model.sparsity, 2))

    run(tmp_path, "acdc", callbacks=[Watch()], total_max_steps=20)
    assert set(sparsities) == {0.0, 0.9}
    assert sparsities[0] == 0
    assert sparsities[-3:] == [0.9] * 3


def test_acdc_opens_without_momentum(tmp_path):
    checked = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, optimizer, **kwargs):
            now = model.sparsity
            if not args.output_dir.endswith("warm_up"):
                if now == 0 and self.before > 0:
                    momentum = optimizer.optimizer.parts["weights"].state
                    weights = model.prunable_weights().values()
                    checked.extend(float(momentum[weight]["momentum_buffer"].abs().max()) for weight in weights)
                self.before = now

        before = 0

    run(tmp_path, "acdc", callbacks=[Watch()], total_max_steps=20)
    assert checked
    assert max(checked) == 0


@pytest.mark.parametrize("method", ["gmp", "acdc"])
def test_gradual_methods_start_from_the_whole_pretrained_network(method, tmp_path):
    """Also with a pretrained head, where no warm-up opens the first mask."""
    model = fresh(sparsity=SPARSITY, scope="global")
    pretrained = {name: weight.detach().clone() for name, weight in model.prunable_weights().items()}
    seen = []

    def compare(model, folder):
        seen.extend(torch.equal(weight, pretrained[name]) for name, weight in model.prunable_weights().items())

    run(tmp_path, method, model, callbacks=[AtStageBegin(compare)])
    assert seen
    assert all(seen)


@pytest.mark.parametrize("method", ["gmp", "acdc", "movement"])
def test_best_model_is_not_one_from_before_it_was_pruned(method, tmp_path):
    settings = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    best = dict(load_best_model_at_end=True, metric_for_best_model="eval_accuracy")
    data = {"eval_dataset": Images(8, augment=False)}
    model = run(tmp_path, method, total_max_steps=20, learning_rate=0.1, **settings, **best, **data).model
    assert model.sparsity == pytest.approx(SPARSITY, abs=2e-3)


def test_rigl_makes_as_many_updates_as_it_says():
    schedule = METHODS["rigl"].stages[-1].masks
    updates = [step for step in range(1, 201) if schedule.needs_dense_gradients(StageProgress(step, 200, 0.9))]
    assert len(updates) == schedule.updates
    assert max(updates) < 0.75 * 200


def test_bip_steps_weights_and_scores_in_turn(tmp_path):
    changes = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            self.before = _snapshot(model)

        def on_step_end(self, args, state, control, model, **kwargs):
            if not args.output_dir.endswith("warm_up"):
                now = _snapshot(model)
                changes.append(tuple(not torch.equal(self.before[role], now[role]) for role in now))

    def _snapshot(model):
        roles = model.parameters_by_role()
        return {
            role: torch.cat([parameter.detach().flatten() for parameter in roles[role].values()])
            for role in ("scores", "weights", "head")
        }

    run(tmp_path, "bip", callbacks=[Watch()], total_max_steps=6)
    weights, scores = (False, True, True), (True, False, False)
    assert changes == [weights, weights, scores, scores, weights, weights]


def test_bip_weights_and_scores_both_meet_both_kinds_of_batches(tmp_path):
    met = set()

    class Trainer(VPNsTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if self.plan.name == "search":
                clean = (inputs["pixel_values"].unsqueeze(1) == Images(augment=False).images).flatten(2).all(2).any()
                turn = self.optimizer.optimizer.turns[self.optimizer.optimizer.steps % 4]
                met.add(("scores" in turn, bool(clean)))
            return super().training_step(model, inputs, *args, **kwargs)

    for method in ("bip", "bip+prompt"):
        met.clear()
        trainer = make_trainer(
            tmp_path / method, build(method), method=method, mix_unaugmented=True, total_max_steps=8, cls=Trainer
        )
        trainer.train()
        assert met == {(scores, clean) for scores in (True, False) for clean in (True, False)}


@pytest.mark.parametrize("implicit", [0.0, 0.1])
def test_gradient_of_scores(implicit):
    """HYDRA's toy: dL/dscores = weight * g * sign(score); BiP takes implicit * mask * g from the weight."""
    from vpns_hf.masking import PrunableWeight, attach_scores, masked_weights

    layer = torch.nn.Linear(3, 1, bias=False)
    layer.weight.data = torch.tensor([[0.5, -2.0, 1.0]])
    slots = {"weight": PrunableWeight(layer, "weight")}
    attach_scores(slots)
    part = masked_weights(slots)["weight"]
    part.mask[0, 0] = False
    part.implicit_gradient = implicit
    loss = (layer(torch.tensor([1.0, 2.0, 3.0])) - 2).square().sum() / 2
    loss.backward()
    gradient = torch.tensor([[-3.0, -6.0, -9.0]])
    mask = torch.tensor([[0.0, 1.0, 1.0]])
    expected = (torch.tensor([[0.5, -2.0, 1.0]]) - implicit * mask * gradient) * gradient
    # Before the sign of the scores, which is that of the weights here.
    assert torch.allclose(part.scores.grad, expected * torch.tensor([[1.0, -1.0, 1.0]]))
    assert torch.allclose(expected, torch.tensor([[-1.5, 12, -9]] if not implicit else [[-1.5, 8.4, -17.1]]))


def test_movement_scores_rise_where_weights_move_away_from_zero():
    """Toy A: one SGD step of 0.1 on the scores, which start at zero and are ranked with their sign."""
    from vpns_hf.masking import PrunableWeight, attach_scores, masked_weights

    first, second = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False)
    first.weight.data, second.weight.data = torch.tensor([[1.0, -2.0], [3.0, 0.5]]), torch.tensor([[2.0, -1.0]])
    slots = {"A": PrunableWeight(first, "weight"), "b": PrunableWeight(second, "weight")}
    attach_scores(slots, signed=True)
    parts = masked_weights(slots)
    output = second(first(torch.tensor([1.0, 2.0])))
    ((output + 11).square().sum() / 2).backward()
    scores = {name: -0.1 * part.scores.grad for name, part in parts.items()}
    assert torch.allclose(scores["A"], torch.tensor([[-0.2, 0.8], [0.3, 0.1]]))
    assert torch.allclose(scores["b"], torch.tensor([[0.6, 0.4]]))


def test_movement_ranks_signed_scores_per_layer(tmp_path):
    model = build("movement")
    seen = {}

    class Watch(TrainerCallback):
        def on_train_end(self, args, state, control, model, **kwargs):
            if not args.output_dir.endswith("warm_up"):
                seen.update({name: score.detach().clone() for name, score in model.scores().items()})

    run(tmp_path, "movement", model, callbacks=[Watch()])
    assert any((score < 0).any() for score in seen.values())
    for name, mask in model.masks().items():
        kept, pruned = seen[name][mask], seen[name][~mask]
        assert kept.min() >= pruned.max()


@pytest.mark.parametrize("method", ["omp+prompt", slow("imp+prompt"), "random+prompt", "bip+prompt", "gmp+prompt"])
def test_any_trained_method_may_carry_a_prompt(method, tmp_path):
    model = build(method)
    trainer = run(tmp_path, method, model, eval_dataset=Images(8, augment=False))
    assert max(float(parameter.detach().abs().max()) for parameter in model.prompt.parameters()) > 0
    assert "eval_accuracy_prompted" in trainer.finished_stages[-1].metrics
    plain = tiny_model(sparsity=SPARSITY, prompt=None)
    with pytest.raises(ValueError, match="needs a prompt"):
        make_trainer(tmp_path / "none", plain, method=method)


@pytest.mark.parametrize("method", ["vpns+prompt", "wanda+prompt"])
def test_prompts_that_cannot_be_added(method, tmp_path):
    with pytest.raises(ValueError, match=r"has a prompt already|takes none"):
        make_trainer(tmp_path, fresh(), method=method)


@pytest.mark.parametrize("method", ["tune", "linear_probe", "prompt_only_new_head"])
def test_methods_for_pruned_models_refuse_others(method, tmp_path):
    with pytest.raises(ValueError, match="needs a model that is pruned already"):
        make_trainer(tmp_path, build(method), method=method)


def test_a_pruned_model_is_not_pruned_less(tmp_path):
    pruned = run(tmp_path / "omp", "omp", fresh(sparsity=0.9)).model
    with pytest.raises(ValueError, match="would bring weights back as zeros"):
        run(tmp_path / "again", "omp", pruned, sparsity=0.5)


@pytest.mark.parametrize("method", ["bip", "rigl"])
def test_methods_that_fp16_would_break_refuse_it(method, tmp_path):
    args = make_trainer(tmp_path, fresh()).args
    args.fp16, args.method = True, method
    with pytest.raises(ValueError, match="does not work with fp16"):
        VPNsTrainer(model=fresh(), args=args, train_dataset=Images())


@pytest.mark.parametrize(("name", "value"), [("method", "hydra"), ("sparsity", 0.5), ("seed", 3)])
def test_a_run_goes_on_with_its_own_settings_only(name, value, tmp_path):
    settings = dict(save_strategy="steps", save_steps=2, sparsity=0.9)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, fresh(), callbacks=[StopAt("search", 3)], **settings).train()
    changed = make_trainer(tmp_path, fresh(), **settings | {name: value})
    with pytest.raises(ValueError, match=f"holds a run with .*{name}"):
        changed.train(resume_from_checkpoint=True)


def test_prompt_held_at_zero_is_hydra_on_the_same_batches(tmp_path):
    zero = run(tmp_path / "zero", "vpns_zero_prompt", build("vpns"), mix_unaugmented=True).model
    hydra = run(tmp_path / "hydra", "hydra", build("vpns"), mix_unaugmented=True).model
    assert_same_state(zero, hydra)


def test_methods_that_need_an_unpruned_model_say_so(tmp_path):
    with pytest.raises(ValueError, match="pruned already"):
        make_trainer(tmp_path, run(tmp_path / "omp", "omp").model, method="vpns").train()


@pytest.mark.parametrize(
    ("method", "stage"),
    [
        ("bip", "search"),
        ("movement", "search"),
        ("gmp", "tune"),
        ("acdc", "tune"),
        ("rigl", "tune"),
        ("imp", "round_2"),
        ("snip", "tune"),
        ("omp+prompt", "tune"),
    ],
)
def test_resume_equals_the_uninterrupted_run(method, stage, tmp_path):
    # Iterative pruning then has four rounds instead of eleven.
    sparsity = 0.5 if method == "imp" else SPARSITY
    settings = dict(
        method=method,
        save_strategy="steps",
        save_steps=2,
        total_max_steps=14 if method != "imp" else 20,
        head_warm_up_epochs=0.5,
        calibration_images_per_class=2,
    )
    whole = make_trainer(tmp_path / "whole", build(method, sparsity=sparsity), **settings)
    whole.train()
    stopped = make_trainer(
        tmp_path / "stopped", build(method, sparsity=sparsity), callbacks=[StopAt(stage, 3)], **settings
    )
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    torch.manual_seed(123)
    resumed = make_trainer(tmp_path / "stopped", build(method, sparsity=sparsity), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(resumed.model, whole.model)
    assert history(tmp_path / "stopped") == history(tmp_path / "whole")
    for ours, theirs in zip(resumed.finished_stages, whole.finished_stages, strict=True):
        assert ours.steps == theirs.steps
        assert vars(ours.cost) | {"seconds": 0} == vars(theirs.cost) | {"seconds": 0}


def test_budget_is_shared_out_and_cost_is_counted(tmp_path):
    """HYDRA: 7 steps of 4 images over two stages; SNIP also scores 12 images, forward and backward."""
    stages = run(tmp_path / "hydra", "hydra", total_max_steps=7).finished_stages
    assert [(stage.name, stage.steps) for stage in stages] == [("warm_up", 2), ("search", 3), ("tune", 4)]
    assert [stage.cost.images for stage in stages] == [8, 12, 16]
    assert [stage.cost.backward_images for stage in stages] == [8, 12, 16]
    trainer = run(tmp_path / "snip", "snip", total_max_steps=3)
    cost = trainer.finished_stages[-1].cost
    assert (cost.images, cost.forward_images, cost.backward_images) == (12, 24, 24)
    kept = sum(int(mask.sum()) for mask in trainer.model.masks().values())
    dense = {name for name in trainer.model.backbone_state() if name not in trainer.model.masks()}
    others = sum(p.numel() for name, p in trainer.model.backbone.named_parameters() if name in dense)
    assert cost.trained_weights == kept + others
    with pytest.raises(ValueError, match="12 stages"):
        run(tmp_path / "imp", "imp", total_max_steps=3)


def test_calibration_images_are_balanced_and_the_same_every_time(tmp_path):
    trainer = make_trainer(tmp_path, fresh(), calibration_images_per_class=2)
    batches = trainer.calibration_batches()
    labels = torch.cat([batch["labels"] for batch in batches])
    assert labels.bincount().tolist() == [2] * 6
    again = trainer.calibration_batches()
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(batches, again, strict=True))


def test_a_new_score_and_a_new_method_are_one_entry_each(tmp_path, monkeypatch):
    from vpns_hf.methods import Method, Select, prune_and_tune
    from vpns_hf.scores import SCORES

    def distance_to_mean(model, batches):
        """Keep the weights that differ most from their layer's mean."""
        return {name: (weight - weight.mean()).abs() for name, weight in model.prunable_weights().items()}

    monkeypatch.setitem(SCORES, "distance_to_mean", distance_to_mean)
    monkeypatch.setitem(METHODS, "distance", Method("Distance.", prune_and_tune(Select("distance_to_mean"))))

    model = build("distance")
    weights = {name: weight.detach().clone() for name, weight in model.prunable_weights().items()}
    run(tmp_path, "distance", model)
    kept = torch.cat([(weights[n] - weights[n].mean()).abs()[mask] for n, mask in model.masks().items()])
    pruned = torch.cat([(weights[n] - weights[n].mean()).abs()[~mask] for n, mask in model.masks().items()])
    assert kept.min() >= pruned.max()
    assert model.sparsity == pytest.approx(SPARSITY, abs=1e-3)


def mapped(mapping, **kwargs):
    return fresh(sparsity=SPARSITY, scope="global", num_labels=4, label_mapping=mapping, **kwargs)


@pytest.mark.parametrize("mapping", ["random", "frequency", "optimal", "iterative", "bayesian"])
@pytest.mark.parametrize("method", ["vpns", "omp", slow("imp"), "bip", "dense"])
def test_label_mappings_through_the_trainer(method, mapping, tmp_path):
    model = run(tmp_path, method, mapped(mapping)).model
    assert model.config.label_mapping_state == "final"
    image = torch.rand(2, 3, 32, 32)
    assert model(image).logits.shape == (2, 4)
    assert model.head_logits(image).shape == (2, 6 if mapping == "bayesian" else 4)
    if method != "dense":
        masks = model.masks().values()
        kept, total = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
        assert kept == kept_count(total, SPARSITY)


def test_iterative_mapping_is_refreshed_every_epoch_of_the_search(tmp_path):
    """It follows the predictions of the model as it is masked, and is cut out of the head once the mask is frozen."""
    calls = []

    class Watch(TrainerCallback):
        def on_epoch_begin(self, args, state, control, model, **kwargs):
            if args.output_dir.endswith("search"):
                calls.append((state.epoch, model.config.label_mapping_state, model.head_logits(IMAGE).shape[1]))

    model = mapped("iterative")
    run(tmp_path, "vpns", model, total_max_steps=-1, search_epochs=3, max_steps=-1, callbacks=[Watch()])
    assert [call[1:] for call in calls] == [("open", 6)] * 3
    assert model.config.label_mapping_state == "final"
    assert model.head_logits(IMAGE).shape[1] == 4


IMAGE = torch.zeros(1, 3, 32, 32)


@pytest.mark.parametrize("mapping", [slow("random"), "iterative", "bayesian"])
@pytest.mark.parametrize(("stage", "step"), [("search", 3), slow("search", 9), slow("tune", 3)])
def test_resume_with_a_label_mapping(mapping, stage, step, tmp_path):
    settings = dict(save_strategy="steps", save_steps=2, search_epochs=2, num_train_epochs=1)
    data = {
        "train_dataset": Images(classes=4),
        "prompted_train_dataset": Images(classes=4, augment=False),
    }
    whole = make_trainer(tmp_path / "whole", mapped(mapping), **data, **settings)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped", mapped(mapping), callbacks=[StopAt(stage, step)], **data, **settings)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    torch.manual_seed(123)
    resumed = make_trainer(tmp_path / "stopped", mapped(mapping), **data, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.model.config.mapped_labels == whole.model.config.mapped_labels
    assert_same_state(resumed.model, whole.model)
    assert history(tmp_path / "stopped") == history(tmp_path / "whole")


def test_same_batches_for_methods_without_a_prompt(tmp_path):
    """With `mix_unaugmented`, HYDRA sees what VPNs sees."""
    clean = Images(augment=False).images
    for method, mix, expected in (
        ("vpns", False, True),
        ("vpns_zero_prompt", False, True),
        ("dense", False, True),
        ("omp", False, False),
        ("hydra", False, False),
        ("hydra", True, True),
    ):
        trainer = make_trainer(tmp_path / f"{method}-{mix}", build(method), method=method, mix_unaugmented=mix)
        trainer.plan = trainer.plan_stages()[-1]
        shown = torch.cat([batch["pixel_values"] for batch in trainer.get_train_dataloader()])
        unaugmented = (shown.unsqueeze(1) == clean).flatten(2).all(2).any(1)
        assert len(shown) == (32 if expected else 16)
        assert int(unaugmented.sum()) == (16 if expected else 0)


def test_the_documented_example_of_a_new_method_runs(tmp_path, monkeypatch):
    from vpns_hf.scores import SCORES

    # Whatever the example puts there is gone after the test.
    monkeypatch.setitem(SCORES, "distance_to_mean", None)
    monkeypatch.setitem(METHODS, "distance", None)
    page = (Path(__file__).parents[2] / "docs/extend.md").read_text(encoding="utf-8")
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "SCORES[" in block]
    assert len(example.strip().splitlines()) < 15
    exec(example, {})
    run(tmp_path, "distance", build("omp"))


LONG = [pytest.param(method, marks=pytest.mark.slow) for method in ("imp", "rigl")]


@pytest.mark.parametrize("method", ["vpns", "omp", "snip", *LONG])
def test_the_mask_alone_is_the_mask_of_the_method(method, tmp_path):
    settings = {"search_max_steps": 4, "max_steps": 4, "total_max_steps": -1}
    whole = run(tmp_path / "whole", method, **settings).model
    found = run(tmp_path / "mask", f"{method}:mask", **settings)
    assert found.model.config.state == "frozen"
    assert all(torch.equal(mask, whole.masks()[name]) for name, mask in found.model.masks().items())
    names = [stage.name for stage in found.stages]
    rounds = [stage.name for stage in get_method("imp").stages_for(True, SPARSITY)[:-1]]
    assert (
        names
        == {
            "vpns": ["warm_up", "search"],
            "omp": ["prune"],
            "imp": [*rounds, "prune"],
            "snip": ["warm_up", "prune"],
            "rigl": ["warm_up", "tune"],
        }[method]
    )
    assert get_method(f"{method}:mask").needs_data == (method != "omp")


@pytest.mark.parametrize("name", ["dense", "tune", "linear_probe", "omp+prompt"])
def test_what_finds_no_mask_is_named(name):
    with pytest.raises(ValueError, match="finds no mask of its own"):
        get_method(f"{name}:mask")
