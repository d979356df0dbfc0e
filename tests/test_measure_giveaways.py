"""The figures of the checks on rewrites count what the trainer's own checks say."""

import collections
import contextlib
import dataclasses
import json

import measure_giveaways
import pytest
import tiny_steps
from all_pairs import build_all

from cooper_jax.configs import base
from cooper_jax.launch import common
from cooper_jax.llm.chat import Failure
from cooper_jax.reward.assistants import CorruptingAssistant
from cooper_jax.reward.pairs.pair_task import PairsConfig
from cooper_jax.rule.verifier import RuleConfig, RuleVerifier
from cooper_jax.runtime import compilation_cache
from cooper_jax.trainer import setup
from cooper_jax.types import Completion, Problem, Triple

CFG = PairsConfig.from_config(base.get_config().pairs)
SOLUTION = "Each box holds 6 pens, so 3 boxes hold 3 * 6 = 18 pens.\nA: 18"


@pytest.fixture(scope="module")
def rule():
    with RuleVerifier(RuleConfig(workers=1, timeout=20.0, step_budget=60.0, memory_mb=2048)) as verifier:
        yield verifier


def triple(completion, label=1.0, **fields):
    return Triple("How many pens?", "18", completion, label, **fields)


class Scripted:
    """Replies in turn, whatever is asked."""

    overlaps, concurrency = True, None

    def __init__(self, replies):
        self.replies = list(replies)

    def rewrite(self, requests):
        return [self.replies.pop(0) for _ in requests]

    def report_failures(self):
        pass

    def close(self):
        pass


def test_false_alarms_are_counted_by_reason(capsys):
    triples = [triple(SOLUTION), triple(SOLUTION + " Oops.", 0.0), triple("<b>18</b>"), triple("Sorry. 18")]
    assert [measure_giveaways.find_false_alarm(t) for t in triples] == [
        "",
        "giveaway_admission",
        "giveaway_markup",
        "refusal",
    ]
    measure_giveaways.print_false_alarms(triples, show=1)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["giveaway_admission", "1", "(25.00", "%)", "1", "(100.00", "%)"] in lines
    assert ["all", "giveaway_*", "2", "(50.00", "%)", "1", "(100.00", "%)"] in lines
    assert ["1", "admission:", "oops"] in lines


def test_positives_are_distinct_and_fit():
    rows = [triple("a", source="x"), triple("b", source="y"), triple("c", 0.0, source="x")]
    rows += [triple("dd", source="x"), triple("a", source="x")]
    chosen = measure_giveaways.choose_positives(rows, "x", 0, 9)
    assert sorted(t.completion for t in chosen) == ["a", "dd"]
    assert [t.completion for t in measure_giveaways.choose_positives(rows, "x", 1, 9)] == ["a"]
    assert len(measure_giveaways.choose_positives(rows, "", 0, 2)) == 2


def test_each_attempt_has_the_reason_of_the_trainers_check(rule, capsys):
    wrong = SOLUTION.replace("18", "16")
    batch = [triple(SOLUTION), triple(SOLUTION + " "), triple("A: 17")]
    # Two positives are asked about; the first is accepted in the second round, the other never.
    replies = [Failure("timeout"), Completion(SOLUTION), Completion(wrong), Completion(wrong + " Oops.")]
    assistant = Scripted([*replies, Completion(SOLUTION.replace("6", "06"))])
    slots, attempts = measure_giveaways.rewrite_positives(batch, assistant, rule, CFG, (), 0, 0)
    assert [a.refusal for a in attempts] == [
        "assistant_timeout",
        "unchanged",
        "",
        "giveaway_admission",
        "not_wrong",
    ]
    assert [slot.refusal for slot in slots[1:]] == ["not_wrong", "no_positive"]
    assert slots[0].negative == wrong and slots[1].negative is None

    measure_giveaways.print_outcomes(slots, attempts)
    measure_giveaways.print_probe(slots)
    measure_giveaways.print_samples(attempts, 1)
    out = capsys.readouterr().out
    assert ["accepted", "1", "(20.00", "%)", "1", "(33.33", "%)"] in [s.split() for s in out.splitlines()]
    assert "pairs/refused_no_positive" in out and "pairs/giveaway_pairs=1\n" in out
    assert "no AUROC: the probe needs 50 pairs" in out and "[phrases] ['oops']" in out


class Recording(CorruptingAssistant):
    """The corrupting assistant, which keeps the ids of its requests, and whose replies are all right."""

    def __init__(self):
        self.ids = []

    def rewrite(self, requests):
        self.ids += [request.ids for request in requests]
        return [Completion(SOLUTION.replace("6", "06")) for _ in requests]


def test_each_try_and_batch_draws_its_own_random_bits(rule):
    assistant = Recording()
    cfg = dataclasses.replace(CFG, tries=3)
    for step in range(2):
        measure_giveaways.rewrite_positives([triple(SOLUTION)] * 2, assistant, rule, cfg, (), 5, step)
    assert len(assistant.ids) == len(set(assistant.ids)) == 2 * 3 * 2
    assert {seed for seed, *_ in assistant.ids} == {5}

    # Another seed gives other rewrites, and the same one the same.
    def rewrite(seed):
        batch = [triple(f"{'x' * i} {SOLUTION}") for i in range(4)]
        slots, _ = measure_giveaways.rewrite_positives(batch, CorruptingAssistant(), rule, CFG, (), seed, 0)
        return [slot.negative for slot in slots]

    assert rewrite(5) == rewrite(5) != rewrite(6)


