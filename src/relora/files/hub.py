"""Files from the Hugging Face hub, and one line for each reason why the hub does not give them.

    gated               accept the terms, log in with `hf auth login`
    not there, private  another name, or `hf auth login`
    token refused       `hf auth login` again
    offline             a folder, or a connection; what is in the cache is used without one

The hub is asked with a time limit before anything is downloaded, since its client would wait without one.
"""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from relora.errors import UserError
from relora.messages import first_line

TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
"""Patterns of a tokenizer's files; `*` stands for folders, too, so `additional_chat_templates` are among them."""
MODEL_FILES = (*TOKENIZER_FILES, "model*.safetensors")
"""Patterns of the files of a model with its tokenizer."""
CODE_FILES = ("*.py",)
"""Patterns of the code that comes with a model."""

SECONDS = 10.0
"""Longest time to wait for the hub's first answer."""

_UNAUTHORIZED = 401


def hub_folder(name: str, kind: str, patterns: Sequence[str], *, revision: str | None = None) -> Path:
    """Download the files of a hub repository that match `patterns`, unless the cache has them; return their folder.

    Args:
        name: hub id.
        kind: what the repository is to hold, for messages: `model` or `tokenizer`.
        revision: branch, tag or commit; by default the main branch.

    Raises:
        UserError: the hub does not give the files, and the cache does not have them.
    """
    try:
        HfApi().model_info(name, revision=revision, timeout=SECONDS)
    except Exception as error:  # of any type: the hub's client and the network raise many
        return _cached(name, kind, patterns, revision, error)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), etag_timeout=SECONDS))
    except Exception as error:  # likewise
        raise UserError(f"{name}: {refusal(error, name, kind)}") from None


def refusal(error: BaseException, name: str, kind: str, what: str = "folder") -> str:
    """Say why the hub did not give a repository, and what would mend it.

    Args:
        error: what the hub's client raised, or a library that uses it.
        name: hub id.
        kind: what the repository was to hold: `model`, `tokenizer` or `dataset`.
        what: what the name could have been on this machine.
    """
    causes = list(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if get_token() is None:
            return f"gated on the hub; accept its terms at {page}, then log in with `hf auth login`"
        return f"gated on the hub, and the account that is logged in has no access; accept its terms at {page}"
    if any(isinstance(cause, HFValidationError) for cause in causes):
        return f"no such {what} (and no hub id is written like that)"
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return "the hub has no such revision of it"
    answers = [cause for cause in causes if isinstance(cause, HfHubHTTPError) and cause.response is not None]
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"no such {what}, and the hub has no {kind} of that name; for a private one log in with `hf auth login`"
    if answers and answers[0].response.status_code == _UNAUTHORIZED:
        return f"no such {what}, and the hub refuses the token that is saved here; log in with `hf auth login`"
    if answers:
        return f"no such {what}, and the hub's answer was {answers[0].response.status_code} ({_line(answers[0])})"
    offline = any(isinstance(cause, OfflineModeIsEnabled) for cause in causes)
    reached = "was not asked (HF_HUB_OFFLINE is set)" if offline else f"cannot be reached ({_line(causes[-1])})"
    return f"no such {what}; the hub {reached}, and its cache on this machine has no such {kind}"


def _cached(name: str, kind: str, patterns: Sequence[str], revision: str | None, error: Exception) -> Path:
    """Return the folder of a repository in the cache; `UserError` with the reason in `error` if it is not there."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), local_files_only=True))
    except IncompleteSnapshotError:
        raise UserError(
            f"{name}: the hub's cache on this machine has only some of its files, and the hub gave no others "
            f"({_line(error)})"
        ) from None
    except (LocalEntryNotFoundError, HFValidationError):
        raise UserError(f"{name}: {refusal(error, name, kind)}") from None


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error and the errors that it was raised from, outermost first."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found


def _line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has no message."""
    return first_line(str(error)) or type(error).__name__
