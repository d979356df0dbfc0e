"""A judge of the user's own in the rule verifier's processes, and the files that flags name."""

import dataclasses
import os
import signal

import pytest
from test_hosts import in_turn
from tiny_steps import config

from cooper_jax.reward.multihost import SharedRule, check_same_code
from cooper_jax.rule.verifier import RuleConfig, RuleVerifier
from cooper_jax.rule.worker_process import Item, make_item
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.settings.user_code import UserCode, read_user_code
from cooper_jax.trainer.setup import build_components
from cooper_jax.types import Problem, Verdict

JUDGE = """
import time

def judge(question, reference, completion, target):
    if completion == "raise":
        raise KeyError("unread")
    if completion == "hang":
        while True:
            pass
    if completion == "allocate":
        return bytearray(1 << 33)
    if completion == "abstain":
        return None
    if completion == "score":
        return 0.5
    return completion == f"{question} {reference} {target}"

def fails(question, **columns):
    raise ValueError("not today")
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(JUDGE)
    return file


def rule_config(judge) -> RuleConfig:
    return RuleConfig(workers=2, timeout=0.5, step_budget=5.0, memory_mb=1024, judge=str(judge))


def test_a_judge_is_given_the_problem_and_its_failures_cost_no_other_verdict(path, capsys):
    problem = Problem("q", "4", columns={"target": 7, "question": "a column"})
    texts = ("q 4 7", "q 4 8", "abstain", "raise", "score", "hang", "allocate", "q 4 7")
    with RuleVerifier(rule_config(f"{path}:judge")) as rule:
        rule.check_ready(make_item(problem, "q 4 7"))
        path.write_text("raise ValueError")  # a worker that starts later reads the text of the start
        found = rule.check([make_item(problem, text) for text in texts])
        other = rule.check([make_item(dataclasses.replace(problem, columns={"target": 8}), "q 4 8")])
        own = rule.check([make_item(problem, "q 5 7", "5")])
    assert [v.value for v in found] == [
        "correct", "wrong", "unrecognised", "unrecognised", "unrecognised", "timeout", "timeout", "correct",
    ]  # fmt: skip
    assert other == own == [Verdict.CORRECT]
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "mine.py:judge" in said and "(line " in said


def test_a_worker_of_a_judge_that_is_killed_is_replaced(path):
    problem = Problem("q", "4", columns={"target": 7})
    kill = path.with_name("kill.py")
    kill.write_text(
        "import os, signal, pathlib\n"
        "def judge(completion):\n"
        f"    once = pathlib.Path({str(path.with_name('once'))!r})\n"
        "    if completion == 'kill' and not once.exists():\n"
        "        once.touch()\n"
        f"        os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "    return True\n"
    )
    with RuleVerifier(rule_config(f"{kill}:judge")) as rule:
        assert rule.check([make_item(problem, "kill")]) == [Verdict.CORRECT]
    assert os.path.exists(path.with_name("once"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fails", "mine.py:fails' fails on the first problem: ValueError: not today \\(line 19\\)"),
        ("judge", "takes target, which is none of its arguments: question, reference, completion"),
    ],
)
def test_a_judge_that_cannot_judge_the_first_problem_is_refused(path, name, words):
    with RuleVerifier(rule_config(f"{path}:{name}")) as rule:
        with pytest.raises(SetupError, match=words):
            rule.check_ready(make_item(Problem("q", "4"), "4"))


@pytest.mark.parametrize(
    ("judge", "words"),
    [("my_judge", "write PATH.py:NAME"), ("none.py:judge", "there is no file"), ("mine.py:x", "has no 'x'")],
)
def test_a_judge_that_is_not_there_is_refused(path, monkeypatch, judge, words):
    monkeypatch.chdir(path.parent)
    with pytest.raises(SetupError, match=words):
        RuleVerifier(rule_config(judge))


@pytest.mark.slow
def test_a_run_starts_with_a_judge_and_ends_without_one_in_one_line(path, tmp_path, capsys):
    """Its columns are missing in synthetic problems."""
    file = tmp_path / "simple.py"
    file.write_text("def judge(question, reference, completion):\n    return reference in completion\n")
    with build_components(config(**{"rule.judge": f"{file}:judge"}), tmp_path / "run") as (components, _):
        problem = components.train[0]
        assert components.rule.check([make_item(problem, f"so {problem.reference}")]) == [Verdict.CORRECT]
    assert "the rule can never verify" not in capsys.readouterr().out
    with pytest.raises(SetupError, match="mine.py:judge' takes target"):
        with build_components(config(**{"rule.judge": f"{path}:judge"}), tmp_path / "other"):
            pass


# --- several hosts -----------------------------------------------------------------------------------


def test_hosts_that_read_different_texts_end_with_the_files_name(monkeypatch):
    texts = ["x = 1", "x = 1", "x = 2"]

    def work(me):
        try:
            check_same_code(
                [None, UserCode("/here/same.py", "f", "same"), UserCode("/here/mine.py", "f", texts[me])]
            )
        except SetupError as error:
            return str(error)

    said = in_turn(monkeypatch, 3, work)
    assert said[0] == said[1] == said[2] and "same.py" not in said[0]
    assert said[0].startswith("/here/mine.py: process 2 has read another text than process 0")
    texts[2] = "x = 1"
    assert in_turn(monkeypatch, 3, work) == [None] * 3


def test_items_with_questions_and_columns_are_divided_over_hosts(monkeypatch):
    class Judge:
        asked = []

        def submit(self, items):
            self.asked += items

            class Ready:
                def result(self):
                    return [Verdict.CORRECT if i.question == i.completion else Verdict.WRONG for i in items]

            return Ready()

    items = [Item("r", str(i % 4), str(i % 3), {"n": i}) for i in range(12)]
    found = in_turn(monkeypatch, 2, lambda me: SharedRule(Judge()).check(items))
    want = [Verdict.CORRECT if i.question == i.completion else Verdict.WRONG for i in items]
    assert found == [want] * 2 and len(Judge.asked) >= len(items)


def test_the_text_of_a_file_is_what_is_compared(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    code = read_user_code(f"{tmp_path}/a.py:x", "reward.functions")
    assert code.label == "a.py:x" and code.digest == dataclasses.replace(code, path="/elsewhere").digest
