"""What a study would run, and what it carries out, with a stand-in for the runs."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs
from rich.console import Console as RichConsole
from tiny_studies import ROOT, a_study, launch, small

from cooper_jax.configs import tiny
from cooper_jax.runtime.console import Console
from cooper_jax.runtime.hosts import Stopped
from cooper_jax.runtime.stored_config import flatten_config
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.study import arms, progress, records, run_scheduler, study_plan
from cooper_jax.trainer import recipes

# In place of launch/train.py: a start makes its checkpoint; an arm goes on from its last whole line, and what its
# config's name says befalls it: "fails" at step 2 of the frozen arm, "waits" for a signal at step 1 of every arm.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
flag = dict(x.removeprefix("--config.").split("=", 1) for x in sys.argv[1:])
folder, steps, kind = Path(flag["run_dir"]), int(flag["steps"]), flag.get("reward.arm", "cooper")
with open(folder.parents[1] / "started", "a") as file:
    file.write(f"{folder.parent.name}/{folder.name}\\n")
def end(*_):
    print("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, end)
if steps == 0:
    if flag["name"] == "no_start" or (flag["name"] == "no_reward_start" and kind == "model"):
        sys.exit("no start for you")
    if flag["name"] == "slow" and kind == "model":
        time.sleep(3)
    (folder / "checkpoints/0").mkdir(parents=True)
    sys.exit()
if folder.name == "compile":
    (folder / "in_use").mkdir()
    time.sleep(60)
sources = ["start_from"] if kind == "rule" else ["start_from", "reward_from"]
assert all((Path(flag[f"supervised.{x}"]) / "checkpoints/0").is_dir() for x in sources)
path = folder / "metrics.jsonl"
text = path.read_text() if path.exists() else ""
whole = text[: text.rfind("\\n") + 1]
path.write_text(whole)
for step in range(len(whole.splitlines()), steps + 1):
    if flag["name"] == "fails" and kind == "model" and step == 2:
        sys.exit("it was the second step")
    if flag["name"] == "waits" and step == 2:
        time.sleep(60)
    with open(path, "a") as file:
        row = {"step": step, "eval/oracle/accuracy": 0.5, "cores": len(os.sched_getaffinity(0))}
        file.write(json.dumps(row) + "\\n")
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "train.py"
    path.write_text(STAND_IN)
    monkeypatch.setattr(study_plan, "TRAIN", path)
    return path


def started(study: study_plan.Study) -> list[str]:
    path = study.out / "started"
    return path.read_text().split() if path.exists() else []


def carry_out(study: study_plan.Study, jobs: int = 1) -> list[run_scheduler.Failure]:
    study.begin()
    return run_scheduler.run_study(study.list_runs(), jobs, lambda standing: None)


# --- what would run -----------------------------------------------------------------------------------


def test_runs_go_seed_by_seed_after_their_start(tmp_path):
    runs = a_study(tmp_path).list_runs()
    assert [run.label for run in runs] == [
        "seed_3/start", "seed_3/start_reward", "seed_3/rule", "seed_3/frozen",
        "seed_4/start", "seed_4/start_reward", "seed_4/rule", "seed_4/frozen",
    ]  # fmt: skip
    policy, reward = tmp_path / "seed_3/start", tmp_path / "seed_3/start_reward"
    assert [run.after for run in runs[:4]] == [(), (), (policy,), (policy, reward)]
    assert [run.steps for run in runs[:4]] == [0, 0, 4, 4]


def test_starts_are_as_few_as_the_arms_need(tmp_path):
    """The reward model's start is left out without an arm that reads it, and where it would train nothing."""
    assert [run.label for run in a_study(tmp_path, names=("rule",), seeds=(3,)).list_runs()] == [
        "seed_3/start", "seed_3/rule",
    ]  # fmt: skip
    study = a_study(tmp_path, names=("frozen",), seeds=(3,), supervised__reward_steps=0)
    start, frozen = study.list_runs()
    assert (start.label, frozen.after) == ("seed_3/start", (start.folder,))
    assert study.make_start_config("start", 3).reward.arm == "model"
    assert study.make_config(study.arms[0], 3).supervised.reward_from == ""


