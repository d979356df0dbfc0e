"""Files that lie elsewhere: gs://BUCKET/NAME and the other addresses that fsspec opens.

1. `path` turns a place to write to into a path with pathlib's methods, here or there.
2. `local` fetches a file, or a directory, into a cache on this machine's disk, whole or not at all.
3. `Uploads` keeps whole copies of growing local files in a remote directory: objects cannot be appended to.

Cached copies lie in $COOPER_CACHE, or ~/.cache/cooper_jax/files.  A copy's name depends on the address and on what
the store says of its version, so that one that is in use never changes; delete the directory to free the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

# Otherwise a listing is kept for good, and what another host writes is never seen.
for _scheme in ("gs", "gcs", "s3", "az"):
    fsspec.config.conf.setdefault(_scheme, {}).setdefault("use_listings_cache", False)

_VERSION = (
    "size",
    "etag",
    "ETag",
    "generation",
    "md5Hash",
    "mtime",
    "updated",
    "LastModified",
    "last_modified",
)


def is_remote(place: str | os.PathLike) -> bool:
    """Whether a place is an address (SCHEME://...), not a path on this machine."""
    return re.match(r"[a-z][a-z0-9+.-]*://", os.fspath(place)) is not None


def to_path(place: str | os.PathLike) -> Path | epath.Path:
    """A place to write to: an absolute path here, or a gs:// path.

    Raises ValueError for another kind of address, and where the package that opens it is missing.
    """
    if not is_remote(place):
        return Path(place).expanduser().absolute()
    text = os.fspath(place).rstrip("/")
    if not text.startswith("gs://"):  # the one kind that TensorStore, which writes checkpoints, is told of
        raise ValueError(f"{text}: a run can be kept on a local path or under gs://BUCKET/NAME alone")
    _open(text)
    return epath.Path(text)


def write_atomically(path: Path | epath.Path, data: bytes) -> None:
    """Replace a file in one step: a reader, or a kill, sees the old contents or the new."""
    if is_remote(path):
        path.write_bytes(data)  # an object appears when it is whole
        return
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def cache_dir() -> Path:
    """Where copies are kept."""
    return Path(os.environ.get("COOPER_CACHE") or "~/.cache/cooper_jax/files").expanduser().absolute()


def staging_dir(remote: epath.Path) -> Path:
    """Where files for a remote directory are written first, on this machine's disk."""
    return cache_dir() / "staging" / hashlib.sha256(os.fspath(remote).encode()).hexdigest()[:20]


def download_file(remote: epath.Path, target: Path) -> None:
    """Make a local file like the remote one; where there is none, there is none here either."""
    fs, place = _open(os.fspath(remote))
    new = target.with_name(target.name + ".new")
    with _reaching(os.fspath(remote)):
        if not fs.exists(place):
            target.unlink(missing_ok=True)
            return
        fs.get_file(place, str(new))
    os.replace(new, target)


def move_files(source: epath.Path, target: epath.Path) -> None:
    """Move a remote directory's files, one by one: stores copy on their side, and know no renames."""
    fs, root = _open(os.fspath(source))
    _, place = _open(os.fspath(target))
    with _reaching(os.fspath(source)):
        for name in fs.find(root):
            fs.cp_file(name, f"{place}/{name.removeprefix(root).lstrip('/')}")
        fs.rm(root, recursive=True)


def fetch_local(source: str | os.PathLike, patterns: Sequence[str] = ("*",)) -> Path:
    """A path on this machine's disk: `source` itself, or a copy of the file or directory at an address.

    patterns: which files of a directory are wanted, by their names.  A copy is used again while the store gives
    the same size and version (etag, generation, time of change).  Processes of one machine share it, and wait for
    the one that fetches.  Raises FileNotFoundError, OSError (access, connection) or ValueError, naming the address.
    """
    if not is_remote(source):
        return Path(source).expanduser()
    source = os.fspath(source).rstrip("/")
    fs, root = _open(source)
    with _reaching(source):
        info = fs.info(root)
        if info["type"] == "directory":
            found = {name: x for name, x in fs.find(root, detail=True).items() if x["type"] == "file"}
            found = {n: x for n, x in found.items() if _wanted(n, patterns)}
        else:
            found = {root: info}
    if not found:
        raise FileNotFoundError(f"{source}: there is no file in it, or none called {' or '.join(patterns)}")
    stored = {n.removeprefix(root).lstrip("/"): _version(x) for n, x in found.items()}
    known = all(version is not None for version in stored.values())
    text = json.dumps([source, stored if known else None, sorted(patterns)], sort_keys=True)
    name = source.rsplit("/", 1)[1]
    entry = cache_dir() / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}"
    place = entry / name
    if known and entry.exists():
        return place
    entry.parent.mkdir(parents=True, exist_ok=True)
    with _alone(entry.with_name(entry.name + ".lock")):
        if known and entry.exists():
            return place
        new, old = (entry.with_name(f"{entry.name}.{kind}") for kind in ("new", "old"))
        for left in (new, old):  # by a kill
            shutil.rmtree(left, ignore_errors=True)
        for remote, x in found.items():
            relative = remote.removeprefix(root).lstrip("/")
            target = new / name / relative if relative else new / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with _reaching(source):
                fs.get_file(remote, str(target))
            if target.stat().st_size != x["size"]:
                raise OSError(
                    f"{source}: {relative or name} came as {target.stat().st_size} of {x['size']} bytes"
                )
        if entry.exists():
            entry.rename(old)
        new.rename(entry)
        shutil.rmtree(old, ignore_errors=True)
    return place


