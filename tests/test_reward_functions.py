"""Rewards by name: the user's own functions beside the rollout, their failures, and how rewards are combined."""

import asyncio
import math
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from test_hosts import finish, in_turn
from tiny_runs import metrics, run, start_hosts, timeless
from tiny_steps import B, G, begun, config, solved, steps, take_step

from cooper_jax.data.policy_prompts import PromptStyle
from cooper_jax.policy.advantages import decoupled_advantages, normalise_rewards
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer import function_runner, reward_functions
from cooper_jax.trainer.function_runner import FunctionRunner, read_values
from cooper_jax.trainer.reward_functions import StepRewards, load_reward_functions, sum_rewards
from cooper_jax.trainer.rewards import RewardConfig
from cooper_jax.types import Completion, Problem, Verdict

FILE = """
def brevity(completions, **kwargs):
    return [-len(text) for text in completions]

def columns(prompts, completions, question, reference, hint, completion_tokens, completion_lengths):
    assert prompts == [question[0] + "?"] * 2 and reference == ["4", "4"]
    assert [len(ids) for ids in completion_tokens] == completion_lengths
    return [float(h == text) for h, text in zip(hint, completions)]

def late(verdicts, scores, completions):
    return [score if verdict == "correct" else None for verdict, score in zip(verdicts, scores)]

async def waits(completions, **kwargs):
    import asyncio
    await asyncio.sleep(0.01)
    return [1.0, None]

def messages(prompts, completions, **kwargs):
    return [len(prompts[0][0]["content"]) + len(c[0]["content"]) for c in completions]

def broken(completions, **kwargs):
    raise KeyError(completions[0])

def positional(completions, /):
    return []

def star(*args):
    return []

class Scorer:
    def __call__(self, completions):
        return [1.0] * len(completions)

def needs_target(completions, target):
    return []

mean = brevity
number = 3
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    return file


def reward_config(functions: str, **changes) -> RewardConfig:
    flags = {f"reward.{name}": value for name, value in changes.items()}
    return RewardConfig.from_config(config(**{"reward.functions": functions}, **flags).reward)


PROBLEMS = [
    Problem("two and two", "4", columns={"hint": "b", "question": "other"}),
    Problem("one and three", "4"),
]
TEXTS = [
    [Completion("a", tokens=1), Completion("b", tokens=2)],
    [Completion("cc", tokens=3), Completion("", tokens=1)],
]
TOKENS = [[[5], [6, 7]], [[5, 6, 7], [1]]]
VERDICTS = [Verdict.CORRECT, Verdict.WRONG, Verdict.CORRECT, Verdict.TIMEOUT]
SCORES = np.array([0.25, 0.5, 0.75, 1.0], np.float32)


def collect(config: RewardConfig, order=(0, 1)):
    functions = load_reward_functions(config, PROBLEMS, PromptStyle("?", "", False, ""))
    try:
        rewards = StepRewards(functions, PROBLEMS)
        for index in order:
            rewards.add_group(index, TEXTS[index], TOKENS[index])
        return rewards.collect(SCORES, VERDICTS, sum(TEXTS, []))
    finally:
        functions.close()


def test_functions_get_the_row_and_are_summed_by_weight(path):
    names = f"rule,{path}:brevity, {path}:columns,{path}:late,{path}:waits"
    found = collect(reward_config(names, function_weights="1,0.5,2,4,0.125"), order=(1, 0))
    nan = math.nan
    expected = {
        "rule": [1, 0, 1, 0],
        "brevity": [-1, -1, -2, 0],
        "columns": [0, 1, 0, 0],
        "late": [0.25, nan, 0.75, nan],
        "waits": [1, nan, 1, nan],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(found.by_name[name], np.float32(values))
    np.testing.assert_array_equal(
        found.total, np.float32([1 - 0.5 + 1 + 0.125, -0.5 + 2, 1 - 1 + 3 + 0.125, 0])
    )
    assert found.metrics["reward/late"] == 0.5 and found.metrics["reward/late/none"] == 2
    assert found.metrics["reward/brevity"] == -1 and found.metrics["reward/masked"] == 0
    assert found.metrics["reward/mean"] == pytest.approx(found.total.mean())


def test_conversational_functions_get_messages(path):
    found = collect(reward_config(f"{path}:messages", function_messages=True))
    size = [len("two and two?"), len("one and three?")]
    assert found.total.tolist() == [size[0] + 1, size[0] + 1, size[1] + 2, size[1]]


def test_a_row_without_a_reward_is_masked(path):
    found = collect(reward_config(f"{path}:late"))
    assert found.masked.tolist() == [False, True, False, True] and found.metrics["reward/masked"] == 2
    assert found.metrics["reward/mean"] == 0.5


def test_sums_by_hand():
    nan = math.nan
    values = np.array([[1, nan, nan], [2, 3, nan]], np.float32)
    np.testing.assert_array_equal(sum_rewards(values, [10.0, 0.5]), np.float32([11, 1.5, nan]))


def test_rewards_normalised_apart_keep_combinations_apart():
    """(1, 0) and (0, 1) have one sum; with rewards of other spreads they get other advantages (GDPO)."""
    options = dict(baseline="group_mean", std="group", eps=0.0, floor=0.0)
    first, second = [1.0, 0, 0, 0], [0, 1.0, 1.0, 0]
    found, zero = decoupled_advantages(jnp.array([first, second]), [1.0, 1.0], 4, **options)
    a, b = (np.array(r) - np.mean(r) for r in (first, second))
    total = a / a.std(ddof=1) + b / b.std(ddof=1)
    np.testing.assert_allclose(found, total / np.sqrt((total**2).sum() / 3), rtol=1e-6)
    assert float(zero) == 0 and found[0] != found[1]
    summed, _ = normalise_rewards(jnp.array(first) + jnp.array(second), 4, **options)
    assert summed[0] == summed[1]

    # A row without the second reward has the first alone; one without any counts in no statistic.
    nan = math.nan
    rewards = jnp.array([[1.0, 0, nan, 2, 2, 2], [nan, 1, nan, 3, 3, 3]])
    found, zero = decoupled_advantages(rewards, [1.0, 7.0], 3, **options)
    assert found[0] == -found[1] > 0 and found[2:].tolist() == [0, 0, 0, 0] and float(zero) == 0.5


# --- failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "failure"),
    [
        ([1.0], "wrong_length"),
        ([1, 2, 3], "wrong_length"),
        (None, "wrong_type"),
        (0.5, "wrong_type"),
        ("12", "wrong_type"),
        ([1, "x"], "wrong_type"),
        ([[1], [2]], "wrong_type"),
        (["1.0", "2.0"], "wrong_type"),
        ({1.0, 2.0}, "wrong_type"),
        ([1, None], ""),
        (np.array([True, False]), ""),
    ],
)
def test_returned_values(returned, failure):
    result = read_values(returned, 2)
    assert result.failure == failure and len(result.values) == 2
    if failure:
        assert result.values == (None, None) and result.message


def test_numbers_that_are_not_finite_are_none_and_counted():
    # The last one is finite, and infinite in float32.
    result = read_values([math.nan, 1, math.inf, -1e39], 4)
    assert result.values == (None, 1.0, None, None) and result.not_finite == 3 and not result.failure


def test_a_call_over_its_limit_is_given_up_and_the_next_one_runs():
    release = threading.Event()

    def slow(completions):
        if completions[0] == "hang":
            release.wait()
        return [1.0]

    runner = FunctionRunner(slow, "", timeout=0.3)
    began = time.monotonic()
    calls = [runner.submit({"completions": [text]}, 1) for text in ("hang", "fine")]
    results = [runner.wait(call) for call in calls]
    assert time.monotonic() - began < 5
    assert [r.failure for r in results] == ["timeout", ""] and results[1].values == (1.0,)
    release.set()  # the late result is ignored
    time.sleep(0.05)
    assert calls[0].result.failure == "timeout"
    runner.close()


def test_a_function_that_keeps_hanging_is_not_called_any_more(monkeypatch):
    monkeypatch.setattr(function_runner, "MAX_ABANDONED", 2)
    release, called = threading.Event(), []

    def hang(completions):
        called.append(1)
        release.wait()

    runner = FunctionRunner(hang, "", timeout=0.05)
    results = [runner.wait(runner.submit({"completions": [""]}, 1)) for _ in range(4)]
    assert [r.failure for r in results] == ["timeout"] * 4 and len(called) == 2
    assert "not called any more" in results[3].message
    release.set()
    runner.close()


def test_async_calls_run_at_once_and_are_cancelled_at_their_limit(monkeypatch):
    started, cancelled = [], []

    async def wait(completions):
        started.append(completions[0])
        try:
            await asyncio.sleep({"long": 60, "short": 0.2}[completions[0]])
        except asyncio.CancelledError:
            cancelled.append(1)
            raise
        return [2]

    runner = FunctionRunner(wait, "", timeout=1.0)
    began = time.monotonic()
    calls = [runner.submit({"completions": [text]}, 1) for text in ("long", "short", "short", "short")]
    results = [runner.wait(call) for call in calls]
    assert time.monotonic() - began < 10
    assert [r.failure for r in results] == ["timeout", "", "", ""] and cancelled == [1]

    # A function that blocks its loop is given up, and the next call gets another loop.
    monkeypatch.setattr(function_runner, "GRACE", 0.1)
    release = threading.Event()

    async def block(completions):
        if completions[0] == "block":
            release.wait()
        return [3]

    blocking = FunctionRunner(block, "", timeout=0.1)
    assert blocking.wait(blocking.submit({"completions": ["block"]}, 1)).message.endswith(
        "blocks its event loop"
    )
    assert blocking.wait(blocking.submit({"completions": ["go"]}, 1)).values == (3.0,)
    release.set()
    for each in (runner, blocking):
        each.close()


def test_failures_are_counted_and_named_and_a_function_that_always_fails_ends_the_run(
    path, capsys, monkeypatch
):
    monkeypatch.setattr(reward_functions, "FAILURES_IN_A_ROW", 4)
    functions = load_reward_functions(
        reward_config(f"{path}:broken,rule"), PROBLEMS, PromptStyle("", "", False, "")
    )

    def one_step():
        rewards = StepRewards(functions, PROBLEMS)
        for index in (0, 1):
            rewards.add_group(index, TEXTS[index], TOKENS[index])
        return rewards.collect(SCORES, VERDICTS, sum(TEXTS, []))

    found = one_step()
    assert found.metrics["reward/broken/exception"] == 2 and math.isnan(found.metrics["reward/broken"])
    assert found.total.tolist() == [1, 0, 1, 0], "the other reward is left"
    said = capsys.readouterr().out
    assert "mine.py:broken" in said and "KeyError: 'a' (line 22)" in said
    with pytest.raises(
        SetupError, match=r"mine.py:broken' failed at each of its last 4 calls.*KeyError: 'cc'"
    ):
        one_step()
    assert capsys.readouterr().out == "", "it is printed once"
    functions.close()


def test_rewards_that_are_never_finite_are_reported_and_end_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reward_functions, "FAILURES_IN_A_ROW", 4)
    (tmp_path / "mine.py").write_text(
        "def nan(completions):\n    return [float('nan'), 10**400][:len(completions)]\n"
        "def none(completions):\n    return [None] * len(completions)\n"
    )

    def one_step(functions):
        rewards = StepRewards(functions, PROBLEMS)
        for index in (0, 1):
            rewards.add_group(index, TEXTS[index], TOKENS[index])
        return rewards.collect(SCORES, VERDICTS, sum(TEXTS, []))

    def load(name):
        config = reward_config(f"{tmp_path}/mine.py:{name}")
        return load_reward_functions(config, PROBLEMS, PromptStyle("", "", False, ""))

    functions = load("nan")
    found = one_step(functions)
    assert found.metrics["reward/nan/not_finite"] == 4 and "reward/nan/none" not in found.metrics
    assert "mine.py:nan' returned 4 rewards that are not finite" in capsys.readouterr().out
    with pytest.raises(SetupError, match="failed at each of its last 4 calls.*no reward was a finite number"):
        one_step(functions)
    functions.close()

    # A function may have nothing to say, but a step without any reward is reported once.
    functions = load("none")
    for said in (1, 0, 0):
        assert one_step(functions).masked.all()
        assert capsys.readouterr().out.count("no response of this step has a reward") == said
    functions.close()


# --- settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{dir}/none.py:f", "there is no file"),
        ("{path}:absent", "has no 'absent'; it has brevity, columns"),
        ("{path}:number", "it is int, which cannot be called"),
        ("{path}:positional", "completions must not be positional-only"),
        ("{path}:star", "passed by name, so it would get none"),
        ("{path}:Scorer", "it is a class; name a function, or an object of the class"),
        ("{path}:needs_target", "takes target, which is neither an argument"),
        ("{dir}/bad.py:f", "SyntaxError: .* \\(line 2\\)"),
        ("{dir}/exits.py:f", "SystemExit: 3"),
    ],
)
def test_functions_that_cannot_be_used_are_refused_in_one_line(path, tmp_path, entry, words):
    (tmp_path / "bad.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(3)\n")
    settings = reward_config(entry.format(path=path, dir=tmp_path))
    with pytest.raises(SetupError, match=words) as error:
        load_reward_functions(settings, PROBLEMS, PromptStyle("", "", False, ""))
    assert len(error.value.messages) == 1 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"functions": "brief"}, "'brief' is none of rule, model"),
        ({"functions": "rule,rule"}, "rule occurs twice"),
        ({"functions": "model", "arm": "rule"}, "model needs a reward model"),
        ({"functions": "rule,model", "function_weights": "1"}, "1 numbers for 2 functions"),
        ({"functions": "rule", "function_weights": "much"}, "give numbers"),
        ({"functions": "rule", "function_timeout": 0.0}, "above 0 seconds"),
        ({"functions": "rule", "answer_required": True}, "does nothing beside reward.functions"),
        ({"function_weights": "1"}, "needs --config.reward.functions"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(flags, words):
    with pytest.raises(SetupError, match=words):
        reward_config(flags.pop("functions", ""), **flags)


def test_names_in_metrics_are_distinct(path, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(FILE)
    names = f"{path}:brevity,{other}:brevity,{path}:mean"
    functions = load_reward_functions(reward_config(names), PROBLEMS, PromptStyle("", "", False, ""))
    assert [t.name for t in functions.terms] == ["mine.brevity", "other.brevity", "mine.mean"]
    functions.close()


def test_a_file_that_changes_during_a_run_changes_nothing(path):
    functions = load_reward_functions(
        reward_config(f"{path}:brevity"), PROBLEMS, PromptStyle("", "", False, "")
    )
    path.write_text("raise ValueError")
    assert functions.terms[0].function(completions=["abc"]) == [-3]
    assert not list(path.parent.glob("__pycache__"))
    functions.close()


# --- whole steps -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_arms_reward_by_name_is_the_same_run(build, tmp_path):
    state, metrics, _, _ = steps(build, tmp_path / "a", 2)
    named, named_metrics, _, _ = steps(build, tmp_path / "b", 2, **{"reward.functions": "model"})
    assert all(a.tobytes() == b.tobytes() for a, b in zip(state, named, strict=True))
    for first, second in zip(metrics, named_metrics, strict=True):
        assert first == {name: second[name] for name in first}
        assert second["reward/model"] == first["reward/mean"]


@pytest.mark.slow
def test_a_masked_row_does_not_move_the_policy(build, tmp_path, path):
    """Rows without a reward leave the loss: what they were is not seen in the policy."""
    path.write_text("def first(completions, **_):\n    return [1.0, 0.5] if 'x' in _ else [1.0, None]\n")
    with build(**{"reward.functions": f"{path}:first"}) as (components, state):
        with begun(components, state, tmp_path) as (state, _, _):
            _, metrics, record = take_step(solved(components), state)
    assert metrics["reward/masked"] == B and metrics["reward/first/none"] == B
    assert record.rewards[0] == 1 and np.isnan(record.rewards[1::G]).all()
    assert not record.advantages.any(), "a single reward has nothing to be compared with"
    assert metrics["reward/zero_variance_groups"] == 1
    assert metrics["response/tokens_mean"] > 0 and set(record.rewards_by_name) == {"first"}


# --- two processes -----------------------------------------------------------------------------------


def test_groups_are_divided_over_hosts_and_all_hosts_have_all_rewards(path, monkeypatch, capsys):
    """Two hosts, as each of them sees it: every group is rewarded on one, and the sums are those of one host."""
    path.write_text(
        FILE
        + "\ndef flaky(completions, question, **kwargs):\n"
        + "    if 'three' in question[0]:\n        raise OSError('now and then')\n"
        + "    return [float('nan'), 0.1]\n"
    )
    settings = reward_config(f"rule,{path}:flaky,{path}:late,{path}:waits")
    alone = collect(settings)
    submitted = []

    def work(me):
        functions = load_reward_functions(settings, PROBLEMS, PromptStyle("?", "", False, ""))
        rewards = StepRewards(functions, PROBLEMS)
        for index in (1, 0):
            rewards.add_group(index, TEXTS[index], TOKENS[index])
        submitted.append((me, [sorted(calls) for calls in rewards._calls]))
        try:
            return rewards.collect(SCORES, VERDICTS, sum(TEXTS, []))
        finally:
            functions.close()

    for found in in_turn(monkeypatch, 2, work):
        np.testing.assert_array_equal(found.total, alone.total)
        np.testing.assert_equal(found.metrics, alone.metrics)
    assert alone.metrics["reward/flaky/exception"] == 1 and alone.metrics["reward/flaky/not_finite"] == 1
    # Of `flaky` and `waits`; `late` starts when the verdicts are known.
    assert (0, [[], [0], [], [0]]) in submitted and (1, [[], [1], [], [1]]) in submitted


FAULTY = """
import time
import zlib

