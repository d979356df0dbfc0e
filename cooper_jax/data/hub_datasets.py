"""Data sets of the Hugging Face hub: their files, in the hub's cache on this machine.

1. `parse_id` reads OWNER/NAME[@REVISION][:CONFIG[:SPLIT]], and hf://datasets/OWNER/NAME[@REVISION]/FILE, whose
   FILE may be a glob.
2. `fetch_files` finds the commit of the revision, chooses the files of config and split by the data set's card
   or by their names (dataset_files.py), and downloads those that are not in the cache.
3. Without a network the cache is used, if it has all files.

Only files of rows are read.  No code of a data set is downloaded or executed.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cooper_jax.data import dataset_files

_PART = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"({_PART}/{_PART})(?:@([\w.-]+))?(?::([^:/]+(?::[^:/]+)?))?")
_ADDRESS = re.compile(
    rf"hf://datasets/({_PART}/{_PART})(?:@([\w.-]+))?(?:/([^:]+?))?(?::([^:/]+(?::[^:/]+)?))?"
)


class HubId(NamedTuple):
    """A data set of the hub, or files of it."""

    repo: str  # OWNER/NAME
    revision: str = ""  # a branch, tag or commit; "" is the main branch
    path: str = ""  # a file or a glob in the data set
    config: str = ""
    split: str = ""


def parse_id(text: str) -> HubId | None:
    """Parse the text of a hub data set; None if it is not of this form.

    OWNER/NAME that ends like a data file is taken for a path.  Whether such a path exists is not checked.
    """
    if match := _ADDRESS.fullmatch(text):
        repo, revision, path, choice = match.groups()
    elif match := _ID.fullmatch(text):
        repo, revision, choice = match.groups()
        path = ""
        if repo.endswith(dataset_files.ALL_SUFFIXES):
            return None
    else:
        return None
    return HubId(repo, revision or "", path or "", *dataset_files.split_choice(choice or ""))


def find_commit(hub_id: HubId) -> str:
    """The commit of a data set's revision: the hub's or, without a network, that in the cache.

    Raises ValueError if neither knows it.
    """
    return _fetch_card(hub_id, hub_id.revision).name


def fetch_files(hub_id: HubId, default_split: str, revision: str = "") -> tuple[dict[str, Path], str]:
    """Fetch the files of a data set: ({path in the data set: local path}, commit).

    Args:
      default_split: the split that is read if `hub_id` names none.
      revision: takes precedence over that of `hub_id`.

    Raises ValueError if the data set or a file is neither in the cache nor on the hub.
    """
    import huggingface_hub

    folder = _fetch_card(hub_id, revision or hub_id.revision)
    names, complete = _list_files(hub_id, folder)
    try:
        chosen = _choose(hub_id, names, folder, default_split)
    except ValueError as error:
        if complete:
            raise
        raise ValueError(
            f"{error} (without a network only the files in the hub's cache are known)"
        ) from error

    # Brackets in a name would be read as a pattern; data sets have none.
    with _wrap_hub_errors(hub_id):
        huggingface_hub.snapshot_download(
            hub_id.repo, repo_type="dataset", revision=folder.name, allow_patterns=chosen
        )
    if missing := [name for name in chosen if not (folder / name).is_file()]:
        raise ValueError(
            f"{hub_id.repo}: {missing[0]} is not in the hub's cache, and there is no network: start once where "
            "there is one, or give a folder with the files"
        )
    return {name: folder / name for name in chosen}, folder.name


def _choose(hub_id: HubId, names: list[str], folder: Path, default_split: str) -> list[str]:
    """Choose the files of a data set: those of its path, or those of its config and split."""
    if not hub_id.path:
        return dataset_files.choose_files(
            names,
            dataset_files.read_card(folder),
            hub_id.repo,
            hub_id.config,
            hub_id.split,
            default_split,
        )
    chosen = sorted(fnmatch.filter(names, hub_id.path))
    if not chosen:
        raise ValueError(f"{hub_id.repo}@{folder.name[:8]}: there is no file {hub_id.path} in it")
    return chosen


def _fetch_card(hub_id: HubId, revision: str) -> Path:
    """Fetch the card of a data set, and return the folder of its commit in the hub's cache."""
    import huggingface_hub

    with _wrap_hub_errors(hub_id):
        return Path(
            huggingface_hub.snapshot_download(
                hub_id.repo,
                repo_type="dataset",
                revision=revision or None,
                allow_patterns=[dataset_files.CARD],
            )
        )


def _list_files(hub_id: HubId, folder: Path) -> tuple[list[str], bool]:
    """List the files of a commit: (all of them, True) or, without a network, (those in the cache, False)."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    with _wrap_hub_errors(hub_id):
        try:
            api = huggingface_hub.HfApi()
            return api.list_repo_files(hub_id.repo, repo_type="dataset", revision=folder.name), True
        except HfHubHTTPError:  # the hub answers, and refuses
            raise
        except Exception:  # offline, by choice or not: the types depend on the library's version
            return [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()], False


@contextlib.contextmanager
def _wrap_hub_errors(hub_id: HubId) -> Iterator[None]:
    """Turn errors of the hub's library into a ValueError that names the data set and the fix."""
    try:
        yield
    except Exception as error:  # many types: offline, unknown, gated, ...
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise ValueError(
            f"{hub_id.repo}: no such file or folder, and the data set could not be downloaded from the Hugging "
            f"Face hub ({type(error).__name__}: {reason}); check the spelling and, for a gated data set, "
            "`hf auth login`; or download it where there is a network and give the folder"
        ) from error
