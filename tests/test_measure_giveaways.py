"""The figures of the checks on rewrites count what the trainer's own checks say."""

import collections

import measure_giveaways
import pytest

from cooper_jax.configs import base
from cooper_jax.llm.chat import Failure
from cooper_jax.reward.assistants import CorruptingAssistant
from cooper_jax.reward.pairs import build_pairs
from cooper_jax.reward.pairs.build_pairs import PairInputs, PairsConfig
from cooper_jax.rule.verifier import RuleConfig, RuleVerifier
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

    overlaps = True

    def __init__(self, replies):
        self.replies = list(replies)

    def rewrite(self, requests):
        return [self.replies.pop(0) for _ in requests]

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


def test_the_outcomes_are_those_of_a_training_step(rule):
    """With one try, the masked pairs of `build_pairs` have the same reasons."""
    texts = [SOLUTION, "The answer is \\boxed{18}.", "A: 17", "A: eighteen\nA: 18"]
    one_try = PairsConfig(per_prompt=1, negatives=("assistant",), tries=1, length_ratio=2.0)
    slots, _ = measure_giveaways.rewrite_positives(
        [triple(text) for text in texts], CorruptingAssistant(), rule, one_try, (), 0, 7
    )
    result = build_pairs.build_pairs(
        PairInputs(
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
    )
    assert [slot.to_pair() for slot in slots] == result.pairs
    assert result.pairs[0] is not None and result.refused["no_positive"] == 1
    assert result.refused == collections.Counter(slot.refusal for slot in slots if slot.negative is None)
