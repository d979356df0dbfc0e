"""The study: what would run, what is carried out, and its figures against ones computed by hand."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from ml_collections import ConfigDict

from configs import tiny
from cooper_jax import recipes
from cooper_jax.runtime.hosts import Stopped
from cooper_jax.runtime.rundir import flat
from cooper_jax.settings import SetupError
from cooper_jax.statistics import Interval
from cooper_jax.study import arms, figure, plan, progress, records, report, schedule, summary, tables

ROOT = Path(__file__).resolve().parents[1]

# In place of launch/train.py: a start makes its checkpoint; an arm goes on from its last whole line, and what its
# config's name says befalls it: "fails" at step 2 of the frozen arm, "waits" for a signal at step 1 of every arm.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
flag = dict(x.removeprefix("--config.").split("=", 1) for x in sys.argv[1:])
folder, steps, kind = Path(flag["run_dir"]), int(flag["steps"]), flag["reward.arm"]
with open(folder.parents[1] / "started", "a") as file:
    file.write(f"{folder.parent.name}/{folder.name}\\n")
def end(*_):
    print("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, end)
if steps == 0:
    if flag["name"] == "no_start":
        sys.exit("no start for you")
    (folder / "checkpoints/0").mkdir(parents=True)
    sys.exit()
assert (Path(flag["warmup.start"]) / "checkpoints/0").is_dir()
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


def small(**changes) -> ConfigDict:
    cfg = tiny.get_config()
    fields = {"steps": 4, "eval.every": 2} | {name.replace("__", "."): x for name, x in changes.items()}
    cfg.update_from_flattened_dict(fields)
    return cfg


def a_study(
    out: Path,
    names=("rule", "frozen"),
    seeds=(3, 4),
    defined=(),
    given=("name", "steps", "eval.every"),
    **changes,
):
    base = small(**changes)
    return plan.Study(out, "configs/tiny.py", base, given, arms.choose(names, defined, base), seeds)


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "train.py"
    path.write_text(STAND_IN)
    monkeypatch.setattr(plan, "TRAIN", path)
    return path


def started(study: plan.Study) -> list[str]:
    path = study.out / "started"
    return path.read_text().split() if path.exists() else []


def carry_out(study: plan.Study, jobs: int = 1) -> list[schedule.Failure]:
    study.begin()
    return schedule.carry_out(study.runs(), jobs, lambda standing: None)


# --- what would run -----------------------------------------------------------------------------------


def test_runs_go_seed_by_seed_after_their_start(tmp_path):
    runs = a_study(tmp_path).runs()
    assert [run.label for run in runs] == [
        "seed_3/start", "seed_3/rule", "seed_3/frozen", "seed_4/start", "seed_4/rule", "seed_4/frozen",
    ]  # fmt: skip
    assert [run.after for run in runs[:3]] == [None, tmp_path / "seed_3/start", tmp_path / "seed_3/start"]
    assert [run.steps for run in runs[:3]] == [0, 4, 4]


@pytest.mark.parametrize("name", arms.ARMS)
def test_an_arms_settings_reach_its_runs(tmp_path, name):
    """Also over flags and over a recipe of the config file: the flags' text, read as launch/train.py reads it."""
    given = ("reward.recipe", "reward.updates", "policy.kl_coef", "steps", "eval.every")
    base = small(reward__recipe="released", reward__updates=7, policy__kl_coef=0.002)
    recipes.apply(base, given)  # as launch/common.py does
    study = plan.Study(tmp_path, "configs/tiny.py", base, given, arms.choose([name], (), base), [5])
    run = study.run(study.arms[0], 5)
    assert run.command[:3] == (sys.executable, str(plan.TRAIN), "--config=configs/tiny.py")
    got = as_train_reads(run.command, base)
    wanted = flat(study.config(study.arms[0], 5).to_dict())
    assert {k: v for k, v in got.items() if v != wanted[k]} == {}
    own = arms.settings_of(study.arms[0], base)
    assert own.items() <= got.items()
    assert got["seed"] == 5 and got["warmup.start"] == str(tmp_path / "seed_5/start")
    assert got["policy.kl_coef"] == 0.002 * {"frozen_kl10": 10, "frozen_kl100": 100}.get(name, 1)
    if name == "robust":
        assert got["reward.updates"] == recipes.RECIPES["robust"]["reward.updates"] != 7
    if name == "frozen":  # nothing of the base's recipe, but the flag's value
        assert (got["reward.arm"], got["reward.warm_start"], got["reward.updates"]) == ("model", 0, 7)


