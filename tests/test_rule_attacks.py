"""Generated attacks on the rule verifier cost their own verdict alone."""

import measure_rule_attacks
import pytest
import rule_attacks

from cooper_jax.rule import rule_verdict
from cooper_jax.rule.verifier import RuleConfig
from cooper_jax.rule.worker_process import Item
from cooper_jax.types import Verdict

ORDINARY = [
    *(Item(str(n), f"{n - 7} + 7 = {n}, so the answer is \\boxed{{{n}}}.") for n in range(40)),
    *(Item(str(n), f"so the answer is \\boxed{{{n + 1}}}.") for n in range(40)),
    Item("\\frac{1}{2}", "\\boxed{0.5}"),
]


def check(count: int) -> None:
    found = measure_rule_attacks.attack_verifier(count, ORDINARY)
    assert found.attacks >= 0.9 * count
    assert found.is_sound, (found.correct, found.ran_code, found.changed)
    memory_limit = RuleConfig.from_config(measure_rule_attacks.base.get_config().rule).memory_mb
    assert 0 < found.memory_mb < 1.05 * memory_limit
    assert sum(counts.total() for counts in found.verdicts.values()) == found.attacks


def test_some_attacks():
    check(40)


@pytest.mark.slow
def test_a_thousand_attacks():
    check(1000)


def test_findings_tell_what_attacks_did(monkeypatch):
    """A rule that calls texts correct, runs them or is changed by them would be found."""
    attacks = [rule_attacks.Attack("text", "\\boxed{1234577}"), rule_attacks.Attack("text", "\\boxed{3}")]
    monkeypatch.setattr(rule_attacks, "generate_attacks", lambda count, canary: canary.touch() or attacks)
    verdicts = iter([Verdict.WRONG])
    judge = measure_rule_attacks.judge_ordinary
    monkeypatch.setattr(
        measure_rule_attacks, "judge_ordinary", lambda *given: ([next(verdicts)], judge(*given)[1])
    )
    found = measure_rule_attacks.attack_verifier(2, ORDINARY[:1])
    assert found.correct == attacks[:1] and found.ran_code and found.changed == 1
    assert found.verdicts["text"] == {"correct": 1, "wrong": 1}


@pytest.mark.slow
def test_attacks_are_the_same_each_time(tmp_path):
    first, again = (rule_attacks.generate_attacks(30, tmp_path / "canary") for _ in range(2))
    assert first == again and len({attack.kind for attack in first}) == 10
    with pytest.raises(FileNotFoundError):
        (tmp_path / "canary").stat()
    assert rule_verdict.judge_answer(rule_attacks.REFERENCE, "\\boxed{1234577}") is not None
