"""Sharing on the Hugging Face Hub: which files, in one commit, with cards merged and errors in one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from transformers.utils import cached_file

from .saved_files import check_published
from .saved_folder import finish_replacing
from .storage.header import PackedFormatError
from .version import __version__

CARD_NAME = "README.md"
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
LATENCY_REPORT, LATENCY_FIGURE = "latency.json", "figures/latency.png"
PUBLISHED_FILES = (
    CARD_NAME,
    "config.json",
    *WEIGHTS,
    "preprocessor_config.json",
    "recipe.yaml",
    "sparsity_report.json",
    LATENCY_REPORT,
    "figures/*.png",
)
TAGS = ("vpns_hf", "pruning", "sparsity", "visual-prompting", "image-classification")
# What lies between these lines of a card is rewritten; what people wrote around them stays.
BEGIN, END = "<!-- vpns_hf: begin -->", "<!-- vpns_hf: end -->"


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Publish a saved model in one commit; a push that fails leaves the files and branches as they were.

    Uploaded are the files of the folder that a shared subnetwork consists of, `PUBLISHED_FILES`, and nothing else:
    checkpoints and the pickles in them stay where they are. Weight files of an earlier push that this one does not
    replace are deleted, other files in the repository are kept, and the card is merged into the one that is there.

    Args:
        folder: what `save_pretrained` or a recipe wrote.
        repo_id: `user/name`; created if needed.
        commit_message: of the commit; None: "Upload model".
        commit_description: of the commit.
        private: whether a repository that is created is private; None: as the account's default is.
        token: of an account that may write; None: that of `hf auth login`.
        revision: branch to commit to, created from `main` if needed; None: `main`.
        create_pr: open a pull request against `revision` instead.

    Raises:
        ValueError: the folder holds no saved model, a link out of it or a file whose content is of another type than
            its name says, or the metadata of the card are not valid.
        OSError: the Hub cannot be reached or refuses.
    """
    folder = Path(folder)
    finish_replacing(folder)
    paths = published_files(folder)
    if "config.json" not in paths or not any(map(_holds_weights, paths)):
        raise ValueError(f"{folder} holds no saved model: expected config.json and model.safetensors in it.")
    check_published(folder, paths)
    api = HfApi(token=token, library_name="vpns_hf", library_version=__version__)
    with clear_errors(f"Could not push to {repo_id}", revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with _branch(api, repo_id, None if create_pr else revision):
            info = api.model_info(repo_id, revision=revision)
            published = {sibling.rfilename for sibling in info.siblings or ()}
            contents: dict[str, str | bytes] = {path: str(folder / path) for path in paths}
            if CARD_NAME in contents and CARD_NAME in published:
                there = ModelCard.load(api.hf_hub_download(repo_id, CARD_NAME, revision=info.sha))
                contents[CARD_NAME] = str(merge_cards(there, ModelCard.load(folder / CARD_NAME))).encode()
            stale = [path for path in published if _holds_weights(path) and path not in contents]
            # Not `upload_folder`, which may spread a folder over several commits.
            return api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(path, content) for path, content in contents.items()),
                    *(CommitOperationDelete(path) for path in sorted(stale)),
                ],
                commit_message=commit_message or "Upload model",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                # A commit in between may have edited the card that was merged here.
                parent_commit=info.sha,
            )


def published_files(folder: str | os.PathLike[str]) -> list[str]:
    """List the files of `PUBLISHED_FILES` in a folder, relative to it: those that a push uploads."""
    names = {path.relative_to(folder).as_posix() for pattern in PUBLISHED_FILES for path in Path(folder).glob(pattern)}
    return sorted(name for name in names if (Path(folder) / name).is_file())


def full_repo_id(repo_id: str, token: bool | str | None = None) -> str:
    """`user/name`, where a name without a user stands for a repository of the account that is signed in.

    Raises:
        OSError: the Hub cannot be reached or refuses.
    """
    if "/" in repo_id:
        return repo_id
    with clear_errors(f"Could not push to {repo_id}"):
        return f"{HfApi(token=token).whoami()['name']}/{repo_id}"


def _holds_weights(path: str) -> bool:
    return "/" not in path and any(fnmatch(path, pattern) for pattern in WEIGHTS)


@contextmanager
def _branch(api: HfApi, repo_id: str, revision: str | None) -> Iterator[None]:
    """Make sure that a branch exists; one that is made here is deleted again if what follows fails."""
    missing = revision is not None and not api.revision_exists(repo_id, revision)
    if missing:
        api.create_branch(repo_id, branch=str(revision))
    try:
        yield
    except BaseException:
        if missing:
            with suppress(HTTPError):
                api.delete_branch(repo_id, branch=str(revision))
        raise


def short_card(title: str, tags: Sequence[str], metadata: Mapping[str, Any], **facts: Any) -> ModelCard:
    """Create a card that says what a model is and how to load it, from `card_templates/short.md`.

    Args:
        title: heading of the card, and where its code loads the model from.
        tags: further tags.
        metadata: further metadata; None values are left out.
        facts: what the template fills in.
    """
    given = {name: value for name, value in metadata.items() if value is not None}
    data = ModelCardData(
        library_name="vpns_hf",
        pipeline_tag="image-classification",
        tags=list(dict.fromkeys([*TAGS, *tags])),
        **given,
    )
    template = (files("vpns_hf.card_templates") / "short.md").read_text(encoding="utf-8")
    return ModelCard.from_template(
        data, template_str=template, title=title, begin=BEGIN, end=END, version=__version__, **facts
    )


