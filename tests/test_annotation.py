"""Hybrid annotation: agreement with a judge of known confusion, and a ledger that kills cannot hurt."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from pathlib import Path

import jax
import pytest
import tiny_models
import tiny_runs
import tiny_tokenizers
from chat_server import Server, reply

from cooper_jax.annotation import annotation_ledger, items, outcome, pipeline, querying
from cooper_jax.configs import base
from cooper_jax.data import labelled_completions
from cooper_jax.llm import chat as chats
from cooper_jax.llm.chat import Failure
from cooper_jax.model import weight_export
from cooper_jax.runtime import device_layouts, hosts
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.types import Completion, Verdict

ROOT = Path(__file__).resolve().parents[1]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def timeless(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("completed", "judged")} for row in rows]


# --- a scripted world ----------------------------------------------------------------------------------------

REFERENCE = re.compile(r"<reference_answer>(.*?)</reference_answer>")
COMPLETION = re.compile(r"<completion>(.*?)</completion>", re.DOTALL)


def script(n, body):
    """The source answers "What is 3 + 4?", wrongly where 3 divides the first number; the judge compares the last
    words, and calls a completion correct that is wrong where 5 divides the answer."""
    text = body["messages"][0]["content"]
    if body["model"] == "writer":
        a, b = map(int, re.findall(r"\d+", text)[:2])
        return reply(f"{a} plus {b} is \\boxed{{{a + b + (a % 3 == 0)}}}", tokens=5)
    reference, completion = REFERENCE.search(text)[1], COMPLETION.search(text)[1]
    said = int(re.findall(r"\d+", completion)[-1])
    right = said == int(reference) or said % 5 == 0
    return reply(f"<think>Verdict: CORRECT</think>\nVerdict: {'CORRECT' if right else 'INCORRECT'}")


def sums(path: Path, count: int) -> str:
    return write(
        path, [{"question": f"What is {a} + {a + 1}?", "answer": str(2 * a + 1)} for a in range(count)]
    )


def config(url="http://127.0.0.1:9/v1", **fields):
    cfg = base.get_config()
    for name, model in (("source", "writer"), ("judge", "judge")):
        cfg[name].update(kind="openai", url=url, model=model, timeout=5.0, concurrency=4, retries=0)
    cfg.rule.workers = 1
    with cfg.unlocked():
        cfg.update_from_flattened_dict(fields)
    return cfg.lock()


@pytest.fixture
def serve(monkeypatch):
    """script -> server, closed afterwards."""
    monkeypatch.setattr(chats, "BACK_OFF", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = []

    def make(script):
        made.append(Server(script))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def quick_rule(monkeypatch):
    """Boxed numbers, compared; no processes to wait for."""

    class Rule:
        def __init__(self, cfg):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def check_ready(self):
            pass

        def submit(self, pairs):
            ((reference, text, *_),) = pairs
            boxed = re.search(r"\\boxed\{(.*?)\}", text)
            verdict = Verdict.NO_ANSWER if boxed is None else Verdict.WRONG
            if boxed and not boxed[1].isdigit():
                verdict = Verdict.UNRECOGNISED
            if boxed and boxed[1] == reference:
                verdict = Verdict.CORRECT

            class Given:
                def result(self):
                    return [verdict]

            return Given()

    monkeypatch.setattr(pipeline, "RuleVerifier", Rule)


def existing(count: int, **changes) -> list[dict]:
    row = {"reference_answer": "7", "model": "m", "source": "s"}
    return [
        row | {"question": f"q{i}", "completion": f"\\boxed{{{7 if i % 2 else 8}}}"} | changes
        for i in range(count)
    ]


# --- agreement -----------------------------------------------------------------------------------------------


def test_agreement_and_kappa_of_a_scripted_judge(serve, tmp_path):
    """Of 40 right completions the judge passes 30, of 20 wrong ones 5:

        observed  (30 + 15) / 60 = .75;  by chance (40 * 35 + 20 * 25) / 60^2 = 19/36;  kappa = 8/17

    Beside them are rows that the judge, the rule, or neither decides.  The file's own labels are off in 6 of 60.
    """
    says = ["CORRECT"] * 30 + ["INCORRECT"] * 10 + ["CORRECT"] * 5 + ["INCORRECT"] * 15
    rows = []
    for i in range(66):
        answer = "21" if i < 40 else "22" if i < 63 else "\\text{who knows}"
        right = i < 40
        label = right if i % 10 else not right
        rows.append(
            {"question": f"Question {i}.", "reference_answer": "21", "completion": f"So \\boxed{{{answer}}}."}
            | {"model": f"model {i % 2}", "label": int(label) if i < 60 else 0, "id": f"row {i}"}
        )

    def judge(n, body):
        i = int(re.search(r"Question (\d+)", body["messages"][0]["content"])[1])
        if i < 60:
            return reply(f"<think>\nVerdict: CORRECT\n</think>\nThe verdict follows.\nVerdict: {says[i]}")
        odd = [
            reply("Perhaps."),
            reply("Verdict: CORRECT\nVerdict: INCORRECT"),
            reply("Verdict: CORRECT", finish="length"),
            reply("Verdict: INCORRECT"),
            reply("Verdict: CORRECT"),
            reply("<think>Verdict: CORRECT"),
        ]
        return odd[i - 60]

    path = write(tmp_path / "there.jsonl", rows)
    server = serve(judge)
    pipeline.annotate_completions(
        config(server.url, **{"annotate.max_ratio": 1.5}), [], [path], str(tmp_path / "out")
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["agreement"]["value"] == pytest.approx(0.75)
    assert report["kappa"]["value"] == pytest.approx(8 / 17)
    assert report["kappa"]["low"] < 8 / 17 < report["kappa"]["high"]
    assert report["confusion"] == {
        "correct": {"correct": 30, "wrong": 10, "undecided": 0},
        "wrong": {"correct": 5, "wrong": 15, "undecided": 3},
        "undecided": {"correct": 1, "wrong": 1, "undecided": 1},
    }
    assert report["judge_undecided"] == {"truncated": 1, "unparsed": 3}
    assert report["rule_undecided"] == {"unrecognised": 3}
    assert report["disputed"] == {
        "both decided, and differ": 15,
        "judge undecided": 3,
        "neither decided": 1,
        "rule undecided": 2,
    }
    assert (report["agreed"], report["labelled"], report["left_out_by_balance"]) == (45, 22 + 15, 8)
    given = report["given_labels"]
    assert (given["rule"]["decided"], given["judge"]["decided"], given["agreed"]["decided"]) == (63, 62, 45)
    assert given["rule"]["accuracy"] == pytest.approx(57 / 63)
    assert {m["judged"] for m in report["models"].values()} == {33}
    assert sum(m["share"] for m in report["models"].values()) == pytest.approx(1.0)
    _the_two_files_hold_what_they_should(tmp_path / "out", says)


def test_agreement_is_resampled_by_question():
    """On ten rows of one question the two agree, on ten of another they differ: two draws of questions, not twenty.

    Half of the resamplings hold both questions, a quarter the one or the other twice.
    """
    rows = [
        outcome.Judged({"question": question}, rule, rule == agree)
        for question, agree in (("a", True), ("b", False))
        for rule in [True, False] * 5
    ]
    found = outcome.measure_agreement(rows, seed=0)
    assert found["both_decided"] == 20
    assert found["agreement"] == {"value": 0.5, "low": 0.0, "high": 1.0}
    assert found["kappa"] == {"value": 0.0, "low": -1.0, "high": 1.0}


def _the_two_files_hold_what_they_should(out: Path, says: list[str]):
    triples = labelled_completions.load_labelled_completions(str(out / "labelled.jsonl"))
    assert Counter(t.label for t in triples) == {1.0: 22, 0.0: 15}
    assert all((t.label == 1.0) == ("boxed{21}" in t.completion) for t in triples)
    rows = lines(out / "labelled.jsonl")
    assert all(r["label"] == (r["rule"] == "correct") == r["judge"] for r in rows)
    first = rows[0]
    assert (
        first["source"] == "there" and first["model"].startswith("model") and first["judge_model"] == "judge"
    )
    assert first["problem"].startswith("row ") and set(first["versions"]) == {"cooper-jax", "math-verify"}
    apart = lines(out / "disputed.jsonl")
    assert len(apart) == 21 and not any("label" in r for r in apart)
    differing = [r for r in apart if r["rule"] in ("correct", "wrong") and r["judge"] is not None]
    assert len(differing) == 15 and all(r["judge"] != (r["rule"] == "correct") for r in differing)
    assert {r["judge_reason"] for r in apart if r["judge"] is None} == {"unparsed", "truncated"}


# --- kills ---------------------------------------------------------------------------------------------------

COUNT = 36


class Gate:
    """The scripted world, which stops answering the model of a section after so many requests, until it opens."""

    def __init__(self):
        self.seen, self.model, self.after = Counter(), "", 0
        self.open, self.lock = threading.Event(), threading.Lock()
        self.open.set()

    def shut(self, model: str, after: int) -> None:
        self.model, self.after = model, self.seen[model] + after
        self.open.clear()

    def __call__(self, n, body):
        with self.lock:
            self.seen[body["model"]] += 1
            late = body["model"] == self.model and self.seen[body["model"]] > self.after
        if late:
            self.open.wait(60)
        return script(n, body)


def start(problems: str, out: Path, url: str) -> subprocess.Popen:
    flags = ["--config.rule.workers=1", "--config.annotate.balance=off"]
    for name, model in (("source", "writer"), ("judge", "judge")):
        flags += [
            f"--config.{name}.url={url}",
            f"--config.{name}.model={model}",
            f"--config.{name}.concurrency=4",
        ]
        flags.append(f"--config.{name}.kind=openai")
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch/annotate.py"), f"--config={ROOT}/configs/base.py", *flags]
        + [f"--problems={problems}", f"--out={out}"],
        env=tiny_runs.environment() | {"NO_PROXY": "127.0.0.1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(condition, process) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def held(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_two_kills_lose_and_double_nothing(serve, tmp_path):
    """The real command: SIGKILL while the source writes, SIGKILL and SIGTERM while the judge judges, then on."""
    problems = sums(tmp_path / "sums.jsonl", COUNT)
    gate = Gate()
    server, out = serve(gate), tmp_path / "out"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "settings.json").write_text('{"judge.temperature": 0.5}')
    (tmp_path / "other" / "verdicts.jsonl").write_text('{"id": "1"}\n')
    refused = start(problems, tmp_path / "other", server.url)
    counted = []
    for model, name, how in (
        ("writer", "completions.jsonl", signal.SIGKILL),
        ("judge", "verdicts.jsonl", signal.SIGKILL),
        ("judge", "verdicts.jsonl", signal.SIGTERM),
    ):
        gate.shut(model, 10)
        before = held(out / name)
        process = start(problems, out, server.url)
        until(lambda: held(out / name) >= before + 10, process)  # noqa: B023
        os.kill(process.pid, how)
        if how == signal.SIGTERM:
            time.sleep(0.2)  # it waits for the requests under way
            gate.open.set()
        said, errors = process.communicate(timeout=60)
        gate.open.set()
        assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else hosts.STOPPED), errors
        assert not (out / "labelled.jsonl").exists()
        counted.append(held(out / name))
    # SIGKILL lost what was under way, SIGTERM waited for it.
    assert counted[0] == 10 and counted[1] == 10 and 20 <= counted[2] <= 20 + 8
    said, errors = refused.communicate(timeout=60)
    assert refused.returncode == 2 and errors.count("\n") == 1
    assert "judge.temperature was 0.5 and is now 0.0" in errors
    with open(out / "verdicts.jsonl", "ab") as file:
        file.write(b'{"id": "torn')
    process = start(problems, out, server.url)
    said, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert (
        f"verdicts.jsonl:{counted[2] + 1}: removed an incomplete line (12 bytes)" in said and "kappa" in said
    )

    undisturbed = tmp_path / "undisturbed"
    pipeline.annotate_completions(
        config(server.url, **{"annotate.balance": "off"}), [problems], [], str(undisturbed)
    )
    for name in ("labelled.jsonl", "disputed.jsonl"):
        assert timeless(lines(out / name)) == timeless(lines(undisturbed / name))
    assert json.loads((out / "report.json").read_text()) == json.loads(
        (undisturbed / "report.json").read_text()
    )
    for name in ("completions.jsonl", "verdicts.jsonl"):
        ids = [row["id"] for row in lines(out / name)]
        assert len(set(ids)) == len(ids) == COUNT
        assert set(ids) == {row["id"] for row in lines(undisturbed / name)}
    # At most what was under way was asked again: 4 at a time, after each of the two SIGKILLs.
    assert COUNT < gate.seen["writer"] - COUNT <= COUNT + 8
    # The judge passes two of the twelve wrong ones: 9 + 10 = 20 and 24 + 25 = 50.
    assert sorted(r["reference_answer"] for r in lines(out / "disputed.jsonl")) == ["19", "49"]
    assert Counter(r["label"] for r in lines(out / "labelled.jsonl")) == {1: 24, 0: 10}


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A config whose source and judge are a random model of one layer, on one device."""
    tokenizer = tiny_tokenizers.write(tmp_path / "llama", "llama3")
    model = tiny_models.config(vocab_size=512, width=16, layers=1, head_dim=8, max_len=2048)
    weight_export.save_pretrained(
        tmp_path / "hf", model, tiny_models.random_params(model), "logits", tokenizer_dir=tokenizer
    )
    layouts = device_layouts.make_layouts
    monkeypatch.setattr(device_layouts, "make_layouts", lambda cfg: layouts(cfg, jax.devices()[:1]))
    fields = {"kind": "local", "weights": str(tmp_path / "hf"), "max_new_tokens": 4, "temperature": 1.0}
    fields["top_p"] = 1.0  # the same programs for both
    flat = {f"{name}.{k}": v for name in ("source", "judge") for k, v in fields.items()}
    return config(**flat, **{"annotate.batch": 4, "rollout.segment": 4})


