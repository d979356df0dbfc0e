"""Digests of files, by which a later start notices other contents.

Files of up to 64 MiB are read whole.  Of larger ones (weights) the size, the first and the last MiB and 62 MiB
between them, evenly spaced, are read: half a second for a file of any size.  The first MiB has the header of a
safetensors or GGUF file.  Other weights differ in nearly every value, so that such a digest tells them apart; a
change of a few bytes in a large file can be missed.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_BLOCK = 2**20  # bytes
_BLOCKS = 64  # that are read


def digest_file(path: Path) -> str:
    """The SHA-256 of a file's contents in hex; of a large file "sampled:" and that of its size and samples."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _BLOCK * _BLOCKS:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for i in range(_BLOCKS):
            file.seek((size - _BLOCK) * i // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
    return f"sampled:{digest.hexdigest()}"
