"""The plan of a study: its runs, their folders, commands and order.

    OUT/settings.json               the settings that all runs share
    OUT/arms/ARM/settings.json      the settings of an arm
    OUT/seed_S/start                the supervised phases of a seed, run once
    OUT/seed_S/ARM                  an arm's run on that seed; it starts from the models of OUT/seed_S/start

1. `Study` resolves and checks every arm's config before any run is started.
2. `begin` writes the settings; if the folder already has settings, it compares them.
3. `list_runs` lists the runs seed by seed, so that the arms of an unfinished study can be compared on the
   seeds that are complete.

All arms of a seed see the same problems in the same order.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from cooper_jax.runtime import output_folder
from cooper_jax.runtime.checkpoint import list_steps
from cooper_jax.runtime.stored_config import flatten_config, must_stay
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.study import arms as study_arms
from cooper_jax.study.arms import START, Arm
from cooper_jax.study.records import read_whole_rows
from cooper_jax.trainer.run_settings import RunSettings

PACKAGE = Path(__file__).resolve().parents[1]
TRAIN = PACKAGE / "launch" / "train.py"


def train_command() -> tuple[str, ...]:
    """Return the command that trains: a checkout's script, or the installed package's module."""
    if (PACKAGE / "launch").is_symlink():
        return (sys.executable, str(TRAIN))
    # Run as a file, the installed script would put cooper_jax/ on the path, whose types.py would then hide
    # the standard library's.
    return (sys.executable, "-P", "-m", "cooper_jax.launch.train")


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """A process of launch/train.py."""

    arm: str  # or START
    seed: int
    folder: Path
    steps: int
    command: tuple[str, ...]

    @property
    def label(self) -> str:
        """The run's name in messages: seed_S/ARM."""
        return f"{self.folder.parent.name}/{self.arm}"

    @property
    def after(self) -> Path | None:
        """The folder of the run that must be complete before this one; None for a start."""
        return None if self.arm == START else self.folder.parent / START

    def count_done(self) -> int:
        """Read the last step from metrics.jsonl; 0 without one."""
        rows = read_whole_rows(self.folder / "metrics.jsonl")
        return int(rows[-1]["step"]) if rows else 0

    def is_complete(self) -> bool:
        """Return True if the run needs no further process."""
        # A start writes its checkpoint of step 0 after the supervised phases, and has no further steps.
        if self.arm == START:
            return 0 in list_steps(self.folder)
        return self.count_done() >= self.steps


