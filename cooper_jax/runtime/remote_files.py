"""Remote files: gs://BUCKET/NAME, and the other addresses that fsspec can open.

1. `to_path` converts a local path or gs:// address to an object with pathlib's methods.
2. `fetch_local` downloads a file or a directory into a cache on this machine's disk, completely or not at
   all.
3. `Uploads` keeps copies of growing local files in a remote directory.  Whole files are uploaded, because
   nothing can be appended to an object.

The cache is $COOPER_CACHE, or ~/.cache/cooper_jax/files.  A copy's name depends on the address and on the
version that the store reports, so a copy in use never changes.  The cache may be deleted to free disk space.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

# Otherwise fsspec caches listings forever, and files written by another host are never seen.
for _scheme in ("gs", "gcs", "s3", "az"):
    fsspec.config.conf.setdefault(_scheme, {}).setdefault("use_listings_cache", False)

# Fields of a store's file information that identify a version.
_VERSION_FIELDS = (
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
    """Tell whether a place is an address (SCHEME://...) and not a path on this machine."""
    return re.match(r"[a-z][a-z0-9+.-]*://", os.fspath(place)) is not None


def to_path(place: str | os.PathLike) -> Path | epath.Path:
    """Convert a place to write to into an absolute local path, or a gs:// path.

    Raises ValueError for another kind of address, and if the package that opens it is not installed.
    """
    if not is_remote(place):
        return Path(place).expanduser().absolute()

    # Orbax writes checkpoints with TensorStore, which is set up here for no other store.
    text = os.fspath(place).rstrip("/")
    if not text.startswith("gs://"):
        raise ValueError(f"{text}: a run can be kept on a local path or under gs://BUCKET/NAME only")
    _open(text)  # raises if the package for gs:// is missing
    return epath.Path(text)


def write_atomically(path: Path | epath.Path, data: bytes) -> None:
    """Replace a file atomically: readers see the old or the new contents, and SIGKILL leaves one of them.

    Raises OSError, naming the file, if the disk is full; the old contents stay.
    """
    # Stores make an object visible when it is complete.
    if is_remote(path):
        path.write_bytes(data)
        return

    # The data must be on the disk before the new name is: after a crash of the machine, some file systems
    # would otherwise show an empty file.
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # The half of a file must not take the room that is missing.
        new.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"{error.strerror}: fix that, and start the same command again", str(path)
        ) from error
    os.replace(new, path)


def cache_dir() -> Path:
    """Return the directory of cached copies."""
    return Path(os.environ.get("COOPER_CACHE") or "~/.cache/cooper_jax/files").expanduser().absolute()


def staging_dir(remote: epath.Path) -> Path:
    """Return the local directory in which files for a remote directory are written before the upload."""
    return cache_dir() / "staging" / hashlib.sha256(os.fspath(remote).encode()).hexdigest()[:20]


def download_file(remote: epath.Path, target: Path) -> None:
    """Make a local file equal to the remote one; without a remote file, delete the local one."""
    # Under another name first, so that an interrupted download leaves the old file.
    fs, remote_path = _open(os.fspath(remote))
    new = target.with_name(target.name + ".new")
    with _wrap_store_errors(os.fspath(remote)):
        if not fs.exists(remote_path):
            target.unlink(missing_ok=True)
            return
        fs.get_file(remote_path, str(new))
    os.replace(new, target)


def move_files(source: epath.Path, target: epath.Path) -> None:
    """Move a remote directory file by file: object stores can copy, but not rename."""
    # All copies are made before anything is deleted.
    fs, source_root = _open(os.fspath(source))
    _, target_root = _open(os.fspath(target))
    with _wrap_store_errors(os.fspath(source)):
        for name in fs.find(source_root):
            fs.cp_file(name, f"{target_root}/{name.removeprefix(source_root).lstrip('/')}")
        fs.rm(source_root, recursive=True)


