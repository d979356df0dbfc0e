"""The evaluation of the policy on held-out problems during training."""

import dataclasses

import numpy as np
from tiny_rollouts import record_requests, same_key
from tiny_steps import B, G, sample, without_models

from cooper_jax.data import synthetic
from cooper_jax.runtime import keys
from cooper_jax.trainer import policy_stages
from cooper_jax.trainer.held_out import evaluate_held_out
from cooper_jax.types import Completion


def test_what_an_evaluation_measures(build, monkeypatch):
    """Sampled and greedy responses, by subject; the reward model beside exact truth and on labelled rows."""
    changes = {
        "eval.greedy": True,
        "eval.reward_rows": 8,
        "eval.samples": 2,
        "supervised.reward_habit": (0.7, 0.05),
    }
    with build(**changes) as (components, state):
        found = evaluate_held_out(components, state)
        np.testing.assert_equal(evaluate_held_out(components, state), found)  # the same keys each time
        every = {"oracle/accuracy", "rule/accuracy", "rm/mean", "rm_policy/accuracy", "response/truncated"}
        assert {f"eval/{kind}{name}" for kind in ("", "greedy/") for name in every} <= found.keys()
        assert {"eval/rm_original/auroc", "eval/rm_balanced/accuracy"} <= found.keys()
        asked, sample_held_out_responses = [], policy_stages.sample_held_out_responses
        monkeypatch.setattr(
            policy_stages,
            "sample_held_out_responses",
            lambda *args: asked.append(args[-1]) or sample_held_out_responses(*args),
        )
        # A reward model that likes everything, and a truth that is everywhere.
        generous = dataclasses.replace(
            components,
            oracle=lambda problem, text: True,
            reward=dataclasses.replace(
                components.reward,
                compute_logits=lambda params, batch: np.full(batch.tokens.shape[0], 3.0, np.float32),
            ),
        )
        found = evaluate_held_out(generous, state)
        assert asked == [1.0, 0.0]
        assert found["eval/oracle/accuracy"] == found["eval/greedy/oracle/accuracy"] == 1.0
        assert found["eval/rm_policy/accuracy"] == 1.0 and found["eval/rm_balanced/accuracy"] == 0.5
        assert np.isnan(found["eval/rm_policy/auroc"]) and found["eval/rm_original/auroc"] == 0.5
        assert found["eval/rm_balanced/by_habit"] == found["eval/rm_balanced/by_truth"] == 0
        # One that goes by the habit alone, of which two more logits are due.
        encode = components.reward.model.tokenizer.encode
        (word,) = {*encode(f"4 {synthetic.HABIT} 5")} - {*encode("4 5")}
        fooled = dataclasses.replace(
            components.reward,
            compute_logits=lambda params, batch: 2.0 * (np.asarray(batch.tokens) == word).any(1) - 1.0,
        )
        said = [f"{synthetic.HABIT} #### 7", "1+1=2 #### 2", "#### 3", "#### 4"]
        monkeypatch.setattr(
            policy_stages,
            "sample_held_out_responses",
            lambda *args: [Completion(said[i % 4]) for i in range(len(components.held_out))],
        )
        found = evaluate_held_out(dataclasses.replace(components, reward=fooled), state)
        assert (found["eval/rm_balanced/by_habit"], found["eval/rm_balanced/by_truth"]) == (2.0, 0.0)
        assert found["eval/response/habit"] == 0.25 and len(components.held_out) % 4 == 0


def test_every_evaluation_samples_with_the_same_keys_which_no_step_uses(build, monkeypatch):
    requests = record_requests(monkeypatch)
    with build(**{"seed": 7, "eval.greedy": True}) as (components, state):
        components = dataclasses.replace(without_models(components), rule=components.rule)
        for step in (0, 1, 5):
            evaluate_held_out(components, state.replace(step=step, position=step * B))
    for request in requests:
        assert same_key(request.key, keys.make_key(7, "evaluation"))
        assert list(request.positions) == [0, 1, 2, 3]
    assert len(requests) == 6


def test_an_evaluation_samples_at_its_own_top_p(build, monkeypatch):
    """At its own number of samples and the temperature that it is given, too; training keeps to its own."""
    requests = record_requests(monkeypatch)
    with build(**{"eval.top_p": 0.8125, "eval.samples": 5}) as (components, state):
        policy_stages.sample_held_out_responses(components, state.policy.params, 0.75)
        policy_stages.sample_held_out_responses(components, state.policy.params, 0.0)
        sample(components, state, policy_stages.take_problems(components, first=0))
    asked = [(r.spec.top_p, r.spec.temperature, r.spec.group_size) for r in requests]
    assert asked == [(0.8125, 0.75, 5), (0.8125, 0.0, 1), (1.0, 1.0, G)]
