"""A tracker that logs to Weights & Biases, by the library's own variables: WANDB_API_KEY, WANDB_MODE and others.

A resumed run continues the run of the stored id.  wandb ignores a row of a step that it has already.  Offline, each
start writes a folder of its own with the same id, which `wandb sync` uploads in turn.  wandb keeps the newest step
open for further values, so SIGKILL may lose the last row.
"""

from __future__ import annotations

import netrc
import os
import secrets
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from cooper_jax.runtime.trackers import sample_tables
from cooper_jax.runtime.trackers.tracker import PHASES, PROJECT, Samples, TrackedRun
from cooper_jax.settings.setup_errors import SetupError

# Values of WANDB_MODE with which nothing is sent.
_LOCAL_MODES = ("offline", "disabled", "dryrun")


def _knows_key() -> bool:
    """True if wandb finds a key: in the environment, or where `wandb login` has written it."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(file).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbTracker:
    """Logs scalars and tables of samples to a run of wandb."""

    REPLACES_ROWS = False

    @staticmethod
    def check_environment() -> None:
        """Raise SetupError if wandb would ask for a key: a run has nobody to answer."""
        # `wandb.login` would ask the server, which need not answer when a run starts.
        if os.environ.get("WANDB_MODE") in _LOCAL_MODES or _knows_key():
            return
        raise SetupError(
            "log.to=wandb: no key is known: set WANDB_API_KEY, or WANDB_MODE=offline to write local files that "
            "`wandb sync` uploads"
        )

    def __init__(self, run: TrackedRun):
        environment = os.environ
        self._phases: list[sample_tables.TableRow] = []  # of supervised.jsonl, until the next row of metrics
        # The id ties the starts of a run together.
        identity = run.state.setdefault("id", secrets.token_hex(4))
        self._run = wandb.init(
            project=environment.get("WANDB_PROJECT", PROJECT),
            name=environment.get("WANDB_NAME", run.name),
            id=identity,
            resume="allow",
            dir=environment.get("WANDB_DIR", str(run.folder)),
            config=dict(run.config),
            # By default it would replace sys.stdout, which the progress bar writes to.
            # And at the end it would print a table of all metrics.
            settings=wandb.Settings(console="off", quiet=True),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a step's metrics, and the table of the phases before them."""
        row: dict[str, Any] = dict(metrics)
        if self._phases:
            row[PHASES] = _make_table(self._phases)
        self._run.log(row, step=step)
        self._phases = []

    def log_phase(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        """Keep the row for a table: wandb's steps never decrease, and the run's own begin at 0."""
        self._phases.append({"phase": phase, "step": step, **figures})

    def log_samples(self, step: int, samples: Samples) -> None:
        """Log a step's samples as tables."""
        tables = sample_tables.make_tables(step, samples)
        self._run.log({name: _make_table(rows) for name, rows in tables.items()}, step=step)

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


def _make_table(rows: list[sample_tables.TableRow]) -> wandb.Table:
    """A table of rows.  A column may have no value for some rows, and numbers of both types."""
    columns, data = sample_tables.split_columns(rows)
    return wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)
