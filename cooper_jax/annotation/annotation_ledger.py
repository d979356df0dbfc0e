"""The ledger of an annotation: what has been answered, so that a kill loses no more than what was under way.

    settings.json      what decides the outcome; a later start must agree with it, in what the judge's section says
                       once there is a verdict
    completions.jsonl  one object an item: its completion, or why there is none
    verdicts.jsonl     one object an item that was judged: the rule's verdict and the judge's
    lock               held by the process that writes here

Lines are appended, each seen onto the disk, in the order in which answers come; an item's id says which it is.
A last line that a kill tore is cut off, and said.  A line with a `failure` is replaced by a later one of its id.
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
from cooper_jax.data.row_reader import replace_surrogates
from cooper_jax.runtime import output_folder, remote_files
from cooper_jax.runtime.metrics import JsonLines, to_jsonable
from cooper_jax.runtime.run_directory import lock_folder
from cooper_jax.runtime.stored_config import flatten_config
from cooper_jax.settings.setup_errors import setup_errors

Row = dict[str, Any]
COMPLETIONS, VERDICTS = "completions.jsonl", "verdicts.jsonl"
# The fields of a model that is asked which decide its replies, and not how fast, or from where, they come.
ASKED = ("kind", "model", "weights", "tokenizer", "num_layers", "dtype", "thinking", "max_prompt_tokens")
DRAWN = ("max_new_tokens", "temperature", "top_p")


class LedgerFile:
    """One file of the ledger: `rows` by their ids, in the order of the file."""

    def __init__(self, path: Path):
        self.rows: dict[str, Row] = {}
        self._lines = JsonLines(path)
        for number, line in enumerate(output_folder.read_whole_lines(path), 1):
            row = json.loads(line)
            if not isinstance(row.get("id"), str):
                raise ValueError(f"{path}:{number}: no JSON object with an id: mend or delete the line")
            self._take({k: replace_surrogates(v) if isinstance(v, str) else v for k, v in row.items()})

    def append(self, rows: Sequence[Row]) -> None:
        """On the disk when this returns.  Raises SetupError for a full one."""
        rows = [to_jsonable(row) for row in rows]
        if rows:
            with setup_errors("--out"):
                self._lines.append(*rows)
        for row in rows:
            self._take(row)

    def _take(self, row: Row) -> None:
        known = row["id"] in self.rows and not has_failed(self.rows[row["id"]])
        if not known:
            self.rows[row["id"]] = row

    def forget_failures(self) -> None:
        """Take what failed for not yet asked."""
        self.rows = {id: row for id, row in self.rows.items() if not has_failed(row)}

    def close(self) -> None:
        self._lines.close()


def has_failed(row: Row) -> bool:
    return "failure" in row


class Ledger:
    """An open folder; a context manager.

    Raises ValueError where it was begun with other settings (naming both values), is in use, holds what was not
    written here, or is an address.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]):
        if not str(folder):
            raise ValueError("give --out=DIR, the folder for the outcome")
        if remote_files.is_remote(folder):
            raise ValueError(
                f"--out={folder}: annotations are written to a local path, to be copied from there"
            )
        self.folder = Path(folder).expanduser().absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.folder / "lock", self.folder, "--out")
        self._logs: list[LedgerFile] = []
        try:
            output_folder.check_same_settings(self.folder, settings, later={"judge.": VERDICTS})
            self.completions = self._log(COMPLETIONS)
            self.verdicts = self._log(VERDICTS)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        for log in self._logs:
            log.close()
        os.close(self._lock)

    def write(self, name: str, content: Any) -> None:
        """A file of JSON, or of JSON lines for a list of rows: as a whole, or not at all.

        Raises SetupError for a full disk.
        """
        if isinstance(content, list):
            text = "".join(json.dumps(to_jsonable(row), ensure_ascii=False) + "\n" for row in content)
        else:
            text = json.dumps(to_jsonable(content), indent=2, ensure_ascii=False) + "\n"
        with setup_errors(f"--out: {name}"):
            remote_files.write_atomically(self.folder / name, text.encode("utf-8", "backslashreplace"))

    def _log(self, name: str) -> LedgerFile:
        self._logs.append(LedgerFile(self.folder / name))
        return self._logs[-1]


def outcome_settings(cfg: ConfigDict, known: Mapping[str, str], sampled: bool) -> dict[str, Any]:
    """What decides the outcome, flat.  known: the files of the plan."""
    names = ["judge"]
    out: dict[str, Any] = {"seed": cfg.seed, "rollout.kv_dtype": cfg.rollout.kv_dtype, **known}
    if sampled:
        names.append("source")
        out |= {f"annotate.{name}": cfg.annotate[name] for name in ("problems", "samples")}
        out |= {f"data.{name}": cfg.data[name] for name in ("instruction", "question_key", "reference_key")}
    for name in names:
        fields = flatten_config(cfg[name].to_dict())
        kept = (*ASKED, *DRAWN)
        out |= {f"{name}.{field}": value for field, value in fields.items() if field in kept}
    return out


def verdict_versions() -> dict[str, str]:
    """Of what decides verdicts: this project and math-verify."""
    return {
        "cooper-jax": __version__,
        "math-verify": importlib.metadata.version("math-verify"),
    }