def as_train_reads(command, base) -> dict:
    """Dotted fields of the config that launch/train.py makes of a command."""
    program = (
        "import sys, json; sys.path.insert(0, sys.argv.pop(1))\n"
        "from absl import app\nfrom launch import common\n"
        "app.run(lambda _: print(json.dumps(common.config().to_dict())), flags_parser=common.parse_flags)"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, str(ROOT), *command[2:]],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    ).stdout
    like = flat(base.to_dict())
    found = flat(json.loads(told))
    return {k: tuple(map(_tuples, v)) if isinstance(like[k], tuple) else v for k, v in found.items()}


def _tuples(x):
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


def test_the_start_of_a_seed_holds_both_models_and_nothing_else(tmp_path):
    cfg = a_study(tmp_path, reward__recipe="robust").config(None, 3)
    assert (cfg.reward.arm, cfg.reward.warm_start, cfg.steps, cfg.eval.every, cfg.seed) == (
        "model",
        0,
        0,
        0,
        3,
    )
    assert cfg.warmup.start == "" and cfg.warmup.reward_steps == tiny.get_config().warmup.reward_steps


def test_an_arm_of_the_command_line():
    text = "mine: reward.pair_loss=logit, pairs.negatives=('assistant','swap'), reward.pair_bce=1"
    arm = arms.parse(f"{text}, reward.guard=true", small())
    assert arm.name == "mine" and arm.settings == {
        "reward.pair_loss": "logit", "pairs.negatives": ("assistant", "swap"), "reward.pair_bce": 1.0,
        "reward.guard": True,
    }  # fmt: skip
    settings = arms.settings_of(arms.parse("mine: reward.recipe=robust, reward.updates=5", small()), small())
    assert settings["reward.updates"] == 5 and settings["reward.warm_start"] == 20


@pytest.mark.parametrize(
    "text, message",
    [
        ("mine reward.updates=3", "a colon and settings"),
        ("start: reward.updates=3", "other than 'start'"),
        ("mine: reward.updats=3", "'reward.updats=3': it is FIELD=VALUE"),
        ("mine: reward.updates=3.5", "reward.updates=3.5: it takes a int like 1"),
        ("mine: reward.pair_bce=much", "takes a float"),
        ("mine: warmup.reward_steps=3", "warmup.reward_steps is alike in all arms"),
        ("mine: reward.recipe=sturdy", "reward.recipe=sturdy: it is one of released"),
        ("mine: reward.pair_weight=0", "arm mine: reward.pair_weight=0"),
        ("rule: reward.updates=3", "rule is there twice"),
    ],
)
def test_arms_that_cannot_be(tmp_path, text, message):
    with pytest.raises(SetupError, match=message):
        a_study(tmp_path, defined=[text])


def test_settings_that_are_the_studys(tmp_path):
    with pytest.raises(SetupError, match="--config.seed: that is --seeds's"):
        a_study(tmp_path, given=("seed",))
    with pytest.raises(SetupError, match="eval.every=0"):
        a_study(tmp_path, eval__every=0)
    with pytest.raises(SetupError, match="--arms: rul: there is rule, frozen"):
        a_study(tmp_path, names=("rul",))


