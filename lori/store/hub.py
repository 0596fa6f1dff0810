"""Adapters from a local folder or the Hugging Face hub, and checks for base models on the hub.

transformers downloads the base models.
"""

import re
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's, some of which huggingface_hub lets through
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lori.config import CONFIG_FILE
from lori.errors import AdapterError, ModelError, UnreachableError
from lori.format import CARD_FILE, PICKLE_FILE, WEIGHTS_FILE
from lori.peft.config import TEMPLATES_FILE
from lori.prompt_statistics import STATISTICS_FILE

SCHEME = "hf://"
SOURCE = re.compile(SCHEME + r"(?P<id>[^/@]+/[^/@]+)(@(?P<revision>[\w][\w./-]*))?")
MODEL_CONFIG = "config.json"
FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, STATISTICS_FILE, TEMPLATES_FILE)
"""The only files that are downloaded; never a pickle."""


def resolve(source: str) -> Path:
    """Return the folder of `source`: a path, or `hf://owner/name[@revision]`, which is downloaded unless it is cached.

    A LoRI adapter on an explicit basis cannot come from the hub, since its A is in a store. Raises `AdapterError`, with a remedy,
    if there is no such adapter; `UnreachableError` if the hub cannot be reached just now.
    """
    if source.startswith(SCHEME):
        return _fetch(source)
    folder = Path(source).expanduser()
    if not source or not folder.is_dir():  # "" would be the current folder
        raise AdapterError(f"there is no folder {source!r}: expected one, or {SCHEME}owner/name[@revision]")
    return folder


def name_in(source: str) -> str:
    """Return the default name of an adapter from `source`: the last part of the path or of the hub id."""
    path = source.removeprefix(SCHEME).partition("@")[0] if source.startswith(SCHEME) else Path(source).absolute().name
    return path.rpartition("/")[2].partition("@")[0].lower()


def check_model(name: str) -> None:
    """Ask the hub once for a base model that is not cached. A loader would retry for a minute and print each failure.

    Raises `ModelError` if there is no such model, or the hub cannot be reached.
    """
    prefix = f"cannot load the base model {name!r}: "
    try:
        if try_to_load_from_cache(name, MODEL_CONFIG) is None:
            get_hf_file_metadata(hf_hub_url(name, MODEL_CONFIG))
    except HFValidationError as error:
        raise ModelError(f"{prefix}there is no such folder, and it is no hub id, owner/name") from error
    except GatedRepoError as error:
        raise ModelError(f"{prefix}it is gated: ask for access on the hub, then log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        login = "if it is yours and private, log in with `hf auth login`"
        raise ModelError(f"{prefix}there is no such folder, and the hub has no such model: {login}") from error
    except EntryNotFoundError as error:
        raise ModelError(f"{prefix}the hub's has no {MODEL_CONFIG}") from error
    except HfHubHTTPError:  # the hub is busy, and the loader will retry
        return
    except (OfflineModeIsEnabled, HTTPError) as error:
        reason = f"there is no such folder, it was not fetched before, and the hub cannot be reached ({_text(error)})"
        remedy = "connect (HF_HUB_OFFLINE must not be set), or download it elsewhere and pass the folder as --model"
        raise ModelError(f"{prefix}{reason}: {remedy}") from error


def _fetch(source: str) -> Path:
    match = SOURCE.fullmatch(source)
    if match is None or ".." in source:
        raise AdapterError(f"{source!r} is malformed, expected {SCHEME}owner/name[@revision]")
    repo, revision = match["id"], match["revision"]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(FILES)))
    except HFValidationError as error:
        raise AdapterError(f"{source!r} is malformed, expected {SCHEME}owner/name[@revision]: {error}") from error
    except GatedRepoError as error:
        raise AdapterError(f"{source} is gated: ask for access on the hub, then log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise AdapterError(f"the hub has no {repo}, or it is private: if it is yours, log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise AdapterError(f"{repo} has no revision {revision!r}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise _unreachable(repo, error) from error
    except HfHubHTTPError as error:
        raise AdapterError(f"{source} cannot be fetched: {_text(error)}") from error
    except OSError as error:  # the message leaves out the local path in the error
        reason = f"cannot be kept here: {error.strerror}" if error.strerror else "could not be fetched whole"
        raise UnreachableError(f"{source} {reason}") from error
    except HTTPError as error:
        raise _unreachable(repo, error) from error
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterError(f"{source} is not an adapter: it has no {CONFIG_FILE}")
    if not (folder / WEIGHTS_FILE).is_file():
        note = f"{PICKLE_FILE}, which it may have, is a pickle, which can run any code and is never read"
        raise AdapterError(f"{source} cannot be imported: it has no {WEIGHTS_FILE}; {note}")
    return folder


def _unreachable(repo: str, error: Exception) -> UnreachableError:
    return UnreachableError(
        f"the hub cannot be reached for {repo}: connect (HF_HUB_OFFLINE must not be set), "
        f"or download it elsewhere and pass the folder ({_text(error.__cause__ or error)})"
    )


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())
