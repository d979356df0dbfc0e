"""What a study runs, where, and in which order.

    OUT/settings.json               what all runs share
    OUT/arms/ARM/settings.json      what an arm sets
    OUT/seed_S/start                the supervised phases of a seed, once
    OUT/seed_S/ARM                  a run that begins with their models: the same problems in the same order

1. `Study` resolves every arm's config and checks it, before anything is started.
2. `begin` writes the settings, or compares them with those that the folder was begun with.
3. `runs` lists the runs, seed by seed: so an unfinished study has whole seeds, and what is paired can be.
"""

from __future__ import annotations

import dataclasses
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
    """The first words of a command that trains: a checkout's script, or the installed package's module."""
    if (PACKAGE / "launch").is_symlink():
        return (sys.executable, str(TRAIN))
    # As a file, the installed script would put its parent folder first on the path, and with it our types.py.
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
        return f"{self.folder.parent.name}/{self.arm}"

    @property
    def after(self) -> Path | None:
        """The folder of the run that must be complete before."""
        return None if self.arm == START else self.folder.parent / START

    def done(self) -> int:
        """Steps of which metrics are there."""
        rows = read_whole_rows(self.folder / "metrics.jsonl")
        return int(rows[-1]["step"]) if rows else 0

    def complete(self) -> bool:
        if self.arm == START:
            return 0 in list_steps(self.folder)
        return self.done() >= self.steps


@dataclasses.dataclass(frozen=True)
class Study:
    """config_file, base: what all runs share, the base with its flags and a recipe of its own applied.

    given: the fields that flags set.  Raises SetupError where a flag sets what the study or an arm decides, for a
    config without exact truth, and for any arm's settings that contradict themselves.
    """

    out: Path
    config_file: str
    base: ConfigDict
    given: Sequence[str]
    arms: Sequence[Arm]
    seeds: Sequence[int]

    def __post_init__(self):
        belongs = {
            "seed": "--seeds",
            "run_dir": "--out",
            "supervised.start_from": "each seed's own start",
            "resume": "no study",
        }
        for field in self.given:
            if field in belongs:
                raise SetupError(f"--config.{field}: that is {belongs[field]}'s to say: leave it out")
        if self.base.data.format != "synthetic" or not self.base.eval.every or not self.base.steps:
            raise SetupError(
                f"data.format={self.base.data.format}, eval.every={self.base.eval.every}, steps={self.base.steps}: "
                "a study compares exact truth over steps: --config=configs/tiny.py, and neither of the latter 0"
            )
        for arm in self.arms:
            self._refuse_overruled(arm)
            try:
                RunSettings.from_config(self.config(arm, self.seeds[0]))
            except SetupError as error:
                raise SetupError(*(f"arm {arm.name}: {p}" for p in error.problems)) from error

    def _refuse_overruled(self, arm: Arm) -> None:
        """A flag would be of no effect in an arm that sets the field itself."""
        base, own = flatten_config(self.base.to_dict()), study_arms.list_settings(arm, self.base)
        for field in self.given:
            if field in own and own[field] != base[field] and field not in arm.times:
                raise SetupError(
                    f"--config.{field}={base[field]}: the arm {arm.name} sets it to {own[field]}: leave the flag "
                    f'out, or make an arm of its own: --arm="NAME: {field}={base[field]}, ..."'
                )

    def folder(self, name: str, seed: int) -> Path:
        return self.out / f"seed_{seed}" / name

    def config(self, arm: Arm | None, seed: int) -> ConfigDict:
        """Of an arm's run; None: of the start, whose reward model all arms can begin with."""
        cfg = self.base.copy_and_resolve_references()
        own = study_arms.list_settings(arm or study_arms.ARMS["frozen"], self.base)
        name = START if arm is None else arm.name
        own |= {"seed": seed, "run_dir": str(self.folder(name, seed))}
        own |= (
            {"steps": 0, "eval.every": 0}
            if arm is None
            else {"supervised.start_from": str(self.folder(START, seed))}
        )
        if "log.tensorboard" not in self.given:
            own["log.tensorboard"] = False  # nobody looks at so many
        cfg.update_from_flattened_dict(own)
        return cfg

    def run(self, arm: Arm | None, seed: int) -> StudyRun:
        cfg = self.config(arm, seed)
        changed = {
            field
            for field, value in flatten_config(cfg.to_dict()).items()
            if value != flatten_config(self.base.to_dict())[field]
        }
        flags = study_arms.make_flags(cfg, {*self.given, *changed})
        command = (*train_command(), f"--config={self.config_file}", *flags)
        return StudyRun(START if arm is None else arm.name, seed, Path(cfg.run_dir), cfg.steps, command)

    def runs(self) -> list[StudyRun]:
        """Seed by seed, its start first."""
        return [self.run(arm, seed) for seed in self.seeds for arm in (None, *self.arms)]

    def begin(self) -> None:
        """Raises ValueError, naming the field, where the folder was begun with other settings."""
        known = flatten_config(self.base.to_dict())
        shared = {
            f: v
            for f, v in known.items()
            if f == "steps" or (must_stay(f) and f not in ("seed", "supervised.start_from"))
        }
        self.out.mkdir(parents=True, exist_ok=True)
        output_folder.check_same_settings(self.out, shared, begun=any(self.out.glob("seed_*")))
        for arm in self.arms:
            folder = arm_folder(self.out, arm.name)
            folder.mkdir(parents=True, exist_ok=True)
            begun = any(self.out.glob(f"seed_*/{arm.name}"))
            output_folder.check_same_settings(folder, study_arms.list_settings(arm, self.base), begun=begun)


def arm_folder(out: Path, name: str) -> Path:
    return out / "arms" / name


def parse_seeds(text: str) -> list[int]:
    """`0`, `10-19` or `1,3,10-12`.  Raises SetupError for anything else."""
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise SetupError(f"--seeds={text}: {part!r} is neither a number nor a range such as 10-19")
        seeds += range(int(found[1]), int(found[2] or found[1]) + 1)
    return list(dict.fromkeys(seeds))
