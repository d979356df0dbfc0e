"""The reward model's stages of a step: pairs, labelled rows, updates and the warm-up on rollouts."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_models
import tiny_tokenizers
from tiny_rollouts import record_requests, same_key
from tiny_steps import (
    ALL_TERMS,
    AlwaysRight,
    B,
    G,
    a_pair,
    begun,
    host,
    score,
    steps,
    unchanged,
    without_models,
)

from cooper_jax.data import problems as problem_sets
from cooper_jax.model import weight_export
from cooper_jax.runtime import keys
from cooper_jax.trainer import policy_stages, reward_stages
from cooper_jax.types import Completion, Triple, Verdict


def test_an_answer_of_hundreds_of_digits_costs_its_own_pair_alone(build):
    """What the policy writes never ends a step: its state is given away when the pairs are rendered."""

    class BesideItself(AlwaysRight):
        def check(self, items):
            return [Verdict.CORRECT for _ in items]

    changes = {"pairs.negatives": ("own_answer",), "pairs.per_prompt": 1, "reward.recipe": ""}
    with build(**changes) as (components, state):
        components = dataclasses.replace(components, rule=BesideItself(), assistant=None)
        batch, long = policy_stages.take_problems(components, first=0), "9" * 400
        texts = [Completion(f"it is {t} #### {t}") for t in (long, "8", "7", "6", long, long)]
        assert np.isfinite(score(components, state.reward, batch.row_problems, texts)).all()
        wrong = [Verdict.WRONG] * (B * G)
        ranked = np.array([0.9, 0.1, 0.2, 0.1, 0.9, 0.8], np.float32)
        made = reward_stages.make_pairs(components, batch, texts, wrong, ranked, 1)
        assert made.refused == {"too_long": 2}
        assert [p and p.positive_reference for p in made.pairs] == [None, "7", None]
        _, metrics = reward_stages.update_reward_model(components, state.reward, made.pairs)
        assert metrics["rm/valid"] == 1


def test_rewrites_may_have_no_control_token_of_any_tokenizer_in_use(build, tmp_path):
    """Those of a local assistant of another family too."""
    folder = tiny_tokenizers.write(tmp_path / "llama", "llama3")
    model = tiny_models.config(vocab_size=512, width=16, layers=1, head_dim=8)
    params = tiny_models.random_params(model)
    weight_export.save_pretrained(folder.with_name("hf"), model, params, "logits", tokenizer_dir=folder)
    weights = {"assistant.weights": str(tmp_path / "hf"), "assistant.max_new_tokens": 6}
    asked = []

    for kind in ("corrupt", "local"):
        with build(**{"assistant.kind": kind} | weights) as (components, _):
            batch = policy_stages.take_problems(components, first=0)
            asked.append(reward_stages.make_pair_task(components, batch, 1))
            for bundle in (components.policy, components.reward_bundle):
                own = bundle.model.tokenizer.control_texts
                assert own and own <= asked[-1].special_tokens
    assert "<|eot_id|>" not in asked[0].special_tokens and "<|eot_id|>" in asked[1].special_tokens


def test_no_valid_pair_moves_no_reward_model(build):
    with build() as (components, state):
        reward = host(state.reward)
        moved, metrics = reward_stages.update_reward_model(components, state.reward, [None] * B)
        assert all(unchanged(reward, moved)) and metrics["rm/valid"] == 0
        assert np.isnan(metrics["rm/pair_loss"])


@pytest.mark.slow
def test_several_reward_updates_are_that_many_steps(build):
    """On the same pairs and rows; and the motion is how far they moved the pairs' logits."""
    with build(**{"log.pair_motion": True, "reward.rollout_bce": 1.0, "reward.rollout_rows": 4}) as (
        components,
        state,
    ):
        pairs = [a_pair(components.train[0]), None, a_pair(components.train[1])]
        rows = [
            Triple(p.question, p.reference, "so #### 2", i % 2) for i, p in enumerate(components.train[:3])
        ]
        start = [x.copy() for x in host(state.reward)]
        update = reward_stages.update_reward_model

        def again():
            leaves = [
                jax.device_put(x, old.sharding)
                for x, old in zip(start, jax.tree.leaves(state.reward), strict=True)
            ]
            return jax.tree.unflatten(jax.tree.structure(state.reward), leaves)

        def logits(reward):
            valid = [p for p in pairs if p]
            problems = [p.problem for p in valid]
            sides = ([p.positive for p in valid], [p.negative for p in valid])
            return np.stack(
                [score(components, reward, problems, [Completion(t) for t in side]) for side in sides]
            )

        before = logits(state.reward)
        together, metrics = update(components, again(), pairs, rows, updates=3)
        one = again()
        for i in range(3):
            one, of_one = update(components, one, pairs, rows)
            assert of_one["rm/updates"] == 1 and (i or of_one["rm/loss"] == metrics["rm/loss"])
        assert all(unchanged(host(together), one)) and metrics["rm/updates"] == 3
        moved = logits(together) - before
        assert abs(moved).min() > 0
        assert metrics["rm/common_motion"] == pytest.approx(moved.mean(), abs=1e-5)
        assert metrics["rm/difference_motion"] == pytest.approx((moved[0] - moved[1]).mean(), abs=1e-5)
        assert metrics["rm/rollout_rows"] == 3 and metrics["rm/valid"] == 2

        # Neither pairs nor rows: nothing moves, and no mean is a number.
        kept, none = update(components, again(), [None] * 3, [], updates=2)
        assert all(unchanged(start, kept)) and none["rm/updates"] == 0 == none["rm/valid"]
        for name in ("pair_loss", "common_push", "common_motion", "rollout_bce", "rollout_accuracy"):
            assert np.isnan(none[f"rm/{name}"]), name

        # What is exchanged is read the other way round.
        exchanged = [p and dataclasses.replace(p, exchanged=True) for p in pairs]
        _, other = update(components, again(), exchanged, rows)
        for mine, theirs in (("positive", "negative"), ("negative", "positive")):
            assert other[f"rm/{mine}_mean"] == pytest.approx(metrics[f"rm/{theirs}_mean"], abs=1e-6)

        # A swapped negative, and a positive beside its own answer, stand beside their own references.
        text, asked = pairs[0].positive, pairs[0].problem
        for mine, theirs in (("positive", "negative"), ("negative", "positive")):
            moved_to = dataclasses.replace(pairs[0], negative=text, **{f"{mine}_reference": "11"})
            _, found = update(components, again(), [moved_to, None, None], rows)
            problems = [dataclasses.replace(asked, reference="11"), asked]
            z = score(components, again(), problems, [Completion(text)] * 2)
            p = 1 / (1 + np.exp(-z))
            assert (found[f"rm/{mine}_mean"], found[f"rm/{theirs}_mean"]) == pytest.approx(tuple(p), abs=1e-5)
            assert p[0] != p[1]