def test_special_tokens_and_the_length_ratio_are_those_given(rule):
    wrong = SOLUTION.replace("18", "16")
    replies = [Completion("\u00a7end\u00a7 " + wrong), Completion("So it is clear. " * 4 + wrong)]
    batch, one_try = [triple(SOLUTION), triple(SOLUTION + " ")], dataclasses.replace(CFG, tries=1)

    def find_refusals(special_tokens, length_ratio):
        cfg = dataclasses.replace(one_try, length_ratio=length_ratio)
        _, attempts = measure_giveaways.rewrite_positives(
            batch, Scripted(replies), rule, cfg, special_tokens, 0, 0
        )
        return [a.refusal for a in attempts]

    assert find_refusals((), 9.0) == ["", ""]
    assert find_refusals({"\u00a7end\u00a7"}, 9.0) == ["giveaway_special_token", ""]
    assert find_refusals((), 1.5) == ["", "length"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """(completions, *flags, **fields of the config) -> output of the command `rewrites` with the tiny config."""

    def run(triples, *flags, **changes):
        path = tmp_path / "labelled.jsonl"
        rows = ({**dataclasses.asdict(t), "reference_answer": t.reference} for t in triples)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

        # The config is given here, because absl's flags are the same object for all tests of a process.
        cfg = tiny_steps.config(**{"run_dir": str(tmp_path), "data.prompts_per_step": 2} | changes)
        monkeypatch.setattr(compilation_cache, "enable_compilation_cache", lambda: None)
        monkeypatch.setattr(common, "parse_flags", lambda argv: argv)
        monkeypatch.setattr(common, "run_job", contextlib.nullcontext)
        monkeypatch.setattr(common, "read_config", lambda: cfg)
        monkeypatch.setattr(
            "sys.argv", ["measure_giveaways.py", "rewrites", str(path), "--config=tiny", *flags]
        )
        measure_giveaways.main()
        return capsys.readouterr().out

    return run


def test_rewrites_prints_outcomes_and_samples(run, monkeypatch):
    given = []
    rewrite_positives = measure_giveaways.rewrite_positives

    def record(batch, assistant, rule, cfg, special_tokens, seed, step):
        given.append((len(batch), cfg.length_ratio, special_tokens, seed, step))
        return rewrite_positives(batch, assistant, rule, cfg, special_tokens, seed, step)

    monkeypatch.setattr(measure_giveaways, "rewrite_positives", record)
    monkeypatch.setattr(setup, "collect_control_texts", lambda *_: frozenset({"\u00a7end\u00a7"}))
    triples = [triple(SOLUTION), triple("So. " + SOLUTION), triple("A: 17"), triple("A: 16", 0.0)]
    out = run(triples, "--show=1", "--digits=visible", seed=3, **{"pairs.length_ratio": 2.5})

    # Batches have prompts_per_step positives, and the settings are the config's.
    tokens = frozenset({"\u00a7end\u00a7"})
    assert given == [(2, 2.5, tokens, 3, 0), (1, 2.5, tokens, 3, 1)]
    lines = [line.split() for line in out.splitlines()]
    assert ["accepted", "2", "(100.00", "%)", "2", "(66.67", "%)"] in lines
    assert ["pairs/refused_no_positive", "0", "(0.00", "%)", "1", "(33.33", "%)"] in lines
    assert "3 positives, 2 requests, 2 accepted" in out and "assistant.kind=corrupt" in out
    assert "pairs/giveaway_pairs=2\n" in out and "AUROC with digits visible: nan" in out
    assert out.count("--- accepted") == 1 and "[rewrite] " in out


def test_rewrites_keeps_its_limits_and_refuses_what_it_cannot_do(run, capsys):
    triples = [triple(SOLUTION), triple("So. " + SOLUTION, source="x")]
    assert "0 (" not in run(triples, "--minutes=0") and "AUROC with" not in run(triples, "--minutes=0")
    assert "1 positives, 1 requests" in run(triples, "--positives=1")
    # Batches have two positives here, so the third is not rewritten.
    three = [triple(f"{n}. " + SOLUTION) for n in range(3)]
    assert "3 positives" not in run(three, "--pairs=1") and "3 positives" in run(three, "--pairs=4")
    with pytest.raises(SystemExit):
        run(triples, "--source=y", "--longest=7")
    assert "no positives with --source=y --longest=7" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(triples, **{"pairs.negatives": ("own_answer",)})
    assert "this config asks no assistant" in capsys.readouterr().err


def test_the_outcomes_are_those_of_a_training_step(rule):
    """With one try, the masked pairs of `build_pairs` have the same reasons."""
    texts = [SOLUTION, "The answer is \\boxed{18}.", "A: 17", "A: eighteen\nA: 18"]
    one_try = PairsConfig(per_prompt=1, negatives=("assistant",), tries=1, length_ratio=2.0)
    slots, _ = measure_giveaways.rewrite_positives(
        [triple(text) for text in texts], CorruptingAssistant(), rule, one_try, (), 0, 7
    )
    result = build_all(
        [Problem("How many pens?", "18")] * len(texts),
        [Completion(text) for text in texts],
        rule.check([("18", text) for text in texts]),
        1,
        CorruptingAssistant(),
        rule,
        one_try,
        lambda answer: True,
        seed=0,
        step=7,
    )
    assert [slot.to_pair() for slot in slots] == result.pairs
    assert result.pairs[0] is not None and result.refused["no_positive"] == 1
    assert result.refused == collections.Counter(slot.refusal for slot in slots if slot.negative is None)
