"""Dynamic sampling: the groups that a step keeps, what it counts, and what an interrupted refill leaves behind."""

import dataclasses
import zlib

import numpy as np
import pytest
from tiny_steps import B, G, config, host, take_step

from cooper_jax.policy.advantages import find_flat_groups
from cooper_jax.runtime import hosts, keys
from cooper_jax.runtime.metrics import PhaseTimer
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer import dynamic_sampling, policy_stages
from cooper_jax.trainer.grading import Grades
from cooper_jax.trainer.reward_functions import CombinedRewards
from cooper_jax.trainer.run_settings import RunSettings
from cooper_jax.types import Verdict

MANY = 40  # problems: more than any test samples


def is_correct(text: str) -> bool:
    return zlib.crc32(text.encode()) % 8 == 0


class ByText:
    """A rule verifier that finds an eighth of all texts correct."""

    def submit(self, items):
        return [Verdict.CORRECT if is_correct(item[1]) else Verdict.WRONG for item in items]

    def collect(self, pending):
        return [verdict for verdicts in pending for verdict in verdicts]


def rule_arm(build, **changes):
    return build(**{"reward.arm": "rule", "policy.kl_coef": 0.0, "data.synthetic_size": MANY} | changes)


def sample_all(components, state):
    """The responses of the first step to the first MANY problems, [MANY][G], had they all been sampled."""
    key = keys.make_key(components.settings.seed, "rollout", state.step + 1)
    completions = []
    for first in range(state.position, state.position + MANY, B):
        problems = policy_stages.take_problems(components, first=first, count=B)
        _, some, _ = policy_stages.sample_responses(components, state.policy.params, problems, key)
        completions += some
    return [completions[i * G : (i + 1) * G] for i in range(MANY)]


def sample_first(components, state):
    """The first batch of a run's first step."""
    key = dynamic_sampling.make_rollout_key(components, 1)
    return dynamic_sampling.sample_batch(
        components, state.policy.params, PhaseTimer(), key=key, step=1, first=0
    )


def choose(flat: list[bool], budget: int) -> tuple[list[int], int]:
    """Positions of the groups that a step keeps, and the number that it samples, one problem at a time."""
    sampled = B
    while sum(not f for f in flat[:sampled]) < B and sampled < B + budget:
        sampled += 1
    varied = [i for i in range(sampled) if not flat[i]]
    equal = [i for i in range(sampled) if flat[i]]
    return sorted((varied + equal)[:B]), sampled


@pytest.mark.parametrize(
    "devices, budget",
    [(1, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 30), (4, 3)))],
)
def test_flat_groups_are_replaced_by_the_next_problems(build, budget, devices):
    with rule_arm(build, devices=devices, **{"data.refill_prompts": budget}) as (components, state):
        components = dataclasses.replace(components, rule=ByText())
        groups = sample_all(components, state)
        flat = [len({is_correct(c.text) for c in group}) == 1 for group in groups]
        expected, sampled = choose(flat, budget)
        assert any(flat[:B]), "nothing would be replaced"

        before = host(state.policy.params)
        state, metrics, record = take_step(components, state)

    # The same texts as if each problem had been sampled among others: its draws depend on its position alone.
    assert [c.text for c in record.completions] == [c.text for i in expected for c in groups[i]]
    assert [p.id for p in record.problems] == [
        components.train[components.data_order.problem_at(i, 0, "shuffle")].id for i in expected
    ]
    assert record.rewards.tolist() == [float(is_correct(c.text)) for i in expected for c in groups[i]]
    assert state.position == metrics["data/position"] == sampled
    assert metrics["data/refill_prompts"] == sampled - B <= budget
    assert metrics["data/replaced_groups"] == sum(flat[:sampled]) - sum(flat[i] for i in expected)
    assert metrics["reward/zero_variance_groups"] == pytest.approx(np.mean([flat[i] for i in expected]))
    every = [is_correct(c.text) for group in groups[:sampled] for c in group]
    assert metrics["rule/sampled_accuracy"] == pytest.approx(np.mean(every))
    assert record.sampled_tokens == sum(c.tokens for group in groups[:sampled] for c in group)
    if budget == 30:
        assert metrics["reward/zero_variance_groups"] == 0 and metrics["data/refill_rounds"] > 1
        changed = [a.tobytes() != b.tobytes() for a, b in zip(before, host(state.policy.params), strict=True)]
        assert all(changed)