def fetch_local(source: str | os.PathLike, patterns: Sequence[str] = ("*",)) -> Path:
    """Return a local path: of `source` itself, or of a cached copy of the file or directory at an address.

    A copy is used again while the store reports the same size and version (etag, generation, time of change).
    Processes of one machine share the copy: one downloads it, and the others wait.

    Args:
      patterns: selects files of a directory by their names.

    Raises FileNotFoundError, OSError (access, connection) or ValueError, naming the address.
    """
    if not is_remote(source):
        return Path(source).expanduser()
    source = os.fspath(source).rstrip("/")
    fs, root = _open(source)
    files = _list_files(fs, source, root, patterns)

    # The copy's name depends on all versions.  If the store reports no versions, a copy may be outdated:
    # download again.
    versions = {_relative_name(name, root): _version(info) for name, info in files.items()}
    has_versions = all(version is not None for version in versions.values())
    identity = json.dumps([source, versions if has_versions else None, sorted(patterns)], sort_keys=True)
    entry = cache_dir() / f"{hashlib.sha256(identity.encode()).hexdigest()[:20]}"
    copy = entry / source.rsplit("/", 1)[1]
    if has_versions and entry.exists():
        return copy

    entry.parent.mkdir(parents=True, exist_ok=True)
    with _lock_file(entry.with_name(entry.name + ".lock")):
        # Another process may have downloaded it in the meantime.
        if has_versions and entry.exists():
            return copy

        # Remove what a killed process left behind.
        new, old = (entry.with_name(f"{entry.name}.{kind}") for kind in ("new", "old"))
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)

        # Some libraries end a broken download without an error, so compare sizes.
        for name, info in files.items():
            relative = _relative_name(name, root)
            target = new / copy.name / relative if relative else new / copy.name
            target.parent.mkdir(parents=True, exist_ok=True)
            with _wrap_store_errors(source):
                fs.get_file(name, str(target))
            size = target.stat().st_size
            if size != info["size"]:
                raise OSError(f"{source}: {relative or copy.name} came as {size} of {info['size']} bytes")

        # Only a complete copy gets the final name.  An outdated one exists here if there are no versions.
        if entry.exists():
            entry.rename(old)
        new.rename(entry)
        shutil.rmtree(old, ignore_errors=True)
    return copy


def _list_files(
    fs: fsspec.AbstractFileSystem, source: str, root: str, patterns: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """List the file at `root`, or the matching files in that directory: file name -> file information."""
    with _wrap_store_errors(source):
        info = fs.info(root)
        if info["type"] != "directory":
            return {root: info}
        entries = fs.find(root, detail=True)
    files = {n: x for n, x in entries.items() if x["type"] == "file" and _matches(n, patterns)}
    if not files:
        raise FileNotFoundError(f"{source}: there is no file in it, or none called {' or '.join(patterns)}")
    return files


def _relative_name(name: str, root: str) -> str:
    """Return a file's name relative to the directory `root`; "" for `root` itself."""
    return name.removeprefix(root).lstrip("/")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name.rsplit("/", 1)[1], p) for p in patterns)


def _version(info: dict[str, Any]) -> dict[str, str] | None:
    """Return the fields that identify a file's version; None if the store reports only its size."""
    # Every store has other fields; `size` is in all of them.
    fields = {key: str(info[key]) for key in _VERSION_FIELDS if info.get(key) is not None}
    return fields if len(fields) > 1 else None


def _open(source: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of an address, and the path in it.

    Raises ValueError for an unknown scheme, and if the package for the scheme is not installed.
    """
    # The library logs the tracebacks of failures that end in one of our messages.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
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
def _wrap_store_errors(source: str) -> Iterator[None]:
    """Turn errors of a store's library into an OSError that names the address and the fix."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{source}: there is no such file or directory; check the spelling"
        ) from error
    except Exception as error:
        # Every library has its own types of errors: credentials, permissions, network.
        reason = (str(error).splitlines() or ["no message"])[0][:300]
        raise OSError(
            f"{source} cannot be reached ({type(error).__name__}: {reason}): check that this machine's "
            "account has access (gs://: `gcloud auth application-default login`, or the VM's service account "
            "and its scopes)"
        ) from error