# What the arms are, said once more: a slip in the table of arms shows.
ROBUST = {
    "reward.arm": "cooper", "reward.pair_loss": "sigmoid", "reward.pair_weight": 1.0, "reward.pair_bce": 2.0,
    "reward.rollout_bce": 0.0, "reward.updates": 2, "reward.warmup_updates": 20, "reward.replay": 0,
    "reward.replay_rows": 0, "reward.answer_required": False, "reward.rule_or_model": False,
    "reward.shuffle_labels": False,
    "pairs.per_prompt": 3, "pairs.negatives": ("assistant", "swap", "own_answer"), "policy.kl_coef": 0.002,
    "policy.std_floor": 0.0,
}  # fmt: skip
_PAPERS = {
    "reward.pair_bce": 0.0, "reward.updates": 1, "reward.warmup_updates": 0, "pairs.negatives": ("assistant",)
}  # fmt: skip
_FROZEN = {"reward.arm": "model", "reward.warmup_updates": 0}
_LABELS = {"reward.rollout_bce": 1.0, "reward.replay": 256, "reward.replay_rows": 32}
_TWO = {"pairs.per_prompt": 2}
APART = {
    "rule": {"reward.arm": "rule"},
    "frozen": _FROZEN,
    "released": _PAPERS | {"reward.pair_loss": "logit"},
    "sigmoid": _PAPERS,
    "robust": {},
    "frozen_warm": {"reward.arm": "model"},
    "frozen_guard": _FROZEN | {"reward.answer_required": True},
    "frozen_kl10": _FROZEN | {"policy.kl_coef": 0.02},
    "frozen_kl100": _FROZEN | {"policy.kl_coef": 0.2},
    "frozen_floor": _FROZEN | {"policy.std_floor": 0.1},
    "either": _FROZEN | {"reward.rule_or_model": True},
    "bce": _LABELS | {"reward.pair_weight": 0.0, "reward.pair_bce": 0.0},
    "labels": _LABELS,
    "rewrites": {"pairs.negatives": ("assistant",)},
    "pointwise": _PAPERS | {"reward.pair_bce": 2.0},
    "no_bce": {"reward.pair_bce": 0.0},
    "no_warm": {"reward.warmup_updates": 0},
    "no_swap": _TWO | {"pairs.negatives": ("assistant", "own_answer")},
    "no_own": _TWO | {"pairs.negatives": ("assistant", "swap")},
    "logit": {"reward.pair_loss": "logit"},
    "shuffled": {"reward.shuffle_labels": True},
}


@pytest.fixture(scope="module")
def of_arms(tmp_path_factory) -> dict[str, tuple]:
    """Each arm's study, over flags and the recipe of the config file, and the settings that its run reads."""
    given = ("policy.kl_coef", "steps", "eval.every")
    base = small(policy__kl_coef=0.002)
    recipes.apply_presets(base, given)  # as launch/common.py does
    out = tmp_path_factory.mktemp("arms")
    studies = [
        study_plan.Study(out, "configs/tiny.py", base, given, arms.choose_arms([name], (), base), [5])
        for name in arms.ARMS
    ]
    read = as_train_reads([study.make_run(study.arms[0], 5).command for study in studies], base)
    return {name: (study, got) for name, study, got in zip(arms.ARMS, studies, read, strict=True)}


@pytest.mark.parametrize("name", arms.ARMS)
def test_an_arms_settings_reach_its_runs(of_arms, name):
    """Also over the recipe of the config file: the flags' text, read as launch/train.py reads it."""
    study, got = of_arms[name]
    run = study.make_run(study.arms[0], 5)
    assert run.command[:3] == (sys.executable, str(study_plan.TRAIN), "--config=configs/tiny.py")
    wanted = flatten_config(study.make_config(study.arms[0], 5).to_dict())
    assert {k: v for k, v in got.items() if v != wanted[k]} == {}
    own = arms.list_settings(study.arms[0], study.base)
    assert own.items() <= got.items()
    assert got["seed"] == 5 and got["supervised.start_from"] == str(study.out / "seed_5/start")
    reward = "" if got["reward.arm"] == "rule" else str(study.out / "seed_5/start_reward")
    assert got["supervised.reward_from"] == reward
    assert {field: got[field] for field in ROBUST} == ROBUST | APART[name]