def test_seeds():
    assert plan.parse_seeds("1,3,10-12,11") == [1, 3, 10, 11, 12]
    for wrong in ("", "3-1", "-3", "a", "1,,2"):
        with pytest.raises(SetupError, match="--seeds="):
            plan.parse_seeds(wrong)


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


def test_what_is_complete_is_not_started_again(tmp_path, stand_in):
    study = a_study(tmp_path / "out")
    assert carry_out(study) == []
    labels = [run.label for run in study.runs()]
    assert started(study) == labels and all(run.complete() for run in study.runs())
    assert carry_out(study) == [] and started(study) == labels
    assert carry_out(a_study(tmp_path / "out", seeds=(4, 9))) == []
    assert started(study) == [*labels, "seed_9/start", "seed_9/rule", "seed_9/frozen"]


def test_a_torn_run_goes_on(tmp_path, stand_in):
    study = a_study(tmp_path / "out", names=("rule",), seeds=(3,))
    carry_out(study)
    path = tmp_path / "out/seed_3/rule/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:9])
    assert study.runs()[1].done() == 2
    carry_out(study)
    assert started(study) == ["seed_3/start", "seed_3/rule", "seed_3/rule"]
    assert [row["step"] for row in records.whole_rows(path)] == [0, 1, 2, 3, 4]


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path, stand_in):
    study = a_study(tmp_path / "out", name="fails")
    failed = carry_out(study)
    assert [f.run.label for f in failed] == ["seed_3/frozen", "seed_4/frozen"]
    assert "exit code 1" in str(failed[0]) and "it was the second step" in str(failed[0])
    assert [run.label for run in study.runs() if run.complete()] == [
        "seed_3/start", "seed_3/rule", "seed_4/start", "seed_4/rule",
    ]  # fmt: skip


def test_without_its_start_no_arm_begins(tmp_path, stand_in):
    failed = carry_out(a_study(tmp_path / "out", name="no_start", seeds=(3,)))
    assert [f.run.label for f in failed] == ["seed_3/start", "seed_3/rule", "seed_3/frozen"]
    assert "no start for you" in str(failed[0]) and "seed_3/start failed" in str(failed[1])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_several_runs_at_once_keep_to_a_core_each(tmp_path, stand_in):
    before, most = os.sched_getaffinity(0), []
    study = a_study(tmp_path / "out")
    study.begin()
    assert schedule.carry_out(study.runs(), 2, lambda now: most.append(len(now.working))) == []
    assert max(most) == 2 and os.sched_getaffinity(0) == before
    rows = records.whole_rows(tmp_path / "out/seed_3/rule/metrics.jsonl")
    assert [row["cores"] for row in rows] == [1] * 5


def test_a_signal_is_passed_on_and_the_same_command_goes_on(tmp_path, stand_in):
    study = a_study(tmp_path / "out", names=("rule",), seeds=(3,), name="waits")
    study.begin()

    def watch(now):
        if any(work.run.done() == 1 for work in now.working.values()):
            os.kill(os.getpid(), signal.SIGINT)

    before, began = signal.getsignal(signal.SIGINT), time.monotonic()
    with pytest.raises(Stopped):
        schedule.carry_out(study.runs(), 1, watch)
    assert time.monotonic() - began < 30 and signal.getsignal(signal.SIGINT) is before
    assert (tmp_path / "out/seed_3/rule/log.txt").read_text().endswith("saved\n")
    text = stand_in.read_text()
    stand_in.write_text(text.replace('"waits"', '"never"'))
    assert carry_out(study) == [] and study.runs()[1].complete()