def test_an_interrupted_refill_leaves_the_state_as_it_was(build, monkeypatch):
    """A SIGTERM in the second rollout of a step: the state is that before the step, which can be repeated."""
    with rule_arm(build, **{"data.refill_prompts": 30}) as (components, state):
        components = dataclasses.replace(components, rule=ByText())
        rollouts = []
        sample = policy_stages.sample_responses

        def stop_in_the_second(*args, **options):
            rollouts.append(len(args[2].problems))
            if len(rollouts) == 2:
                raise hosts.Stopped
            return sample(*args, **options)

        before = host(state.policy.params)
        monkeypatch.setattr(policy_stages, "sample_responses", stop_in_the_second)
        with pytest.raises(hosts.Stopped):
            take_step(components, state)
        assert rollouts[0] == B > rollouts[1] > 0 and state.position == 0
        after = host(state.policy.params)
        assert [x.tobytes() for x in before] == [x.tobytes() for x in after]

        monkeypatch.setattr(policy_stages, "sample_responses", sample)
        repeated, _, record = take_step(components, state)
    with rule_arm(build, **{"data.refill_prompts": 30}) as (components, state):
        whole, _, other = take_step(dataclasses.replace(components, rule=ByText()), state)
    assert repeated.position == whole.position and record.completions == other.completions
    assert [x.tobytes() for x in host(repeated.policy)] == [x.tobytes() for x in host(whole.policy)]


def test_without_a_budget_no_group_is_replaced(build):
    with rule_arm(build) as (components, state):
        components = dataclasses.replace(components, rule=ByText())
        state, metrics, _ = take_step(components, state)
    assert state.position == B and "data/refill_prompts" not in metrics


def test_scores_are_those_of_the_kept_groups(build, monkeypatch):
    """The reward model's rewards are never equal: with flat_std groups of nearly equal ones are replaced."""
    with build(**{"data.synthetic_size": MANY, "data.refill_prompts": 9}) as (components, state):
        components = dataclasses.replace(components, rule=ByText())
        seen = []
        grade = dynamic_sampling._grade

        def note(*args):
            seen.append(grade(*args))
            return seen[-1]

        first = sample_first(components, state)
        scores = first.grader.collect_scores(state.reward_params)
        spread = np.sort(scores.reshape(B, G).std(axis=1, ddof=1))
        policy = dataclasses.replace(components.settings.policy, flat_std=float(spread[1]) * 1.0001)
        components = dataclasses.replace(
            components, settings=dataclasses.replace(components.settings, policy=policy)
        )
        monkeypatch.setattr(dynamic_sampling, "_grade", note)
        first = sample_first(components, state)
        sampled = dynamic_sampling.replace_flat_groups(components, state, first, PhaseTimer())
        assert seen[0].flat.sum() == 2 and len(seen) > 1
        scores = sampled.grader.collect_scores(state.reward_params)
        again = policy_stages.take_problems(components, first=0, count=B + 9)
        where = [again.positions.index(p) for p in sampled.problems.positions]
        assert sampled.problems.prompt_tokens == [again.prompt_tokens[i] for i in where]
        rewards = sampled.grader.collect_rewards(
            scores, sampled.grader.collect_verdicts(), sampled.completions
        )
        np.testing.assert_array_equal(rewards.total, scores)
        assert len(scores) == len(sampled.completions) == sampled.rollout.tokens.shape[0] == B * G


def test_flat_groups():
    rewards = np.array([0.5, 0.5, 0.5, 0.51, np.nan, 1.0, 0.0, 1.0])
    advantages = np.array([0.0, 0.0, -1.0, 1.0, 0.0, 0.0, -1.0, 1.0])
    assert find_flat_groups(rewards, advantages, 2, 0.0).tolist() == [True, False, True, False]
    assert find_flat_groups(rewards, advantages, 2, 0.05).tolist() == [True, True, True, False]


def test_grades_of_two_batches():
    def make(total, failures):
        total = np.array(total, np.float32)
        rewards = CombinedRewards(total, {"short": total + 1}, failures, penalty=total / 2)
        return Grades(total + 2, [Verdict.WRONG] * len(total), rewards)

    grades = make([0, 1], {"reward/short/error": 1.0}).concatenate(
        make([2, np.nan], {"reward/short/error": 2.0, "reward/short/none": 1.0})
    )
    chosen = grades.take(np.array([1, 2, 3]))
    assert chosen.collect_scores(None)[:2].tolist() == [3, 4] and len(chosen.verdicts) == 3
    assert chosen.rewards.masked.tolist() == [False, False, True]
    assert chosen.rewards.metrics == pytest.approx(
        {
            "reward/short/error": 3.0,
            "reward/short/none": 1.0,
            "reward/overlong": float("nan"),
            "reward/short": 2.5,
            "reward/masked": 1.0,
            "reward/mean": 1.5,
            "reward/std": 0.5,
        },
        nan_ok=True,
    )
    with pytest.raises(ValueError, match="no reward model"):
        dataclasses.replace(grades, scores=None).collect_scores(None)


def test_a_baseline_of_the_step_has_no_flat_groups():
    cfg = config(**{"data.refill_prompts": 4, "policy.baseline": "batch_mean", "policy.std": "batch"})
    with pytest.raises(SetupError, match="data.refill_prompts=4: with policy.baseline=batch_mean"):
        RunSettings.from_config(cfg)
    with pytest.raises(SetupError, match="data.refill_prompts=-1"):
        RunSettings.from_config(config(**{"data.refill_prompts": -1}))
