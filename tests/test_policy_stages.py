"""The policy's stages of a step: sampling, log-probabilities and updates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_rollouts import record_requests
from tiny_steps import B, G, a_pair, host, sample, score, steps, take_step, unchanged, without_models

from cooper_jax.data import problems as problem_sets
from cooper_jax.model import transformer
from cooper_jax.runtime import keys
from cooper_jax.trainer import policy_stages, reward_stages
from cooper_jax.types import Completion, Triple


@pytest.mark.slow
def test_rows_that_do_not_divide_the_mesh(build):
    """Six rows on one device, and padded to eight on a mesh of 2 x 2 x 2: one rollout, the same numbers."""

    def run(devices, **mesh):
        with build(devices, **mesh) as (components, state):
            state = state.replace(reference=state.policy.params)
            problems = policy_stages.take_problems(components, first=0)
            rollout = sample(components, state, problems)
            texts = [Completion(f"{i} apples") for i in range(B * G)]
            logits = score(components, state.reward, problems.row_problems, texts)
            batch = policy_stages.compute_logprobs(components, state, problems.prompt_tokens, rollout)
            advantages = np.linspace(-1, 1, B * G).astype(np.float32)
            pairs = [a_pair(p) for p in components.train[:B]]
            reward, reward_metrics = reward_stages.update_reward_model(components, state.reward, pairs)
            rows = [np.asarray(x)[: B * G] for x in (rollout.tokens, batch.ref_logprobs)]
            policy, policy_metrics = policy_stages.update_policy(
                components, state.policy, batch, advantages, 1
            )
            metrics = policy_metrics | reward_metrics
            return [*rows, logits], metrics, host(policy.params) + host(reward.params)

    one = run(1)
    eight = run(8, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    assert eight[0][0].shape == (B * G, 6) and eight[0][2].shape == (B * G,)
    np.testing.assert_array_equal(one[0][0], eight[0][0])
    for a, b in zip(one[0][1:], eight[0][1:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert one[1].keys() == eight[1].keys() and one[1]["rm/valid"] == B
    for name, value in one[1].items():
        assert eight[1][name] == pytest.approx(value, abs=1e-5), name
    # The rates are 3e-5 and 5e-4: a row too many or too few would move parameters by as much.
    for a, b in zip(one[2], eight[2], strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


ADAPTERS = {
    f"{model}.lora.{field}": value
    for model in ("policy", "reward")
    for field, value in (("rank", 2), ("base_dtype", "bfloat16"))
}


@pytest.mark.parametrize(
    "devices, updates",
    [
        pytest.param(4, {}, marks=pytest.mark.slow),
        pytest.param(1, {"policy.epochs": 2, "policy.minibatches": 2}, marks=pytest.mark.slow),
        pytest.param(2, ADAPTERS, marks=pytest.mark.slow),
    ],
)
def test_packed_rows_make_the_updates_of_unpacked_ones(build, devices, updates):
    found = {}
    for packing in ("off", "on"):
        changes = {"policy.packing": packing, "reward.packing": packing, "log.pair_motion": True}
        changes |= {f"{model}.optimiser.eps": 1e-3 for model in ("policy", "reward")} | updates
        changes |= {"reward.rollout_bce": 1.0}
        with build(devices, **changes) as (components, state):
            state = state.replace(reference=state.policy.params)
            problems = policy_stages.take_problems(components, first=0)
            rollout = sample(components, state, problems)
            batch = policy_stages.compute_logprobs(components, state, problems.prompt_tokens, rollout)
            masked = np.arange(B * G) == 1
            batch = policy_stages.mask_rows(components, batch, masked)
            advantages = np.linspace(-1, 1, B * G).astype(np.float32)
            policy, metrics = policy_stages.update_policy(components, state.policy, batch, advantages, 1)

            texts = [Completion(f"{i} apples") for i in range(B * G)]
            logits = score(components, state.reward, problems.row_problems, texts)
            pairs = [a_pair(components.train[0]), None, a_pair(components.train[1])]
            row = components.train[2]
            labelled = [Triple(row.question, row.reference, "3 pears", label) for label in (0.0, 1.0)]
            reward, reward_metrics = reward_stages.update_reward_model(
                components, state.reward, pairs, labelled
            )
            metrics |= reward_metrics

            width = rollout.tokens.shape[1]  # without packing the columns end with the longest response
            ref = np.zeros((B * G, width), np.float32)
            ref[:, : batch.ref_logprobs.shape[1]] = np.asarray(batch.ref_logprobs)[: B * G]
            found[packing] = (ref, logits), metrics, host(policy.params) + host(reward.params)
    for x, y in zip(found["on"][0], found["off"][0], strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    assert found["off"][1]["rm/valid"] == 2 and found["off"][1]["rm/rollout_rows"] == 2
    assert found["on"][1].keys() == found["off"][1].keys() | {"policy/padding"}
    for name, value in found["off"][1].items():
        assert found["on"][1][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for a, b in zip(found["on"][2], found["off"][2], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_steps_on_packed_rows_after_supervised_phases(build, tmp_path):
    """The phases before step 1 do not pack; a reward model and a reference of their own pack for their meshes."""
    changes = {"supervised.policy_steps": 1, "supervised.reward_steps": 1, "supervised.reward_batch": 8}
    changes |= {"devices": 3, "mesh.reward": "1x1x1", "mesh.reference": "1x1x1"}
    rows = {}
    for packing in ("off", "on"):
        flags = {"policy.packing": packing, "reward.packing": packing}
        rows[packing] = steps(build, tmp_path / packing, 1, **changes | flags)[1][0]
    assert 0 < rows["on"]["policy/padding"] < 0.9 and rows["on"]["rm/valid"] > 0
    for name, value in rows["off"].items():
        if name.startswith(("policy/", "rm/", "reward/")):
            assert rows["on"][name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), name


@pytest.mark.slow
def test_several_updates_a_step(build):
    """Two epochs of two minibatches: four updates, old log-probabilities from before the first."""
    with build(**{"policy.epochs": 2, "policy.minibatches": 2, "policy.optimiser.lr": 1e-2}) as (
        components,
        state,
    ):
        state = state.replace(reference=state.policy.params)
        before = host(state.policy.params)
        problems = policy_stages.take_problems(components, first=0)
        rollout = sample(components, state, problems)
        batch = policy_stages.compute_logprobs(components, state, problems.prompt_tokens, rollout)
        mask = np.asarray(batch.response_mask)
        np.testing.assert_allclose(
            np.asarray(batch.old_logprobs)[mask], np.asarray(batch.rollout_logprobs)[mask], atol=1e-5
        )
        advantages = np.array([1, -1] * B, np.float32)
        policy, metrics = policy_stages.update_policy(components, state.policy, batch, advantages, 1)
        assert int(policy.updates) == 4 and int(policy.skipped) == 0
        assert not any(unchanged(before, policy.params))
        # From the second update on the policy is no longer the one that sampled.
        assert metrics["policy/ratio_min"] < 1.0 < metrics["policy/ratio_max"]


@pytest.mark.slow
def test_a_step_at_another_temperature_uses_it_in_sampling_scoring_and_updating(build, monkeypatch):
    """All see softmax(logits / 0.5): computed here from the whole logits of made-up responses."""
    temperature, requests = 0.5, record_requests(monkeypatch)
    with build(**{"rollout.temperature": temperature}) as (components, state):
        state = state.replace(reference=state.policy.params)
        problems = policy_stages.take_problems(components, first=0)
        rollout = sample(components, state, problems)
        assert requests[0].spec.temperature == temperature
        batch = policy_stages.compute_logprobs(components, state, problems.prompt_tokens, rollout)

        # The distribution over the next token at every column but the last.
        params, model = state.policy.params, components.policy.model.config
        hidden = transformer.hidden_states(
            params, model, batch.tokens, batch.valid, dtype=jnp.float32, layout=components.layout
        )
        logits = transformer.compute_logits(params, model, hidden)[:, :-1, : model.vocab_size]
        tokens, width = np.asarray(batch.tokens)[:, 1:, None], batch.response_mask.shape[1]

        def expected(temperature):
            found = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits / temperature)), tokens, -1)
            return found[:, -width:, 0]

        # At temperature 1 they would be others.
        assert np.abs(expected(temperature) - expected(1.0)).mean() > 0.1
        np.testing.assert_allclose(batch.ref_logprobs, expected(temperature), atol=1e-5)

        # The update's own log-probabilities, too, are those of a sampler and of a reference at 0.5.
        batch = batch.replace(rollout_logprobs=jnp.asarray(expected(temperature)))
        advantages = np.array([1, -1] * B, np.float32)
        _, metrics = policy_stages.update_policy(components, state.policy, batch, advantages, 1)
        assert metrics["policy/rollout_mismatch"] < 1e-5 and abs(metrics["policy/kl"]) < 1e-5


def test_the_data_order_follows_from_the_seed(build, monkeypatch):
    """Three steps of three problems of eight: the first epoch in the order of seed 7, and into the second."""
    requests = record_requests(monkeypatch)
    with build(**{"seed": 7, "reward.arm": "model"}) as (components, state):
        state, visited = state.replace(reference=state.policy.params), []
        for _ in range(3):
            state, _, seen = take_step(without_models(components), state)
            visited += seen.problems

    def order(seed):
        return [problem_sets.problem_at(place, 8, seed) for place in range(9)]

    assert visited == [components.train[i] for i in order(7)] and order(7) != order(0)
    assert [list(request.positions) for request in requests] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.slow
def test_every_step_cuts_its_minibatches_by_a_permutation_of_its_own(build, monkeypatch):
    """Six responses to one prompt, known by their advantages, in three minibatches of two."""
    record_requests(monkeypatch)
    shape = {"data.prompts_per_step": 1, "rollout.group_size": 6, "policy.minibatches": 3}
    with build(**{"seed": 7, "reward.arm": "model"} | shape) as (components, state):
        noted: list[list[float]] = []
        state, orders = state.replace(reference=state.policy.params), []
        for _ in range(3):
            noted.clear()
            state, _, seen = take_step(without_models(components, noted), state)
            rows = {float(advantage): row for row, advantage in enumerate(seen.advantages)}
            assert [len(part) for part in noted] == [2, 2, 2] and len(rows) == 6
            orders.append([rows[advantage] for part in noted for advantage in part])

    def permutation(step):  # of the step's first and only epoch
        key = jax.random.fold_in(keys.make_key(7, "minibatch", step), 0)
        return jax.random.permutation(key, 6).tolist()

    assert orders == [permutation(step) for step in (1, 2, 3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