@dataclasses.dataclass(frozen=True)
class Study:
    """A study's arms and seeds, and the config that they share.

    Raises SetupError for a flag that sets a field of the study or of an arm, for a config without exact
    truth, and for settings of an arm that contradict each other.
    """

    out: Path
    config_file: str
    base: ConfigDict  # the file's config, with the flags and the recipe that the file itself names
    given: Sequence[str]  # the dotted names of the fields that flags set
    # The runs are all pairs of these.
    arms: Sequence[Arm]
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        # Fields that the study sets itself, with the flag or folder that decides them.
        owners = {
            "seed": "--seeds",
            "run_dir": "--out",
            "supervised.start_from": "each seed's own start",
            "resume": "single runs",
        }
        for field in self.given:
            if field in owners:
                raise SetupError(f"--config.{field}: it belongs to {owners[field]}: leave it out")

        # Arms are compared by evaluations during training, against the exact truth of synthetic problems.
        # A user's judge is the truth of its task.
        has_truth = self.base.data.format == "synthetic" or self.base.rule.judge
        if not has_truth or not self.base.eval.every or not self.base.steps:
            raise SetupError(
                f"data.format={self.base.data.format}, eval.every={self.base.eval.every}, "
                f"steps={self.base.steps}: a study compares exact truth over steps: use "
                "--config=configs/tiny.py, or a task with a program that decides (--config.rule.judge), and set "
                "neither of the latter to 0"
            )

        # One seed is enough: configs of different seeds differ only in the seed and in folders.
        for arm in self.arms:
            self._refuse_overruled(arm)
            try:
                RunSettings.from_config(self.make_config(arm, self.seeds[0]))
            except SetupError as error:
                raise SetupError(*(f"arm {arm.name}: {p}" for p in error.messages)) from error

    def _refuse_overruled(self, arm: Arm) -> None:
        """Raise SetupError for a flag that an arm's own setting would overrule."""
        # A field with a factor is not overruled: the arm multiplies the flag's value.
        base, own = flatten_config(self.base.to_dict()), study_arms.list_settings(arm, self.base)
        for field in self.given:
            if field in own and own[field] != base[field] and field not in arm.factors:
                raise SetupError(
                    f"--config.{field}={base[field]}: the arm {arm.name} sets it to {own[field]}: leave the "
                    f'flag out, or define another arm: --arm="NAME: {field}={base[field]}, ..."'
                )

    def run_folder(self, name: str, seed: int) -> Path:
        """Return the folder of a run.  name: the arm's name, or START."""
        return self.out / f"seed_{seed}" / name

    def make_config(self, arm: Arm | None, seed: int) -> ConfigDict:
        """Make the config of an arm's run; None stands for the start that all arms of a seed share."""
        cfg = self.base.copy_and_resolve_references()
        # The start has the settings of `frozen`: it trains a reward model, which every arm can use unchanged.
        own = study_arms.list_settings(arm or study_arms.ARMS["frozen"], self.base)
        name = START if arm is None else arm.name
        own |= {"seed": seed, "run_dir": str(self.run_folder(name, seed))}
        if arm is None:
            own |= {"steps": 0, "eval.every": 0}
        else:
            own["supervised.start_from"] = str(self.run_folder(START, seed))

        # Results are read from metrics.jsonl, so event files are written only on request.
        if "log.tensorboard" not in self.given:
            own["log.tensorboard"] = False
        cfg.update_from_flattened_dict(own)
        return cfg

    def make_run(self, arm: Arm | None, seed: int) -> StudyRun:
        """Make the run of an arm; None stands for the start."""
        # The command has flags for the fields that differ from the base, so that it can be run by hand.
        cfg = self.make_config(arm, seed)
        base = flatten_config(self.base.to_dict())
        changed = {field for field, value in flatten_config(cfg.to_dict()).items() if value != base[field]}
        flags = study_arms.make_flags(cfg, {*self.given, *changed})
        command = (*train_command(), f"--config={self.config_file}", *flags)
        return StudyRun(START if arm is None else arm.name, seed, Path(cfg.run_dir), cfg.steps, command)

    def list_runs(self) -> list[StudyRun]:
        """List all runs, seed by seed, each seed's start first."""
        return [self.make_run(arm, seed) for seed, arm in itertools.product(self.seeds, (None, *self.arms))]

    def begin(self) -> None:
        """Write the study's settings into its folder.

        Raises ValueError, naming the field, if the folder was begun with other settings.
        """
        known = flatten_config(self.base.to_dict())
        shared = {}
        for field, value in known.items():
            belongs_to_run = field in ("seed", "supervised.start_from")
            if field == "steps" or (must_stay(field) and not belongs_to_run):
                shared[field] = value

        # Settings may be replaced as long as no run has used them.
        self.out.mkdir(parents=True, exist_ok=True)
        output_folder.check_same_settings(self.out, shared, begun=any(self.out.glob("seed_*")))

        for arm in self.arms:
            folder = self.out / "arms" / arm.name
            folder.mkdir(parents=True, exist_ok=True)
            begun = any(self.out.glob(f"seed_*/{arm.name}"))
            output_folder.check_same_settings(folder, study_arms.list_settings(arm, self.base), begun=begun)


def parse_seeds(text: str) -> list[int]:
    """Read seeds: `0`, `10-19` or `1,3,10-12`.  Raises SetupError for anything else."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        # A single number is the range from itself to itself.
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise SetupError(f"--seeds={text}: {part!r} is neither a number nor a range such as 10-19")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return list(dict.fromkeys(seeds))
