"""A policy on benchmarks: which problems, figures by hand, resuming, judging anew, the table."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import pytest
import report_runs
import tiny_models
import tiny_rollouts
import tiny_runs
import tiny_tokenizers
from ml_collections import ConfigDict

from cooper_jax import statistics
from cooper_jax.configs import qwen_1p5b, tiny
from cooper_jax.data import labelled_completions, seen_questions, synthetic
from cooper_jax.data.answer_forms import normalise_completion
from cooper_jax.evaluation import benchmark_jobs, benchmark_sets, benchmark_summaries, benchmarks
from cooper_jax.evaluation.evaluated_models import ChosenModels
from cooper_jax.evaluation.evaluation_ledger import ITEMS, RESULTS, TIMINGS, Ledger
from cooper_jax.evaluation.text_tables import format_percent, format_table
from cooper_jax.model import weight_export
from cooper_jax.reward import multihost
from cooper_jax.runtime import hosts, remote_files
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.statistics import Interval
from cooper_jax.trainer import run_problems
from cooper_jax.types import Completion, Problem

ROOT = Path(__file__).resolve().parents[1]

SHRUNK = {
    f"{model}.arch.{name}": value
    for model in ("policy", "reward")
    for name, value in {"width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn": 16}.items()
} | {
    "benchmark.samples": 2,
    "benchmark.max_new_tokens": 6,
    "benchmark.chunk": 2,
    "benchmark.bootstrap": 50,
    "eval.problems": 3,
    "reward.microbatch": 4,
    "reward.allow_untrained_head": True,
    "mesh.data": -1,
    "mesh.fsdp": 1,
}


def config(**changes) -> ConfigDict:
    """The tiny config, smaller, with random weights."""
    c = tiny.get_config()
    c.update_from_flattened_dict(SHRUNK | {name.replace("__", "."): v for name, v in changes.items()})
    return c


def write_rows(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion, form",
    [
        (r"so \boxed{0.50}", "1/2"),
        (r"so \boxed{\dfrac{2}{4}}", "1/2"),
        ("The answer is 2/4.", "1/2"),
        (r"\boxed{-\frac{3}{6}}", "-1/2"),
        (r"\boxed{\$1,200.00}", "1200"),
        ("It is 3, then 4 apples", "4"),
        ("#### 1,234", "1234"),
        (r"\boxed{x = 5}", "5"),
        (r"\boxed{x + 1}", "x+1"),
        (r"\boxed{\left( 1, 2 \right)}", "(1,2)"),
        (r"\boxed{\text{Yes}}", "yes"),
        ("\\boxed{1/0}", "1/0"),
        ("Nothing here", None),
        ("", None),
    ],
)
def test_answers_are_one_where_their_normal_forms_are(completion, form):
    assert normalise_completion(completion) == form


# --- which problems ------------------------------------------------------------------------------------------


def test_the_periodic_evaluation_takes_a_benchmarks_part():
    whole = [Problem(f"How many {i} ?", str(i), level=str(i // 10)) for i in range(40)]
    chosen = run_problems.choose_held_out(whole, whole, 12)
    assert chosen == [whole[i] for i in benchmark_sets.sample_part(40, 12)]
    assert {p.level for p in chosen} == set("0123")  # of a sorted file, the first 12 have two levels
    assert (
        run_problems.choose_held_out(whole, whole, 40)
        == run_problems.choose_held_out(whole, whole, 99)
        == whole
    )
    # What one run leaves out is replaced by the next in the order; the others are the same ones.
    kept = [p for p in whole if p not in chosen[:3]]
    other = run_problems.choose_held_out(kept, whole, 12)
    assert set(chosen[3:]) < set(other) and len(other) == 12
    assert other == [p for p in whole if p in set(other)]


def test_the_part_is_fixed_and_grows():
    """These places are what earlier evaluations asked: they must never change."""
    assert benchmark_sets.sample_part(20, 5) == [1, 2, 7, 11, 18]
    assert benchmark_sets.sample_part(20, 0) == benchmark_sets.sample_part(20, 99) == list(range(20))
    for count in range(1, 20):
        assert set(benchmark_sets.sample_part(20, count)) < set(benchmark_sets.sample_part(20, count + 1))


def test_a_folder_stands_for_the_benchmarks_in_it(tmp_path):
    gsm8k = {"question": "Two and two?", "answer": "It is 4.\n#### 4"}
    for name in ("a_test.jsonl", "b_train.jsonl", "c_test.jsonl"):
        write_rows(tmp_path / name, gsm8k)
    write_rows(tmp_path / "d_test.jsonl", {"text": "no benchmark"})
    (tmp_path / "e_test.jsonl").write_text("no JSON")
    assert benchmark_sets.find_benchmarks([str(tmp_path)]) == [
        str(tmp_path / n) for n in ("a_test.jsonl", "c_test.jsonl")
    ]
    with pytest.raises(SetupError, match="two files are called 'a_test'"):
        benchmark_sets.find_benchmarks([str(tmp_path), str(tmp_path / "a_test.jsonl")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SetupError, match="no file called"):
        benchmark_sets.find_benchmarks([str(tmp_path / "empty")])
    with pytest.raises(SetupError, match="there is no such file"):
        benchmark_sets.find_benchmarks([str(tmp_path / "nowhere.jsonl")])
    # A data set of the hub, whose split is data.eval_split unless it names one.
    assert benchmark_sets.find_benchmarks(["owner/sums:main"]) == ["owner/sums:main"]
    assert benchmark_sets.get_benchmark_name("owner/sums:main") == "sums:main"


def test_all_published_benchmarks_are_found(shared_data):
    assert [benchmark_sets.get_benchmark_name(p) for p in benchmark_sets.find_benchmarks([str(shared_data)])] == [
        "gsm8k_test", "math500_test", "odyssey_test", "olympiadbench_en_test", "svamp_test",
    ]  # fmt: skip


def load_benchmarks(cfg, places, seen) -> list[benchmark_sets.Benchmark]:
    settings = benchmark_sets.BenchmarkConfig.from_config(cfg.benchmark)
    return benchmark_sets.load_benchmarks(cfg, settings, places, _Words(), seen)


class _Words:
    """A tokenizer of words."""

    bos_id = None

    def encode(self, text):
        return list(range(len(text.split())))


def test_what_is_left_out_is_counted(tmp_path):
    rows = [{"question": f"How many {'very ' * n}many?", "answer": f"#### {n}"} for n in range(6)]
    path = write_rows(tmp_path / "x_test.jsonl", *rows)
    seen = frozenset(seen_questions.fingerprint_question(row["question"]) for row in rows[:2])
    cfg = config(benchmark__max_prompt_tokens=6)
    (found,) = load_benchmarks(cfg, [str(path)], seen)
    assert found.places == (2, 3) and [p.reference for p in found.problems] == ["2", "3"]
    assert (found.asked, found.too_long, found.seen, found.excluded) == (6, 2, 2, 2)
    cfg.benchmark.exclude_seen = False
    (found,) = load_benchmarks(cfg, [str(path)], seen)
    assert found.places == (0, 1, 2, 3) and (found.seen, found.excluded) == (2, 0)
    cfg.benchmark.max_prompt_tokens = 1
    with pytest.raises(SetupError, match="no problem is left of 6"):
        load_benchmarks(cfg, [str(path)], seen)


def test_the_real_overlap_is_left_out(shared_data):
    """Questions of the labelled completions are in three benchmarks (tests/test_overlap.py says which)."""
    seen = frozenset(
        seen_questions.fingerprint_question(t.question)
        for name in ("train", "dev")
        for t in labelled_completions.load_labelled_completions(str(shared_data / f"verify_{name}.jsonl"))
    )
    found = {
        b.name: b for b in load_benchmarks(config(), benchmark_sets.find_benchmarks([str(shared_data)]), seen)
    }
    assert {name: b.seen for name, b in found.items()} == {
        "gsm8k_test": 847, "math500_test": 4, "odyssey_test": 252, "olympiadbench_en_test": 0, "svamp_test": 0,
    }  # fmt: skip
    for b in found.values():
        assert b.excluded == b.seen and len(b.problems) == b.asked - b.seen
        assert not seen & {seen_questions.fingerprint_question(p.question) for p in b.problems}


def test_chunks_are_even():
    made = [_benchmark("a", 10), _benchmark("b", 3)]
    assert [(b.name, (r.start, r.stop)) for b, r in benchmark_sets.split_chunks(made, 4)] == [
        ("a", (0, 3)), ("a", (3, 6)), ("a", (6, 10)), ("b", (0, 3)),
    ]  # fmt: skip


def _benchmark(name: str, size: int) -> benchmark_sets.Benchmark:
    problems = tuple(
        Problem(f"{name} {i}?", str(i), "", f"{name}:{i}", "even" if i % 2 == 0 else "odd")
        for i in range(size)
    )
    return benchmark_sets.Benchmark(name, problems, tuple(range(size)), asked=size)


# --- figures -------------------------------------------------------------------------------------------------


def _row(answer: str, rule: str, reward: float, truncated: bool = False) -> dict:
    said = f"\\boxed{{{answer}}}" if answer else "no idea"
    return {"completion": said, "tokens": 10, "truncated": truncated, "rule": rule, "reward": reward}


ROWS = [
    # 0?: three of four are right, and the most frequent answer is.
    _row("0", "correct", 0.9), _row("0", "correct", 0.9), _row("0", "correct", 0.2), _row("9", "wrong", 0.8),
    # 1?: one of four is right; two answers are as frequent, one of them right; two samples give none.
    _row("1", "correct", 0.9), _row("7", "wrong", 0.1), _row("", "no_answer", 0.1, True),
    _row("", "unrecognised", 0.1),
]  # fmt: skip


def test_figures_by_hand():
    found = benchmark_summaries.summarise_benchmark(_benchmark("x", 2), ROWS, 4, 1.5, seed=0, resamples=50)
    rule, model = found["judges"]["rule"], found["judges"]["model"]
    assert rule["accuracy"].value == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert {k: v.value for k, v in rule["pass_at"].items()} == pytest.approx(
        {1: 1 / 2, 2: (1 + 1 / 2) / 2, 4: 1.0}
    )
    assert rule["majority"].value == pytest.approx((1 + 1 / 2) / 2)
    assert (rule["accuracy"].low, rule["accuracy"].high) == (
        0.25,
        0.75,
    )  # both drawn from the one or the other
    assert model["accuracy"].value == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert found["truncated"] == found["no_answer"] == found["undecided"] == 1 / 8
    assert found["agreement"]["rule and model"] == pytest.approx(
        {"agreement": 6 / 8, "kappa": 0.5, "only rule": 1 / 8, "only model": 1 / 8}
    )
    subjects = found["by"]["subject"]
    assert {s: (g["problems"], g["accuracy"]["rule"].value) for s, g in subjects.items()} == {
        "even": (1, 0.75), "odd": (1, 0.25),
    }  # fmt: skip
    assert "level" not in found["by"]


def test_intervals_are_by_problem_and_the_mean_counts_benchmarks_alike():
    few = [_row("0", "correct", 1.0)] * 4
    many = [_row("9", "wrong", 0.0)] * 36
    results = [
        benchmark_summaries.summarise_benchmark(
            _benchmark(n, len(rows) // 4), rows, 4, 1.0, seed=0, resamples=50
        )
        for n, rows in (("few", few), ("many", many))
    ]
    means = benchmark_summaries.average_benchmarks(results, {"few": few, "many": many}, 0, 50)
    assert means["rule"].value == pytest.approx(1 / 2)
    right = benchmark_summaries.make_correct_matrix(ROWS, "rule", 4).mean(1)
    expected = statistics.bootstrap_interval(
        lambda w: float((w * right).sum() / w.sum()),
        ["a", "b"],
        benchmark_summaries.keys.make_generator(3, "bootstrap"),
        99,
    )
    assert benchmark_summaries.bootstrap_mean(right, 3, 99) == expected


def test_counts_of_k():
    assert benchmark_summaries.list_k(1) == [1]
    assert benchmark_summaries.list_k(8) == [1, 2, 4, 8]
    assert benchmark_summaries.list_k(12) == [1, 2, 4, 8, 12]


def test_the_look_of_a_table():
    text = format_table(
        ["name", "share (95 %)", "n"],
        [
            ["a", format_percent(Interval(0.25, 0.125, 1.0)), "7"],
            ["long", format_percent(float("nan")), "1234"],
        ],
    )
    assert text.splitlines() == [
        "name          share (95 %)     n",
        "----  --------------------  ----",
        "a     25.0 (12.5 to 100.0)     7",
        "long                     -  1234",
    ]


LOOK = """
benchmark  judge  problems    accuracy % (95 %)  pass@2  pass@4  maj@4  truncated  no answer  undecided  tokens  seconds
---------  -----  --------  -------------------  ------  ------  -----  ---------  ---------  ---------  ------  -------
x          rule          2  50.0 (25.0 to 75.0)    75.0   100.0   75.0       12.5       12.5       12.5      10        2
x          model         2  50.0 (25.0 to 75.0)    75.0   100.0   58.3       12.5                            10        2
"""  # noqa: E501


def test_the_look_of_a_summary():
    found = benchmark_summaries.summarise_benchmark(_benchmark("x", 2), ROWS, 4, 1.5, seed=0, resamples=50)
    text = benchmark_summaries.format_summary([found], {})
    assert text.splitlines()[:4] == LOOK.strip("\n").splitlines()


# --- the ledger ----------------------------------------------------------------------------------------------


def test_a_ledger_goes_on_from_whole_chunks_wherever_it_was_cut(tmp_path):
    chunks = [[{"i": 0}, {"i": 1}], [{"i": 2}], [{"i": 3, "text": "ä\n"}, {"i": 4}]]
    sizes = [len(c) for c in chunks]

    def write(folder, first=0, count=3):
        with Ledger(folder, {"a": 1}, sizes) as ledger:
            assert ledger.done == first
            for chunk in chunks[first:count]:
                ledger.append(chunk, 1.0)

    write(tmp_path / "whole")
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in (ITEMS, TIMINGS)}
    ends, rows = [0], 0
    lines = whole[ITEMS].splitlines(keepends=True)
    for size in sizes:
        rows += size
        ends.append(len(b"".join(lines[:rows])))
    for cut in range(len(whole[ITEMS]) + 1):
        write(tmp_path / "cut", count=0) if not (tmp_path / "cut").exists() else None
        (tmp_path / "cut" / ITEMS).write_bytes(whole[ITEMS][:cut])
        (tmp_path / "cut" / TIMINGS).write_bytes(whole[TIMINGS])
        write(tmp_path / "cut", first=max(i for i, end in enumerate(ends) if end <= cut))
        assert {name: (tmp_path / "cut" / name).read_bytes() for name in whole} == whole, cut


def test_a_ledger_refuses_other_settings_and_company(tmp_path):
    with Ledger(tmp_path / "x", {"a": "a slip that nothing was judged under"}, [1]):
        pass
    with Ledger(tmp_path / "x", {"a": 1, "b": "yes"}, [1]) as ledger:
        with pytest.raises(ValueError, match="x is in use by process"):
            Ledger(tmp_path / "x", {"a": 1, "b": "yes"}, [1])
        ledger.append([{"i": 0}], 1.0)
    with pytest.raises(
        ValueError, match=r'a was 1 and is now 2; b was "yes" and is now \(absent\); c was \(abs'
    ):
        Ledger(tmp_path / "x", {"a": 2, "c": 0}, [1])
    (tmp_path / "x" / ITEMS).write_text('{"i": 0}\nnonsense\n{"i": 1}\n')
    with pytest.raises(ValueError, match=f"{ITEMS}:2: no JSON object"):
        Ledger(tmp_path / "x", {"a": 1, "b": "yes"}, [1])
    with pytest.raises(ValueError, match="local path"):
        Ledger("gs://bucket/x", {}, [1])


def test_results_that_find_no_room_are_one_error(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    with Ledger(tmp_path, {}, [1]) as ledger:
        monkeypatch.setattr(remote_files, "write_atomically", full)
        with pytest.raises(SetupError, match="--out: results.json: .*No space left on device"):
            ledger.write(RESULTS, {})


# --- judging -------------------------------------------------------------------------------------------------


class _Scripted:
    """Says each problem's number on the first sample, and another on the second; breaks when told to."""

    samples = 2

    def __init__(self, breaks_at: int = -1):
        self.left = breaks_at

    def __call__(self, benchmark, chunk, on_ready):
        for place in reversed(range(len(chunk))):
            self.left -= 1
            if self.left == 0:
                raise hosts.Stopped
            i = chunk[place]
            on_ready(place, [Completion(f"\\boxed{{{i}}}", False, 5), Completion("\\boxed{77}", True, 6)])