def _wanted(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name.rsplit("/", 1)[1], p) for p in patterns)


def _version(info: dict[str, Any]) -> dict[str, str] | None:
    """What tells one version of a file from another; None where the store says no more than its size."""
    found = {key: str(info[key]) for key in _VERSION if info.get(key) is not None}
    return found if len(found) > 1 else None


def _open(source: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of an address, and the path in it.  Raises ValueError where there is none."""
    try:
        return fsspec.url_to_fs(source)
    except ImportError as error:
        fix = "install what it names"
        if source.startswith(("gs://", "gcs://")):
            fix = "pip install gcsfs, or pip install 'cooper-jax[gcs]'"
        raise ValueError(f"{source}: a package that opens it is missing ({error}): {fix}") from error
    except ValueError as error:
        raise ValueError(f"{source}: no such kind of address ({error}): gs://BUCKET/NAME is one") from error


@contextlib.contextmanager
def _reaching(source: str) -> Iterator[None]:
    """Turn what a store's library raises into one OSError that says what was wanted."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{source}: there is no such file or directory; check the spelling"
        ) from error
    except Exception as error:  # each store has kinds of its own: credentials, permissions, network
        said = (str(error).splitlines() or ["no message"])[0][:300]
        raise OSError(
            f"{source} cannot be reached ({type(error).__name__}: {said}): see that this machine's account has "
            "access (gs://: `gcloud auth application-default login`, or the VM's service account and its scopes)"
        ) from error


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of this machine at a time; the lock ends with its process."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class Uploads:
    """Whole copies of the growing files of a local folder, in a remote one.

    A thread of its own uploads them, one file at a time, so that a slow one holds nobody up: what changed in the
    meantime goes with the next.  A file is uploaded as far as it had got when `changed` was called, and thus in
    whole lines.  It goes whole each time: a file of 1 GB costs 1 GB, at most as often as the last upload took.
    """

    def __init__(self, folder: Path, remote: epath.Path):
        self.folder, self.remote = folder, remote
        self._fs, self._root = _open(os.fspath(remote))
        self._due: dict[str, int] = {}  # name -> bytes that are to be there
        self._busy = False
        self._closed = False
        self._stuck = False
        self._error: Exception | None = None
        self._state = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def changed(self, *names: str) -> None:
        """Files, by their paths in the folder, have grown.  Raises what went wrong in an earlier upload."""
        sizes = {name: (self.folder / name).stat().st_size for name in names}
        with self._state:
            self._go_on()
            self._due |= sizes
            self._state.notify_all()

    def flush(self) -> None:
        """Until all that was said to have changed is there; raises OSError for what could not be uploaded.

        Such files stay due: another call tries again.
        """
        with self._state:
            self._go_on()
            self._state.wait_for(lambda: self._error is not None or not (self._due or self._busy))
            self._raise()

    def close(self) -> None:
        """`flush`, and end the thread whatever comes of it."""
        try:
            if not self._closed:
                self.flush()
        finally:
            with self._state:
                self._closed = True
                self._state.notify_all()
            self._thread.join()

    def _go_on(self) -> None:
        self._raise()
        self._stuck = False
        self._state.notify_all()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise OSError(f"{error}; what was to be there is in {self.folder}") from error

    def _work(self) -> None:
        while True:
            with self._state:
                # After an error nothing goes until somebody has heard of it and calls again.
                self._state.wait_for(lambda: self._closed or (self._due and not self._stuck))
                if self._closed:
                    return
                name, size = next(iter(self._due.items()))
                del self._due[name]
                self._busy = True
            error = None
            try:
                self._upload(name, size)
            except Exception as raised:
                error = raised
            with self._state:
                self._busy = False
                if error is not None:
                    self._error, self._stuck = error, True
                    self._due.setdefault(name, size)
                self._state.notify_all()

    def _upload(self, name: str, size: int) -> None:
        # From a copy: it does not grow, and a failure to read it leaves no half object behind.
        copy = self.folder / ".uploading"
        with open(self.folder / name, "rb") as source, open(copy, "wb") as target:
            left = size
            while left and (block := source.read(min(left, 1 << 20))):
                target.write(block)
                left -= len(block)
        with _reaching(f"{self.remote}/{name}"):
            self._fs.put_file(str(copy), f"{self._root}/{name}")
        copy.unlink()