@pytest.mark.slow
def test_a_torn_batch_of_local_weights_is_sampled_as_before(local, quick_rule, tmp_path):
    problems, out = sums(tmp_path / "sums.jsonl", 8), tmp_path / "out"
    pipeline.annotate_completions(local, [problems], [], str(out))
    names = ("completions.jsonl", "verdicts.jsonl", "disputed.jsonl")
    whole = {name: timeless(lines(out / name)) for name in names}
    assert len(whole["disputed.jsonl"]) == 8 and len({r["completion"] for r in whole["disputed.jsonl"]}) > 3
    for name, kept in (("completions.jsonl", 5), ("verdicts.jsonl", 2)):
        content = (out / name).read_text().splitlines(keepends=True)
        (out / name).write_text("".join(content[:kept]) + content[kept][:-9])
    pipeline.annotate_completions(local, [problems], [], str(out))
    assert {name: timeless(lines(out / name)) for name in names} == whole


# --- failures ------------------------------------------------------------------------------------------------


def test_what_may_pass_is_asked_once_more_and_the_rest_is_kept_as_failed(serve, quick_rule, tmp_path):
    seen = Counter()

    def flaky(n, body):
        text = body["messages"][0]["content"]
        seen[text] += 1
        if "What is 3 +" in text and seen[text] == 1:
            return 503, {}, b""
        if "What is 4 +" in text and "<completion>" not in text:
            return 400, {}, b""
        if "What is 5 +" in text and "<completion>" in text:
            return 400, {}, b""
        return script(n, body)

    server, problems, out = serve(flaky), sums(tmp_path / "sums.jsonl", 8), str(tmp_path / "out")
    cfg = config(server.url, **{"annotate.balance": "off"})
    pipeline.annotate_completions(cfg, [problems], [], out)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["failed"] == {"http_400": 1} and report["judge_undecided"] == {"http_400": 1}
    assert (report["completions"], report["judged"]) == (7, 7)
    asked = len(server.requests)
    pipeline.annotate_completions(cfg, [problems], [], out)
    assert len(server.requests) == asked
    cfg = config(server.url, **{"annotate.balance": "off", "annotate.ask_again": True})
    server.close()
    again = serve(script)
    for name in ("source", "judge"):
        cfg[name].url = again.url
    pipeline.annotate_completions(cfg, [problems], [], out)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["failed"], report["judge_undecided"], report["judged"]) == ({}, {}, 8)
    assert len(again.requests) == 3


