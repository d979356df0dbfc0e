"""The rule verifier: verdicts on a table, precision on labelled completions, a pool that outlives its workers."""

import collections
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cooper_jax.configs import base
from cooper_jax.data.labelled_completions import load_labelled_completions
from cooper_jax.rule import answer_finder, rule_verdict, rule_worker, verifier
from cooper_jax.rule.verifier import SHORT_LIMIT, RuleConfig, RuleVerifier
from cooper_jax.rule.worker_process import START_TRIES, WorkerError, choose_environment
from cooper_jax.runtime import hosts
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.types import Verdict

C, W, N, U = Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER, Verdict.UNRECOGNISED
# No large number shows that this takes longer than any limit.
HANGS = "\\boxed{\\int_0^1 \\frac{x^{x^x}}{\\sin(x^5+1)} dx}"


@pytest.fixture(scope="module")
def rule():
    with RuleVerifier(RuleConfig(workers=2, timeout=20.0, step_budget=60.0, memory_mb=2048)) as verifier:
        yield verifier


TABLE = [
    # how an answer is marked
    ("20", "So \\boxed{20}", C),
    ("20", "\\boxed{3} no, \\boxed{20} in 7 days", C),
    ("20", "\\boxed{21}, not 20", W),
    ("\\frac{1}{2}", "\\boxed{\\frac{1}{2}}", C),
    ("20", "14 + 6 = 20\n#### 20", C),
    ("20", "14 + 6 = 22\n#### 22", W),
    ("20", "7 * 2 = 14 ; 14 + 6 = 20 # 20", C),
    ("20", "The answer is 20. It took 3 steps.", C),
    ("20", "The final answer is: $20$ because 4 * 5 = 20", C),
    ("20", "the answer is 19", W),
    ("20", "Altogether 14 + 6 = 20 apples", C),
    ("20", "Altogether 14 + 7 = 21 apples", W),
    ("20", "# Step 1\nAdd them.\nThe answer is 20.", C),
    ("20", '{"answer": "20",\n "reasoning": "4 times 5"}', C),
    # forms of a number
    ("20", "\\boxed{x = 20}", C),
    ("20", "x = 20", C),
    ("1000", "\\boxed{1,000}", C),
    ("1,000", "\\boxed{1000}", C),
    ("10000", "\\boxed{10{,}000}", C),
    ("10000", "\\boxed{10\\,000}", C),
    ("20", "\\boxed{\\frac{40}{2}}", C),
    ("20", "\\boxed{40/2}", C),
    ("20", "7 * 2 = 14 ; 14 + 6 = 20 # 40 / 2", C),
    ("20", "\\boxed{20.0}", C),
    ("20", "14 + 6 = 20 # 20 .0", C),
    ("145.0", "\\boxed{145}", C),
    ("20", "\\boxed{\\$20}", C),
    ("20", "The answer is $20", C),
    ("20", "\\boxed{20\\%}", C),
    ("0.2", "\\boxed{20\\%}", C),
    ("20", "\\boxed{20 apples}", C),
    ("20", "\\boxed{20 \\text{ apples}}", C),
    ("20", "\\boxed{22 \\text{ apples}}", W),
    ("20", "\\boxed{-20}", W),
    ("0.5", "\\boxed{1/2}", C),
    ("2.5", "\\boxed{2 1/2}", C),
    ("10000001", "\\boxed{10000000}", W),
    ("57.6", "\\boxed{58}", W),
    ("30000", "\\boxed{3 \\times 10^4}", C),
    # other forms that compare
    ("\\frac{\\pi}{2}", "\\boxed{pi/2}", C),
    ("(1,2)", "\\boxed{(1, 2)}", C),
    ("(1,2)", "\\boxed{(2,1)}", W),
    ("(1,2,3)", "\\boxed{(1,2,4)}", W),
    ("[1,2)", "\\boxed{[1,2)}", C),
    ("[3,3]", "\\boxed{(3,3)}", C),  # a pair; as an interval it would be equal to 3
    ("[3,3]", "\\boxed{3}", W),
    ("[3,3]", "\\boxed{[3,4]}", W),
    ("(1,2)", "\\boxed{[1,3]}", W),
    ("[1,2)", "\\boxed{[1,2]}", W),
    ("\\{1,2\\}", "\\boxed{\\{2,1\\}}", C),
    ("1, 2", "\\boxed{1 \\text{ and } 2}", C),
    ("1, 2", "\\boxed{1, 3}", W),
    ("4a-2", "\\boxed{2(2a-1)}", C),
    ("4a-2", "\\boxed{4a+2}", W),
    ("3\\sqrt{2}", "\\boxed{\\sqrt{18}}", C),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\boxed{\\begin{pmatrix}1\\\\3\\end{pmatrix}}", W),
    ("B", "\\boxed{B}", C),
    ("B", "\\boxed{(C)}", W),
    ("1 < x < 2", "\\boxed{(1,2)}", C),
    ("(1,2)", "\\boxed{1 < x < 2}", C),
    # a unit behind a formula, marked as text
    ("\\frac{41}{12} \\text{ km}", "\\boxed{\\frac{41}{12}}", C),
    ("\\frac{41}{12} \\text{ km}", "\\boxed{\\frac{41}{13} \\text{ km}}", W),
    ("12\\pi \\text{ cm}^2", "\\boxed{12\\pi}", C),
    ("5 \\text{ cm}", "\\boxed{5 \\text{ centimeters}}", C),
    ("5 \\text{ cm}", "\\boxed{5 \\text{ km}}", W),
    # letters side by side are a product, not a word or a unit
    ("6xy", "\\boxed{\\frac{12yx}{2}}", C),
    ("6xy", "\\boxed{6}", W),
    ("2ab", "\\boxed{2cd}", U),
    ("2RC+R+C", "\\boxed{R+C+2CR}", C),
    ("2RC+R+C", "\\boxed{R+C+CR}", W),
    ("y = ce^{-x}+1", "\\boxed{y = 1 + ce^{-x}}", C),
    ("y = ce^{-x}+1", "\\boxed{y = 2 + ce^{-x}}", W),
    ("8", "\\boxed{8 AM}", C),
    # roots as typed
    ("\\frac{\\sqrt{30}}{12}", "\\boxed{(√30)/12}", C),
    ("\\frac{\\pi}{2\\sqrt{2}}", "\\boxed{pi / (2 * sqrt(2))}", C),
    ("\\frac{\\pi}{2\\sqrt{2}}", "\\boxed{pi / (2 * sqrt(3))}", W),
    ("m_{\\max }=n-1", "\\boxed{n-1}", C),
    ("m_{\\max }=n-1", "\\boxed{n-2}", W),
    # no answer
    ("20", "", N),
    ("20", "I do not know.", N),
    ("20", "\\boxed{}", N),
    # what the rule cannot compare abstains
    ("20", "\\boxed{twenty}", U),
    ("20", "#### twenty", U),
    ("20", "So it is twenty.", U),
    ("twenty", "\\boxed{20}", U),
    ("two", "\\boxed{tow}", U),  # letters alone would be one product
    ("20", "\\boxed{\\frac{1}{ }}", U),
    ("20", "14 + 6 = \\boxed{20", U),
    ("20", "The answer is that nobody knows", U),
    ("B", "\\boxed{12}", U),
    ("20 cm", "\\boxed{0.2 \\text{ metres}}", C),
    ("45^\\circ", "\\boxed{\\frac{\\pi}{4}}", C),
    ("14/3", "\\boxed{4.67}", U),
    ("2k", "\\boxed{2n}", U),
    ("y < 3", "\\boxed{x < 4}", U),
    ("20", "We get 20 apples in 5 days", U),
    # words that are the reference's are the reference
    ("no solution", "\\boxed{\\text{No solution}}", C),
    ("No", "The answer is No, X is not complete", C),
    ("No", "The answer is Yes, X is complete", W),
    ("No", "\\boxed{Nothing}", U),
    ("B", "\\boxed{Option B}", C),
    ("B", "The answer is option C", W),
    ("t(0,4]", "\\boxed{t(0,4]}", C),  # a misprint, which is text only
    ("t(0,4]", "\\boxed{t(0,5]}", U),
    # an equation at the end of a text is none that answers 0
    ("0", "We are left with $2x + xy - x^2 = 0$", U),
    ("0", "Nothing is left: $x = 2 - 2 = 0$", C),
]