def test_progress(tmp_path, stand_in, capsys):
    study = a_study(tmp_path / "out", names=("rule",), seeds=(3,))
    now, clock = schedule.Standing(study.runs(), jobs=1), iter(range(0, 1000, 10))
    board = progress.Board(clock=lambda: float(next(clock)))
    start, rule = now.runs
    now.waiting = [rule]
    now.working = {0: schedule.Working(start, None, 0.0, 0)}
    board(now)
    rule.folder.mkdir(parents=True)
    (rule.folder / "metrics.jsonl").write_text('{"step": 0, "eval/oracle/accuracy": 0.25}\n{"step": 1}\n{"st')
    now.waiting, now.complete, now.working = [], [start], {0: schedule.Working(rule, None, 30.0, 0)}
    board(now)
    now.failed, now.working = [schedule.Failure(rule, "no more")], {}
    board(now)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "0/2 runs  seed_3/start  ETA ?"
    # Three steps are left; the one that is done took as long as the run does: some tens of seconds.
    assert said[1].startswith("1/2 runs  seed_3/rule 1/4 25%  ETA 0:0")
    assert said[2] == "failed: seed_3/rule: no more"
    assert said[3] == "1/2 runs  ETA 0:00:00"


# --- figures ------------------------------------------------------------------------------------------

STUDY = {
    "steps": 8, "problems": 100, "samples": 1, "every": 2, "seeds": [1, 2, 3],
    "arms": {"rule": {"about": "the rule", "settings": {}}, "frozen": {"about": "no update", "settings": {}}},
}  # fmt: skip


