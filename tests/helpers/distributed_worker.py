"""What every process of a test in test_distributed.py runs: `launcher distributed_worker.py <job> <folder>`."""

from __future__ import annotations

import copy
import gc
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, ViTImageProcessor

from helpers.models import tiny_model
from helpers.training import Images, StopAt, fresh, make_trainer
from vpns_hf import VPNsTrainer
from vpns_hf.masking import get_pattern, select_masks, sharding

SETTINGS = dict(
    per_device_train_batch_size=2,
    per_device_eval_batch_size=2,
    consistency_check_steps=1,
    logging_steps=1,
    save_strategy="no",
)


def data(length):
    images = Images(length, augment=False)
    return dict(train_dataset=images, prompted_train_dataset=images, eval_dataset=Images(7, augment=False))


def run(folder, length=16, resume=None, **settings):
    """Train all stages; the model and the metrics of every stage are left in the folder."""
    trainer = make_trainer(folder, fresh(), **data(length) | SETTINGS | settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def first_process():
    return not dist.is_initialized() or dist.get_rank() == 0


# DDP -----------------------------------------------------------------------------------------------------------------


# Methods whose masks change while weights train.
LEARNED = {
    "joint": dict(method="vpns_joint", score_learning_rate="auto", score_start="snip"),
    "taught": dict(method="gmp_lamp", teacher="self"),
}


def ddp(folder):
    """Runs that the test repeats in one process, and the checks that need several."""
    trainer = run(folder / "even")
    assert trainer.accelerator.num_processes == 2
    assert trainer.model_wrapped is trainer.model
    run(folder / "uneven", length=15)
    for name, settings in LEARNED.items():
        run(folder / name, **settings)
    consistency(folder)
    sharded_selection()
    for scope in ("global", "row"):
        sharded_model(sparsity=0.7, scope=scope)
    (folder / "sharded").touch()


def patterns(folder):
    """Groups within rows, blocks that two processes share, and channels of several weights."""
    dist.init_process_group("gloo")
    sharded_selection_in_patterns()
    for pattern in ("2:4", "block:3", "channels"):
        sharded_model(sparsity=get_pattern(pattern).sparsity or 0.7, scope="global", pattern=pattern)
    (folder / "sharded").touch()


class Tamper(TrainerCallback):
    """Changes one thing on the second process after the second step of a stage."""

    def __init__(self, kind, stage="search"):
        self.kind, self.stage = kind, stage

    @torch.no_grad()
    def on_step_end(self, args, state, control, model, **kwargs):
        if dist.get_rank() == 0 or state.global_step != 2 or not args.output_dir.endswith(self.stage):
            return
        if self.kind == "masks":
            # As many weights are kept.
            mask = next(iter(model.masks().values()))
            mask.copy_(mask.roll(1))
        else:
            # The smallest change that a float can make.
            entry = next(iter(model.parameters_by_role()[self.kind].values())).view(-1)[:1]
            entry.copy_(torch.nextafter(entry, torch.full_like(entry, 9)))


def consistency(folder):
    found = {}
    for kind, stage in (("scores", "search"), ("masks", "search"), ("prompt", "search"), ("weights", "tune")):
        try:
            run(folder / f"tampered-{kind}", callbacks=[Tamper(kind, stage)], max_steps=3)
            found[kind] = "nothing"
        except RuntimeError as error:
            found[kind] = str(error)
    (folder / f"consistency-{dist.get_rank()}.json").write_text(json.dumps(found))


# FSDP2 ---------------------------------------------------------------------------------------------------------------


def shard(model):
    """As accelerate does it: the blocks, then the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model.backbone.vit.layers, model):
        fully_shard(module, mesh=mesh)
        # gloo has no average; torch 2.8 lets it add up in its place.
        module.set_force_sum_reduction_for_comms(True)
    model.shard_masks()
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert all(isinstance(mask, DTensor) for mask in model.masks().values())


def step(model, optimizer, index, sharded):
    """One optimizer step on eight images, of which every process of a sharded model takes its share."""
    generator = torch.Generator().manual_seed(index)
    images, labels = torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 6
    if sharded:
        own = slice(dist.get_rank(), None, dist.get_world_size())
        images, labels = images[own], labels[own]
    model.train()
    model(images, labels, use_prompt=index % 2 == 0).loss.backward()
    for name, weight in model.prunable_weights().items():
        if weight.grad is not None and model.config.state == "frozen":
            assert not sharding.whole(weight.grad)[~sharding.whole(model.masks()[name])].any()
    optimizer.step()
    optimizer.zero_grad()


def largest_difference(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((sharding.whole(p.detach()) - q.detach()).abs().max()) for p, q in pairs)


def assert_same_masks(model, other):
    expected = other.masks()
    for name, mask in model.masks().items():
        assert torch.equal(sharding.whole(mask), expected[name]), name


def sharded_selection():
    """Rows that do not divide, fewer rows than processes, ties, half precision."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        shapes = {"odd": (5, 3), "one row": (1, 4), "image": (3, 2, 3, 3)}
        scores = {
            name: torch.randn(shape, generator=generator).to(dtype).mul(2).round() for name, shape in shapes.items()
        }
        template = torch.nn.ParameterDict({name: torch.nn.Parameter(score) for name, score in scores.items()})
        fully_shard(template, mesh=mesh)
        for scope in ("global", "layer", "erk", "row"):
            masks = select_masks({name: template[name].detach() for name in scores}, 0.6, scope)
            expected = select_masks(scores, 0.6, scope)
            assert all(isinstance(mask, DTensor) for mask in masks.values())
            assert all(torch.equal(mask.full_tensor(), expected[name]) for name, mask in masks.items()), scope


def sharded_selection_in_patterns():
    """Rows that do not divide, ties, a block on two processes, more processes than rows of blocks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    shapes = {"odd": (5, 8), "one row": (1, 4), "image": (3, 4, 3, 3)}
    scores = {name: torch.randn(shape, generator=generator).mul(2).round() for name, shape in shapes.items()}
    template = torch.nn.ParameterDict({name: torch.nn.Parameter(score) for name, score in scores.items()})
    fully_shard(template, mesh=mesh)
    parts = {name: template[name].detach() for name in scores}
    for pattern, sparsity in (("2:4", 0.5), ("2:4", 0.3), ("block:2", 0.6), ("block:4", 0.5)):
        for scope in ("global", "layer", "row"):
            masks = select_masks(parts, sparsity, scope, get_pattern(pattern))
            expected = select_masks(scores, sparsity, scope, get_pattern(pattern))
            assert all(isinstance(mask, DTensor) for mask in masks.values())
            assert all(torch.equal(mask.full_tensor(), expected[name]) for name, mask in masks.items()), pattern


def sharded_model(**settings):
    """Search, freeze, tune: each step equals that of the whole model."""
    torch.manual_seed(0)
    model = tiny_model(**settings)
    whole = copy.deepcopy(model)
    model.image_processor = processor = ViTImageProcessor()
    shard(model)
    optimizers = [torch.optim.Adam([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (model, whole)]
    for index in range(3):
        step(model, optimizers[0], index, sharded=True)
        step(whole, optimizers[1], index, sharded=False)
        flips = model.update_masks()
        assert flips == whole.update_masks() > 0
        assert_same_masks(model, whole)
    assert model.sparsity == whole.sparsity
    assert largest_difference(model, whole) < 1e-4
    state = sharding.full_state(model)
    assert set(state) == (set(whole.state_dict()) if first_process() else set())
    if first_process():
        copy.deepcopy(whole).load_state_dict(state)
    sharding.load_full_state(model, whole.state_dict())
    model.freeze_masks()
    whole.freeze_masks()
    assert type(model) is type(whole)
    assert model.image_processor is processor
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in model.state_dict().items())
    shard(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2) for m in (model, whole)]
    for index in range(3):
        step(model, optimizers[0], index, sharded=True)
        step(whole, optimizers[1], index, sharded=False)
    weights = model.prunable_weights()
    assert not any(sharding.whole(weights[n])[~sharding.whole(mask)].any() for n, mask in model.masks().items())
    with torch.no_grad():
        for weight in weights.values():
            sharding.local(weight).add_(1)
    model.zero_masked_weights()
    assert not any(sharding.whole(weights[n])[~sharding.whole(mask)].any() for n, mask in model.masks().items())
    # Whole masks may be applied to a sharded model.
    assert model.apply_masks({name: mask.clone() for name, mask in whole.masks().items()}) == 0
    with torch.no_grad():
        for name, weight in weights.items():
            sharding.local(weight).sub_(sharding.local(model.masks()[name]).to(weight.dtype))
    assert largest_difference(model, whole) < 1e-4
    model.merge_and_unload()


# Faults --------------------------------------------------------------------------------------------------------------


class Die(TrainerCallback):
    """The second process is killed after the second step."""

    def on_step_end(self, args, state, control, **kwargs):
        if dist.get_rank() == 1 and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(folder):
    run(folder, callbacks=[Die()])


# Slow ----------------------------------------------------------------------------------------------------------------


def resumed(folder):
    """A run that stops in either stage and goes on, beside one that does not; saved on the first process only."""
    settings = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
    run(folder / "whole", **settings)
    for stage in ("search", "tune"):
        try:
            run(folder / stage, callbacks=[StopAt(stage, 3)], **settings)
            raise AssertionError("the run was not stopped")
        except KeyboardInterrupt:
            dist.barrier()
        run(folder / stage, resume=True, **settings)


def accumulated(folder):
    run(folder, per_device_train_batch_size=1, gradient_accumulation_steps=2)


VARIANTS = {
    "plain": {},
    "best": dict(
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True
    ),
    "gmp": dict(method="gmp", max_grad_norm=1.0),
    "acdc": dict(method="acdc", num_train_epochs=5),
    "joint": dict(method="vpns_joint", score_learning_rate="auto"),
    "gmp_lamp": dict(method="gmp_lamp"),
}


def variants(folder, names=tuple(VARIANTS), callbacks=()):
    """Runs to compare ways to spread a model by."""
    device = dict(use_cpu=not torch.cuda.is_available())
    return [run(folder / name, callbacks=list(callbacks), **VARIANTS[name], **device) for name in names]


class AllSharded(TrainerCallback):
    """Fails unless parameters and masks are split while the model trains."""

    def on_step_end(self, args, state, control, model, **kwargs):
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert all(isinstance(mask, DTensor) for mask in model.masks().values())


def fsdp2(folder):
    """VPNsTrainer under FSDP2, with and without an interruption; a model that was not trained is evaluated, too."""
    trainer = variants(folder, callbacks=[AllSharded()])[0]
    assert trainer.accelerator.is_fsdp2
    trainer.save_model()
    searched = VPNsTrainer(trainer.load_stage("search"), trainer.args, eval_dataset=trainer.eval_dataset)
    assert searched.evaluate()["eval_loss"] == trainer.finished_stages[0].metrics["eval_loss"]
    settings = dict(save_strategy="steps", save_steps=2, use_cpu=not torch.cuda.is_available())
    try:
        run(folder / "stopped", callbacks=[StopAt("search", 3)], **settings)
        raise AssertionError("the run was not stopped")
    except KeyboardInterrupt:
        dist.barrier()
    run(folder / "stopped", resume=True, **settings)


def fsdp2_on_cpu(folder):
    """The same on CPUs, where accelerate has no FSDP: it is told that this is a machine with GPUs."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    from vpns_hf import VPNsTrainingArguments

    VPNsTrainingArguments._uses_fsdp = False
    init = VPNsTrainer.__init__

    def pretend(self, model, args, *rest, **kwargs):
        assert args.device.type == "cpu"
        if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        init(self, model, args, *rest, **kwargs)

    VPNsTrainer.__init__ = pretend
    fsdp2(folder)


if __name__ == "__main__":
    # accelerate collects garbage after every stage; all that was imported need not be gone through.
    gc.freeze()
    torch.set_num_threads(1)
    job, target = sys.argv[1:]
    Path(target).mkdir(parents=True, exist_ok=True)
    globals()[job](Path(target))
    print(f"{job} done")
    if dist.is_initialized():
        dist.destroy_process_group()