# Flags are parsed once in a process: one forks for each command.
READER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from absl import app
from cooper_jax.launch import common
for words in json.load(sys.stdin):
    if os.fork() == 0:
        sys.argv = words
        app.run(lambda _: print(json.dumps(common.read_config().to_dict())), flags_parser=common.parse_flags)
    if os.wait()[1]:
        sys.exit(f"refused: {words}")
"""


def as_train_reads(commands, base) -> list[dict]:
    """Dotted fields of the configs that launch/train.py makes of commands."""
    told = subprocess.run(
        [sys.executable, "-c", READER, str(ROOT)],
        input=json.dumps([command[1:] for command in commands]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    ).stdout
    like = flatten_config(base.to_dict())
    return [
        {
            k: tuple(map(_tuples, v)) if isinstance(like[k], tuple) else v
            for k, v in flatten_config(one).items()
        }
        for one in map(json.loads, told.splitlines())
    ]


def _tuples(x):
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


@pytest.mark.parametrize("name, arm", [("start", "rule"), ("start_reward", "model")])
def test_the_starts_of_a_seed_train_a_model_each_and_nothing_else(tmp_path, name, arm):
    cfg = a_study(tmp_path, reward__recipe="robust").make_start_config(name, 3)
    assert (cfg.reward.arm, cfg.reward.warmup_updates, cfg.steps, cfg.eval.every, cfg.seed) == (
        arm,
        0,
        0,
        0,
        3,
    )
    section, usual = cfg.supervised, tiny.get_config().supervised
    assert (section.start_from, section.reward_from) == ("", "")
    assert section.reward_steps == usual.reward_steps  # the rule arm has no reward model to train
    assert section.policy_steps == (usual.policy_steps if name == "start" else 0)


def test_an_arm_of_the_command_line():
    text = "mine: reward.pair_loss=logit, pairs.negatives=('assistant','swap'), reward.pair_bce=1"
    arm = arms.parse_arm(f"{text}, reward.answer_required=true", small())
    assert arm.name == "mine" and arm.settings == {
        "reward.pair_loss": "logit", "pairs.negatives": ("assistant", "swap"), "reward.pair_bce": 1.0,
        "reward.answer_required": True,
    }  # fmt: skip
    settings = arms.list_settings(
        arms.parse_arm("mine: reward.recipe=robust, reward.updates=5", small()), small()
    )
    assert settings["reward.updates"] == 5 and settings["reward.warmup_updates"] == 20


@pytest.mark.parametrize(
    "text, message",
    [
        ("mine reward.updates=3", "a colon and settings"),
        ("start: reward.updates=3", "other than start,"),
        ("start_reward: reward.updates=3", "start_reward, compile, a colon"),
        (
            "mine: reward.updats=3",
            "--arm=mine: --config.reward.updats: the config does not have this field",
        ),
        ("mine: reward.updates=3.5", "reward.updates=3.5: it takes a int like 1"),
        ("mine: reward.pair_bce=much", "takes a float"),
        ("mine: supervised.reward_steps=3", "supervised.reward_steps is the same in all arms"),
        ("mine: reward.recipe=sturdy", "--arm=mine: reward.recipe is .sturdy.; it is one of released"),
        ("mine: reward.pair_weight=0", "arm mine: reward.pair_weight=0"),
        ("rule: reward.updates=3", "rule occurs twice"),
    ],
)
def test_arms_that_cannot_be(tmp_path, text, message):
    with pytest.raises(SetupError, match=message):
        a_study(tmp_path, defined=[text])


def test_settings_that_are_the_studys(tmp_path):
    with pytest.raises(SetupError, match="--config.seed: it belongs to --seeds"):
        a_study(tmp_path, given=("seed",))
    with pytest.raises(SetupError, match="eval.every=0"):
        a_study(tmp_path, eval__every=0)
    for field, value in {"reward.pair_bce": 0.25, "reward.recipe": "released"}.items():
        fields = {field.replace(".", "__"): value}
        with pytest.raises(SetupError, match=rf"--config.{field}={value}: the arm robust sets it to"):
            a_study(tmp_path, names=("robust",), given=(field,), **fields)
    a_study(
        tmp_path,
        names=("robust", "frozen_kl10"),
        given=("reward.pair_bce", "policy.kl_coef"),
        reward__pair_bce=2.0,
    )
    with pytest.raises(SetupError, match="--arms: rul: the arms are rule, frozen"):
        a_study(tmp_path, names=("rul",))


def test_seeds():
    assert study_plan.parse_seeds("1,3,10-12,11") == [1, 3, 10, 11, 12]
    for wrong in ("", "3-1", "-3", "a", "1,,2"):
        with pytest.raises(SetupError, match="--seeds="):
            study_plan.parse_seeds(wrong)


def test_settings_that_differ_are_refused(tmp_path):
    a_study(tmp_path, steps=6).begin()
    a_study(tmp_path).begin()  # nothing was run under the slip
    for arm in ("rule", "mine"):
        (tmp_path / "seed_7" / arm).mkdir(parents=True)
    a_study(tmp_path, names=("rule", "robust"), seeds=(8,)).begin()  # more arms and seeds are welcome
    with pytest.raises(ValueError, match="policy.kl_coef was 0.001 and is now 0.1"):
        a_study(tmp_path, policy__kl_coef=0.1).begin()
    with pytest.raises(ValueError, match="steps was 4 and is now 6"):
        a_study(tmp_path, steps=6).begin()
    a_study(tmp_path, defined=["mine: reward.updates=2"]).begin()
    with pytest.raises(
        ValueError, match="mine was begun with other settings: reward.updates was 2 and is now 3"
    ):
        a_study(tmp_path, defined=["mine: reward.updates=3"]).begin()


# --- carrying it out ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_complete_is_not_started_again(tmp_path, stand_in):
    study = a_study(tmp_path / "out")
    assert carry_out(study) == []
    labels = [run.label for run in study.list_runs()]
    assert started(study) == labels and all(run.is_complete() for run in study.list_runs())
    assert carry_out(study) == [] and started(study) == labels
    assert carry_out(a_study(tmp_path / "out", seeds=(4, 9))) == []
    starts = ["seed_9/start", "seed_9/start_reward"]
    assert started(study) == [*labels, *starts, "seed_9/rule", "seed_9/frozen"]


def test_a_torn_run_goes_on(tmp_path, stand_in):
    study = a_study(tmp_path / "out", names=("rule",), seeds=(3,))
    carry_out(study)
    path = tmp_path / "out/seed_3/rule/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:9])
    assert study.list_runs()[1].count_done() == 2
    carry_out(study)
    assert started(study) == ["seed_3/start", "seed_3/rule", "seed_3/rule"]
    assert [row["step"] for row in records.read_whole_rows(path)] == [0, 1, 2, 3, 4]


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path, stand_in):
    study = a_study(tmp_path / "out", name="fails")
    failed = carry_out(study)
    assert [f.run.label for f in failed] == ["seed_3/frozen", "seed_4/frozen"]
    assert "exit code 1" in str(failed[0]) and "it was the second step" in str(failed[0])
    assert [run.label for run in study.list_runs() if run.is_complete()] == [
        "seed_3/start", "seed_3/start_reward", "seed_3/rule",
        "seed_4/start", "seed_4/start_reward", "seed_4/rule",
    ]  # fmt: skip


def test_without_its_start_no_arm_begins(tmp_path, stand_in):
    failed = carry_out(a_study(tmp_path / "out", name="no_start", seeds=(3,)))
    assert [f.run.label for f in failed] == [
        "seed_3/start", "seed_3/rule", "seed_3/frozen", "seed_3/start_reward",
    ]  # fmt: skip
    assert "no start for you" in str(failed[0]) and "seed_3/start failed" in str(failed[1])


def test_an_arm_without_a_reward_model_does_not_wait_for_one(tmp_path, stand_in):
    failed = carry_out(a_study(tmp_path / "out", name="no_reward_start", seeds=(3,)))
    assert [f.run.label for f in failed] == ["seed_3/start_reward", "seed_3/frozen"]
    assert started(a_study(tmp_path / "out", seeds=(3,)))[-1] == "seed_3/rule"


def test_the_starts_of_a_seed_run_at_the_same_time(tmp_path, stand_in):
    study = a_study(tmp_path / "out", seeds=(3,))
    study.begin()
    most: list[set[str]] = []

    def watch(now):
        most.append({work.run.label for work in now.running.values()})

    assert run_scheduler.run_study(study.list_runs(), 2, watch) == []
    assert {"seed_3/start", "seed_3/start_reward"} in most


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_several_runs_at_once_keep_to_a_core_each(tmp_path, stand_in):
    before, most = os.sched_getaffinity(0), []
    study = a_study(tmp_path / "out")
    study.begin()
    assert run_scheduler.run_study(study.list_runs(), 2, lambda now: most.append(len(now.running))) == []
    assert max(most) == 2 and os.sched_getaffinity(0) == before
    rows = records.read_whole_rows(tmp_path / "out/seed_3/rule/metrics.jsonl")
    assert [row["cores"] for row in rows] == [1] * 5


@pytest.mark.slow
def test_an_idle_slot_compiles_until_an_arm_can_use_it(tmp_path, stand_in):
    study = a_study(tmp_path / "out", names=("frozen", "robust"), seeds=(3,), name="slow")
    compile_run = study.make_compile_run()
    assert compile_run.after == (tmp_path / "out/seed_3/start",)
    settings = as_train_reads([compile_run.command], study.base)[0]
    assert settings["reward.arm"] == "cooper" and settings["supervised.reward_from"] == "own"
    study.begin()
    began = time.monotonic()
    assert run_scheduler.run_study(study.list_runs(), 2, lambda now: None, compile_run) == []
    assert time.monotonic() - began < 30
    assert [name.removeprefix("seed_3/") for name in sorted(started(study)[:2])] == ["start", "start_reward"]
    assert started(study)[2] == "seed_3/compile" and len(started(study)) == 5
    assert not compile_run.folder.exists()


def test_no_slot_compiles_that_a_run_could_use(tmp_path, stand_in):
    study = a_study(tmp_path / "out", seeds=(3,))
    study.begin()
    assert run_scheduler.run_study(study.list_runs(), 1, lambda now: None, study.make_compile_run()) == []
    assert len(started(study)) == 4
    assert a_study(tmp_path, names=("rule",)).make_compile_run() is None


def test_a_signal_is_passed_on_and_the_same_command_goes_on(tmp_path, stand_in):
    study = a_study(tmp_path / "out", names=("rule",), seeds=(3,), name="waits")
    study.begin()

    def watch(now):
        if any(work.run.count_done() == 1 for work in now.running.values()):
            os.kill(os.getpid(), signal.SIGINT)

    before, began = signal.getsignal(signal.SIGINT), time.monotonic()
    with pytest.raises(Stopped):
        run_scheduler.run_study(study.list_runs(), 1, watch)
    assert time.monotonic() - began < 30 and signal.getsignal(signal.SIGINT) is before
    assert (tmp_path / "out/seed_3/rule/log.txt").read_text().endswith("saved\n")
    text = stand_in.read_text()
    stand_in.write_text(text.replace('"waits"', '"never"'))
    assert carry_out(study) == [] and study.list_runs()[1].is_complete()


def make_statuses(study):
    """A study of one arm and one seed: its start runs, then the arm, which fails."""
    start, rule = study.list_runs()
    runs = [start, rule]
    yield run_scheduler.StudyStatus(
        runs, 1, waiting=[rule], running={0: run_scheduler.RunningProcess(start, None, 0.0, 0)}
    )
    rule.folder.mkdir(parents=True)
    (rule.folder / "metrics.jsonl").write_text('{"step": 0, "eval/oracle/accuracy": 0.25}\n{"step": 1}\n{"st')
    (rule.folder / "log.txt").write_text(
        "$ python launch/train.py\nstep 2: rollout (1 of 3) ...\n  response  5\n"
    )
    yield run_scheduler.StudyStatus(
        runs, 1, complete=[start], running={0: run_scheduler.RunningProcess(rule, None, 30.0, 0)}
    )
    yield run_scheduler.StudyStatus(
        runs, 1, complete=[start], failed=[run_scheduler.Failure(rule, "no more")]
    )


def test_a_log_gets_a_line_for_each_change(tmp_path, stand_in):
    study, clock = a_study(tmp_path / "out", names=("rule",), seeds=(3,)), iter(range(0, 1000, 10))
    out = io.StringIO()
    board = progress.ProgressBoard(Console(out), clock=lambda: float(next(clock)))
    for status in make_statuses(study):
        board(status)
    board.close()
    said = out.getvalue().splitlines()
    assert said[0] == "0/2 runs, 1 running, 1 waiting  seed_3/start  ETA ?"
    # Three steps are left; the one that is done took as long as the run does: some tens of seconds.
    assert said[1].startswith("1/2 runs, 1 running  seed_3/rule 1/4 25% (step 2: rollout (1 of 3))  ETA 0:0")
    assert said[2] == "failed: seed_3/rule: no more"
    assert said[3:] == ["1/2 runs, 1 failed  ETA 0:00:00"]


def test_a_terminal_has_a_table_of_all_runs(tmp_path, stand_in, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(Console, "page_lines", 24)
    study, clock = a_study(tmp_path / "out", names=("rule",), seeds=(3,)), iter(range(0, 1000, 10))
    console = Console(Terminal())
    board = progress.ProgressBoard(console, clock=lambda: float(next(clock)))
    tables = []
    for status in make_statuses(study):
        board(status)
        drawn = io.StringIO()
        RichConsole(file=drawn, width=100).print(board._render())
        tables.append([line.split() for line in drawn.getvalue().splitlines()])
    board.close()
    first, second, third = tables
    assert first[1] == "run state step held-out time doing".split()
    assert first[2][:2] == ["seed_3/start", "running"] and first[3] == ["seed_3/rule", "waiting"]
    assert second[2][:4] == ["seed_3/rule", "running", "1/4", "25%"]
    assert " ".join(second[2]).endswith("s step 2: rollout (1 of 3)")
    assert third[2:] == [["seed_3/rule", "failed"], ["seed_3/start", "complete"]]
    monkeypatch.setattr(Console, "page_lines", 5)
    drawn = io.StringIO()
    RichConsole(file=drawn, width=100).print(board._render())
    assert drawn.getvalue().splitlines()[-1].strip() == "and 1 more"


# --- the command -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, says",
    [
        (["--config=configs/tiny.py", "--arms=rull"], "error: --arms: rull: the arms are rule"),
        (["--config=configs/tiny.py", "--from=x"], "error: --from=x belongs to --report"),
        (["--config=configs/tiny.py", "--report", "--from=x"], "error: --from=x: there is no such file"),
        (["--config=configs/tiny.py", "--config.seed=3"], "error: --config.seed: it belongs to --seeds"),
        (["--report"], "not the folder of a study"),
    ],
)
def test_bad_flags_give_one_line(tmp_path, words, says):
    done = launch(*words, f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from absl import app
from cooper_jax.study import study_plan
from cooper_jax.launch import study
study_plan.TRAIN = Path({stand_in!r})
app.run(study.main, flags_parser=study.parse_flags)
"""


