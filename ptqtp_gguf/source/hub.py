"""Ids of the Hugging Face Hub: downloads what a conversion needs of a model, or a data set's text. The only importer of
huggingface_hub."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError

# of the top folder only: weights, what the tokenizer is made of, and the card, which names the model in the metadata
COMMON = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "README.md"]
WEIGHTS, OLD_WEIGHTS = ["*.safetensors"], ["pytorch_model*.bin"]
LEFT_OUT = ["*/*", "consolidated*", "adapter_model*"]
ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


ABOUT = {  # files of a data set that are not its data
    *("readme.txt", "license.txt", "requirements.txt"),
    *("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"),
}


def looks_like_id(text: str) -> bool:
    """True for "org/name" where no file or folder has that name."""
    return bool(ID.fullmatch(text)) and len(text) <= 96 and not os.path.lexists(text)


def fetch(
    repo_id: str, revision: str | None = None, log: Callable[[str], None] = lambda _: None, quiet: bool = False
) -> Path:
    """Download a model into the Hub's cache, or find it there; what is there already is not loaded again.

    revision  branch, tag or commit; None = main
    quiet     without huggingface_hub's own progress bars on standard error
    Returns the folder of the snapshot.
    Raises InputError with the way out: unknown, gated, offline, no such revision, disk full.
    """
    with _explained(repo_id, revision, "model", quiet) as where:
        log(where)
        folder = _snapshot(repo_id, revision, [*COMMON, *WEIGHTS])
        if not any(folder.glob("*.safetensors")):
            folder = _snapshot(repo_id, revision, [*COMMON, *OLD_WEIGHTS])
        return folder
    raise AssertionError  # _explained lets every error through


def fetch_data(repo_id: str, suffixes: tuple[str, ...], log: Callable[[str], None] = lambda _: None) -> Path:
    """Download one file of a data set into the Hub's cache, or find it there: the first by name of those that end so;
    one for training before others. Raises InputError.
    """
    with _explained(repo_id, None, "data set", False) as where:
        from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

        if constants.HF_HUB_OFFLINE:
            folder = Path(snapshot_download(repo_id, repo_type="dataset"))
            files = [p.relative_to(folder).as_posix() for p in folder.rglob("*")]
        else:
            files = HfApi().list_repo_files(repo_id, repo_type="dataset")
        files = [f for f in files if f.endswith(suffixes) and f.lower().rpartition("/")[2] not in ABOUT]
        if not files:
            raise InputError(
                f"{repo_id}: this data set has no file that ends in {', '.join(suffixes)}; give a local file"
            )
        chosen = min(files, key=lambda f: ("train" not in f.lower(), f))
        log(f"{where}: {chosen}")
        return Path(hf_hub_download(repo_id, chosen, repo_type="dataset"))
    raise AssertionError  # _explained lets every error through


@contextlib.contextmanager
def _explained(repo_id: str, revision: str | None, what: str, quiet: bool) -> Iterator[str]:
    """Errors of huggingface_hub about a model or data set as InputError; gives what is loaded, from where, to where."""
    try:
        from huggingface_hub import constants, errors
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise InputError(
            f"{repo_id}: downloading needs huggingface_hub; pip install huggingface_hub, or give a local folder"
        ) from None
    if quiet:
        disable_progress_bars()
    at = f"{repo_id} (revision {revision})" if revision else repo_id
    where = constants.ENDPOINT
    page = f"{where}/{repo_id}" if what == "model" else f"{where}/datasets/{repo_id}"
    try:
        yield f"{at}: from {where}, into {constants.HF_HUB_CACHE}"
    except errors.HFValidationError:
        raise InputError(f"{repo_id!r} is not a model id of the form org/name, nor a local folder") from None
    except errors.GatedRepoError:
        raise InputError(
            f"{at}: access is gated; accept its terms at {page}, then set HF_TOKEN to a token of yours"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{at}: no such {what} on {where}, or a private one, and no local folder of that name; "
            "check the name, or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{repo_id}: no revision {revision or 'main'} on {where}") from None
    except errors.LocalEntryNotFoundError as e:
        raise InputError(f"{at}: {_unreachable(constants, where, e)}") from None
    except errors.HfHubHTTPError as e:
        raise InputError(f"{at}: {_refused(where, e)}") from None
    except (getattr(errors, "HTTPError", OSError), OSError) as e:  # the transport's own errors are HTTPErrors
        if getattr(e, "errno", None) == errno.ENOSPC:
            raise InputError(
                f"{at}: the disk is full at {constants.HF_HUB_CACHE}; set HF_HOME to a folder with more room"
            ) from None
        raise InputError(f"{at}: the download from {where} broke off ({_text(e)}); run again to resume") from None


def _snapshot(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    found = snapshot_download(repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=LEFT_OUT)
    return Path(found)


def _unreachable(constants: Any, where: str, e: BaseException) -> str:
    if constants.HF_HUB_OFFLINE:
        return "not, or not wholly, in the cache, and HF_HUB_OFFLINE is set; unset it, or give a local folder"
    if getattr(e.__cause__, "response", None) is not None:
        return _refused(where, e.__cause__)
    why = f" ({_text(e.__cause__)})" if e.__cause__ else ""
    return f"{where} cannot be reached{why} and the cache does not hold it; try again, or give a local folder"


def _refused(where: str, e: Any) -> str:
    status = e.response.status_code
    if status in (401, 403):
        return f"{where} refuses access ({status}); set HF_TOKEN to a token that may read it"
    return f"{where} answers with the status {status}; try again later, or give a local folder"


def _text(e: BaseException) -> str:
    return (" ".join(str(e).split()) or type(e).__name__)[:300]