class _Likes77:
    def rewards(self, triples):
        return [0.75 if "77" in t.completion else 0.25 for t in triples]


def test_a_run_that_is_cut_off_ends_as_one_that_is_not(tmp_path):
    made = [_benchmark("a", 5), _benchmark("b", 2)]
    sizes = [len(r) * 2 for _, r in benchmark_sets.split_chunks(made, 2)]

    def run(folder, sampler):
        with multihost.open_rule_verifier(config()) as rule, Ledger(folder, {}, sizes) as ledger:
            benchmarks.run_benchmarks(made, sampler, rule, _Likes77(), ledger, 2, said.append)

    said: list[str] = []
    run(tmp_path / "whole", _Scripted())
    assert [line.split("  ")[0] for line in said] == [
        "a 1/5 problems", "a 3/5 problems", "a 5/5 problems", "b 2/2 problems",
    ]  # fmt: skip
    with pytest.raises(hosts.Stopped):
        run(tmp_path / "cut", _Scripted(breaks_at=5))
    assert len(read_rows(tmp_path / "cut" / ITEMS)) == 6
    run(tmp_path / "cut", _Scripted())
    whole = (tmp_path / "whole" / ITEMS).read_bytes()
    assert whole == (tmp_path / "cut" / ITEMS).read_bytes()
    rows = read_rows(tmp_path / "whole" / ITEMS)
    assert [(r["benchmark"], r["place"], r["sample"]) for r in rows[:4]] == [
        ("a", 0, 0), ("a", 0, 1), ("a", 1, 0), ("a", 1, 1),
    ]  # fmt: skip
    assert [r["rule"] for r in rows] == ["correct", "wrong"] * 7
    assert [r["reward"] for r in rows] == [0.25, 0.75] * 7