def start(stand_in: Path, out: Path, name: str) -> subprocess.Popen:
    """launch/study.py with a stand-in for launch/train.py."""
    program = PROGRAM.format(root=str(ROOT), stand_in=str(stand_in))
    words = [f"--config={ROOT / 'configs/tiny.py'}", f"--out={out}", "--arms=rule,frozen", "--jobs=2"]
    words += ["--config.steps=4", "--config.eval.every=2", f"--config.name={name}"]
    return subprocess.Popen(
        [sys.executable, "-c", program, *words], env=tiny_runs.environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
def test_exit_codes(tmp_path, stand_in):
    failing = start(stand_in, tmp_path / "fails", "fails")
    said, errors = failing.communicate(timeout=120)
    assert failing.returncode == 1 and "failed: seed_0/frozen: see log.txt" in errors, said + errors
    assert "it was the second step" in said and "| rule | reward: the rule verifier's verdict | 1 |" in said
    waiting = start(stand_in, tmp_path / "waits", "waits")
    until = time.monotonic() + 120
    while not (tmp_path / "waits/seed_0/rule/metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.1)
    waiting.send_signal(signal.SIGTERM)
    said, errors = waiting.communicate(timeout=120)
    assert waiting.returncode == 75 and "the same command resumes" in said, said + errors