def flaky(question, completions, **kwargs):
    if zlib.crc32(question[0].encode()) % 3 == 0:
        raise OSError("now and then")
    return [zlib.crc32(text.encode()) % 7 / 7 for text in completions]

def slow(question, completions, **kwargs):
    time.sleep(60 if zlib.crc32(question[0].encode()) % 8 == 1 else 0.02)
    return [len(text) / 100 for text in completions]
"""


@pytest.mark.slow
def test_faulty_functions_in_two_processes_are_bounded_counted_and_bit_equal(tmp_path):
    """One function raises now and then, one is slow and hangs now and then; which calls these are is fixed."""
    file = tmp_path / "mine.py"
    file.write_text(FAULTY)
    changes = {
        "steps": 2,
        "eval__every": 0,
        "reward__arm": "rule",
        "reward__recipe": "",
        "supervised__policy_steps": 0,
        "supervised__reward_steps": 0,
        "reward__functions": f"rule,{file}:flaky,{file}:slow",
        "reward__function_timeout": 5.0,
    }
    for name in ("first", "second"):
        processes = start_hosts(tmp_path / name, 2, 1, tmp_path / f"out_{name}", **changes)
        said = [tmp_path / f"out_{name}" / str(i) for i in range(2)]
        assert finish(processes) == [0, 0], [path.read_text()[-3000:] for path in said]
    first, second = metrics(tmp_path / "first"), metrics(tmp_path / "second")
    assert timeless(first) == timeless(second)
    assert (tmp_path / "first/samples.jsonl").read_text() == (tmp_path / "second/samples.jsonl").read_text()

    # The counts are those of the problems, whichever process they belonged to.
    assert sum(row.get("reward/flaky/exception", 0) for row in first) > 0
    assert sum(row.get("reward/slow/timeout", 0) for row in first) > 0
    for row in first:
        assert 0 < row["reward/flaky"] < 1 and row["reward/slow"] > 0 and row["reward/masked"] == 0
        assert row["time/functions"] < 8 * 5 + 20
    assert "mine.py:flaky' failed (exception)" in (tmp_path / "out_first" / "0").read_text()

    # One process of the same mesh has the same faults.
    done = run(tmp_path / "one", devices=2, **changes)
    assert done.returncode == 0, done.stderr
    for one, two in zip(metrics(tmp_path / "one"), first, strict=True):
        for name in ("flaky/exception", "slow/timeout"):
            assert one.get(f"reward/{name}") == two.get(f"reward/{name}")
        assert two["reward/mean"] == pytest.approx(one["reward/mean"], rel=1e-4)
