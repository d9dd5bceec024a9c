"""`HubTrainer`: pushes the model to the Hub, at the end and while it trains."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from ..hub import BEGIN, CARD_NAME, clear_errors, merge_cards, published_files, push_folder
from ..model.modeling import PromptedSparseModel
from .resumable_trainer import ResumableTrainer

logger = logging.getLogger(__name__)


class HubTrainer(ResumableTrainer):
    """Publishes what a shared subnetwork consists of, packed, with its card and without pickles."""

    push_in_progress: PushInProgress | None

    def __init__(self, **kwargs: Any):
        # Trainer makes the repository in its own `__init__`.
        self._hub = HfApi()
        super().__init__(**kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository `args.hub_model_id` on the Hub, if there is none.

        Args:
            token: of an account that may write; None: `args.hub_token`, else that of `hf auth login`.
            private: whether it is private; None: `args.hub_private_repo`.

        Raises:
            OSError: the Hub cannot be reached or refuses.
        """
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        # Not Trainer's own, which takes no `private` before transformers 5.23.
        with clear_errors(f"Could not create {name} on the Hub"):
            repository = self._hub.create_repo(
                name,
                token=self.args.hub_token if token is None else token,
                private=self.args.hub_private_repo if private is None else private,
                exist_ok=True,
            )
        self.hub_model_id, self.push_in_progress = repository.repo_id, None

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | Sequence[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset_tags: str | Sequence[str] | None = None,
    ) -> None:
        """Write a short model card to `args.output_dir`, unless there is one with results, as recipes write it.

        Args:
            language, license, tags: of the metadata.
            model_name: name of the model in the metadata.
            finetuned_from: Hub id of the backbone; None: where it was loaded from.
            dataset_tags: Hub ids of the data sets.
        """
        if not self.is_world_process_zero():
            return
        given = {"language": language, "license": license, "model_name": model_name, "datasets": dataset_tags}
        metadata = given | ({"base_model": finetuned_from} if finetuned_from else {})
        self._write_card(self.model, Path(self.args.output_dir), [tags] if isinstance(tags, str) else tags, metadata)

    def _write_card(
        self, model: PromptedSparseModel, folder: Path, tags: Sequence[str] | None, metadata: dict[str, Any]
    ) -> None:
        path = folder / CARD_NAME
        there = ModelCard.load(path) if path.is_file() else None
        if there is not None and BEGIN in there.text and there.data.to_dict().get("model-index"):
            return
        card = model.short_card(self.hub_model_id or folder.absolute().name, tags or (), **metadata)
        (merge_cards(there, card) if there is not None else card).save(path)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Upload the model, its image processor, card, recipe, report and figures in one commit, and nothing else.

        All of it is saved in `args.output_dir` first, so a push that fails can be repeated.

        Args:
            commit_message: of the commit.
            blocking: wait until it is done.
            token: of an account that may write; None: `args.hub_token`, else that of `hf auth login`.
            revision: branch to commit to; None: `args.hub_revision`, else `main`.
            private: whether a repository that is created is private; None: `args.hub_private_repo`.
            kwargs: passed to [`~VPNsTrainer.create_model_card`].

        Returns:
            The commit, or without `blocking` its future; None on processes other than the main one.

        Raises:
            OSError: the Hub cannot be reached or refuses.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.create_model_card(**kwargs)
        self._finish_current_push()
        push = partial(self._publish, self.args.output_dir, commit_message or "End of training", token, revision)
        if not blocking:
            return self._hub.run_as_future(push)
        try:
            return push()
        except OSError as error:
            raise OSError(
                f"{error} The model is saved in {self.args.output_dir}; `trainer.push_to_hub()` pushes it again."
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer's own would copy the checkpoint over the results in `output_dir` and publish a pickle.
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        running = self.push_in_progress
        if running is not None and not running.is_done() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress: {self.stage.name}, step {self.state.global_step}"
        with _training_goes_on():
            copied = self._complete_copy(Path(checkpoint_folder))
            job = self._hub.run_as_future(self._push_copy, copied, message)
            if running is None or running.is_done():
                self.push_in_progress = PushInProgress([job])
            else:
                running.jobs.append(job)

    def _complete_copy(self, checkpoint: Path) -> tempfile.TemporaryDirectory[str]:
        """What a push of a checkpoint publishes; a copy, because checkpoints are deleted while training goes on."""
        copied, run_folder = tempfile.TemporaryDirectory(), checkpoint.parents[1]
        folder = Path(copied.name)
        for name in published_files(run_folder):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(run_folder / name, folder / name)
        model = type(self.model).from_pretrained(checkpoint)
        model.save_pretrained(folder)
        self._write_card(model, folder, None, {})
        return copied

    def _push_copy(self, copied: tempfile.TemporaryDirectory[str], message: str) -> None:
        with _training_goes_on(), copied as folder:
            self._publish(folder, message)

    def _publish(self, folder: str, message: str, token: str | None = None, revision: str | None = None) -> CommitInfo:
        return push_folder(
            folder,
            str(self.hub_model_id),
            commit_message=message,
            token=self.args.hub_token if token is None else token,
            revision=revision or self.args.hub_revision,
        )


@contextmanager
def _training_goes_on() -> Iterator[None]:
    """Warn of what goes wrong with a push of a checkpoint instead of ending the training by it."""
    try:
        yield
    except Exception as error:
        logger.warning("%s Training goes on, and the next save is pushed again.", error)
