"""Whole steps: the parameters that they update, how responses are graded and rewarded, and logged samples."""

import dataclasses
import zlib
from collections import Counter

import jax
import numpy as np
import pytest
from tiny_rollouts import record_requests
from tiny_steps import (
    B,
    G,
    Undecided,
    begun,
    config,
    host,
    score,
    solved,
    steps,
    take_step,
    unchanged,
    without_models,
)

from cooper_jax.rule.worker_process import make_item
from cooper_jax.trainer import grading, policy_stages, reward_stages
from cooper_jax.trainer.rewards import REWARDS, compute_rewards, name_rewards
from cooper_jax.trainer.samples import StepRecord, select_samples
from cooper_jax.types import Completion, Pair, Verdict


def test_who_moves_in_a_step(build, tmp_path):
    """Policy and reward model in every step, the reference in none; each update moves its own model alone."""
    with build() as (components, state), begun(components, state, tmp_path) as (state, _, _):
        components = solved(components)
        reference = host(state.reference)
        assert all(unchanged(reference, state.policy.params))
        for step in (1, 2, 3):
            policy, reward = host(state.policy.params), host(state.reward.params)
            state, metrics, record = take_step(components, state)
            assert state.step == step and state.position == step * B
            assert metrics["pairs/valid"] == sum(p is not None for p in record.pairs) >= 1
            assert not any(unchanged(reward, state.reward.params))
            assert not any(unchanged(policy, state.policy.params))
            assert all(unchanged(reference, state.reference))
        policy, updates = host(state.policy.params), int(state.reward.updates)
        moved, _ = reward_stages.update_reward_model(components, state.reward, record.pairs)
        assert int(moved.updates) == updates + 1 and all(unchanged(policy, state.policy.params))


@pytest.mark.parametrize("own_devices", [False, True])
def test_each_response_is_submitted_once_as_its_group_ends(build, own_devices):
    """Groups may end in any order; verdicts and scores come in the order of the rows."""

    class Counting(Undecided):
        submitted = []

        def submit(self, items):
            self.submitted.append(list(items))
            return super().submit(items)

    # A reward model on devices of its own scores while others are sampled: four responses, then the other two.
    meshes = {"mesh.data": 1, "mesh.reward": "1x1x1"} if own_devices else {}
    with build(2 if own_devices else 1, **meshes) as (components, state):
        assert grading.can_score_during_rollout(components) == own_devices
        components = dataclasses.replace(components, rule=Counting())
        problems = policy_stages.take_problems(components, first=0)
        texts = [[Completion(f"{b} and {g} #### {b}") for g in range(G)] for b in range(B)]
        grader = grading.ResponseGrader(components, problems, state.reward_params)
        for b in (2, 0, 1):
            grader.add_group(b, texts[b])
        whole = sum(texts, [])
        assert [len(items) for items in Counting.submitted] == [G] * B
        items = [make_item(p, c.text) for p, c in zip(problems.row_problems, whole, strict=True)]
        assert Counting.submitted[0] == items[2 * G :] and Counting.submitted[1] == items[:G]
        assert grader.collect_verdicts() == Undecided().submit(items)
        assert len(Counting.submitted) == B, "nothing is submitted a second time"
        logits = score(components, state.reward, problems.row_problems, whole)
        np.testing.assert_allclose(
            grader.collect_scores(state.reward_params), 1 / (1 + np.exp(-logits)), atol=1e-6
        )
        assert len(set(logits.tolist())) > 1
        with pytest.raises(ValueError, match="no reward model"):
            grading.ResponseGrader(components, problems, None).collect_scores(None)


