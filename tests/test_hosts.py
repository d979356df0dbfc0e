"""Two processes are one run: they learn what one learns, end together, and go on from where they ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import (
    ROOT,
    begun_again,
    command,
    environment,
    metrics,
    parameters,
    run,
    start_hosts,
    timeless,
)  # fmt: skip

from cooper_jax.reward.assistants import Failure
from cooper_jax.reward.multihost import SharedRule, share_over_hosts
from cooper_jax.reward.pairs.build_pairs import build_pairs
from cooper_jax.reward.pairs.pair_task import PairsConfig, PairTask
from cooper_jax.rule.worker_process import Item, make_item
from cooper_jax.runtime import hosts, interrupts
from cooper_jax.types import Completion, Problem, Verdict

# Three steps, a checkpoint after each; as many supervised ones as make pairs, and so move the reward model.
SHORT = dict(steps=3, checkpoint__every=1, eval__every=0, supervised__policy_steps=500)
BOUND = 60.0  # seconds that the others may take to notice that a process is gone


def finish(processes: list[subprocess.Popen], seconds: float = 400.0) -> list[int]:
    """Their exit codes; what has not ended by then is killed, and fails."""
    deadline = time.monotonic() + seconds
    try:
        return [p.wait(max(deadline - time.monotonic(), 0.1)) for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def until(reached, processes: list[subprocess.Popen], seconds: float = 400.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert all(p.poll() is None for p in processes), "a process ended too early"
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.01)


def steps_logged(path: Path) -> int:
    log = path / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> dict:
    """SHORT, from supervised phases that one process has done: they are the same in all runs here."""
    path = tmp_path_factory.mktemp("hosts") / "start"
    done = run(path, **SHORT | dict(steps=0))
    assert done.returncode == 0, done.stderr
    return SHORT | dict(supervised__start_from=path)


@pytest.fixture(scope="module")
def whole(short, tmp_path_factory) -> Path:
    """Two processes of two devices, uninterrupted."""
    path = tmp_path_factory.mktemp("hosts")
    processes = start_hosts(path / "run", 2, 2, path / "out", **short)
    assert finish(processes) == [0, 0], [(path / "out" / str(i)).read_text()[-3000:] for i in range(2)]
    return path / "run"


@pytest.mark.slow
def test_supervised_phases_of_two_processes(tmp_path):
    """The models at step 0 are those of one process with the same mesh, and moved."""
    few = SHORT | dict(steps=0, supervised__policy_steps=3, supervised__reward_steps=3)
    none = SHORT | dict(
        steps=0, supervised__policy_steps=0, supervised__reward_steps=0, reward__allow_untrained_head=True
    )
    assert finish(start_hosts(tmp_path / "two", 2, 2, tmp_path / "out", **few)) == [0, 0]
    for name, changes in (("one", few), ("none", none)):
        done = run(tmp_path / name, devices=4, **changes)
        assert done.returncode == 0, done.stderr
    for model in ("policy", "reward"):
        two, one, none = (parameters(tmp_path / name, 0, model) for name in ("two", "one", "none"))
        moved = np.linalg.norm(one - none)
        assert moved > 0.01 and np.linalg.norm(two - one) < 1e-3 * moved, (model, moved)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(short, whole, tmp_path):
    """The same mesh in one process, from the same step 0: the same draws, and sums equal but for the last bits."""
    done = run(begun_again(whole, tmp_path / "one"), devices=4, **short)
    assert done.returncode == 0, done.stderr
    for one, two in zip(metrics(tmp_path / "one"), metrics(whole), strict=True):
        assert one.keys() - {"time/checkpoint"} == two.keys() - {"time/checkpoint"}
        for name in one:
            if not name.startswith("time/"):
                assert (one[name] is None) == (two[name] is None), name
                assert one[name] is None or two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    assert sum(row["pairs/valid"] for row in metrics(whole)) > 0, "the reward model never moved"
    assert (tmp_path / "one/samples.jsonl").read_text().count("\n") > 0


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_ends_the_others_and_all_resume(short, whole, tmp_path, victim):
    """SIGKILL in the middle of a step: the other leaves within the bound and says why; resumed, it is the whole."""
    path = tmp_path / "run"
    processes = start_hosts(path, 2, 2, tmp_path / "out", **short)
    until(lambda: steps_logged(path) == 1, processes)
    time.sleep(0.3)  # into the second step
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    codes = finish(processes, BOUND)
    assert time.monotonic() - killed < BOUND
    said = (tmp_path / "out" / str(1 - victim)).read_text()
    if victim == 1:
        assert codes[0] == hosts.LOST and "process 1" in said and "start the same command again" in said, said
    else:  # it ran the coordination service, and JAX itself ends those who lose it
        assert codes[1] in (hosts.LOST, -signal.SIGABRT) and "distributed service" in said, said
    assert steps_logged(path) < short["steps"]
    again = start_hosts(path, 2, 2, tmp_path / "again", **short)
    assert finish(again) == [0, 0], (tmp_path / "again/0").read_text()[-3000:]
    assert "resumed from step" in (tmp_path / "again/0").read_text()
    assert timeless(metrics(path)) == timeless(metrics(whole))
    assert (path / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("who", [(1,), (0, 1)])
def test_sigterm_saves_and_exits_with_its_code(short, whole, tmp_path, who):
    """To one process or to both: both stop at the same place, the last whole step is saved, and the run goes on."""
    path = tmp_path / "run"
    changes = short | dict(checkpoint__every=100)  # so that nothing but the signal saves
    processes = start_hosts(path, 2, 2, tmp_path / "out", **changes)
    until(lambda: steps_logged(path) == 1, processes)
    for i in who:
        processes[i].send_signal(signal.SIGTERM)
    assert finish(processes) == [hosts.STOPPED] * 2, (tmp_path / "out/0").read_text()[-3000:]
    logged = steps_logged(path)
    assert 0 < logged < short["steps"]
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["0", str(logged)]
    assert f"step {logged} is saved" in (tmp_path / "out/0").read_text()
    assert finish(start_hosts(path, 2, 2, tmp_path / "again", **changes)) == [0, 0]
    assert timeless(metrics(path)) == timeless(metrics(whole))


# Notes each call, and takes long while the file `slow` is there.
NOTING = """
import pathlib, time
HERE = pathlib.Path(__file__).parent