ITEM = {
    "benchmark": "x", "id": "x:1", "place": 0, "question": "One?", "reference": "1", "subject": "s", "level": "",
    "sample": 0, "completion": "\\boxed{1}", "truncated": False, "tokens": 3,
}  # fmt: skip


def test_recorded_responses_are_judged_anew(tmp_path):
    half = "\\boxed{2} \ud83d"  # of a pair: no UTF-8 form
    rows = [ITEM | {"rule": "wrong"}, ITEM | {"sample": 1, "completion": half, "truncated": True}]
    path = write_rows(tmp_path / "items.jsonl", *rows)
    cfg = config()
    benchmark_jobs.rejudge_items(cfg, ChosenModels(cfg, tmp_path), str(path), tmp_path / "out")
    again = read_rows(tmp_path / "out" / ITEMS)
    assert [(r["completion"], r["truncated"], r["rule"]) for r in again] == [
        ("\\boxed{1}", False, "correct"), ("\\boxed{2} \ufffd", True, "wrong"),
    ]  # fmt: skip
    results = json.loads((tmp_path / "out" / RESULTS).read_text())
    assert results["benchmarks"][0]["judges"]["rule"]["accuracy"]["value"] == 0.5
    assert results["benchmarks"][0]["by"]["subject"]["s"]["problems"] == 1

    (shown,) = report_runs.encode(tmp_path / "out")["runs"]
    assert [(bar["name"], bar["value"]) for bar in shown["charts"][0]["bars"]] == [("x, by rule", 0.5)]
    (sample,) = shown["samples"]["samples"]
    assert [(r["text"], r["verdict"]) for r in sample["responses"]] == [
        ("\\boxed{1}", "correct"), ("\\boxed{2} \ufffd", "wrong")
    ]  # fmt: skip
    assert shown["table"].startswith("benchmark") and shown["environment"]["packages"]


