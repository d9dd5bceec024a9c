"""Reporting callbacks see one run: steps and folder of all stages together."""

import pytest
from helpers.training import StopAt, fresh, make_trainer
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

WRITTEN = []


class Writer:
    """Writer of TensorBoard that keeps (folder, tag, step)."""

    def __init__(self, log_dir):
        self.log_dir = str(log_dir)

    def add_scalar(self, tag, value, step):
        WRITTEN.append((self.log_dir, tag, step))

    def add_text(self, *args):
        pass

    def flush(self):
        pass

    def close(self):
        pass


class TensorBoard(TensorBoardCallback):
    """The callback of transformers with another writer, so that TensorBoard need not be installed."""

    def __init__(self):
        self._SummaryWriter, self.tb_writer, self.logging_dir = Writer, None, None


class StageSteps(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.steps.append(state.global_step)


@pytest.fixture
def written():
    WRITTEN.clear()
    return WRITTEN


def steps_of(written, tag):
    return [step for _, name, step in written if name == tag]


def test_steps_and_folder_of_a_report_continue_over_the_stages(tmp_path, written):
    own = StageSteps()
    trainer = make_trainer(tmp_path, fresh(), method="vpns", max_steps=4, callbacks=[TensorBoard(), own])
    trainer.train()
    assert own.steps == [2, 4, 2, 4]
    assert steps_of(written, "train/loss") == [2, 4, 6, 8]
    assert steps_of(written, "train/train_loss") == [4, 8]
    folders = {folder for folder, _, _ in written}
    assert len(folders) == 1
    assert folders.pop().startswith(f"{tmp_path}/runs/")
    trainer.evaluate(trainer.train_dataset)
    assert steps_of(written, "eval/loss") == [8]


def test_a_resumed_run_reports_the_steps_that_were_left(tmp_path, written):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, fresh(), max_steps=4, save_steps=2, callbacks=[StopAt("1-tune", 3)]).train()
    trainer = make_trainer(tmp_path, fresh(), max_steps=4, save_steps=2, callbacks=[TensorBoard()])
    trainer.train(resume_from_checkpoint=True)
    assert steps_of(written, "train/loss") == [8]


def test_reporting_callbacks_can_be_removed(tmp_path, written):
    trainer = make_trainer(tmp_path, fresh(), max_steps=2, callbacks=[TensorBoard()])
    trainer.remove_callback(TensorBoardCallback)
    trainer.train()
    assert written == []