def note(prompts, completions, reference):
    with open(HERE / "calls", "a") as file:
        file.write("x")
    if (HERE / "slow").exists():
        time.sleep(1.5)
    return [1.0 if text.rstrip().endswith(answer) else 0.0 for text, answer in zip(completions, reference)]
"""


@pytest.mark.slow
def test_a_refill_is_interrupted_and_resumed(short, tmp_path):
    """SIGTERM within the second step's refill of flat groups: the resumed run equals the uninterrupted one."""
    (tmp_path / "note.py").write_text(NOTING)
    changes = short | dict(
        checkpoint__every=100,
        reward__arm="rule",
        reward__functions=tmp_path / "note.py:note",
        data__refill_prompts=24,
    )
    whole = tmp_path / "whole"
    assert finish(start_hosts(whole, 2, 2, tmp_path / "out", **changes)) == [0, 0]
    rows = metrics(whole)[-3:]
    assert rows[1]["data/refill_prompts"] > 0, "the second step replaces nothing"

    # Each of a step's groups is one call: the second step's refill begins after this many.
    prompts = 8
    before = int(prompts + rows[0]["data/refill_prompts"] + prompts)
    calls, path = tmp_path / "calls", tmp_path / "run"
    calls.unlink()
    processes = start_hosts(path, 2, 2, tmp_path / "out", **changes)
    until(lambda: calls.exists() and calls.stat().st_size >= before - 1, processes)
    (tmp_path / "slow").touch()
    until(lambda: calls.stat().st_size > before, processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    (tmp_path / "slow").unlink()
    assert finish(processes) == [hosts.STOPPED] * 2, (tmp_path / "out/0").read_text()[-3000:]
    assert steps_logged(path) == 1 and calls.stat().st_size > before
    assert finish(start_hosts(path, 2, 2, tmp_path / "again", **changes)) == [0, 0]
    assert timeless(metrics(path)) == timeless(metrics(whole))
    assert np.array_equal(parameters(path, 3, "policy"), parameters(whole, 3, "policy"))
    assert (path / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


@pytest.mark.slow
def test_rollouts_one_step_ahead_are_interrupted_and_resumed(short, tmp_path):
    """Each process has a device of the policy's and one of the rollout's; weights pass through the hosts."""
    changes = short | dict(rollout__ahead=1, mesh__rollout="1x2x1", policy__optimiser__lr=1e-3)
    whole = tmp_path / "whole"
    assert finish(start_hosts(whole, 2, 2, tmp_path / "out", **changes)) == [0, 0]
    rows = metrics(whole)[-3:]
    assert rows[0]["policy/rollout_mismatch"] < 1e-4 < rows[1]["policy/rollout_mismatch"]

    path = tmp_path / "run"
    processes = start_hosts(path, 2, 2, tmp_path / "out", **changes)
    until(lambda: steps_logged(path) == 1, processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    assert finish(processes) == [hosts.STOPPED] * 2, (tmp_path / "out/0").read_text()[-3000:]
    assert steps_logged(path) < 3
    assert finish(start_hosts(path, 2, 2, tmp_path / "again", **changes)) == [0, 0]
    assert timeless(metrics(path)) == timeless(metrics(whole))
    for model in ("policy", "reward", "rollout_policy"):
        assert np.array_equal(parameters(path, 3, model), parameters(whole, 3, model)), model
    assert (path / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_process_without_peers(short, tmp_path, sent):
    """A terminal sends Ctrl-C to the rule's workers, too."""
    path = tmp_path / "run"
    # So many steps that the signal arrives before the end on any machine.
    changes = short | dict(checkpoint__every=1000, reward__arm="rule", steps=500)
    # A shell that starts the tests in the background lets them ignore SIGINT, and a child inherits what is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with open(tmp_path / "out", "wb") as file:
            process = subprocess.Popen(
                command(path, **changes), env=environment(), stdout=file, stderr=file, start_new_session=True
            )
    finally:
        signal.signal(signal.SIGINT, before)
    until(lambda: steps_logged(path) == 1, [process])
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)
    else:
        process.send_signal(sent)
    assert process.wait(120) == hosts.STOPPED, (tmp_path / "out").read_text()[-3000:]
    assert (path / "checkpoints" / str(steps_logged(path))).is_dir()


INTERRUPTED = """
import sys, time
sys.path.insert(0, {root!r})
from cooper_jax.runtime import interrupts
interrupts.end_at_interrupt()
if {begins!r}:
    from cooper_jax.runtime import hosts
    hosts.start_hosts()
print("waits", flush=True)
while True:
    time.sleep(0.1)
"""


@pytest.mark.parametrize("begins", [False, True])
def test_ctrl_c_where_nothing_is_saved_ends_a_process_at_once(tmp_path, begins):
    """Before a run has begun the first, and after that the second: with a code of its own, without a traceback."""
    program = INTERRUPTED.format(root=str(ROOT), begins=begins)
    # A shell that starts the tests in the background lets them ignore SIGINT, and a child inherits what is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with open(tmp_path / "out", "wb") as file:
            process = subprocess.Popen([sys.executable, "-c", program], stdout=file, stderr=file)
    finally:
        signal.signal(signal.SIGINT, before)
    said = lambda: (tmp_path / "out").read_text()  # noqa: E731
    until(lambda: "waits" in said(), [process])
    process.send_signal(signal.SIGINT)
    if begins:
        until(lambda: "Ctrl-C again ends at once" in said(), [process])
        process.send_signal(signal.SIGINT)
    assert process.wait(30) == interrupts.INTERRUPTED
    assert said().endswith("\ninterrupted\n") and "Traceback" not in said()


@pytest.mark.slow
def test_a_first_host_that_falls_silent_is_noticed(tmp_path):
    """SIGSTOP: its connections stay open, and the coordination service that it runs says nothing any more."""
    program = PROGRAM.format(
        root=str(ROOT), end="print('waits', flush=True); hosts.exchange_bytes('never', b'')"
    )
    program = program.replace(
        "hosts.exchange_bytes('never', b'')", "hosts.exchange_bytes('never', b'') if me else time.sleep(300)"
    )
    processes = start_hosts(tmp_path, 2, 2, tmp_path / "out", program="import time\n" + program)
    try:
        until(lambda: all("waits" in (tmp_path / "out" / str(i)).read_text() for i in range(2)), processes)
        processes[0].send_signal(signal.SIGSTOP)
        assert processes[1].wait(BOUND) == hosts.LOST
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert "the first host does not answer" in (tmp_path / "out/1").read_text()


# --- in small ----------------------------------------------------------------------------------------------

PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from cooper_jax.runtime import hosts
hosts.start_hosts()
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
with hosts.run_as_one():
    me = jax.process_index()
    assert hosts.exchange_bytes("a", bytes([me])) == [b"\\0", b"\\1"]
    assert hosts.exchange_json("a", {{"me": me}}) == [{{"me": 0}}, {{"me": 1}}]
    assert hosts.broadcast_value("b", lambda: b"first" if me == 0 else 1 / 0) == b"first"
    assert [i for i in range(4) if hosts.is_assigned(i)] == [me, me + 2]
    for i in range(hosts.KEPT_EXCHANGES + 3):
        hosts.exchange_bytes("many", b"")
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    x = jax.make_array_from_callback((8,), NamedSharding(mesh, PartitionSpec("data")), lambda i: np.arange(8.0)[i])
    np.testing.assert_array_equal(hosts.fetch_arrays({{"x": x, "y": np.ones(2)}})["x"], np.arange(8.0))
    {end}
print("over", flush=True)
"""


def two(end: str) -> list[subprocess.CompletedProcess]:
    """PROGRAM in two processes of two devices, started by launch/local_hosts.py."""
    return subprocess.run(
        [sys.executable, str(ROOT / "launch/local_hosts.py"), "-n", "2", "--devices", "2", "--"]
        + [sys.executable, "-c", PROGRAM.format(root=str(ROOT), end=end)],
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_what_processes_tell_each_other():
    done = two("pass")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[0] over" in done.stdout and "[1] over" in done.stdout


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others():
    """One raises while the other waits for it: a setup error stays one, and anything else is a lost host."""
    done = two("raise SystemExit(2) if me == 1 else hosts.exchange_bytes('never', b'')")
    assert done.returncode == 2 and "process 1 ended with a setup error" in done.stdout, done.stdout
    done = two("hosts.exchange_bytes('never', b'') if me == 1 else 1 / 0")
    assert done.returncode in (1, hosts.LOST) and "process 0 failed with exit code 1" in done.stdout, (
        done.stdout
    )
    assert "ZeroDivisionError" in done.stdout and "over" not in done.stdout


def test_half_a_cluster_is_named(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID is set without JAX_COORDINATOR_ADDRESS, JAX_NUM_"):
        hosts.start_hosts()


# --- the rule and the assistant over hosts, as one of three sees them ------------------------------------------


class Judge:
    """A rule verifier that notes what it is asked; whoever is asked answers by the reference."""

    def __init__(self):
        self.asked = []

    def submit(self, items):
        self.asked += [item[:3] for item in items]  # reference, completion, question

        class Ready:
            def result(self):
                return [Verdict.CORRECT if item[0] == item[1] else Verdict.WRONG for item in items]

        return Ready()


def in_turn(monkeypatch, count: int, work):
    """Run work(i) as process i of `count`, what they exchange being put together; -> their results."""
    said: dict[str, dict[int, bytes]] = {}

    class Later(Exception):
        pass

    def attempt(me):
        monkeypatch.setattr(hosts, "is_assigned", lambda key: key % count == me)

        def exchange(name, own):
            said.setdefault(name, {})[me] = own
            if len(said[name]) < count:
                raise Later
            return [said[name][i] for i in range(count)]

        monkeypatch.setattr(hosts, "exchange_bytes", exchange)
        try:
            return work(me)
        except Later:
            return None

    for me in range(count):
        attempt(me)
    return [attempt(me) for me in range(count)]


def test_verdicts_are_divided_and_shared(monkeypatch):
    items = [Item(str(i % 5), str(i % 3)) for i in range(30)]
    judges = [Judge() for _ in range(3)]
    results = in_turn(monkeypatch, 3, lambda me: SharedRule(judges[me]).check(items))
    want = [Verdict.CORRECT if item[0] == item[1] else Verdict.WRONG for item in items]
    assert results == [want] * 3
    asked = [set(judge.asked) for judge in judges]
    distinct = {item[:3] for item in items}
    assert set.union(*asked) == distinct and all(asked)
    assert sum(map(len, asked)) == len(distinct), "an item belongs to one host, wherever it is met"


def test_submissions_are_collected_with_one_exchange(monkeypatch):
    """Groups of a step are submitted one by one as they end; the hosts tell each other all verdicts at once."""
    groups = [[Item(str(i), "0"), Item("1", str(i))] for i in range(5)] + [[Item("1", "1")], []]
    judges, exchanged = [Judge() for _ in range(3)], []

    def work(me):
        rule = SharedRule(judges[me])
        pending = [rule.submit(group) for group in groups]
        asked, exchange = len(judges[me].asked), hosts.exchange_bytes
        monkeypatch.setattr(hosts, "exchange_bytes", lambda *args: exchanged.append(me) or exchange(*args))
        verdicts = rule.collect(pending)
        assert len(judges[me].asked) == asked, "nothing is submitted twice"
        return verdicts

    items = [item for group in groups for item in group]
    want = [Verdict.CORRECT if item[0] == item[1] else Verdict.WRONG for item in items]
    assert in_turn(monkeypatch, 3, work) == [want] * 3
    assert exchanged == [0, 1, 2, 0, 1, 2]  # each process is tried twice
    assert {item[:3] for item in items} == {item for judge in judges for item in judge.asked}


def test_an_item_is_judged_by_the_same_host_in_any_list(monkeypatch):
    """What has been judged once is known where it is asked for again."""
    items = [Item(str(i), str(i)) for i in range(12)]
    judges = [Judge() for _ in range(2)]
    for part in (items[:5], items[5:], items):
        for me in range(2):
            monkeypatch.setattr(hosts, "is_assigned", lambda key, me=me: key % 2 == me)
            SharedRule(judges[me]).submit(part)
    assert not set(judges[0].asked) & set(judges[1].asked)


class Rewriter:
    """An assistant that remembers its requests; it makes a wrong text of every second row at the second attempt."""

    overlaps = True

    def __init__(self, concurrency):
        self.concurrency, self.asked = concurrency, []

    def rewrite(self, requests):
        self.asked += requests
        return [
            Failure("empty") if r.ids[2] % 2 and not r.ids[3] else Completion(f"{r.positive} not", False, 7)
            for r in requests
        ]

    def report_failures(self):
        pass


class Verifier(Judge):
    """All responses are correct, and all rewrites wrong."""

    def check(self, items):
        return [Verdict.WRONG for _ in items]


@pytest.mark.parametrize("concurrency", [None, 3])
def test_rewrites_are_divided_and_shared(monkeypatch, concurrency):
    """Each host makes the pairs of the problems whose responses it judges, without a word to the others."""
    cfg = PairsConfig(per_prompt=2, negatives=("assistant",), tries=3, length_ratio=4.0)
    problems = [Problem(f"q{i}", "1") for i in range(7)]
    completions, verdicts = [Completion(f"so 1, row {n}") for n in range(14)], [Verdict.CORRECT] * 14
    writers = [Rewriter(concurrency) for _ in range(3)]

    def work(me):
        rule = SharedRule(Verifier())
        task = PairTask(problems, 2, writers[me], rule, cfg, seed=0, step=1)
        return build_pairs(task, completions, verdicts)

    results = in_turn(monkeypatch, 3, work)
    whole = build_pairs(
        PairTask(problems, 2, Rewriter(concurrency), Verifier(), cfg, seed=0, step=1), completions, verdicts
    )
    assert results == [whole] * 3 and None not in whole.pairs and whole.requests == 21
    asked = [{request.question for request in writer.asked} for writer in writers]
    assert sum(map(len, asked)) == 7 and all(asked), "a problem belongs to one host"
    assert len({request.ids for writer in writers for request in writer.asked}) == 21


def test_a_problem_is_rewritten_where_it_is_judged(monkeypatch):
    problems = [Problem(f"q{i}", "1") for i in range(12)]
    for me in range(3):
        monkeypatch.setattr(hosts, "is_assigned", lambda key, me=me: key % 3 == me)
        judge = Judge()
        rule = SharedRule(judge)
        rule.submit([make_item(problem, "a response") for problem in problems])
        assert [item[2] for item in judge.asked] == [p.question for p in problems if rule.owns(p)]


def test_one_process_needs_nothing_shared():
    rule = object()
    assert share_over_hosts(rule, 1) is rule
    shared = share_over_hosts(rule, 2)
    assert isinstance(shared, SharedRule) and shared.local is rule