def test_responses_of_an_evaluation_that_has_not_ended_are_not_judged(tmp_path):
    """A part would be judged as if it were all, and all of it again when the rest is there."""
    cfg, folder = config(), tmp_path / "sampled"

    def judged(items, out):
        benchmark_jobs.rejudge_items(cfg, ChosenModels(cfg, tmp_path), str(items), tmp_path / out)
        return len(read_rows(tmp_path / out / ITEMS))

    with Ledger(folder, {}, [1, 1]) as ledger:
        ledger.append([ITEM], 1.0)
        with pytest.raises(SetupError, match=r"--rejudge=.*items.jsonl: the evaluation .* has not ended"):
            judged(folder / ITEMS, "part")
        assert not (tmp_path / "part").exists()
        ledger.append([ITEM | {"id": "x:2", "place": 1}], 1.0)
        ledger.write(RESULTS, {})
    assert judged(folder / ITEMS, "all") == 2
    (tmp_path / "alone").mkdir()
    assert judged((folder / ITEMS).rename(tmp_path / "alone" / ITEMS), "again") == 2


@pytest.mark.parametrize(
    "rows, words",
    [
        ([{k: v for k, v in ITEM.items() if k != "tokens"}], r"items.jsonl:1: field 'tokens' is missing"),
        ([ITEM | {"sample": "0"}], r"items.jsonl:1: field 'sample' is '0': must be int"),
        ([ITEM, ITEM], r"items.jsonl:2: sample 0 of x:1 is where sample 1 is expected"),
        ([ITEM, ITEM | {"sample": 1}, ITEM | {"id": "x:2"}], "problems have from 1 to 2 samples"),
        ([], "there is no row in it"),
    ],
)
def test_an_items_file_that_is_none_is_refused(rows, words, tmp_path):
    cfg = config()
    path = write_rows(tmp_path / "items.jsonl", *rows)
    with pytest.raises(SetupError, match=words):
        benchmark_jobs.rejudge_items(cfg, ChosenModels(cfg, tmp_path), str(path), tmp_path / "out")


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("judged_by", "vote", "one of rule, model, both"),
        ("samples", 0, "at least 1"),
        ("problems", -1, "at least 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(field, value, words, tmp_path):
    cfg = config(**{f"benchmark__{field}": value})
    with pytest.raises(SetupError, match=rf"benchmark\.{field}=.*{words}"):
        benchmark_jobs.evaluate_benchmarks(cfg, ChosenModels(cfg, tmp_path), ["synthetic"], tmp_path / "out")


# --- all of it -----------------------------------------------------------------------------------------------


class _Deaf:
    """A reward model that says the same of everything."""

    def __init__(self, *_):
        pass

    def check(self, references):
        pass

    def rewards(self, triples):
        return [0.25] * len(triples)


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """(three problems' file, a reward model's folder that has seen the second): no model is made or loaded."""
    arch = types.SimpleNamespace(family="llama", layers=1, width=8, max_len=None)
    model = types.SimpleNamespace(tokenizer=_Words(), config=arch)
    monkeypatch.setattr(ChosenModels, "load", lambda *_: (model, None))
    monkeypatch.setattr(benchmarks, "PolicySampler", lambda *_: _Scripted())
    monkeypatch.setattr(benchmark_jobs, "RewardModel", _Deaf)
    rows = [{"question": f"How many are {i} ?", "answer": f"#### {i}"} for i in range(3)]
    path, folder = write_rows(tmp_path / "x_test.jsonl", *rows), tmp_path / "model"
    folder.mkdir()
    seen_questions.write_record(folder, seen_questions.record_questions(["how many are 1?"], "train"))
    return path, folder


def _asked_in(out: Path) -> tuple[list[str], dict]:
    """(the questions in the order of the items, what the results say of the benchmark)."""
    results = json.loads((out / RESULTS).read_text())
    return list(dict.fromkeys(row["question"] for row in read_rows(out / ITEMS))), results["benchmarks"][0]


UNSEEN = ["How many are 0 ?", "How many are 2 ?"]


def test_a_reward_model_judges_no_policy_on_what_it_saw(stand_ins, tmp_path):
    path, folder = stand_ins
    cfg = config(benchmark__judged_by="model", reward__weights=str(folder))
    benchmark_jobs.evaluate_benchmarks(cfg, ChosenModels(cfg, tmp_path), [str(path)], tmp_path / "out")
    questions, found = _asked_in(tmp_path / "out")
    assert questions == UNSEEN and (found["seen"], found["excluded"]) == (1, 1)


@pytest.mark.parametrize("arm", ["cooper", "rule"])
def test_a_policy_is_not_measured_on_what_the_reward_model_saw_that_paid_it(arm, stand_ins, tmp_path):
    """Whoever judges; the rule arm's policy was paid by nobody who has seen anything."""
    path, folder = stand_ins
    cfg = config(benchmark__judged_by="rule", reward__arm=arm)
    benchmark_jobs.evaluate_benchmarks(
        cfg, ChosenModels(cfg, tmp_path, folder, 0), [str(path)], tmp_path / "out"
    )
    questions, found = _asked_in(tmp_path / "out")
    left_out = arm == "cooper"
    assert (UNSEEN == questions) == left_out and found["excluded"] == left_out


def test_a_reward_model_judges_no_recorded_response_to_what_it_saw(stand_ins, tmp_path):
    items = [ITEM | {"id": f"x:{i}", "place": i, "question": f"How many are {i} ?"} for i in range(3)]
    path = write_rows(tmp_path / "items.jsonl", *items)
    cfg = config(benchmark__judged_by="model", reward__weights=str(stand_ins[1]))
    benchmark_jobs.rejudge_items(cfg, ChosenModels(cfg, tmp_path), str(path), tmp_path / "out")
    questions, found = _asked_in(tmp_path / "out")
    assert questions == UNSEEN and (found["seen"], found["excluded"]) == (1, 1)
    cfg.benchmark.exclude_seen = False
    benchmark_jobs.rejudge_items(cfg, ChosenModels(cfg, tmp_path), str(path), tmp_path / "all")
    questions, found = _asked_in(tmp_path / "all")
    assert len(questions) == 3 and (found["seen"], found["excluded"]) == (1, 0)


@pytest.mark.slow
def test_random_models_from_end_to_end(tmp_path, monkeypatch):
    """Sampled, judged by rule, reward model and oracle; resumed; judged anew to the same rewards."""
    devices = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    path = write_rows(
        tmp_path / "sums_test.jsonl",
        *({"question": f"Ada has {i} coins .", "answer": f"#### {i}", "level": i} for i in range(3)),
    )
    cfg = config(benchmark__judged_by="both")
    chosen, out = ChosenModels(cfg, tmp_path), tmp_path / "out"
    benchmark_jobs.evaluate_benchmarks(cfg, chosen, ["synthetic", str(path)], out)
    rows, whole = read_rows(out / ITEMS), (out / ITEMS).read_bytes()
    assert [(r["benchmark"], r["sample"]) for r in rows] == [
        (name, s) for name in ("synthetic", "sums_test") for _ in range(3) for s in range(2)
    ]
    assert all(0 < r["reward"] < 1 and 1 <= r["tokens"] <= 6 for r in rows)
    made = synthetic.make_problems(cfg.seed, 3, "eval")
    assert [r["oracle"] for r in rows[:6]] == [
        synthetic.is_correct(made[i // 2], r["completion"]) for i, r in enumerate(rows[:6])
    ]
    results = json.loads((out / RESULTS).read_text())
    assert [set(b["judges"]) for b in results["benchmarks"]] == [
        {"rule", "model", "oracle"},
        {"rule", "model"},
    ]
    assert results["benchmarks"][1]["by"]["level"].keys() == {"0", "1", "2"}
    assert set(results["mean"]) == {"rule", "model"}

    lines = whole.splitlines(keepends=True)
    (out / ITEMS).write_bytes(b"".join(lines[:7]) + lines[7][:20])
    benchmark_jobs.evaluate_benchmarks(cfg, chosen, ["synthetic", str(path)], out)
    assert (out / ITEMS).read_bytes() == whole
    cfg.benchmark.temperature = 0.5
    with pytest.raises(SetupError, match="benchmark.temperature was 0.7 and is now 0.5"):
        benchmark_jobs.evaluate_benchmarks(cfg, chosen, ["synthetic", str(path)], out)

    benchmark_jobs.rejudge_items(cfg, chosen, str(out / ITEMS), tmp_path / "again")
    again = read_rows(tmp_path / "again" / ITEMS)
    assert [(r["completion"], r["rule"]) for r in again] == [(r["completion"], r["rule"]) for r in rows]
    assert [r["reward"] for r in again] == pytest.approx([r["reward"] for r in rows], abs=1e-5)


def test_a_benchmark_is_sampled_at_its_own_top_p(tmp_path, monkeypatch):
    """At its own temperature and number of samples, too, whatever the evaluations of training have."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    requests = tiny_rollouts.record_requests(monkeypatch)
    own = dict(benchmark__top_p=0.8125, benchmark__temperature=0.75, benchmark__samples=3)
    cfg = config(benchmark__judged_by="rule", benchmark__chunk=3, eval__top_p=0.5, **own)
    benchmark_jobs.evaluate_benchmarks(cfg, ChosenModels(cfg, tmp_path), ["synthetic"], tmp_path / "out")
    asked = [(r.spec.top_p, r.spec.temperature, r.spec.group_size) for r in requests]
    assert asked == [(0.8125, 0.75, 3)] and len(read_rows(tmp_path / "out" / ITEMS)) == 9


def test_the_papers_config_needs_the_policys_weights_alone(tmp_path, monkeypatch):
    """No reward model, no assistant's server, no training data."""
    devices = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    folder = tiny_tokenizers.write(tmp_path / "tokenizer", "qwen")
    model = tiny_models.config(family="qwen2", qkv_bias=True, vocab_size=512, layers=1)
    params = tiny_models.random_params(model)
    weight_export.save_pretrained(tmp_path / "hf", model, params, "logits", tokenizer_dir=folder)
    path = write_rows(tmp_path / "a_test.jsonl", {"question": "Two and two?", "answer": "#### 4"})
    cfg = qwen_1p5b.get_config()
    cfg.policy.weights = str(tmp_path / "hf")
    cfg.benchmark.max_prompt_tokens, cfg.benchmark.max_new_tokens = 252, 4  # all of the model's 256 positions
    benchmark_jobs.evaluate_benchmarks(
        cfg, ChosenModels(cfg, tmp_path / "out"), [str(path)], tmp_path / "out"
    )
    rows = read_rows(tmp_path / "out" / ITEMS)
    assert len(rows) == cfg.benchmark.samples and "reward" not in rows[0]
    (tmp_path / "hf" / "model.safetensors").touch()  # as if other weights had been written there
    with pytest.raises(SetupError, match='policy.files was "[0-9a-f]+" and is now'):
        benchmark_jobs.evaluate_benchmarks(
            cfg, ChosenModels(cfg, tmp_path / "out"), [str(path)], tmp_path / "out"
        )


def test_an_untrained_head_is_no_judge(tmp_path):
    cfg = config(benchmark__judged_by="model", reward__allow_untrained_head=False)
    cfg.reward.weights = "nowhere"
    path = write_rows(tmp_path / "items.jsonl", ITEM)
    with pytest.raises(SetupError, match="nowhere"):
        benchmark_jobs.rejudge_items(cfg, ChosenModels(cfg, tmp_path), str(path), tmp_path / "out")


def command(out: Path, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "launch/evaluate.py"), f"--out={out}", *flags]


def started(out: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(out, *flags), env=tiny_runs.environment(), capture_output=True, text=True, timeout=400
    )


def started_on_two_hosts(out: Path, *flags: str) -> subprocess.CompletedProcess:
    hosts_of = [sys.executable, str(ROOT / "launch/local_hosts.py"), "-n", "2", "--devices=1", "--"]
    return subprocess.run(
        [*hosts_of, *command(out, *flags)],
        env=tiny_runs.environment(), capture_output=True, text=True, timeout=400,
    )  # fmt: skip


TINY = f"--config={ROOT / 'configs/tiny.py'}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, words",
    [
        ([TINY], "give one of --benchmark, --rejudge, --labelled and --attacks"),
        ([TINY, "--benchmark=synthetic", "--compare=x"], "--compare belongs to --attacks"),
        ([TINY, "--out=", "--benchmark=synthetic"], "--out is empty: give --out=DIR"),
        ([TINY, "--benchmark=nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
        ([TINY, "--run_dir=runs/x", "--benchmark=synthetic"], "--config and --run_dir both"),
        ([TINY, "--benchmrk=synthetic"], "--benchmrk: there is no such flag; did you mean --benchmark?"),
        (
            [TINY, "--labelled=x", "--judge=oracle"],
            "--judge=oracle: expected multi string enum (value should be one of <model|rule|",
        ),
        ([TINY, "--config.steps=few"], "--config.steps=few: expected int (invalid literal for int()"),
        (
            [TINY, "--config.stps=2"],
            "--config.stps: the config does not have this field; did you mean --config.steps?",
        ),
        (["--config=nowhere.py", "--benchmark=synthetic"], "No such file or directory: 'nowhere.py'"),
        (
            ["--benchmark=synthetic"],
            "--config is missing: give --config=FILE; the shipped configs are base, ",
        ),
        ([TINY, "synthetic"], "unexpected arguments ['synthetic']"),
        (
            ["--run_dir=.", "--config.reward.weights=x", "--benchmark=synthetic"],
            "--config.reward.weights names other weights than the run's",
        ),
    ],
)
def test_a_wrong_command_ends_with_one_line(flags, words, tmp_path):
    done = started(tmp_path / "out", *flags)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and words in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_killed_and_stopped_it_ends_with_the_same_files(tmp_path):
    """A process alone: SIGKILL in the middle of it, then SIGTERM, then to the end."""
    shrunk = [f"--config.{name}={value}" for name, value in (SHRUNK | {"eval.problems": 24}).items()]
    flags = [
        TINY,
        "--benchmark=synthetic",
        "--config.mesh.data=1",
        "--config.benchmark.judged_by=both",
        *shrunk,
    ]
    assert started(tmp_path / "whole", *flags).returncode == 0
    cut = tmp_path / "cut"
    for which, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, hosts.STOPPED)):
        process = subprocess.Popen(
            command(cut, *flags), env=tiny_runs.environment(), stdout=subprocess.DEVNULL
        )
        before = _size(cut / ITEMS)
        while _size(cut / ITEMS) <= before and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, which)
        assert process.wait(timeout=300) == code
    assert 0 < _size(cut / ITEMS) < _size(tmp_path / "whole" / ITEMS)
    assert started(cut, *flags).returncode == 0
    assert (cut / ITEMS).read_bytes() == (tmp_path / "whole" / ITEMS).read_bytes()
    whole, again = (json.loads((tmp_path / n / RESULTS).read_text()) for n in ("whole", "cut"))
    for results in (whole, again):
        for found in results["benchmarks"]:
            del found["seconds"]
    assert whole == again


