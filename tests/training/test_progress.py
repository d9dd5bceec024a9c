"""The progress of a run: a bar a stage in a terminal, plain lines elsewhere, nothing where nothing is asked for."""

import io
import re
from types import SimpleNamespace

import pytest
from helpers.training import Images, StopAt, fresh, make_trainer
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from vpns_hf.training import progress
from vpns_hf.training.progress import StageBars

LENGTHS = {"max_steps": 4, "save_strategy": "no", "eval_dataset": Images(8, augment=False)}
EVALUATED = LENGTHS | {"eval_strategy": "steps", "eval_steps": 4}
SEARCH = "[stage 1 of 2] search"


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def bars(self, name):
        """Every state in which a bar of this name was shown, without times and speed."""
        text = re.sub(r"\x1b\[\w", "", self.getvalue()).replace("\n", "\r")
        shown = [line.strip() for line in text.split("\r") if line.strip().startswith(name)]
        return [re.sub(r"\[\d+:.*?(?:step/s|it/s|s/step|s/it)\s*", "[", line) for line in shown]


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    # Not that of the process, which pytest sets again for the test itself.
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    return stream


def loss_at(trainer, step):
    """The loss that was logged in the search, as it is shown."""
    entries = trainer.logs()["search"]
    return next(f"{entry['loss']:.4g}" for entry in entries if entry["step"] == step and "loss" in entry)


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys, disable_tqdm):
    trainer = make_trainer(tmp_path, fresh(sparsity=0.9), disable_tqdm=disable_tqdm, **EVALUATED)
    trainer.train()
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    density = f"{1 - trainer.model.sparsity:.2%}"
    accuracies = "accuracy {eval_accuracy:.2%}, accuracy prompted {eval_accuracy_prompted:.2%}"
    searched = accuracies.format(**trainer.finished_stages[0].metrics)
    assert lines[:4] == [
        f"{SEARCH}: step 2/4, loss {loss_at(trainer, 2)}, density {density}",
        f"{SEARCH}: step 4/4, loss {loss_at(trainer, 4)}, density {density}",
        f"{SEARCH}: step 4/4, {searched}",
        f"{SEARCH}: 4 steps, density {density}, {searched}",
    ]
    assert [line.split(":")[0] for line in lines] == [SEARCH] * 4 + ["[stage 2 of 2] tune"] * 4
    assert "{" not in printed.out
    assert printed.err == ""


def test_one_bar_a_stage_in_a_terminal(tmp_path, terminal, capsys):
    trainer = make_trainer(tmp_path, fresh(sparsity=0.9), disable_tqdm=False, **EVALUATED)
    trainer.train()
    last = terminal.bars(SEARCH)[-1]
    metrics = trainer.finished_stages[0].metrics
    assert last.startswith(f"{SEARCH}: 100%|")
    assert "| 4/4 [" in last
    assert last.endswith(
        f", loss {loss_at(trainer, 4)}, density {1 - trainer.model.sparsity:.2%}, accuracy "
        f"{metrics['eval_accuracy']:.2%}, accuracy prompted {metrics['eval_accuracy_prompted']:.2%}]"
    )
    # One line a stage is left; a bar below it goes down a line and up again.
    assert terminal.getvalue().count("\n") - terminal.getvalue().count("\x1b[A") == 2
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert terminal.bars("evaluation")


def test_a_resumed_run_shows_where_it_is(tmp_path, terminal, capsys):
    settings = LENGTHS | {"save_strategy": "steps", "save_steps": 2, "disable_tqdm": False}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, fresh(), callbacks=[StopAt("0-search", 3)], **settings).train()
    terminal.seek(0)
    terminal.truncate()
    make_trainer(tmp_path, fresh(), **settings).train(resume_from_checkpoint=True)
    shown = [re.search(r"(\d)/4", bar)[1] for bar in terminal.bars(SEARCH)]
    assert shown[0] == "2"
    assert shown[-1] == "4"
    assert "[stage 2 of 2] tune: 100%" in terminal.bars("[stage 2 of 2] tune")[-1]


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_nothing_is_shown_above_warnings(tmp_path, terminal, capsys, disable_tqdm):
    make_trainer(tmp_path, fresh(), disable_tqdm=disable_tqdm, log_level="error", **EVALUATED).train()
    assert terminal.getvalue() == ""
    assert "step " not in capsys.readouterr().out


def test_the_main_process_alone_shows_it(tmp_path, terminal, capsys):
    trainer = make_trainer(tmp_path, fresh(), disable_tqdm=False, **EVALUATED)
    trainer.state.is_world_process_zero = False
    bars = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, StageBars))
    trainer.state.max_steps = 4
    bars.on_train_begin(trainer.args, trainer.state, trainer.control)
    bars.on_step_end(trainer.args, trainer.state, trainer.control)
    bars.on_log(trainer.args, trainer.state, trainer.control, logs={"loss": 1.0, "sparsity": 0.9})
    bars.on_prediction_step(trainer.args, trainer.state, trainer.control, eval_dataloader=[0])
    bars.on_evaluate(trainer.args, trainer.state, trainer.control)
    bars.on_train_end(trainer.args, trainer.state, trainer.control)
    assert terminal.getvalue() == capsys.readouterr().out == ""


def test_evaluation_alone(tmp_path, terminal, capsys):
    trainer = make_trainer(tmp_path, fresh(), disable_tqdm=False, **LENGTHS)
    trainer.evaluate()
    trainer.predict(Images(8, augment=False))
    assert terminal.bars("evaluation")
    assert capsys.readouterr().out == ""


def test_the_second_pass_of_an_evaluation_starts_its_bar_again(tmp_path, terminal):
    trainer = make_trainer(tmp_path, fresh(), disable_tqdm=False, **LENGTHS)
    bars = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, StageBars))
    for shown in (1, 2, 1, 2):
        bars.on_prediction_step(trainer.args, trainer.state, trainer.control, eval_dataloader=[0, 0])
        assert (bars.prediction_bar.n, bars.prediction_bar.total) == (shown, 2)
    bars.on_evaluate(trainer.args, trainer.state, trainer.control)
    assert bars.prediction_bar is None


class Own(ProgressCallback):
    def __init__(self):
        super().__init__()
        self.logged = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged += 1


@pytest.mark.parametrize(("disable_tqdm", "default"), [(False, ProgressCallback), (True, PrinterCallback)])
def test_callbacks_of_the_caller_stay(tmp_path, capsys, disable_tqdm, default):
    own, silent = Own(), TrainerCallback()
    settings = LENGTHS | {"disable_tqdm": disable_tqdm}
    trainer = make_trainer(tmp_path / "a", fresh(), callbacks=[own, silent], **settings)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert default not in kinds
    assert own in trainer.callback_handler.callbacks
    assert kinds.count(StageBars) == 1
    trainer.train()
    assert own.logged

    # One that is of the same class as Trainer's own.
    theirs = default()
    trainer = make_trainer(tmp_path / "b", fresh(), callbacks=[theirs], **settings)
    found = [callback for callback in trainer.callback_handler.callbacks if type(callback) is default]
    assert found == [theirs]
    trainer.add_callback(Own())
    assert sum(isinstance(callback, Own) for callback in trainer.callback_handler.callbacks) == 1

    # As with Trainer, it can be removed by the class.
    trainer = make_trainer(tmp_path / "c", fresh(), **settings)
    trainer.remove_callback(ProgressCallback)
    capsys.readouterr()
    trainer.train()
    assert "step " not in capsys.readouterr().out