def test_verdicts(rule):
    got = rule.check([(reference, completion) for reference, completion, _ in TABLE])
    wrong = [(*row, str(v)) for row, v in zip(TABLE, got, strict=True) if v != row[2]]
    assert not wrong


def test_workers_speak_the_verdicts_of_types():
    names = {rule_verdict.CORRECT, rule_verdict.WRONG, rule_verdict.NO_ANSWER, rule_verdict.UNRECOGNISED}
    assert names == {v.value for v in Verdict} - {Verdict.TIMEOUT.value}


def test_a_verdict_needs_no_jax_and_little_of_ours():
    code = (
        "import sys; sys.path.append(sys.argv[1]); from cooper_jax.rule import rule_verdict, rule_worker\n"
        "assert rule_verdict.judge_answer('20', '#### 20') == 'correct'\n"
        "found = {m for m in sys.modules if m.startswith(('cooper_jax.', 'kernels'))}\n"
        "found |= {'jax', 'numpy', 'sympy', 'math_verify'}\n"
        "print(*sorted(found & set(sys.modules)))\n"
    )
    folder = str(Path(rule_verdict.__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-P", "-c", code, folder], capture_output=True, text=True, timeout=60
    )
    rule = Path(rule_verdict.__file__).parent
    ours = {f"cooper_jax.rule.{path.stem}" for path in rule.glob("*.py")} | {"cooper_jax.rule"}
    parents = {
        f"cooper_jax.rule.{name}"
        for name in ("__init__", "verifier", "worker_process", "reference_checks", "user_judge")
    }
    # The large libraries would cost a worker a second at its start.
    assert set(run.stdout.split()) == ours - parents, run.stderr


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a \\boxed{\\frac{1}{\\{2}} b", "\\frac{1}{\\{2}"),
        ("\\boxed{1} \\boxed{2", "1"),
        ("#### 1,000 \nbye", "1,000"),
        ("the answer is 3.5. Done", "3.5"),
        ("Answer: 7, because 7", "7"),
        ("#### 4\nNo: the answer is 5", "5"),
        ("A: 12", "12"),
        ("nothing here", None),
        ("#hashtag and # 3", "3"),
    ],
)
def test_find_answer(text, answer):
    span = answer_finder.find_answer(text)
    assert (text[slice(*span)] if span else None) == answer


def test_agreement_on_labelled_completions(rule, shared_data):
    """The floors are just below the figures of docs/references.md, whose command reads the same rows."""
    rows = []
    for name in ("verify_train.jsonl", "verify_dev.jsonl"):
        rows += load_labelled_completions(str(shared_data / name))
    verdicts = rule.check([(row.reference, row.completion) for row in rows])
    confusion = collections.Counter((r.source, v, r.label) for r, v in zip(rows, verdicts, strict=True))
    print(sorted(confusion.items()))

    def count(source, verdict, label):
        return confusion[source, verdict, label]

    # A verdict that is neither "correct" nor "wrong" agrees with label 0.  Odyssey has a judge's noisy labels:
    # most of its rows that are called wrong and labelled 1 are the judge's errors.
    for source, precision, wrong_precision, recall, agreement in (
        ("gsm8k", 0.999, 0.999, 0.999, 0.999),
        ("math", 0.998, 0.999, 0.999, 0.998),
        ("odyssey", 0.969, 0.981, 0.582, 0.812),
    ):
        total = {label: sum(r.source == source and r.label == label for r in rows) for label in (0, 1)}
        agreeing = count(source, C, 1) + total[0] - count(source, C, 0)
        assert count(source, C, 1) >= precision * (count(source, C, 0) + count(source, C, 1)), source
        assert count(source, W, 0) >= wrong_precision * (count(source, W, 0) + count(source, W, 1)), source
        assert count(source, C, 1) >= recall * total[1], source
        assert agreeing >= agreement * sum(total.values()), source


@pytest.mark.slow
def test_answers_that_hang_cost_no_other_answer_its_verdict():
    """A step of 256 with 20 answers that take seconds each; the settings are those of a run."""
    ordinary = [(str(n), f"So it is \\boxed{{{n + n % 2}}}.") for n in range(1000, 1236)]
    hanging = [("\\int_0^1 x dx", HANGS.replace("x^5", f"x^{n}")) for n in range(5, 25)]
    places = range(3, 256, 13)  # of the hanging ones among the others
    items = list(ordinary)
    for place, item in zip(places, hanging, strict=True):
        items.insert(place, item)
    with RuleVerifier(RuleConfig.from_config(base.get_config().rule)) as verifier:
        verdicts = verifier.check(items)
    assert Verdict.TIMEOUT in {verdicts[place] for place in places} <= {U, Verdict.TIMEOUT}
    others = [v for place, v in enumerate(verdicts) if place not in places]
    assert others == [W if n % 2 else C for n in range(1000, 1236)]


# --- the pool, with a worker that does as the completion says -----------------------------------------------

SCRIPT = """
import json, os, sys, time
log = open(os.path.join(os.path.dirname(__file__), "log"), "a", buffering=1)
print(json.dumps({"verdict": "ready"}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    what, _, rest = request["completion"].partition(" ")
    log.write(json.dumps([os.getpid(), time.time(), "start", request["completion"], request["limit"]]) + "\\n")
    cpu = 0.001
    if what == "sleep":
        time.sleep(float(rest))
    if what == "long":
        request["reference"], cpu = "timeout", request["limit"]
    if what == "greedy":
        request["reference"] = "memory"
    if what == "die":
        os._exit(1)
    if what == "once":
        if not os.path.exists(rest):
            open(rest, "w").close()
            os._exit(1)
    log.write(json.dumps([os.getpid(), time.time(), "end", request["completion"], request["limit"]]) + "\\n")
    print(json.dumps({"verdict": request["reference"], "cpu": cpu}), flush=True)
"""


@pytest.fixture
def scripted(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text(SCRIPT)
    verifiers = []

    def make(workers=2, timeout=1.0, step_budget=2.0, stall_limit=60.0):
        config = RuleConfig(workers, timeout, step_budget, 0)
        verifiers.append(RuleVerifier(config, (sys.executable, str(path)), stall_limit))
        return verifiers[-1]

    yield make
    for made in verifiers:
        made.close()


def read_log(tmp_path: Path) -> list:
    return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def test_order_is_kept_whatever_finishes_first(scripted):
    verdicts = ["correct", "wrong", "no_answer", "unrecognised"] * 5
    items = [(v, f"sleep {0.002 * ((7 * i) % 11)}") for i, v in enumerate(verdicts)]
    assert scripted(workers=3).check(items) == [Verdict(v) for v in verdicts]


def test_a_step_has_a_budget_for_verdicts_over_the_limit(scripted, tmp_path):
    rule = scripted(workers=1, timeout=1.0, step_budget=2.0)
    pending = rule.submit([("wrong", f"long {i}") for i in range(4)] + [("wrong", "go")])
    assert pending.result() == [Verdict.TIMEOUT] * 4 + [W]
    assert rule.check([("wrong", "long 5")]) == [Verdict.TIMEOUT]  # the budget is full again
    limits = [row[4] for row in read_log(tmp_path) if row[2] == "start"]
    assert limits == [1.0, 1.0, SHORT_LIMIT, SHORT_LIMIT, SHORT_LIMIT, 1.0]


def test_a_stalled_worker_is_replaced_and_its_item_is_not_remembered(scripted, tmp_path):
    rule = scripted(stall_limit=0.5)
    items = [("correct", "go"), ("correct", "sleep 30")]
    assert rule.check(items) == rule.check(items) == [C, Verdict.TIMEOUT]
    started = collections.Counter(row[3] for row in read_log(tmp_path) if row[2] == "start")
    assert started == {"go": 1, "sleep 30": 2}


def test_a_dying_worker_is_replaced_and_its_item_redone(scripted, tmp_path):
    rule = scripted()
    items = [("correct", f"once {tmp_path / 'mark'}"), ("wrong", "die"), ("wrong", "go"), ("wrong", "greedy")]
    assert rule.check(items) == [C, Verdict.TIMEOUT, W, Verdict.TIMEOUT]
    started = collections.Counter(row[3].split()[0] for row in read_log(tmp_path) if row[2] == "start")
    assert started == {"once": 2, "die": 2, "go": 1, "greedy": 2}


def test_a_worker_killed_from_outside_is_replaced(scripted, tmp_path):
    rule = scripted(workers=1)
    pending = rule.submit([("correct", "sleep 0.8"), ("wrong", "go")])
    while not (tmp_path / "log").exists() or not read_log(tmp_path):
        time.sleep(0.02)
    assert not pending.done()
    os.kill(read_log(tmp_path)[0][0], signal.SIGKILL)
    assert pending.result() == [C, W]
    idle = read_log(tmp_path)[-1][0]
    os.kill(idle, signal.SIGKILL)  # while it waits for work
    assert rule.check([("wrong", "again")]) == [W]


def test_verdicts_are_remembered_and_timeouts_too(scripted, tmp_path):
    rule = scripted()
    items = [("correct", "go"), ("correct", "long"), ("correct", "die")]
    assert rule.check(items) == rule.check(items) == [C, Verdict.TIMEOUT, Verdict.TIMEOUT]
    started = collections.Counter(row[3] for row in read_log(tmp_path) if row[2] == "start")
    assert started == {"go": 1, "long": 1, "die": 2}


def test_a_stop_signal_ends_the_wait(scripted, monkeypatch):
    pending = scripted().submit([("correct", "sleep 30")])
    threading.Timer(0.5, hosts._sigterm_received.set).start()
    start = time.monotonic()
    try:
        with pytest.raises(hosts.Stopped):
            pending.result()
    finally:
        hosts._sigterm_received.clear()
    assert time.monotonic() - start < 10.0


def test_close_ends_every_process_and_fails_what_is_left(scripted, tmp_path):
    rule = scripted(workers=2)
    pending = rule.submit([("correct", f"sleep {30 + i}") for i in range(4)])
    while not (tmp_path / "log").exists() or len(read_log(tmp_path)) < 2:
        time.sleep(0.02)
    pids = {row[0] for row in read_log(tmp_path)}
    assert len(pids) == 2
    rule.close()
    rule.close()
    with pytest.raises(RuntimeError, match="closed"):
        pending.result()
    with pytest.raises(RuntimeError, match="closed"):
        rule.submit([])
    assert not any(alive(pid) for pid in pids)


def test_a_worker_that_cannot_start_is_reported(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("raise SystemExit('math-verify is missing')")
    with RuleVerifier(RuleConfig(2, 1.0, 2.0, 0), command=(sys.executable, str(path))) as rule:
        with pytest.raises(RuntimeError, match="did not start.*exit status 1.*math-verify is missing"):
            rule.check([("1", "1"), ("2", "2"), ("3", "3")])


@pytest.mark.parametrize("failures", [2, 100])
def test_a_machine_without_room_for_processes_is_waited_for_and_reported(monkeypatch, failures):
    """EAGAIN as under a limit of processes: for a moment, and for good."""
    start, tried = verifier.Worker, []

    def refuse(*args):
        tried.append(args)
        if len(tried) <= failures:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return start(*args)

    monkeypatch.setattr(verifier, "Worker", refuse)
    monkeypatch.setattr(verifier, "FIRST_WAIT", 0.001)
    with RuleVerifier(RuleConfig(1, 1.0, 2.0, 0)) as rule:
        if failures == 2:
            assert rule.check([("1", "\\boxed{1}")]) == [C] and len(tried) == 3
            return
        with pytest.raises(WorkerError, match="cannot start a worker process.*temporarily.*rule.workers"):
            rule.check([("1", "\\boxed{1}")])
        assert len(tried) == START_TRIES


def test_workers_that_read_text_of_strangers_get_no_secrets(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("LANGCHAIN_API_KEY", "lc_secret")
    before = find_workers()
    with RuleVerifier(RuleConfig(1, 1.0, 2.0, 0)) as rule:
        assert rule.check([("1", "\\boxed{1}")]) == [C]
        (folder,) = find_workers() - before
        variables = (folder / "environ").read_bytes()
    assert b"secret" not in variables and b"PATH=" in variables
    # The user's own judge is trusted code.
    assert choose_environment(with_judge=True)["OPENAI_API_KEY"] == "sk-secret"


def find_workers() -> set[Path]:
    """The folders in /proc of this process's workers."""
    return {folder for folder in Path("/proc").glob("[0-9]*") if is_worker(folder)}


def is_worker(folder: Path) -> bool:
    try:
        parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
        return int(parent) == os.getpid() and b"rule_worker" in (folder / "cmdline").read_bytes()
    except OSError:  # it has ended
        return False


def test_the_first_question_finds_a_verifier_that_does_not_work(tmp_path, rule):
    rule.check_ready()
    path = tmp_path / "broken.py"
    path.write_text("import math_verify_is_not_here\n")
    with RuleVerifier(RuleConfig(2, 1.0, 2.0, 0), command=(sys.executable, str(path))) as broken:
        with pytest.raises(
            ValueError, match="does not work: a rule worker did not start.*not_here'$"
        ) as caught:
            broken.check_ready()
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    path.write_text(SCRIPT.replace('request["reference"], "cpu"', '"wrong", "cpu"'))
    with RuleVerifier(RuleConfig(1, 1.0, 2.0, 0), command=(sys.executable, str(path))) as mistaken:
        with pytest.raises(ValueError, match="says 'wrong'"):
            mistaken.check_ready()


def test_works_off_the_main_thread(rule):
    got = []
    thread = threading.Thread(
        target=lambda: got.extend(rule.check([("5", "\\boxed{5}"), ("5", "\\boxed{7}")]))
    )
    thread.start()
    thread.join()
    assert got == [C, W]


@pytest.mark.parametrize(
    "field", [{"workers": 0}, {"timeout": 0.0}, {"step_budget": -1.0}, {"memory_mb": -1}]
)
def test_bad_settings_name_the_flag(field):
    ((name, value),) = field.items()
    with pytest.raises(SetupError, match=rf"rule\.{name}={value}\b"):
        RuleConfig(**{"workers": 1, "timeout": 1.0, "step_budget": 2.0, "memory_mb": 0, **field})


# --- real processes -------------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.add(int(stat.parent.name))
        except OSError:  # gone meanwhile
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_workers_die_with_a_killed_parent():
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from cooper_jax.rule.verifier import RuleConfig, RuleVerifier\n"
        "rule = RuleVerifier(RuleConfig(2, 2.0, 2.0, 2048))\n"
        "rule.check([('1', '1'), ('2', '2')])\n"
        f"pending = rule.submit([('\\\\sum_{{k=1}}^9 k', {HANGS!r})])\n"
        "print('busy', flush=True)\n"
        "pending.result()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    with parent:
        assert parent.stdout.readline() == b"busy\n"
        time.sleep(0.3)
        workers = children(parent.pid)
        assert len(workers) == 2
        parent.kill()
    deadline = time.monotonic() + 60.0
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_signals_to_the_whole_group_are_the_parents_to_answer():
    """Ctrl-C, or a scheduler's SIGTERM, reaches workers too: they go on, for the parent still needs verdicts."""
    others = children(os.getpid())
    with RuleVerifier(RuleConfig(workers=1, timeout=30.0, step_budget=60.0, memory_mb=0)) as rule:
        assert rule.check([("1", "\\boxed{1}")]) == [Verdict.CORRECT]
        (worker,) = children(os.getpid()) - others
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker, number)
        assert rule.check([("2", "\\boxed{2}")]) == [Verdict.CORRECT]
        assert children(os.getpid()) - others == {worker}


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_memory_is_limited():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import rule_worker\n"
        "rule_worker.limit_memory(400)\n"
        "try:\n    bytearray(500 << 20)\nexcept MemoryError:\n    print('limited')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(Path(rule_worker.__file__).parent)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.stdout == "limited\n", run.stderr


@pytest.mark.parametrize(
    "error", [ValueError("current limit exceeds maximum limit"), OSError(22, "no such limit")]
)
def test_a_platform_that_refuses_the_limit_gives_the_reason(monkeypatch, error):
    import resource

    def refuse(*_):
        raise error

    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert rule_worker.limit_memory(400) == str(error)
    assert rule_worker.limit_memory(0) == ""


@pytest.mark.parametrize("error", ["ValueError", "OSError"])
def test_workers_run_without_a_limit_that_the_platform_refuses_and_say_so_once(tmp_path, capsys, error):
    path = tmp_path / "mac.py"
    path.write_text(
        "import resource, runpy\n"
        f"def refuse(*_):\n    raise {error}('not on this system')\n"
        "resource.setrlimit = refuse\n"
        f"runpy.run_path({rule_worker.__file__!r}, run_name='__main__')\n"
    )
    command = (sys.executable, "-P", str(path))
    with RuleVerifier(RuleConfig(2, 20.0, 40.0, 2048), command=command) as rule:
        rule.check_ready()
        items = [(str(n), f"\\boxed{{{n}}}") for n in range(40)]
        assert rule.check(items) == [Verdict.CORRECT] * 40  # enough for both workers
    said = capsys.readouterr().out
    assert said.count("warning") == 1 and "not on this system" in said and "config.rule.memory_mb" in said
