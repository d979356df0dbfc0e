"""A study's figures against ones computed by hand, its tables, and what is kept of its runs."""

from __future__ import annotations

import io
import json
import math
import warnings

import numpy as np
import pytest
from tiny_studies import ROOT, a_study

from cooper_jax.statistics import Interval
from cooper_jax.study import arms, figure, records, study_report, summary, tables

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
    found = summary.summarise_record(records.summarise_run("frozen", 1, rows), STUDY)
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
    assert summary.summarise_trace("a", [(0, 0.5), (2, 0.25)])["a_end"] == 0.25
    assert math.isnan(summary.summarise_trace("a", [(0, 0.5)])["a_end"])


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
    assert summary.has_dipped([0.5, accuracy, 0.6], 0.5, 100) is is_one


def test_over_seeds_by_hand():
    # mean 2, s = sqrt(((-1)^2 + 0 + 1^2) / 2) = 1, t(.975, 2) = 4.302653
    found = summary.mean_over_seeds([1.0, 2.0, 3.0])
    assert (found.value, found.low, found.high) == pytest.approx(
        (2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5)
    )
    one = summary.mean_over_seeds([0.5, math.nan])
    assert one.value == 0.5 and math.isnan(one.low) and math.isnan(summary.mean_over_seeds([]).value)


def test_a_runs_gain_by_hand():
    # .3 to .5 of 100: the variances are .0021 and .0025, together .0678 squared
    found = summary.gain_interval(0.3, 0.5, 100)
    assert (found.value, found.low, found.high) == pytest.approx(
        (0.2, 0.2 - 0.13293, 0.2 + 0.13293), abs=1e-5
    )


def of_three_seeds() -> records.Records:
    runs = [
        records.summarise_run("rule", seed, rows_of([0.4, 0.5, end, end, end]))
        for seed, end in ((1, 0.6), (2, 0.7), (3, 0.8))
    ]
    runs += [
        records.summarise_run("frozen", 1, rows_of([0.4, 0.3, 0.1, 0.1, 0.1], reward=0.9, judge=[0.7] * 5)),
        records.summarise_run("frozen", 2, rows_of([0.4, 0.3, 0.1, 0.3, 0.5], reward=0.8, judge=[0.6] * 5)),
        records.summarise_run("frozen", 3, rows_of([0.4, 0.3, 0.2], judge=[0.6] * 3)),  # at step 4 of 8
    ]
    return records.Records(STUDY, tuple(runs))


def test_figures_of_arms():
    found = summary.summarise_study(of_three_seeds())
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
    assert frozen["pairs"] == 2 and frozen["accuracy_less_rule"] == Interval(
        pytest.approx(-0.45),
        pytest.approx(-0.45 - 12.7062 * 0.05, abs=1e-5),
        pytest.approx(-0.45 + 12.7062 * 0.05, abs=1e-5),
    )
    assert frozen["reward_end"].value == pytest.approx(0.85)
    assert found["missing"] == [{"arm": "frozen", "seed": 3, "done": 4}]
    some = of_three_seeds()
    some = records.Records(STUDY, tuple(run for run in some.runs if (run.arm, run.seed) != ("rule", 2)))
    found = summary.summarise_study(some)
    assert found["arms"]["frozen"]["pairs"] == 1 and "-50.0 on 1 |" in tables.format_markdown(found)


def test_a_run_without_its_last_evaluation_is_not_complete():
    rows = rows_of([0.4, 0.5, 0.5, 0.5, 0.5])
    assert summary.summarise_record(records.summarise_run("rule", 1, rows), STUDY)["complete"]
    del rows[-1]["eval/oracle/accuracy"]
    assert not summary.summarise_record(records.summarise_run("rule", 1, rows), STUDY)["complete"]
    some = records.Records(STUDY | {"seeds": [1, 2, 3, 5]}, (records.summarise_run("rule", 1, rows),))
    assert "(seeds): rule on 1 (at step 8), 2-3, 5; frozen on 1-3, 5." in tables.format_markdown(
        summary.summarise_study(some)
    )


def test_how_pairs_moved_by_spans():
    rows = [{"step": 0, "eval/oracle/accuracy": 0.5}]
    rows += [{"step": s, "rm/common_push": float(s), "rm/valid": 2.0 * s} for s in range(1, 41)]
    rows[7]["rm/common_push"] = math.nan
    found = records.summarise_run("robust", 1, rows).motion
    assert found == {
        "1-10": {"common_push": 5.333, "valid": 11.0},  # (55 - 7) / 9
        "11-30": {"common_push": 20.5, "valid": 41.0},
        "31-": {"common_push": 35.5, "valid": 71.0},
    }