@pytest.mark.slow
def test_models_on_meshes_of_their_own(build, tmp_path):
    """Reward model and reference beside the policy: the same step, scored while the policy decodes; and resumed."""

    def step(name, devices, **meshes):
        out = []
        for _ in range(2):  # begun, then from its checkpoint
            with (
                build(devices, **{"mesh.data": 1, "rollout.segment": 2, "reward.microbatch": 2} | meshes) as (
                    components,
                    state,
                ),
                begun(components, state, tmp_path / name) as (state, _, _),
            ):
                components = solved(components)
                assert grading.can_score_during_rollout(components) == bool(meshes)
                where = [x.sharding.device_set for x in jax.tree.leaves(state.reference)]
                assert where == [set(components.policy.reference_layout.mesh.devices.flat)] * len(where)
                state, metrics, record = take_step(components, state)
                out.append((metrics, record, host(state.policy.params) + host(state.reward.params)))
        return out

    one = step("one", 1)
    apart = step("apart", 4, **{"mesh.reward": "1x2x1", "mesh.reference": "1x1x1"})
    for (metrics, record, params), (other_metrics, other_record, other_params) in zip(
        one, apart, strict=True
    ):
        assert [c.text for c in record.completions] == [c.text for c in other_record.completions]
        np.testing.assert_allclose(record.rewards, other_record.rewards, atol=1e-6)
        assert other_metrics == pytest.approx(metrics, abs=1e-5, nan_ok=True)
        for a, b in zip(params, other_params, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_the_policy_is_rewarded_with():
    """Each function of the table by hand, and those that the flags name, in their order."""
    verdicts = [Verdict.CORRECT, Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER, Verdict.UNRECOGNISED]
    texts = [Completion("", truncated=n == 1) for n in range(5)]
    scores = np.array([0.3, 0.6, 0.7, 0.9, 0.5], np.float32)

    def rewards(**flags):
        cfg = config().reward
        cfg.update(flags)
        found = compute_rewards(name_rewards(cfg), scores, verdicts, texts)
        assert found.dtype == np.float32
        return found.tolist()

    assert compute_rewards(["rule"], None, verdicts, texts).tolist() == [1, 1, 0, 0, 0]
    assert rewards(arm="rule") == [1, 1, 0, 0, 0]
    assert rewards() == rewards(arm="model") == scores.tolist()
    assert rewards(rule_or_model=True) == [1, 1, *scores[2:].tolist()]
    assert rewards(answer_required=True) == [scores[0].item(), 0, scores[2].item(), 0, scores[4].item()]
    assert rewards(rule_or_model=True, answer_required=True) == [1, 0, scores[2].item(), 0, scores[4].item()]
    # The rule where it decides, which includes responses without an answer; the model for the last one alone.
    assert rewards(rule_then_model=True) == [1, 1, 0, 0, 0.5]
    assert rewards(rule_then_model=True, answer_required=True) == [1, 0, 0, 0, 0.5]
    late = compute_rewards(["model", "rule_then_model"], scores[:1], [Verdict.TIMEOUT], texts[:1])
    assert late.tolist() == scores[:1].tolist()
    named = REWARDS["answer_required"](scores, verdicts, texts)
    assert named.tolist() == rewards(answer_required=True)


@pytest.mark.slow
def test_long_responses_are_penalised_and_left_out_of_the_loss(build):
    """The same rollouts with and without DAPO's two settings."""
    found = []
    for flags in ({}, {"reward.overlong_tokens": 4, "policy.mask_truncated": True}):
        with build(**{"reward.arm": "rule", "policy.std": "none"} | flags) as (components, state):
            limit = components.settings.rollout.max_new_tokens
            state = state.replace(reference=state.policy.params)
            _, metrics, record = take_step(components, state)
            found.append((metrics, record))
    (plain, before), (metrics, after) = found
    assert after.completions == before.completions and any(c.truncated for c in after.completions)
    penalty = np.array([-min(max(c.tokens - (limit - 4), 0) / 4, 1) for c in after.completions])
    np.testing.assert_allclose(after.rewards, before.rewards + penalty, atol=1e-6)
    assert metrics["reward/overlong"] == pytest.approx(penalty.mean()) and penalty.min() == -1
    assert "reward/overlong" not in plain
    kept = [not c.truncated for c in after.completions]
    tokens = sum(c.tokens for c, k in zip(after.completions, kept, strict=True) if k)
    expected = -sum(
        a * c.tokens for a, c, k in zip(after.advantages, after.completions, kept, strict=True) if k
    )
    assert metrics["policy/pg_loss"] == pytest.approx(expected / max(tokens, 1), abs=1e-6)


def test_a_step_rewards_with_the_reward_model_from_before_its_update(build, monkeypatch):
    """Logits of 0 to 5 before the update and negative ones after: each row learns from its own of the former."""
    record_requests(monkeypatch)
    noted, updated = [], []
    with build(**{"policy.std": "none"}) as (components, state):
        components = without_models(components, noted)
        reward = components.reward

        def score(params, batch):
            return reward.compute_logits(params, batch) * (-1 if updated else 1)

        def update(*arguments):
            updated.append(arguments)
            return reward.update(*arguments)

        components = dataclasses.replace(
            components, reward=dataclasses.replace(reward, compute_logits=score, update=update)
        )
        state = state.replace(reference=state.policy.params)
        _, metrics, record = take_step(components, state)
    rewards = 1 / (1 + np.exp(-np.arange(6.0)))
    np.testing.assert_allclose(record.rewards, rewards, atol=1e-6)
    assert len(updated) == 1 and metrics["rm/mean"] == pytest.approx(rewards.mean(), abs=1e-6)

    # Two responses to a prompt: the second has the higher reward, by twice its advantage.
    halves = (rewards[1::2] - rewards[::2]) / 2
    advantages = np.stack([-halves, halves], axis=1).ravel()
    np.testing.assert_allclose(record.advantages, advantages, atol=1e-6)
    np.testing.assert_allclose(noted, [advantages], atol=1e-6)


def test_samples_name_the_pairs_of_their_own_prompt(build):
    with build(**{"pairs.per_prompt": 2, "log.samples": 2}) as (components, _):
        problems = list(components.train[:B])
        pairs = [Pair(problems[i // 2], f"right {i}", f"wrong {i}", i) for i in range(2 * B)]
        pairs[0] = pairs[1] = pairs[2] = None  # the first prompt has none: the others come first
        rows = np.arange(B * G, dtype=np.float32)
        texts = [Completion(str(i)) for i in range(B * G)]
        verdicts = [Verdict.CORRECT] * (B * G)
        record = StepRecord(problems, texts, verdicts, rows, -rows, pairs, Counter())
        record = dataclasses.replace(
            record, scores=rows / 10, prompt_tokens=[[i] for i in range(len(problems))]
        )

        def is_correct(problem, text):
            return int(text) % G == 0

        first, second = select_samples(record, components.settings.log.samples, is_correct, str)
    assert (first["id"], second["question"]) == (problems[1].id, problems[2].question)
    reference = first["reference"]
    assert first["pairs"] == [
        {
            "positive": "right 3",
            "positive_reference": reference,
            "negative": "wrong 3",
            "negative_reference": reference,
        }
    ]
    assert [p["positive"] for p in second["pairs"]] == ["right 4", "right 5"]
    assert [r["text"] for r in first["responses"]] == ["2", "3"]
    assert [r["advantage"] for r in second["responses"]] == [-4.0, -5.0]
    assert (first["prompt"], second["prompt"]) == ("[1]", "[2]")
    assert [r["score"] for r in second["responses"]] == pytest.approx([0.4, 0.5])
    assert [r["truth"] for r in first["responses"]] == [True, False]


@pytest.mark.slow
def test_samples_leave_out_what_is_not_known(build):
    """A run without a reward model has no scores, one without exact truth no truth."""
    with build() as (components, _):
        problems, verdicts = list(components.train[:1]), [Verdict.CORRECT]
    one = np.ones(1, np.float32)
    record = StepRecord(problems, [Completion("1")], verdicts, one, one, [], Counter())
    (sample,) = select_samples(record, 2)
    assert sample.keys() == {"id", "question", "reference", "responses", "pairs"}
    assert sample["responses"][0].keys() == {"text", "truncated", "verdict", "reward", "advantage"}


@pytest.mark.slow
def test_the_oracle_trains_nothing(build, tmp_path):
    """Nonsense in its place moves its own metric and not a bit of any parameter."""

    def nonsense(components):
        return dataclasses.replace(components, oracle=lambda problem, text: zlib.crc32(text.encode()) % 3 > 0)

    whole, metrics, replay, _ = steps(build, tmp_path / "whole", 2)
    other, others, same, _ = steps(build, tmp_path / "other", 2, change=nonsense)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(whole, other, strict=True)) and same == replay
    assert [m["oracle/accuracy"] for m in metrics] != [m["oracle/accuracy"] for m in others]
    for a, b in zip(metrics, others, strict=True):
        names = [n for n in a if not n.startswith("oracle/")]
        np.testing.assert_equal([a[n] for n in names], [b[n] for n in names])