def merge_cards(old: ModelCard, new: ModelCard) -> ModelCard:
    """Merge the old card with the generated part and the metadata of the new one.

    What people wrote around the generated part stays, and so do metadata that the new card does not give. A card
    without a generated part keeps its whole text, and that of the new card follows.
    """
    metadata = old.data.to_dict() | new.data.to_dict()
    tags = [*(old.data.to_dict().get("tags") or []), *(new.data.to_dict().get("tags") or [])]
    if tags:
        metadata["tags"] = list(dict.fromkeys(tags))
    before, begin, rest = old.text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end and "model-index" not in new.data.to_dict():
        # These results are of the generated part that goes.
        metadata.pop("model-index", None)
    _, new_begin, generated = new.text.partition(BEGIN)
    if not new_begin:
        text = old.text
    else:
        if not begin or not end:
            before, after = old.text.rstrip() + "\n\n", "\n"
        text = before + BEGIN + generated.partition(END)[0] + END + after
    return ModelCard(f"---\n{ModelCardData(**metadata, ignore_metadata_errors=True).to_yaml()}\n---\n{text}")


_HUB_KEYS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "trust_remote_code")


def hub_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Select the arguments of `from_pretrained` that say where files come from.

    Code in a repository is not trusted unless the caller says so: left open, transformers would ask on the terminal.
    """
    return {"trust_remote_code": False} | {key: kwargs[key] for key in _HUB_KEYS if key in kwargs}


def find_file(name: str, file: str, kwargs: Mapping[str, Any]) -> str | None:
    """Return the local path of a file of a model, downloaded if needed; None where the model has no such file."""
    try:
        return cached_file(name, file, **hub_kwargs(kwargs))
    except OSError as error:
        # transformers names a cause for everything but a file that is not there.
        if error.__cause__ is None:
            return None
        raise


def pinned_revision(name: str, kwargs: Mapping[str, Any]) -> str | None:
    """Pin the revision that `from_pretrained` was asked for to a commit, so that all files are of the same one.

    Args:
        name: Hub id or folder.
        kwargs: the other arguments of `from_pretrained`.
    """
    if os.path.isdir(name):
        return kwargs.get("revision")
    return HfApi().resolve_revision(
        name,
        revision=kwargs.get("revision"),
        token=kwargs.get("token"),
        cache_dir=kwargs.get("cache_dir"),
        local_files_only=kwargs.get("local_files_only", False),
    )


@contextmanager
def clear_errors(failed: str, revision: str | None = None) -> Iterator[None]:
    """Turn what clients of the Hub raise into one sentence: what failed, why, and what can be done.

    Args:
        failed: what failed, such as `"Could not push to user/name"`.
        revision: the revision that was asked for.

    Raises:
        OSError: in place of errors of the Hub and of the network; all others pass.
    """
    try:
        yield
    except PackedFormatError:
        raise
    except Exception as error:
        reason = next((text for cause in _causes(error) if (text := _reason(cause, revision))), None)
        if reason is None:
            raise
        raise OSError(f"{failed}: {reason}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException, revision: str | None) -> str | None:
    match error:
        case HFValidationError():
            return "this is no local folder, and no Hub id such as user/name."
        case LocalTokenNotFoundError():
            return "no token was found; sign in with `hf auth login`, or pass `token=...`."
        case OfflineModeIsEnabled():
            return (
                "the files are not all in the cache, and the Hub may not be asked; do without `local_files_only=True` "
                "and HF_HUB_OFFLINE."
            )
        case GatedRepoError():
            return "the repository is gated; ask for access on its page, and sign in with `hf auth login`."
        case RepositoryNotFoundError():
            return (
                "there is no such repository, or it is private and the token does not open it; check the spelling, "
                "and sign in with `hf auth login` or pass `token=...`."
            )
        case RevisionNotFoundError():
            return f"the repository has no branch, tag or commit {revision!r}."
        case LocalEntryNotFoundError() | RevisionResolutionError() if error.__cause__ is None:
            return "the files are not all in the cache; do without `local_files_only=True` to ask the Hub."
        case LocalEntryNotFoundError():
            return None
        case EntryNotFoundError():
            return "a file that is needed is not in the repository."
        case HfHubHTTPError():
            return _refusal(error.response.status_code)
        case json.JSONDecodeError():
            return f"the answer of {constants.ENDPOINT} cannot be read; try again later."
        case HTTPError():
            return f"{constants.ENDPOINT} cannot be reached, or broke off ({error}); check the network and try again."
    return None


def _refusal(status: int) -> str:
    match status:
        case 401 | 403:
            return (
                f"the Hub refused ({status}); sign in with `hf auth login` or pass the `token=...` of an account with "
                "access to it."
            )
        case 412:
            return "somebody else has pushed in the meantime; try again."
        case _:
            return f"the Hub answered with status {status}; try again later."
