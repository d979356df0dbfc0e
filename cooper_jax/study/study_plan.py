"""The plan of a study: its runs, their folders, commands and order.

    OUT/settings.json               the settings that all runs share
    OUT/arms/ARM/settings.json      the settings of an arm
    OUT/seed_S/start                the policy's supervised phase of a seed, run once
    OUT/seed_S/start_reward         the reward model's, run at the same time where there are several slots
    OUT/seed_S/ARM                  an arm's run on that seed; it starts from the models of these two
    OUT/seed_S/compile              for a while: a run whose programs are kept in the compilation cache

1. `Study` resolves and checks every arm's config before any run is started.
2. `begin` writes the settings; if the folder already has settings, it compares them.
3. `list_runs` lists the runs seed by seed, so that the arms of an unfinished study can be compared on the
   seeds that are complete.

All arms of a seed see the same problems in the same order.  Without two supervised phases a seed has one start,
OUT/seed_S/start, from which the arms get both models.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cooper_jax.runtime import output_folder
from cooper_jax.runtime.checkpoint import list_steps
from cooper_jax.runtime.stored_config import flatten_config, must_stay
from cooper_jax.settings.cross_checks import OWN
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.study import arms as study_arms
from cooper_jax.study.arms import COMPILE, REWARD_START, START, STARTS, Arm
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

    arm: str  # or one of STARTS
    seed: int
    folder: Path
    steps: int
    command: tuple[str, ...]
    after: tuple[Path, ...] = ()  # the folders of the starts that must be complete before this run

    @property
    def label(self) -> str:
        """The run's name in messages: seed_S/ARM."""
        return f"{self.folder.parent.name}/{self.arm}"

    @property
    def is_start(self) -> bool:
        """True for a run of the supervised phases."""
        return self.arm in STARTS

    def count_done(self) -> int:
        """Read the last step from metrics.jsonl; 0 without one."""
        rows = read_whole_rows(self.folder / "metrics.jsonl")
        return int(rows[-1]["step"]) if rows else 0

    def is_complete(self) -> bool:
        """Return True if the run needs no further process."""
        # A start writes its checkpoint of step 0 after the supervised phases, and has no further steps.
        if self.is_start:
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
            "supervised.reward_from": "each seed's own start",
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

    def list_starts(self) -> tuple[str, ...]:
        """List the starts of each seed, of STARTS."""
        # A study of rule arms alone needs no reward model.
        if any(self._reads_reward_start(arm) for arm in self.arms):
            return STARTS
        return (START,)

    def _reads_reward_start(self, arm: Arm) -> bool:
        """True if an arm has a reward model, and this model's supervised phase is a run of its own."""
        settings = study_arms.list_settings(arm, self.base)
        return self._splits_start() and settings.get("reward.arm", self.base.reward.arm) != "rule"

    def _splits_start(self) -> bool:
        """True if the supervised phases of the two models are two runs."""
        return bool(self.base.supervised.policy_steps and self.base.supervised.reward_steps)

    def run_folder(self, name: str, seed: int) -> Path:
        """Return the folder of a run.  name: the arm's name, or one of STARTS."""
        return self.out / f"seed_{seed}" / name

    def make_start_config(self, start: str, seed: int) -> ConfigDict:
        """Make the config of a start, which all arms of a seed share.  start: one of STARTS."""
        # The reward model gets the settings of `frozen`, so that every arm can use it unchanged.
        has_policy_alone = start == START and self._splits_start()
        own = study_arms.list_settings(study_arms.ARMS["rule" if has_policy_alone else "frozen"], self.base)
        own |= {"steps": 0, "eval.every": 0}
        if start == REWARD_START:
            own["supervised.policy_steps"] = 0
        return self._complete_config(own, start, seed)

    def make_config(self, arm: Arm, seed: int) -> ConfigDict:
        """Make the config of an arm's run."""
        own = study_arms.list_settings(arm, self.base)
        own["supervised.start_from"] = str(self.run_folder(START, seed))
        if self._reads_reward_start(arm):
            own["supervised.reward_from"] = str(self.run_folder(REWARD_START, seed))
        return self._complete_config(own, arm.name, seed)

    def _complete_config(self, own: dict[str, Any], name: str, seed: int) -> ConfigDict:
        """Make a run's config.  own: the fields that it sets.  name: of its folder."""
        cfg = self.base.copy_and_resolve_references()
        own = own | {"seed": seed, "run_dir": str(self.run_folder(name, seed))}

        # Results are read from metrics.jsonl, so trackers get rows only on request.
        if "log.to" not in self.given:
            own["log.to"] = ""
        cfg.update_from_flattened_dict(own)
        return cfg

    def make_start(self, start: str, seed: int) -> StudyRun:
        """Make a run of supervised phases.  start: one of STARTS."""
        return self._complete_run(start, seed, self.make_start_config(start, seed))

    def make_run(self, arm: Arm, seed: int) -> StudyRun:
        """Make the run of an arm."""
        starts = STARTS if self._reads_reward_start(arm) else (START,)
        after = tuple(self.run_folder(start, seed) for start in starts)
        return self._complete_run(arm.name, seed, self.make_config(arm, seed), after)

    def make_compile_run(self) -> StudyRun | None:
        """Make a run that compiles the arms' programs while a reward model is still being trained.

        It evaluates and makes one step with the start's policy and a reward model that is not trained.  Nothing of
        it is kept but the programs.  Of the arms it takes one that updates its reward model, whose programs include
        the others'.  None if no arm waits for a reward model.
        """
        waiting = [arm for arm in self.arms if self._reads_reward_start(arm)]
        if not waiting:
            return None

        def updates_at_steps(arm: Arm) -> bool:
            return (
                study_arms.list_settings(arm, self.base).get("reward.arm", self.base.reward.arm) == "cooper"
            )

        seed, arm = self.seeds[0], next(filter(updates_at_steps, waiting), waiting[0])
        own = study_arms.list_settings(arm, self.base)
        warmup_updates = own.get("reward.warmup_updates", self.base.reward.warmup_updates)
        own |= {
            "supervised.start_from": str(self.run_folder(START, seed)),
            "supervised.reward_from": OWN,
            "supervised.reward_steps": 0,
            "reward.allow_untrained_head": True,
            "reward.warmup_updates": min(warmup_updates, 1),
            "steps": 1,
            "eval.every": 2,  # at step 0 alone
        }
        cfg = self._complete_config(own, COMPILE, seed)
        return self._complete_run(COMPILE, seed, cfg, (self.run_folder(START, seed),))

    def _complete_run(self, name: str, seed: int, cfg: ConfigDict, after: tuple[Path, ...] = ()) -> StudyRun:
        # The command has flags for the fields that differ from the base, so that it can be run by hand.
        base = flatten_config(self.base.to_dict())
        changed = {field for field, value in flatten_config(cfg.to_dict()).items() if value != base[field]}
        flags = study_arms.make_flags(cfg, {*self.given, *changed})
        command = (*train_command(), f"--config={self.config_file}", *flags)
        return StudyRun(name, seed, Path(cfg.run_dir), cfg.steps, command, after)

    def list_runs(self) -> list[StudyRun]:
        """List all runs, seed by seed, each seed's starts first."""
        runs = []
        for seed in self.seeds:
            runs += [self.make_start(start, seed) for start in self.list_starts()]
            runs += [self.make_run(arm, seed) for arm in self.arms]
        return runs

    def begin(self) -> None:
        """Write the study's settings into its folder.

        Raises ValueError, naming the field, if the folder was begun with other settings.
        """
        known = flatten_config(self.base.to_dict())
        shared = {}
        for field, value in known.items():
            belongs_to_run = field in ("seed", "supervised.start_from", "supervised.reward_from")
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
