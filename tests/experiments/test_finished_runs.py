"""A finished run leaves what is needed of it, and says where it is; it can be resumed, reported and learned from."""

import json
import logging

import pytest
import torch
from helpers.recipes import run
from helpers.training import Images, fresh, make_trainer

from vpns_hf import PromptedSparseModel
from vpns_hf.training.clearing import clear_run, size
from vpns_hf.training.run_record import RunRecord
from vpns_hf.training.teacher import load_teacher

STEPS = {"search_max_steps": 2, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def content(path):
    """The content of a file. Loading states the dtype of the backbone, and training transformers' `use_cache`."""
    if path.name != "config.json":
        return path.read_bytes()
    config = json.loads(path.read_text())
    config["backbone_config"].pop("dtype", None)
    config.pop("use_cache", None)
    return config


def test_what_a_run_leaves_and_says_and_resuming_it(task, capsys, caplog, monkeypatch):
    # Times are measured again when a finished run is resumed.
    monkeypatch.setattr("vpns_hf.experiments.prune.measure_milliseconds", lambda models: {})
    run(task, references=["dense", "vpns_zero_prompt"], **STEPS)
    out = task / "out"
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("The pruned model (")
    assert f", its card, numbers and figures are in {out}; the references are in {out}/dense and" in line
    assert f"{out}/vpns_zero_prompt. Checkpoints of " in line
    assert line.endswith(" MB were removed (`--keep_checkpoints true` keeps them).")
    models = {path.relative_to(out).parent for path in out.rglob("model.safetensors")}
    assert {str(model) for model in models} == {".", "1-search/model", "dense", "vpns_zero_prompt"}
    assert not [name for name in files(out) if "checkpoint-" in name or "first_state" in name]
    # The scores alone would take as much as the dense model.
    assert (out / "1-search/model/model.safetensors").stat().st_size < 1.1 * (out / "model.safetensors").stat().st_size

    kept = [name for name in files(out) if not name.startswith(("runs", "figures")) and not name.endswith(".yaml")]
    before = {name: content(out / name) for name in kept}
    caplog.clear()
    for name in ("latency.json", "figures/latency.png"):
        (out / name).write_text("of another model")
    with caplog.at_level(logging.WARNING):
        run(task, "--resume_from_checkpoint", "true", references=["dense", "vpns_zero_prompt"], **STEPS)
    assert caplog.text.count("has ended, so nothing is trained") == 3
    after = {name: content(out / name) for name in kept}
    assert [name for name in kept if after[name] != before[name]] == []
    assert not {"latency.json", "figures/latency.png"} & set(files(out))
    assert "Checkpoints" not in capsys.readouterr().out.splitlines()[-1]

    assert "vpns before tuning" in [row["name"] for row in json.loads(after["metrics.json"])["test"]]


def test_checkpoints_are_kept_where_that_is_asked_for(task, capsys):
    run(task, method="omp", references=["none"], keep_checkpoints=True, **STEPS)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith(" MB are kept.")
    assert (task / "out/1-tune/checkpoint-2/optimizer.pt").is_file()
    assert (task / "out/1-tune/model/model.safetensors").is_file()


@pytest.mark.parametrize("model", [{}, {"label_mapping": "iterative", "num_labels": 6}])
def test_the_models_that_stay_give_the_same_outputs(tmp_path, model):
    trainer = make_trainer(tmp_path, fresh(**model), **STEPS)
    trainer.train()
    trainer.save_model()
    images = torch.stack([Images(augment=False)[index]["pixel_values"] for index in range(4)])

    def outputs():
        return [trainer.load_stage(name).eval()(images, use_prompt=True).logits for name in ("search", "tune")]

    before, whole = outputs(), size(tmp_path)
    freed = clear_run(tmp_path, keep=("search",))
    assert freed == whole - size(tmp_path) > whole / 2
    for mine, theirs in zip(outputs(), before, strict=True):
        assert torch.equal(mine, theirs)
    assert clear_run(tmp_path, keep=("search",)) == 0
    assert [len(log) for log in trainer.logs().values()] == [2, 2]


def test_a_model_that_was_removed_is_named(tmp_path):
    trainer = make_trainer(tmp_path, fresh(), **STEPS)
    trainer.train()
    trainer.save_model()
    clear_run(tmp_path)
    with pytest.raises(ValueError, match=r"The model of the stage 'search' is not in .*0-search/model any more"):
        trainer.load_stage("search")


def test_a_finished_run_teaches_and_resumes(tmp_path):
    trainer = make_trainer(tmp_path, fresh(), method="dense", **STEPS)
    trainer.train()
    trainer.save_model()
    clear_run(tmp_path)
    assert RunRecord.last_model(tmp_path) == tmp_path
    teacher = load_teacher(str(tmp_path), fresh())
    resumed = make_trainer(tmp_path, fresh(), method="dense", **STEPS)
    resumed.train(resume_from_checkpoint=True)
    saved = PromptedSparseModel.from_pretrained(tmp_path)
    for name, tensor in saved.backbone_state().items():
        assert torch.equal(teacher.backbone_state()[name], tensor)
        assert torch.equal(resumed.model.backbone_state()[name], tensor)


def test_a_clean_up_that_was_killed_is_finished(tmp_path, monkeypatch):
    """Between its steps the run can be resumed, and the next clean-up does the rest."""
    trainer = make_trainer(tmp_path, fresh(), **STEPS)
    trainer.train()
    trainer.save_model()
    expected = trainer.model.backbone_state()
    removed = []

    def stop(path):
        removed.append(path)
        if path.name == "model.tmp":
            raise KeyboardInterrupt

    monkeypatch.setattr("vpns_hf.training.clearing.remove", stop)
    with pytest.raises(KeyboardInterrupt):
        clear_run(tmp_path)
    monkeypatch.undo()
    assert removed
    resumed = make_trainer(tmp_path, fresh(), **STEPS)
    resumed.train(resume_from_checkpoint=True)
    assert not list(tmp_path.rglob("model.tmp"))
    for name, tensor in resumed.model.backbone_state().items():
        assert torch.equal(tensor, expected[name])
    clear_run(tmp_path)
    assert not list(tmp_path.rglob("checkpoint-*"))
