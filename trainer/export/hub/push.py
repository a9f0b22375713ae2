"""Uploading an export to the Hugging Face hub.

The token is the one that huggingface_hub finds: HF_TOKEN, or what `hf auth login` has stored. No message repeats it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session, httpx, validate_repo_id

from trainer.common.credentials import HIDDEN
from trainer.common.errors import Unavailable, UserError, short_line

_ANSWER_SECONDS = 120.0
"""Longest wait for an answer of the hub; without one the library would wait for ever."""
_WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]


def check_push(repo: str) -> None:
    """Check, before an export is made, that it can be pushed: the name, and the token by asking the hub whose it is.

    Raises:
        UserError: The name is none, there is no token, or the hub does not accept it.
        Unavailable: The hub cannot be reached.
    """
    try:
        validate_repo_id(repo)
        if "/" not in repo:
            raise HFValidationError("the owner is missing")
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repo}: must be OWNER/NAME ({short_line(error)})") from None
    with _reported(repo, ""):
        if get_token() is None:
            raise UserError(
                f"--push-to-hub {repo}: there is no token; set HF_TOKEN to one that may write, or run `hf auth login`"
            )
        HfApi().whoami()


def push(folder: Path, repo: str, private: bool, message: str) -> str:
    """Upload a folder to the model repository `repo`, which is created if needed; return its address.

    Files of weights that are there and not in the folder are removed, because they would be loaded with the new ones.

    Args:
        private: Whether only its owner may see it; otherwise that is the owner's default, and a repository that exists
            stays as it is.
        message: The message of the commit.

    Raises:
        UserError: The hub refuses it, or the repository exists and is public although `private`.
        Unavailable: The hub cannot be reached.
    """
    api = HfApi()
    again = f"hf upload {repo} {quote(str(folder))}{' --private' if private else ''}"
    with _reported(repo, f"; the export itself is complete, and the command `{again}` uploads it"):
        url = str(api.create_repo(repo, private=private or None, exist_ok=True))
        if private and not api.model_info(repo).private:
            raise UserError(
                f"--push-to-hub {repo}: the repository exists and is public, but --private was given; nothing was "
                "uploaded"
            )
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=list(_WEIGHTS))
    return url


@contextmanager
def _reported(repo: str, advice: str) -> Iterator[None]:
    """Report an error of the hub's library, or that the hub does not answer, in one line.

    Args:
        advice: The end of the line.
    """
    session = get_session()
    before, session.timeout = session.timeout, httpx.Timeout(_ANSWER_SECONDS)
    try:
        yield
    except OfflineModeIsEnabled:
        raise UserError(f"--push-to-hub {repo}: HF_HUB_OFFLINE is set; unset it{advice}") from None
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        kind, what = _meaning(error)
        raise kind(f"--push-to-hub {repo}: {what}{advice}") from None
    finally:
        session.timeout = before


def _meaning(error: Exception) -> tuple[type[UserError], str]:
    """What an error of the hub's library means to the user."""
    answer = _caused_by(error, HfHubHTTPError)
    if answer is None and (reason := _caused_by(error, httpx.HTTPError, ConnectionError, TimeoutError)):
        return Unavailable, f"the hub cannot be reached ({type(reason).__name__}); try again later"
    if answer is None:
        return UserError, f"the upload was refused ({_without_token(short_line(error))})"
    status, reason = answer.response.status_code, short_line(answer.server_message or answer)
    if error is not answer:  # which says at which file it was
        reason = short_line(error) if isinstance(error, ValueError) else f"{short_line(error)}: {reason}"
    reason = _without_token(reason)
    if status == 401:
        return UserError, "the hub does not accept the token; set HF_TOKEN to another, or run `hf auth login`"
    if status == 403:
        return UserError, f"the token has no right to write there ({reason}); use one that has"
    if status >= 500 or status == 429:
        return Unavailable, f"the hub has failed with status {status} ({reason}); try again later"
    return UserError, f"the hub refused it with status {status} ({reason})"


def _caused_by(error: BaseException | None, *kinds: type[BaseException]) -> Any:
    """The first cause of one of these kinds: threads of an upload wrap errors. None if there is none."""
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__
    return error


def _without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, HIDDEN) if token else text