@pytest.mark.slow
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
    found = records.read_folder(out)
    told = study_report.write_report(found, tmp_path / "first")
    records.write_records(found, tmp_path / "kept/study.jsonl")
    assert (
        study_report.write_report(records.read_records(tmp_path / "kept/study.jsonl"), tmp_path / "again")
        == told
    )
    for name in ("results.json", "arms.csv", "runs.csv", "tables.md", "study.png"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    results = json.loads((tmp_path / "again/results.json").read_text())
    assert list(results["arms"]) == ["rule", "robust"] and results["study"]["problems"] == 300
    assert "| robust | common push |" in told and "no reward model" not in told
    lines = (tmp_path / "kept/study.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 4 * (3 + 1) and all(len(line) < 2500 for line in lines[1:])


def test_only_some_arms_and_seeds():
    found = of_three_seeds().only(["frozen"], [2, 3])
    assert [(run.arm, run.seed) for run in found.runs] == [("frozen", 2), ("frozen", 3)]
    assert "| frozen | no update | 1 |" in tables.format_markdown(summary.summarise_study(found))
    with pytest.raises(ValueError, match="--seeds: 7 is not in the study, which has 1, 2, 3"):
        of_three_seeds().only([], [7])


def test_a_reward_model_beside_the_one_that_all_begin_with():
    """Its end .65 less its own step 0, .75 after a warm start, and less .7, which the frozen arm begins with."""
    accuracies, ends = [0.4] * 5, (0.6, 0.7)
    runs = [records.summarise_run("frozen", seed, rows_of(accuracies, judge=[0.7] * 5)) for seed in (1, 2, 3)]
    runs += [
        records.summarise_run("robust", seed, rows_of(accuracies, judge=[0.75, 0.1, end, end, end]))
        for seed, end in zip((1, 2), ends, strict=True)
    ]
    study = STUDY | {"arms": {name: {"about": "", "settings": {}} for name in ("frozen", "robust")}}
    found = summary.summarise_study(records.Records(study, tuple(runs)))["arms"]
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
        found = figure._moving_mean(values)
    np.testing.assert_array_equal(found, [math.nan] * 4 + [1.0, 2.0, 2.0, 2.0])


def test_tables_show_every_dip_and_what_is_missing():
    text = tables.format_markdown(summary.summarise_study(of_three_seeds()))
    assert "(seeds): frozen on 3 (at step 4)." in text
    assert "| frozen | 2 | 40.0 | 10.0 | 4 | 30.0 | -10.0 (-23.1 to 3.1) | 40 30 10 30 50 |" in text
    assert "-45.0 (-108.5 to 18.5) |" in text


@pytest.mark.parametrize(
    "content, message", [(b"", "first line"), (b'{"a": 1}\n', "first line"), (b"x\n", "line 1")]
)
def test_files_that_are_none(tmp_path, content, message):
    (tmp_path / "kept.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        records.read_records(tmp_path / "kept.jsonl")
    with pytest.raises(ValueError, match="not the folder of a study"):
        records.read_folder(tmp_path)


def test_tables_as_csv_by_hand():
    """The same numbers as test_figures_of_arms works out."""
    found = summary.summarise_study(of_three_seeds())
    lines = study_report.format_arms_csv(found).splitlines()
    assert lines[0] == "arm,quantity,mean,low,high,seeds"
    assert "frozen,accuracy_less_rule,-0.45,-1.085,0.1853,2" in lines  # 12.7062 x .05 = .6353
    assert "frozen,dipped,2,,,2" in lines and "rule,dipped,0,,,3" in lines
    assert not [line for line in lines if line.startswith("rule,rm_balanced")]  # it has no reward model
    header, *runs = (line.split(",") for line in study_report.format_runs_csv(found).splitlines())
    by_run = {(row[0], row[1]): dict(zip(header, row, strict=True)) for row in runs}
    assert len(by_run) == 6 and by_run["frozen", "3"]["complete"] == "False"
    assert by_run["frozen", "1"]["accuracy_end"] == "0.1" and by_run["rule", "1"]["rm_balanced_end"] == ""


def test_the_number_beside_a_curve_is_the_curves():
    """The end of the mean over the two complete runs, (.1 + .5) / 2, and not the mean of three evaluations."""
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    found = of_three_seeds()
    figure._draw_accuracy(axes, found.of("frozen"), found.of("rule"))
    thick = max(axes.lines, key=lambda line: line.get_linewidth())
    assert thick.get_ydata()[-1] == pytest.approx(0.3)
    assert sorted(text.get_text() for text in axes.texts) == ["30%", "rule"]


@pytest.mark.slow
def test_the_figure_is_a_picture_of_readable_width():
    from matplotlib.image import imread

    many = {f"arm_{i}": {"about": "an arm among others", "settings": {}} for i in range(8)}
    runs = [records.summarise_run(name, seed, rows_of([0.4, 0.5, 0.6])) for name in many for seed in (1, 2)]
    for shown in (of_three_seeds(), records.Records(STUDY | {"arms": many}, tuple(runs))):
        drawn = figure.draw_figure(shown)
        assert len(drawn) < 250_000
        height, width, _ = imread(io.BytesIO(drawn)).shape
        assert width == 1605 and 500 < height < 2200


def test_the_documented_tables_are_those_of_the_kept_runs():
    """And what docs/results.md says of them in words holds."""
    kept = ROOT / "docs/results"
    controls, found = (
        summary.summarise_study(records.read_records(kept / name))
        for name in ("controls.jsonl", "study.jsonl")
    )
    for name, one in (("controls", controls), ("study", found)):
        assert (kept / f"{name}_arms.csv").read_text() == study_report.format_arms_csv(one), name
        assert (kept / f"{name}_runs.csv").read_text() == study_report.format_runs_csv(one), name
    assert list(controls["arms"]) == list(arms.ARMS) and not controls["missing"]
    by_arm = controls["arms"]
    assert by_arm["pointwise"]["dipped"] == 0 < by_arm["no_bce"]["dipped"]
    assert all(
        by_arm[name]["ends_below_half"] == 3
        for name in by_arm
        if name.startswith("frozen_") and name != "frozen_warm"
    )
    assert by_arm["bce"]["accuracy_end"].value > by_arm["robust"]["accuracy_end"].value
    by_arm = found["arms"]
    assert all(by_arm[name]["seeds"] == list(range(10, 20)) for name in arms.MAIN)
    assert by_arm["frozen"]["ends_below_half"] == 10
    assert by_arm["rule"]["ends_above_start"] == by_arm["robust"]["ends_above_start"] == 10
    robust = by_arm["robust"]
    assert robust["dipped"] == 0 and robust["accuracy_less_rule"].low > 0
    for move in ("gain", "less_begun"):
        assert abs(robust[f"rm_balanced_{move}"].value) < 0.02, move


def test_a_task_of_a_judge_is_compared_by_its_verdicts(tmp_path):
    """Rows of a task that only the user's judge decides: no exact truth, no labelled completions."""
    rows = rows_of([0.2, 0.3, 0.4, 0.5, 0.6], false_positives=[0.25] * 8)
    for row in rows:
        if "eval/oracle/accuracy" in row:
            row["eval/rule/accuracy"] = row.pop("eval/oracle/accuracy")
            row["eval/rm/rule_agreement"] = 0.75
    runs = []
    for arm in ("rule", "frozen"):
        runs += [records.summarise_run(arm, seed, rows) for seed in (1, 2, 3)]
    assert runs[0].evaluations[1] == {"step": 2, "rule": 0.3, "accuracy": 0.3, "rm_policy": 0.75}
    found = records.Records(STUDY, tuple(runs))
    assert summary.summarise_study(found)["arms"]["rule"]["accuracy_end"].value == pytest.approx(0.5)
    assert "50.0" in study_report.write_report(found, tmp_path)


def test_a_study_takes_a_task_of_a_judge(tmp_path):
    path = str(ROOT / "examples" / "countdown_judge.py") + ":judge"
    changes = {
        "data__format": "jsonl",
        "data__train": "rows.jsonl",
        "rule__judge": path,
        "reward__recipe": "",
    }
    # For each of two seeds: a start for each model, and two arms.
    assert len(a_study(tmp_path, **changes).list_runs()) == 8
    with pytest.raises(ValueError, match="or a task with a program that decides"):
        a_study(tmp_path, **changes | {"rule__judge": ""})