def rows_of(accuracies, *, reward=0.5, false_positives=None, judge=None) -> list[dict]:
    """Of steps 0, 2, 4, ...; what is known of a step is a number for all, or a list."""
    rows = []
    for step in range(2 * (len(accuracies) - 1) + 1):
        row = {"step": step}
        if step:
            row |= {"reward/mean": reward, "time/step": 2.0, "time/reward": 0.5, "rm/updates": 1.0}
            if false_positives is not None:
                row["rm/false_positive_rate"] = false_positives[step - 1]
        if step % 2 == 0:
            row["eval/oracle/accuracy"] = accuracies[step // 2]
            if judge is not None:
                row |= {"eval/rm_balanced/accuracy": judge[step // 2], "eval/rm_balanced/auroc": math.nan}
        rows.append(row)
    return rows


def test_figures_of_a_run():
    signal_of_steps = [0.1, math.nan, 0.9, 0.3, 0.3, 0.3, 0.3, 0.3]
    rows = rows_of(
        [0.4, 0.2, 0.3, 0.6, 0.9], false_positives=signal_of_steps, judge=[0.7, 0.6, 0.8, 0.8, 0.5]
    )
    found = summary.of_run(records.of_run("frozen", 1, rows), STUDY)
    assert found["complete"] and found["done"] == 8
    assert (found["accuracy_start"], found["accuracy_lowest"], found["accuracy_lowest_at"]) == (0.4, 0.2, 2)
    assert found["accuracy_end"] == pytest.approx((0.3 + 0.6 + 0.9) / 3)
    assert found["ends_above_start"] and not found["ends_below_half"]
    assert (found["false_positives_most"], found["false_positives_most_at"]) == (0.9, 3)
    assert found["false_positives_end"] == pytest.approx(
        (0.1 + 0.9 + 5 * 0.3) / 7
    )  # the last ten, of what is there
    assert (found["seconds"], found["reward_seconds"], found["reward_share"], found["updates"]) == (
        16,
        4,
        0.25,
        8,
    )
    assert found["rm_balanced_end"] == pytest.approx((0.8 + 0.8 + 0.5) / 3)
    assert (found["rm_balanced_lowest"], found["rm_balanced_lowest_at"]) == (0.5, 8)
    assert math.isnan(found["rm_balanced_auroc_end"]) and "rm_original_end" not in found


def test_the_end_is_after_the_start():
    """Of two evaluations only the second is an end; of none after step 0 there is none."""
    assert summary.trace("a", [(0, 0.5), (2, 0.25)])["a_end"] == 0.25
    assert math.isnan(summary.trace("a", [(0, 0.5)])["a_end"])


@pytest.mark.parametrize(
    "accuracy, is_one",
    [
        (0.40, False),
        (0.35, False),  # .35 + 1.96 sqrt(.35 x .65 / 100) = .443 is not under .8 x .5 = .4
        (0.31, False),  # .31 + .0906 = .4006
        (0.30, True),  # .30 + .0898 = .3898
        (0.0, True),
    ],
)
def test_a_dip_is_more_than_chance(accuracy, is_one):
    assert summary.dipped([0.5, accuracy, 0.6], 0.5, 100) is is_one


def test_over_seeds_by_hand():
    # mean 2, s = sqrt(((-1)^2 + 0 + 1^2) / 2) = 1, t(.975, 2) = 4.302653
    found = summary.over_seeds([1.0, 2.0, 3.0])
    assert (found.value, found.low, found.high) == pytest.approx(
        (2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5)
    )
    one = summary.over_seeds([0.5, math.nan])
    assert one.value == 0.5 and math.isnan(one.low) and math.isnan(summary.over_seeds([]).value)


def test_a_runs_gain_by_hand():
    # .3 to .5 of 100: the variances are .0021 and .0025, together .0678 squared
    found = summary.gain(0.3, 0.5, 100)
    assert (found.value, found.low, found.high) == pytest.approx(
        (0.2, 0.2 - 0.13293, 0.2 + 0.13293), abs=1e-5
    )


def of_three_seeds() -> records.Records:
    runs = [
        records.of_run("rule", seed, rows_of([0.4, 0.5, end, end, end]))
        for seed, end in ((1, 0.6), (2, 0.7), (3, 0.8))
    ]
    runs += [
        records.of_run("frozen", 1, rows_of([0.4, 0.3, 0.1, 0.1, 0.1], reward=0.9, judge=[0.7] * 5)),
        records.of_run("frozen", 2, rows_of([0.4, 0.3, 0.1, 0.3, 0.5], reward=0.8, judge=[0.6] * 5)),
        records.of_run("frozen", 3, rows_of([0.4, 0.3, 0.2], judge=[0.6] * 3)),  # at step 4 of 8
    ]
    return records.Records(STUDY, tuple(runs))


def test_figures_of_arms():
    found = summary.summarise(of_three_seeds())
    rule, frozen = found["arms"]["rule"], found["arms"]["frozen"]
    assert rule["seeds"] == [1, 2, 3] and rule["accuracy_end"].value == pytest.approx(0.7)
    assert rule["accuracy_end"].high == pytest.approx(0.7 + 4.302653 * 0.1 / 3**0.5)
    assert (rule["ends_above_start"], rule["ends_below_half"], rule["dipped"]) == (3, 0, 0)
    assert frozen["seeds"] == [1, 2]  # what is not complete is in no mean
    assert (frozen["ends_above_start"], frozen["ends_below_half"], frozen["dipped"]) == (0, 1, 2)
    assert rule["accuracy_gain"].value == pytest.approx(0.3) and rule["accuracy_gain"].low == pytest.approx(
        0.3 - 4.302653 * 0.1 / 3**0.5
    )
    # Seed by seed: .1 - .6 = -.5 and .3 - .7 = -.4; s = .1 / sqrt 2, t(.975, 1) = 12.7062
    assert frozen["pairs"] == 2 and frozen["end_less_rule"] == Interval(
        pytest.approx(-0.45),
        pytest.approx(-0.45 - 12.7062 * 0.05, abs=1e-5),
        pytest.approx(-0.45 + 12.7062 * 0.05, abs=1e-5),
    )
    assert frozen["reward_end"].value == pytest.approx(0.85)
    assert found["missing"] == [{"arm": "frozen", "seed": 3, "done": 4}]


def test_a_run_without_its_last_evaluation_is_not_complete():
    rows = rows_of([0.4, 0.5, 0.5, 0.5, 0.5])
    assert summary.of_run(records.of_run("rule", 1, rows), STUDY)["complete"]
    del rows[-1]["eval/oracle/accuracy"]
    assert not summary.of_run(records.of_run("rule", 1, rows), STUDY)["complete"]
    some = records.Records(STUDY | {"seeds": [1, 2, 3, 5]}, (records.of_run("rule", 1, rows),))
    assert "(seeds): rule on 1 (at step 8), 2-3, 5; frozen on 1-3, 5." in tables.markdown(
        summary.summarise(some)
    )


def test_how_pairs_moved_by_spans():
    rows = [{"step": 0, "eval/oracle/accuracy": 0.5}]
    rows += [{"step": s, "rm/common_push": float(s), "rm/valid": 2.0 * s} for s in range(1, 41)]
    rows[7]["rm/common_push"] = math.nan
    found = records.of_run("robust", 1, rows).motion
    assert found == {
        "1-10": {"common_push": 5.333, "valid": 11.0},  # (55 - 7) / 9
        "11-30": {"common_push": 20.5, "valid": 41.0},
        "31-": {"common_push": 35.5, "valid": 71.0},
    }


def test_kept_records_make_the_same_tables_and_figure(tmp_path):
    """After their way through files: the runs' own, and the compact one."""
    out, rng = tmp_path / "out", np.random.default_rng(0)
    study = a_study(out, names=("rule", "robust"), seeds=(1, 2), eval__problems=300)
    study.begin()
    for name in ("rule", "robust"):
        for seed in (1, 2):
            rows = rows_of(
                rng.random(3), reward=rng.random(), false_positives=[math.nan, *rng.random(3)],
                judge=None if name == "rule" else rng.random(3),
            )  # fmt: skip
            for row in rows[1:] if name == "robust" else ():
                row["rm/common_push"] = rng.normal()
            folder = out / f"seed_{seed}" / name
            folder.mkdir(parents=True)
            text = "".join(
                json.dumps({k: None if v != v else v for k, v in row.items()}) + "\n" for row in rows
            )
            (folder / "metrics.jsonl").write_text(text + '{"step": 5, "torn')
    found = records.of_folder(out)
    told = report.write(found, tmp_path / "first")
    records.keep(found, tmp_path / "kept/study.jsonl")
    assert report.write(records.of_file(tmp_path / "kept/study.jsonl"), tmp_path / "again") == told
    for name in ("results.json", "tables.md", "study.png"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    results = json.loads((tmp_path / "again/results.json").read_text())
    assert list(results["arms"]) == ["rule", "robust"] and results["study"]["problems"] == 300
    assert "| robust | common push |" in told and "no reward model" not in told
    lines = (tmp_path / "kept/study.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 4 * (3 + 1) and all(len(line) < 2500 for line in lines[1:])


def test_only_some_arms_and_seeds():
    found = of_three_seeds().only(["frozen"], [2, 3])
    assert [(run.arm, run.seed) for run in found.runs] == [("frozen", 2), ("frozen", 3)]
    assert "| frozen | no update | 1 |" in tables.markdown(summary.summarise(found))
    with pytest.raises(ValueError, match="--seeds: 7 is not there; 1, 2, 3 is"):
        of_three_seeds().only([], [7])


def test_a_reward_model_beside_the_one_that_all_begin_with():
    """Its end .65 less its own step 0, .75 after a warm start, and less .7, which the frozen arm begins with."""
    accuracies, ends = [0.4] * 5, (0.6, 0.7)
    runs = [records.of_run("frozen", seed, rows_of(accuracies, judge=[0.7] * 5)) for seed in (1, 2, 3)]
    runs += [
        records.of_run("robust", seed, rows_of(accuracies, judge=[0.75, 0.1, end, end, end]))
        for seed, end in zip((1, 2), ends, strict=True)
    ]
    study = STUDY | {"arms": {name: {"about": "", "settings": {}} for name in ("frozen", "robust")}}
    found = summary.summarise(records.Records(study, tuple(runs)))["arms"]
    robust, half = found["robust"], 12.7062 * 0.05
    for name, value in (("gain", -0.1), ("less_begun", -0.05)):
        of = robust[f"rm_balanced_{name}"]
        assert (of.value, of.low, of.high) == pytest.approx((value, value - half, value + half), abs=1e-5)
    assert found["frozen"]["rm_balanced_less_begun"].value == pytest.approx(0)
    assert "rm_original_less_begun" not in robust


def test_a_moving_mean_of_nothing_is_nothing():
    """Steps at which the rule decided nothing: no warning, and no number."""
    values = np.array([math.nan] * 6 + [1.0, 3.0])
    with warnings.catch_warnings(action="error"):
        found = figure._smooth(values)
    np.testing.assert_array_equal(found, [math.nan] * 4 + [1.0, 2.0, 2.0, 2.0])


def test_tables_show_every_dip_and_what_is_missing():
    text = tables.markdown(summary.summarise(of_three_seeds()))
    assert "(seeds): frozen on 3 (at step 4)." in text
    assert "| frozen | 2 | 40.0 | 10.0 | 4 | 30.0 | -10.0 (-23.1 to 3.1) | 40 30 10 30 50 |" in text
    assert "-45.0 (-108.5 to 18.5) |" in text


@pytest.mark.parametrize(
    "content, message", [(b"", "first line"), (b'{"a": 1}\n', "first line"), (b"x\n", "line 1")]
)
def test_files_that_are_none(tmp_path, content, message):
    (tmp_path / "kept.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        records.of_file(tmp_path / "kept.jsonl")
    with pytest.raises(ValueError, match="no folder of a study"):
        records.of_folder(tmp_path)


def test_the_figure_is_a_picture_of_readable_width():
    from matplotlib.image import imread

    many = {f"arm_{i}": {"about": "an arm among others", "settings": {}} for i in range(8)}
    runs = [records.of_run(name, seed, rows_of([0.4, 0.5, 0.6])) for name in many for seed in (1, 2)]
    for shown in (of_three_seeds(), records.Records(STUDY | {"arms": many}, tuple(runs))):
        drawn = figure.draw(shown)
        assert len(drawn) < 250_000
        height, width, _ = imread(io.BytesIO(drawn)).shape
        assert width == 1605 and 500 < height < 2200


# --- the real thing -----------------------------------------------------------------------------------


def launch(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch/study.py"), *words],
        env=tiny_runs.environment(), capture_output=True, text=True, timeout=900, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.parametrize(
    "words, says",
    [
        (["--config=configs/tiny.py", "--arms=rull"], "error: --arms: rull: there is rule"),
        (["--config=configs/tiny.py", "--from=x"], "error: --from=x belongs to --report"),
        (["--config=configs/tiny.py", "--config.seed=3"], "error: --config.seed: that is --seeds's"),
        (["--report"], "no folder of a study"),
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
from cooper_jax.study import plan
from launch import study
plan.TRAIN = Path({stand_in!r})
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


def test_exit_codes(tmp_path, stand_in):
    failing = start(stand_in, tmp_path / "fails", "fails")
    said, errors = failing.communicate(timeout=120)
    assert failing.returncode == 1 and "failed: seed_0/frozen: log.txt" in errors, said + errors
    assert "it was the second step" in said and "| rule | the rule's verdict is the reward | 1 |" in said
    waiting = start(stand_in, tmp_path / "waits", "waits")
    until = time.monotonic() + 120
    while not (tmp_path / "waits/seed_0/rule/metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.1)
    waiting.send_signal(signal.SIGTERM)
    said, errors = waiting.communicate(timeout=120)
    assert waiting.returncode == 75 and "the same command goes on" in said, said + errors


def test_the_documented_tables_are_those_of_the_kept_runs():
    """And what docs/results.md says of them in words holds."""
    kept = ROOT / "docs/results"
    found = summary.summarise(records.of_file(kept / "study.jsonl"))
    assert (kept / "tables.md").read_text() == tables.markdown(found)
    by_arm = found["arms"]
    assert all(by_arm[name]["seeds"] == list(range(10, 20)) for name in arms.MAIN)
    assert by_arm["frozen"]["ends_below_half"] == 10
    assert by_arm["rule"]["ends_above_start"] == by_arm["robust"]["ends_above_start"] == 10
    robust = by_arm["robust"]
    assert robust["dipped"] == 0 and robust["end_less_rule"].low > 0
    for move in ("gain", "less_begun"):
        assert abs(robust[f"rm_balanced_{move}"].value) < 0.02, move


@pytest.mark.slow
def test_a_study_of_seconds(tmp_path):
    """Two steps of a small model, from one start; frozen_warm keeps the reward model that robust begins with."""
    fields = tiny_runs.SMALL | {
        "steps": 2,
        "eval.every": 1,
        "eval.reward_rows": 8,
        "warmup.policy_steps": 100,
    }
    words = [
        f"--config={ROOT / 'configs/tiny.py'}",
        f"--out={tmp_path}",
        "--arms=rule,frozen,frozen_warm,robust",
    ]
    words += [f"--config.{name}={value}" for name, value in fields.items()]
    done = launch(*words, "--seeds=5", f"--keep={tmp_path / 'kept.jsonl'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5/5 runs" in done.stdout
    found = records.of_file(tmp_path / "kept.jsonl")
    assert [(run.arm, run.done) for run in found.runs] == [
        ("rule", 2), ("frozen", 2), ("robust", 2), ("frozen_warm", 2)
    ]  # fmt: skip
    by_arm = {run.arm: tiny_runs.metrics(tmp_path / "seed_5" / run.arm) for run in found.runs}
    first = {arm: rows[0] for arm, rows in by_arm.items()}
    assert len({row["eval/oracle/accuracy"] for row in first.values()}) == 1
    assert (
        first["frozen_warm"]["eval/rm/mean"]
        == first["robust"]["eval/rm/mean"]
        != first["frozen"]["eval/rm/mean"]
    )
    assert "rm/updates" not in by_arm["frozen_warm"][1] and by_arm["robust"][1]["rm/updates"] == 2
    before = (tmp_path / "seed_5/rule/log.txt").read_text()
    again = launch(f"--out={tmp_path}", "--report")
    assert again.returncode == 0 and (tmp_path / "seed_5/rule/log.txt").read_text() == before
    assert (tmp_path / "tables.md").read_text().startswith("# Arms compared over seeds")


@pytest.mark.slow
def test_a_shortened_study_orders_the_arms(tmp_path):
    """The miniature's finding in half of its steps: frozen is hacked, the rule's arm rises, and Cooper's more."""
    fields = {
        "steps": 50, "eval.every": 10, "eval.problems": 512, "eval.greedy": False, "eval.reward_rows": 512,
        "checkpoint.every": 50,
    }  # fmt: skip
    words = [f"--config={ROOT / 'configs/tiny.py'}", f"--out={tmp_path}", "--seeds=10", "--jobs=2"]
    words += ["--arms=rule,frozen,robust", *(f"--config.{name}={value}" for name, value in fields.items())]
    done = launch(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    found = summary.summarise(records.of_folder(tmp_path))
    rule, frozen, robust = (
        next(run for run in found["runs"] if run["arm"] == name) for name in ("rule", "frozen", "robust")
    )
    assert rule["accuracy_start"] == frozen["accuracy_start"] == robust["accuracy_start"]
    assert frozen["ends_below_half"] and frozen["dipped"], frozen["accuracies"]
    assert frozen["reward_end"] > 0.7, "it was no hack: the policy earned little"
    assert rule["ends_above_start"] and not robust["dipped"], (rule["accuracies"], robust["accuracies"])
    assert robust["accuracy_end"] > rule["accuracy_end"] > frozen["accuracy_end"]
    assert robust["false_positives_end"] < frozen["false_positives_end"] / 2
