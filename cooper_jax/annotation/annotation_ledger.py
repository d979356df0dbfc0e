"""Ledger of an annotation: append-only files of all answers, so SIGKILL loses only requests in progress.

    settings.json      settings that decide the outcome; a later start must have the same ones (the judge's
                       settings may still change before the first verdict)
    completions.jsonl  one object per item: its completion, or the reason for its absence
    verdicts.jsonl     one object per judged item: the rule's verdict and the judge's
    lock               locked by the process that writes to the folder

Lines are appended in the order in which answers arrive, each flushed to disk; the field `id` names the item.
An incomplete last line, left by SIGKILL, is dropped with a message.  A line with a `failure` is superseded by
a later line with the same id.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cooper_jax import __version__
from cooper_jax.annotation.items import AnnotateConfig
from cooper_jax.data.row_reader import replace_surrogates
from cooper_jax.runtime import output_folder, remote_files
from cooper_jax.runtime.metrics import JsonLines, to_jsonable
from cooper_jax.runtime.run_directory import lock_folder
from cooper_jax.runtime.stored_config import flatten_config
from cooper_jax.settings.setup_errors import setup_errors

Row = dict[str, Any]
# Names of the ledger's two append-only files.
COMPLETIONS, VERDICTS = "completions.jsonl", "verdicts.jsonl"
# Fields of a language model's section that decide its replies, as opposed to its speed or address.
MODEL_FIELDS = (
    "kind",
    "model",
    "weights",
    "tokenizer",
    "num_layers",
    "dtype",
    "thinking",
    "max_prompt_tokens",
)
SAMPLING_FIELDS = ("max_new_tokens", "temperature", "top_p")


class LedgerFile:
    """One file of the ledger; `rows` maps each id to its row, in the order of the file."""

    def __init__(self, path: Path):
        """Read the existing rows.  Raises ValueError, naming file and line, for a malformed one."""
        self.rows: dict[str, Row] = {}
        self._lines = JsonLines(path)
        for number, line in enumerate(output_folder.read_whole_lines(path), 1):
            row = json.loads(line)
            if not isinstance(row.get("id"), str):
                raise ValueError(f"{path}:{number}: no JSON object with an id: fix or delete the line")
            # Ledgers of earlier versions may contain half surrogate pairs, which no tokenizer accepts.
            self._add({k: replace_surrogates(v) if isinstance(v, str) else v for k, v in row.items()})

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows and flush them to disk.  Raises SetupError for a full disk."""
        rows = [to_jsonable(row) for row in rows]
        # Disk before memory: `rows` never has an answer that a restart would not find.
        if rows:
            with setup_errors("--out"):
                self._lines.append(*rows)
        for row in rows:
            self._add(row)

    def forget_failures(self) -> None:
        """Forget failed requests, so that their items are asked about again."""
        self.rows = {id: row for id, row in self.rows.items() if not has_failed(row)}

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def _add(self, row: Row) -> None:
        """Record a row, unless its item has an answer already; a failure may be replaced."""
        previous = self.rows.get(row["id"])
        if previous is None or has_failed(previous):
            self.rows[row["id"]] = row


def has_failed(row: Row) -> bool:
    """True for a row with the reason of a failure instead of an answer."""
    return "failure" in row


class Ledger:
    """An open ledger folder; a context manager.

    Raises ValueError for a remote address, and for a folder that was begun with other settings (naming both
    values), is in use, or contains files that no annotation wrote.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]):
        """Open a folder, or create it.

        Args:
          folder: on a local disk.
          settings: flat names -> JSON values that decide the outcome.
        """
        # Appending and locking need a local file system.
        if not str(folder):
            raise ValueError("give --out=DIR, the folder for the outcome")
        if remote_files.is_remote(folder):
            raise ValueError(
                f"--out={folder}: annotations are written to a local path; give one, and copy it afterwards"
            )

        # The lock comes first: two writers would interleave their lines.
        self.folder = Path(folder).expanduser().absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.folder / "lock", self.folder, "--out")
        self._files: list[LedgerFile] = []
        try:
            # The judge's settings are binding from the first verdict on, so sampling can start before they
            # are final.
            output_folder.check_same_settings(self.folder, settings, later={"judge.": VERDICTS})
            self.completions = self._open_file(COMPLETIONS)
            self.verdicts = self._open_file(VERDICTS)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files and release the lock."""
        for file in self._files:
            file.close()
        os.close(self._lock)

    def write(self, name: str, content: Any) -> None:
        """Write a file atomically: JSON lines for a list of rows, otherwise one JSON value.

        Raises SetupError for a full disk.
        """
        if isinstance(content, list):
            text = "".join(json.dumps(to_jsonable(row), ensure_ascii=False) + "\n" for row in content)
        else:
            text = json.dumps(to_jsonable(content), indent=2, ensure_ascii=False) + "\n"
        with setup_errors(f"--out: {name}"):
            remote_files.write_atomically(self.folder / name, text.encode("utf-8", "backslashreplace"))

    def _open_file(self, name: str) -> LedgerFile:
        """Open one of the ledger's files; `close` closes it."""
        self._files.append(LedgerFile(self.folder / name))
        return self._files[-1]


def list_outcome_settings(
    cfg: ConfigDict, settings: AnnotateConfig, files: Mapping[str, str], sampled: bool
) -> dict[str, Any]:
    """List the settings that decide the outcome, as flat names -> values.

    Args:
      cfg: the whole config.
      settings: its section `annotate`.
      files: the plan's input files, name -> size and hash.
      sampled: True if any completion is sampled; otherwise the settings of sampling do not matter.
    """
    # The judge always reads the completions; the source is used only if it writes some.
    sections = ["judge"]
    out: dict[str, Any] = {"seed": cfg.seed, "rollout.kv_dtype": cfg.rollout.kv_dtype, **files}
    if sampled:
        sections.append("source")
        out |= {"annotate.problems": settings.problems, "annotate.samples": settings.samples}
        data_fields = ("instruction", "system", "question_key", "reference_key", "reduce_solutions")
        out |= {f"data.{name}": cfg.data[name] for name in data_fields}

    # Addresses, keys and limits on concurrency are left out, so that they may change between two starts.
    for section in sections:
        fields = flatten_config(cfg[section].to_dict())
        kept = (*MODEL_FIELDS, *SAMPLING_FIELDS)
        out |= {f"{section}.{field}": value for field, value in fields.items() if field in kept}
    return out


def read_versions() -> dict[str, str]:
    """Read the versions of the software that decides verdicts: this project and math-verify."""
    return {
        "cooper-jax": __version__,
        "math-verify": importlib.metadata.version("math-verify"),
    }