def test_a_server_that_is_down_is_one_error_and_leaves_no_failures(quick_rule, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    problems = sums(tmp_path / "sums.jsonl", 20)
    with pytest.raises(SetupError, match="8 requests in a row unanswered .connection.*--config.source.url"):
        pipeline.annotate_completions(config(), [problems], [], str(tmp_path / "out"))
    assert held(tmp_path / "out" / "completions.jsonl") == 0


def test_a_wrong_key_is_an_error_for_few_rows_too(serve, quick_rule, tmp_path):
    server = serve(lambda n, body: (401, {}, b""))
    with pytest.raises(SetupError, match="2 requests in a row unanswered .http_401"):
        pipeline.annotate_completions(
            config(server.url), [sums(tmp_path / "sums.jsonl", 2)], [], str(tmp_path / "out")
        )


def test_sources_and_judges_that_refuse_fields_get_others(serve, quick_rule, tmp_path):
    """Both send what a reasoning model's server takes, and read its replies: parts of content, no usage."""

    def script(n, body):
        assert not {"max_tokens", "temperature", "seed"} & body.keys() and body["max_completion_tokens"] > 0
        text = "Verdict: CORRECT" if "reference_answer" in body["messages"][-1]["content"] else "It is 2."
        parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": text}]
        return 200, {}, json.dumps({"choices": [{"message": {"content": parts}}], "usage": None}).encode()

    cfg = config(serve(script).url)
    for name in ("source", "judge"):
        cfg[name].fields = "max_tokens=max_completion_tokens,temperature=,seed="
    pipeline.annotate_completions(cfg, [sums(tmp_path / "sums.jsonl", 4)], [], str(tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["failed"], report["judge_undecided"], report["judged"]) == ({}, {}, 4)


def test_a_server_that_refuses_every_request_is_an_error_and_leaves_no_failures(serve, quick_rule, tmp_path):
    """An unknown field, say, or the wrong address: nothing that is the rows' fault."""
    server = serve(lambda n, body: (400, {}, b'{"error": {"message": "unknown field seed"}}'))
    with pytest.raises(SetupError, match="64 requests in a row unanswered .http_400: unknown field seed"):
        pipeline.annotate_completions(
            config(server.url), [sums(tmp_path / "sums.jsonl", 80)], [], str(tmp_path / "out")
        )
    assert held(tmp_path / "out" / "completions.jsonl") == 0


class Scripted:
    """A chat whose server answers by (pass, place of the item)."""

    overlaps, address = True, "http://scripted"

    def __init__(self, script):
        self._script, self._pass = script, -1

    def stream(self, requests):
        self._pass += 1
        for n, (_, ids) in enumerate(list(requests)):
            yield n, self._script(self._pass, ids[2])


def asked_of(script, count):
    """What a stage keeps of `count` items, and the error that ends it."""
    kept = {}

    def keep(answers):
        kept.update((item.id, answer) for item, answer in answers)

    things = [types.SimpleNamespace(id=str(i), number=i) for i in range(count)]
    stage = querying.Stage(Scripted(script), "source", 0, 1, lambda item: [], keep)
    try:
        stage.run(things, kept, querying.Progress("rows", count, 0))
    except SetupError as error:
        return kept, str(error)
    return kept, ""


def test_more_rows_than_are_borne_in_a_row_fail_twice_and_are_kept(capsys):
    """Every other one, so that the second pass has nothing but failures."""
    kept, error = asked_of(lambda _, i: Failure("timeout") if i % 2 else Completion("1"), 150)
    assert not error and len(kept) == 150
    assert sum(isinstance(answer, Failure) for answer in kept.values()) == 75


def test_a_server_that_dies_in_the_second_pass_leaves_no_failures(capsys):
    def script(attempt, i):
        if i not in (3, 7):
            return Completion("1")
        return Failure("timeout" if attempt == 0 else "connection")

    kept, error = asked_of(script, 20)
    assert "connection" in error and set(kept) == {str(i) for i in range(20) if i not in (3, 7)}


# --- what stands there twice, and balance ---------------------------------------------------------------------


def test_duplicates_within_and_across_files(serve, quick_rule, tmp_path):
    """The first of the plan stays; white space does not tell two apart, a word or another reference does."""
    one = existing(2) + existing(1)
    two = existing(1, question=" q0\n", completion="\\boxed{8} ", model="other") + existing(
        1, completion="a \\boxed{8}"
    )
    two += existing(1, reference_answer="9")
    files = [write(tmp_path / "one.jsonl", one), write(tmp_path / "two.jsonl", two)]
    server = serve(lambda n, body: reply("Verdict: INCORRECT"))
    pipeline.annotate_completions(
        config(server.url, **{"annotate.balance": "off"}), [], files, str(tmp_path / "out")
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["planned"], report["repeated_in_files"], report["duplicates"]) == (5, 1, 1)
    assert len(server.requests) == report["judged"] == 4
    assert [r["completion"] for r in lines(tmp_path / "out" / "labelled.jsonl")] == [
        "\\boxed{8}",
        "a \\boxed{8}",
        "\\boxed{8}",
    ]
    assert all(r["model"] == "m" for r in lines(tmp_path / "out" / "labelled.jsonl"))


def agreeing(counts: dict[str, tuple[int, int]]) -> list[outcome.Judged]:
    rows = [(s, label) for s, (right, wrong) in counts.items() for label in [True] * right + [False] * wrong]
    return [
        outcome.Judged({"id": f"{i * 7919:020x}", "source": source}, label, label)
        for i, (source, label) in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("how", "ratio", "kept"),
    [
        ("off", 1.0, {("a", True): 9, ("a", False): 3, ("b", True): 2, ("b", False): 8, ("c", False): 5}),
        ("source", 1.0, {("a", True): 3, ("a", False): 3, ("b", True): 2, ("b", False): 2}),
        ("source", 2.5, {("a", True): 7, ("a", False): 3, ("b", True): 2, ("b", False): 5}),
        ("overall", 1.0, {True: 11, False: 11}),
    ],
)
def test_balance(how, ratio, kept):
    rows = agreeing({"a": (9, 3), "b": (2, 8), "c": (0, 5)})
    stay = outcome.balance_classes(rows, how, ratio, seed=1)
    found = Counter((x.row["source"], x.label) if how != "overall" else x.label for x in stay)
    assert found == kept
    ids = {x.row["id"] for x in stay}
    assert ids == {x.row["id"] for x in outcome.balance_classes(rows[::-1], how, ratio, seed=1)}
    if how != "off":
        assert ids != {x.row["id"] for x in outcome.balance_classes(rows, how, ratio, seed=2)}


def test_balance_may_change_without_asking_again(serve, quick_rule, tmp_path):
    files, out = [write(tmp_path / "one.jsonl", existing(9))], str(tmp_path / "out")

    def judge(n, body):
        right = "boxed{7}" in body["messages"][0]["content"]
        return reply("Verdict: CORRECT" if right else "Verdict: INCORRECT")

    server = serve(judge)
    for balance, count in (("off", 9), ("source", 8)):
        pipeline.annotate_completions(config(server.url, **{"annotate.balance": balance}), [], files, out)
        assert len(lines(tmp_path / "out" / "labelled.jsonl")) == count
    assert len(server.requests) == 9 and held(tmp_path / "out" / "verdicts.jsonl") == 9


# --- plans, files and flags ----------------------------------------------------------------------------------


def list_items(cfg, problems, completions) -> items.AnnotationPlan:
    return items.list_items(cfg, items.AnnotateConfig.from_config(cfg.annotate), problems, completions)


def test_a_plan_has_stable_ids_and_takes_a_fixed_part(tmp_path):
    path = sums(tmp_path / "sums.jsonl", 30)
    cfg = config(**{"annotate.samples": 3})
    plan = list_items(cfg, [path], [])
    assert len({i.id for i in plan.items}) == 90 and len({i.number for i in plan.items}) == 90
    assert all(0 <= i.number < 2**31 for i in plan.items)
    part = list_items(config(**{"annotate.samples": 2, "annotate.problems": 7}), [path], [])
    assert {i.id for i in part.items} < {i.id for i in plan.items} and len(part.items) == 14
    assert [i.sample for i in part.items] == [0, 1] * 7


def test_completions_are_asked_for_with_the_prompts_of_training(serve, quick_rule, tmp_path):
    """A folder of shards, whose prompts are lists of messages, under a system message."""
    (tmp_path / "chat").mkdir()
    for i in range(2):
        messages = [{"role": "system", "content": "Old."}, {"role": "user", "content": f"What is {i} + 1?"}]
        write(tmp_path / "chat" / f"part-{i}.jsonl", [{"prompt": messages, "answer": i + 1}])

    def script(n, body):
        return reply("Verdict: CORRECT" if body["model"] == "judge" else "\\boxed{1}")

    server = serve(script)
    cfg = config(server.url, **{"data.system": "Be brief."})
    pipeline.annotate_completions(cfg, [str(tmp_path / "chat")], [], str(tmp_path / "out"))
    asked = [body["messages"] for _, _, body in server.requests if body["model"] == "writer"]
    assert sorted(asked, key=str) == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {i} + 1?"}]
        for i in range(2)
    ]


def test_published_sets_are_recognised(shared_data):
    paths = [str(shared_data / f"{name}.jsonl") for name in ("gsm8k_test", "svamp_test", "math500_test")]
    plan = list_items(config(**{"annotate.problems": 5}), paths, [str(shared_data / "verify_dev.jsonl")])
    counts = Counter(i.source for i in plan.items)
    assert [counts[n] for n in ("gsm8k_test", "svamp_test", "math500_test")] == [5] * 3
    given = [i for i in plan.items if i.completion is not None]
    assert len(given) + plan.repeated == 1391 and {i.label for i in given} == {0, 1}


BAD = [
    ({"label": 2}, "bad.jsonl:2: field 'label' is 2: must be 0, 1 or absent"),
    ({"question": None}, "bad.jsonl:2: field 'question' is NoneType"),
    ({"reference_answer": " "}, "bad.jsonl:2: the reference_answer is empty"),
    ({"completion": 7}, "bad.jsonl:2: field 'completion'"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_bad_row_is_named(change, message, tmp_path):
    path = write(tmp_path / "bad.jsonl", existing(1) + existing(1, **change))
    with pytest.raises(SetupError) as caught:
        list_items(config(), [], [path])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "problems", "message"),
    [
        ({}, [], "there is nothing to annotate"),
        ({}, ["absent.jsonl"], "--problems=absent.jsonl"),
        ({}, ["a/sums.jsonl", "b/sums.jsonl"], "two of the files are called 'sums'"),
        ({"annotate.samples": 0}, ["x.jsonl"], "annotate.samples=0"),
        ({"annotate.balance": "yes"}, ["x.jsonl"], "annotate.balance='yes'"),
        ({"annotate.max_ratio": 0.5}, ["x.jsonl"], "annotate.max_ratio=0.5"),
    ],
)
def test_bad_commands_are_one_line(fields, problems, message, tmp_path):
    with pytest.raises(SetupError) as caught:
        pipeline.annotate_completions(config(**fields), problems, [], str(tmp_path / "out"))
    assert message in str(caught.value) and not (tmp_path / "out").exists()


def test_it_runs_in_one_process(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(SetupError, match="one of 4"):
        pipeline.annotate_completions(config(), ["x.jsonl"], [], str(tmp_path / "out"))


def test_a_folder_is_for_one_command_at_a_time_and_one_set_of_settings(tmp_path):
    settings = {"seed": 0, "judge.model": "a"}
    with annotation_ledger.Ledger(tmp_path / "out", settings) as opened:
        with pytest.raises(ValueError, match="in use"):
            annotation_ledger.Ledger(tmp_path / "out", settings)
        opened.verdicts.append([{"id": "1", "rule": "wrong"}])
    with pytest.raises(
        ValueError, match='judge.model was "a" and is now "b"; seed was 0 and is now .absent.'
    ):
        annotation_ledger.Ledger(tmp_path / "out", {"judge.model": "b"})
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(ValueError, match="verdicts.jsonl without settings.json"):
        annotation_ledger.Ledger(tmp_path / "out", settings)
    for folder, message in (("", "--out=DIR"), ("gs://bucket/x", "--out=gs://bucket/x")):
        with pytest.raises(ValueError, match=message):
            annotation_ledger.Ledger(folder, settings)


def test_settings_may_change_until_something_was_answered_under_them(tmp_path):
    """A slip in the source's section costs nothing, nor one in the judge's the completions."""

    def opened(**settings):
        return annotation_ledger.Ledger(
            tmp_path / "out", {"seed": 0} | {k.replace("_", "."): v for k, v in settings.items()}
        )

    opened(source_model="slip", judge_model="slip").close()
    with opened(source_model="writer", judge_model="slip") as one:
        one.completions.append([{"id": "1", "completion": "7"}])
    with pytest.raises(ValueError, match='source.model was "writer" and is now "other": give another --out'):
        opened(source_model="other", judge_model="judge")
    with opened(source_model="writer", judge_model="judge") as one:
        assert json.loads((tmp_path / "out" / "settings.json").read_text())["judge.model"] == "judge"
        one.verdicts.append([{"id": "1", "rule": "wrong"}])
    with pytest.raises(
        ValueError, match='settings: judge.model was "judge" and is now "other": give another'
    ):
        opened(source_model="writer", judge_model="other")


def test_a_judge_that_is_not_there_claims_no_folder(serve, quick_rule, tmp_path):
    """Its section may be mended, though the completions of the files are in the ledger."""
    files, out = [write(tmp_path / "one.jsonl", existing(2))], str(tmp_path / "out")
    away = serve(lambda n, body: (404, {}, b""))
    with pytest.raises(SetupError, match="http_404"):
        pipeline.annotate_completions(config(away.url, **{"judge.model": "slip"}), [], files, out)
    server = serve(lambda n, body: reply("Verdict: INCORRECT"))
    pipeline.annotate_completions(config(server.url), [], files, out)
    assert len(lines(tmp_path / "out" / "verdicts.jsonl")) == 2


@pytest.fixture
def no_large_files():
    """A context in which no file grows over 64 KiB, as on a full disk."""

    @contextlib.contextmanager
    def full():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return full


def test_a_full_disk_is_one_error_and_the_same_command_goes_on(serve, quick_rule, tmp_path, no_large_files):
    rows = existing(3, completion="so " * 10**4 + "\\boxed{8}")
    files, out = [write(tmp_path / "one.jsonl", rows)], tmp_path / "out"
    server = serve(lambda n, body: reply("Verdict: INCORRECT"))
    with (
        no_large_files(),
        pytest.raises(SetupError, match="--out: .*File too large: fix that.*completions.jsonl"),
    ):
        pipeline.annotate_completions(config(server.url), [], files, str(out))
    cfg = config(server.url, **{"annotate.balance": "off"})
    pipeline.annotate_completions(cfg, [], files, str(out))
    assert len(lines(out / "labelled.jsonl")) == 3
    (out / "report.json").unlink()
    with no_large_files(), pytest.raises(SetupError, match="--out: labelled.jsonl: .*File too large"):
        pipeline.annotate_completions(cfg, [], files, str(out))
    assert len(lines(out / "labelled.jsonl")) == 3 and not (out / "report.json").exists()


def test_another_file_under_the_same_name_is_refused(serve, quick_rule, tmp_path):
    out, path = str(tmp_path / "out"), tmp_path / "one.jsonl"
    server = serve(lambda n, body: reply("Verdict: CORRECT"))
    pipeline.annotate_completions(config(server.url), [], [write(path, existing(2))], out)
    with pytest.raises(SetupError, match=r"completions one was .*bytes, sha256 .* and is now .*sha256"):
        pipeline.annotate_completions(config(server.url), [], [write(path, existing(3))], out)


def test_half_a_surrogate_pair_of_a_server_or_a_ledger_is_replaced(serve, quick_rule, tmp_path):
    def cut(n, body):
        if body["model"] == "writer":
            return reply("\\boxed{7} \ud83d")
        return reply("\ud83d\nVerdict: CORRECT")

    problems = write(tmp_path / "one.jsonl", [{"question": "What is 3 + 4?", "answer": "7"}])
    cfg = config(serve(cut).url, **{"annotate.balance": "off"})
    pipeline.annotate_completions(cfg, [problems], [], str(tmp_path / "out"))
    (row,) = lines(tmp_path / "out" / annotation_ledger.COMPLETIONS)
    (verdict,) = lines(tmp_path / "out" / annotation_ledger.VERDICTS)
    assert row["completion"] == "\\boxed{7} \ufffd" and verdict["judge_reply"] == "\ufffd\nVerdict: CORRECT"
    assert len(lines(tmp_path / "out" / "labelled.jsonl")) == 1
    path = tmp_path / "older.jsonl"
    path.write_text('{"id": "1", "completion": "half \\ud83d", "tokens": 3}\n')
    log = annotation_ledger.LedgerFile(path)
    assert log.rows["1"] == {"id": "1", "completion": "half \ufffd", "tokens": 3}
    log.close()


def test_a_ledger_mends_its_last_line_alone(tmp_path, capsys):
    path = tmp_path / "verdicts.jsonl"
    path.write_text(
        '{"id": "1", "judge": true}\n{"id": "2", "failure": "x"}\n{"id": "2", "judge": false}\n{"id": "3'
    )
    log = annotation_ledger.LedgerFile(path)
    assert log.rows["1"]["judge"] and log.rows["2"]["judge"] is False and set(log.rows) == {"1", "2"}
    assert "verdicts.jsonl:4: removed an incomplete line (9 bytes)" in capsys.readouterr().out
    log.append([{"id": "3", "judge": None}])
    assert [row["id"] for row in lines(path)] == ["1", "2", "2", "3"]
    log.close()
    for broken, words in (('{"id"', "no JSON object"), ('{"id": 2}', "no JSON object with an id")):
        path.write_text(f'{{"id": "1"}}\n{broken}\n{{"id": "3"}}\n')
        with pytest.raises(ValueError, match=f"verdicts.jsonl:2: {words}"):
            annotation_ledger.LedgerFile(path)