@pytest.mark.slow
def test_two_hosts_write_what_one_does(tmp_path):
    shrunk = [f"--config.{name}={value}" for name, value in SHRUNK.items()]
    flags = [TINY, "--benchmark=synthetic", "--config.benchmark.judged_by=both", *shrunk]
    assert started(tmp_path / "one", *flags).returncode == 0
    done = started_on_two_hosts(tmp_path / "two", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (read_rows(tmp_path / n / ITEMS) for n in ("one", "two"))
    assert [r | {"reward": 0} for r in one] == [r | {"reward": 0} for r in two]
    assert [r["reward"] for r in one] == pytest.approx([r["reward"] for r in two], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["labelled", "attacks"])
def test_two_hosts_judge_and_attack_as_one_does(job, tmp_path):
    """The rule and a reward model of two steps; the rows, and so the models' batches, are cut otherwise."""
    few = dict(
        steps=1, supervised__policy_steps=2, supervised__reward_steps=2, eval__every=0, checkpoint__every=1
    )
    done = tiny_runs.run(tmp_path / "run", **few)
    assert done.returncode == 0, done.stderr
    rows = [
        {"question": f"How many coins {i} ?", "reference_answer": f"{i}", "completion": f"#### {i + i % 2}"}
        | {"label": int(i % 2 == 0)}
        for i in range(5)
    ]
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    flags = [f"--run_dir={tmp_path / 'run'}", f"--{job}={path}", "--config.reward.max_tokens=256"]
    if job == "labelled":
        flags += ["--judge=model", "--judge=rule", "--judge=rule_then_model"]
    assert (done := started(tmp_path / "one", *flags)).returncode == 0, done.stderr
    done = started_on_two_hosts(tmp_path / "two", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (read_rows(tmp_path / n / ITEMS) for n in ("one", "two"))
    assert len(one) == len(two) >= len(rows)
    for ours, theirs in zip(one, two, strict=True):
        _check_near(ours, theirs)


def _check_near(one, two) -> None:
    """Two records are equal but for the last digits of their floats."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        one, two = list(one.values()), list(two.values())
    if isinstance(one, list):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            _check_near(a, b)
    else:
        assert one == (pytest.approx(two, abs=1e-5) if isinstance(two, float) else two)


@pytest.mark.slow
def test_a_run_before_and_after(tmp_path):
    """launch/train.py, then its policy on its own problems, and its reward models of two steps under attack."""
    few = dict(
        steps=1, supervised__policy_steps=2, supervised__reward_steps=2, eval__every=0, checkpoint__every=1
    )
    done = tiny_runs.run(tmp_path / "run", **few)
    assert done.returncode == 0, done.stderr
    of_run = f"--run_dir={tmp_path / 'run'}"
    done = started(
        tmp_path / "policy", of_run, "--benchmark=synthetic", "--config.benchmark.max_new_tokens=8"
    )
    assert done.returncode == 0 and "step 1: llama of 3 layers x 32, 8 problems" in done.stdout, done.stderr
    row = {"question": "How many coins ?", "reference_answer": "3", "completion": "#### 4", "label": 0}
    path = write_rows(tmp_path / "rows.jsonl", row)
    done = started(
        tmp_path / "attacks", of_run, f"--attacks={path}", "--compare=0", "--config.reward.max_tokens=256"
    )
    assert done.returncode == 0, done.stderr
    rewards = [r["rewards"] for r in read_rows(tmp_path / "attacks" / ITEMS)]
    assert [list(r) for r in rewards] == [["step 1", "step 0"]] * len(rewards)
    done = started(tmp_path / "x", of_run, "--step=7", "--benchmark=synthetic")
    assert done.returncode == 2 and "the checkpoints are 0, 1" in done.stderr


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
