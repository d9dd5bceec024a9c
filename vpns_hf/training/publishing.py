"""Publish a run on the Hub: repository, card, the finished model and complete checkpoints."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from transformers.utils.hub import PushInProgress

from ..hub import BEGIN, CARD_NAME, clear_errors, merge_cards, published_files, push_folder
from ..model.modeling import PromptedSparseModel
from .arguments import VPNsTrainingArguments

logger = logging.getLogger(__name__)


class Publisher:
    """Push what a shared subnetwork consists of, packed, with its card and without pickles.

    Args:
        args: arguments of the run; `hub_model_id`, `hub_token`, `hub_revision`, `hub_private_repo` and
            `hub_always_push` apply.

    Attributes:
        repo_id: id of the repository; None until it is created.
    """

    def __init__(self, args: VPNsTrainingArguments):
        self.args = args
        self.repo_id: str | None = None
        self._hub = HfApi()
        self._pushes: PushInProgress | None = None

    def create_repository(self, token: str | None, private: bool | None) -> str:
        """Create the repository if it does not exist, and return its id.

        Raises:
            OSError: the Hub cannot be reached or refuses.
        """
        name = self.args.hub_model_id or self.run_folder.absolute().name
        # Not Trainer's own, which takes no `private` before transformers 5.23.
        with clear_errors(f"Could not create {name} on the Hub"):
            repository = self._hub.create_repo(
                name,
                token=self.args.hub_token if token is None else token,
                private=self.args.hub_private_repo if private is None else private,
                exist_ok=True,
            )
        self.repo_id = repository.repo_id
        return repository.repo_id

    @property
    def run_folder(self) -> Path:
        """Output folder of the run."""
        return Path(self.args.output_dir)

    def write_card(
        self, model: PromptedSparseModel, folder: Path, tags: Sequence[str] | None, metadata: dict[str, Any]
    ) -> None:
        """Write a short model card, unless the folder holds one with results."""
        path = folder / CARD_NAME
        present = ModelCard.load(path) if path.is_file() else None
        if present is not None and BEGIN in present.text and present.data.to_dict().get("model-index"):
            return
        card = model.short_card(self.repo_id or folder.absolute().name, tags or (), **metadata)
        (merge_cards(present, card) if present is not None else card).save(path)

    def push(self, message: str, blocking: bool, token: str | None, revision: str | None) -> Any:
        """Push the run's folder: a commit, or without `blocking` its future.

        Raises:
            OSError: the Hub cannot be reached or refuses.
        """
        self.wait()
        if not blocking:
            return self._hub.run_as_future(self._publish, self.run_folder, message, token, revision)
        try:
            return self._publish(self.run_folder, message, token, revision)
        except OSError as error:
            raise OSError(
                f"{error} The model is saved in {self.run_folder}; `trainer.push_to_hub()` pushes it again."
            ) from error

    def push_checkpoint(self, model: PromptedSparseModel, checkpoint: Path, message: str) -> None:
        """Push a complete checkpoint in the background, with the card, recipe and figures of the run.

        Nothing is pushed while an earlier push runs, unless `args.hub_always_push`; a failure is a warning.
        """
        running = self._pushes
        if running is not None and not running.is_done() and not self.args.hub_always_push:
            return
        with _warns_of_failure():
            copied = self._complete_copy(model, checkpoint)
            job: Future[None] = self._hub.run_as_future(self._push_copy, copied, message)
            if running is None or running.is_done():
                self._pushes = PushInProgress([job])
            else:
                running.jobs.append(job)

    def wait(self) -> None:
        """Wait until the pushes of checkpoints are done."""
        if self._pushes is not None and not self._pushes.is_done():
            logger.info("Waiting for the push of a checkpoint to finish.")
            self._pushes.wait_until_done()

    def _complete_copy(self, model: PromptedSparseModel, checkpoint: Path) -> tempfile.TemporaryDirectory[str]:
        """Copy what a push of a checkpoint publishes, because checkpoints are deleted while training continues."""
        copied = tempfile.TemporaryDirectory()
        folder = Path(copied.name)
        for name in published_files(self.run_folder):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(self.run_folder / name, folder / name)
        saved = type(model).from_pretrained(checkpoint)
        saved.save_pretrained(folder)
        self.write_card(saved, folder, None, {})
        return copied

    def _push_copy(self, copied: tempfile.TemporaryDirectory[str], message: str) -> None:
        with _warns_of_failure(), copied as folder:
            self._publish(Path(folder), message)

    def _publish(
        self, folder: Path, message: str, token: str | None = None, revision: str | None = None
    ) -> CommitInfo:
        return push_folder(
            folder,
            str(self.repo_id),
            commit_message=message,
            token=self.args.hub_token if token is None else token,
            revision=revision or self.args.hub_revision,
        )


@contextmanager
def _warns_of_failure() -> Iterator[None]:
    """Warn of a failed push of a checkpoint instead of ending the training by it."""
    try:
        yield
    except Exception as error:
        logger.warning("%s Training continues, and the next save is pushed again.", error)