def test_the_reward_warmup_samples_with_a_key_and_in_an_order_of_its_own(build, tmp_path, monkeypatch):
    """Two updates on three prompts each: which they are, their places in that order, and the key."""
    requests = record_requests(monkeypatch)
    with build(**{"seed": 7, "reward.warmup_updates": 2}) as (components, state):
        with begun(without_models(components), state, tmp_path):
            pass
    assert [list(request.positions) for request in requests] == [[0, 1, 2], [3, 4, 5]]
    for request in requests:
        chosen = [problem_sets.problem_at(place, 8, 7, "reward_warmup") for place in request.positions]
        assert request.prompts == [components.train_prompts[i] for i in chosen]
        assert same_key(request.key, keys.make_key(7, "reward_warmup"))


@pytest.mark.slow
def test_rows_without_pairs_need_no_assistant(build, tmp_path):
    def alone(components):
        return dataclasses.replace(components, assistant=None)

    changes = {"reward.pair_weight": 0.0, "reward.pair_bce": 0.0, "reward.warmup_updates": 0}
    with build(**ALL_TERMS | changes) as (components, _):
        assert components.assistant is None
    _, (metrics,), _, _ = steps(build, tmp_path, 1, change=alone, **changes)
    assert metrics["rm/updates"] == 2 and metrics["pairs/valid"] == 0
    assert metrics["rm/rollout_bce"] > 0 and "rm/pair_loss" not in metrics