@contextlib.contextmanager
def _lock_file(path: Path) -> Iterator[None]:
    """Hold an exclusive lock of this machine's processes; it is released even if the process is killed."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class Uploads:
    """Remote copies of the growing files of a local folder, which a thread uploads.

    Files are uploaded one at a time; changes during an upload are part of the next one.  A file is uploaded
    up to the size it had when `changed` was called, so the copy ends with a complete line.  Every upload
    sends the whole file: uploads of a file of 1 GB send 1 GB each, one after the other.
    """

    def __init__(self, folder: Path, remote: epath.Path):
        self.folder, self.remote = folder, remote
        self._fs, self._root = _open(os.fspath(remote))

        # Shared with the thread; `_state` guards these fields and announces changes.
        self._pending: dict[str, int] = {}  # name -> bytes to upload
        self._busy = False  # an upload is in progress
        self._closed = False
        self._paused = False  # after an error, until it was raised in the caller's thread
        self._error: Exception | None = None  # not yet reported to the caller
        self._state = threading.Condition()

        # A daemon, so that a run that fails before `close` is not kept alive by an upload.
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
        self._thread.start()

    def changed(self, *names: str) -> None:
        """Schedule the upload of files that have grown, by their paths in the folder.

        Raises OSError if an earlier upload failed.
        """
        sizes = {name: (self.folder / name).stat().st_size for name in names}
        with self._state:
            self._report_and_retry()
            self._pending |= sizes
            self._state.notify_all()

    def flush(self) -> None:
        """Wait until all changed files are uploaded; raises OSError if one could not be.

        Such files stay scheduled: another call tries again.
        """
        with self._state:
            self._report_and_retry()
            self._state.wait_for(lambda: self._error is not None or not (self._pending or self._busy))
            self._raise_error()

    def close(self) -> None:
        """Flush, and end the thread even if that fails."""
        try:
            if not self._closed:
                self.flush()
        finally:
            with self._state:
                self._closed = True
                self._state.notify_all()
            self._thread.join()

    def _report_and_retry(self) -> None:
        """Raise an unreported error; without one, let the thread continue."""
        self._raise_error()
        self._paused = False
        self._state.notify_all()

    def _raise_error(self) -> None:
        """Raise the thread's error, once."""
        error, self._error = self._error, None
        if error is not None:
            raise OSError(f"{error}; the files to upload are in {self.folder}") from error

    def _run(self) -> None:
        """Upload scheduled files, one at a time, until closed; runs in the thread."""
        while True:
            with self._state:
                # After an error, wait until it was raised in the caller's thread and the caller calls again.
                self._state.wait_for(lambda: self._closed or (self._pending and not self._paused))
                if self._closed:
                    return
                name, size = next(iter(self._pending.items()))
                del self._pending[name]
                self._busy = True

            # Without the lock, so that the training loop can append and schedule meanwhile.
            error: Exception | None = None
            try:
                self._upload(name, size)
            except Exception as raised:
                error = raised

            with self._state:
                self._busy = False
                if error is not None:
                    self._error, self._paused = error, True
                    self._pending.setdefault(name, size)  # unless a newer size is scheduled already
                self._state.notify_all()

    def _upload(self, name: str, size: int) -> None:
        """Upload the first `size` bytes of a file."""
        # Upload a copy that does not grow.  The local file may become longer while it is read, and the object
        # must end with a complete line.
        copy = self.folder / ".uploading"
        with open(self.folder / name, "rb") as source, open(copy, "wb") as target:
            remaining = size
            while remaining and (block := source.read(min(remaining, 1 << 20))):
                target.write(block)
                remaining -= len(block)
        with _wrap_store_errors(f"{self.remote}/{name}"):
            self._fs.put_file(str(copy), f"{self._root}/{name}")
        copy.unlink()
