"""Exact sampling: whatever the rollout's types and slots, a step trains on what its learner samples."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_models
from tiny_models import one_device, random_params
from tiny_steps import host, take_step

from cooper_jax.rollout import engine, sampling_spec
from cooper_jax.trainer import policy_stages

NEW_TOKENS = 20
COARSE = {"rollout.dtype": "bfloat16", "rollout.kv_dtype": "int8"}


def exact_run(build, devices=1, **changes):
    return build(
        devices,
        **{
            "exact": True,
            "reward.arm": "rule",
            "rollout.max_new_tokens": NEW_TOKENS,
            "rollout.segment": 4,
            "rollout.group_size": 4,
            "policy.optimiser.lr": 1e-2,
        }
        | changes,
    )


def varied(components):
    """Rewards that differ within a group, whatever the policy writes, so that it moves."""

    class ByLength:
        def submit(self, items):
            from cooper_jax.types import Verdict

            return [Verdict.CORRECT if len(item[1]) % 2 else Verdict.WRONG for item in items]

        def collect(self, pending):
            return [verdict for verdicts in pending for verdict in verdicts]

    return dataclasses.replace(components, rule=ByLength())


def run_steps(build, count=2, **changes):
    """Steps of an exact run: metrics, texts and the policy's parameters at the end."""
    with exact_run(build, **changes) as (components, state):
        components, found = varied(components), []
        state = dataclasses.replace(state, reference=jax.tree.map(lambda x: x.copy(), state.policy.params))
        for _ in range(count):
            state, metrics, record = take_step(components, state)
            found.append((metrics, [c.text for c in record.completions]))
        return found, host(state.policy.params)


CASES = {
    "float32": {},
    "bfloat16, int8 cache": COARSE,
    "refills and compaction": COARSE | {"rollout.max_rows": 3},
    "several updates": COARSE | {"policy.minibatches": 2},
}


@pytest.fixture(scope="module")
def found():
    """Results of the cases that have been run."""
    return {}


def run_case(name, build, found):
    """The result of `run_steps` for one of CASES, which several tests read."""
    if name not in found:
        found[name] = run_steps(build, **CASES[name])
    return found[name]


INT8 = pytest.param("bfloat16, int8 cache", marks=pytest.mark.slow)
SLOTS = pytest.param("refills and compaction", marks=pytest.mark.slow)
UPDATES = pytest.param("several updates", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["float32", INT8, SLOTS, UPDATES])
def test_the_learner_finds_the_log_probabilities_of_the_rollout(name, build, found):
    steps, _ = run_case(name, build, found)
    for metrics, _ in steps:
        for quantity in ("rollout_mismatch", "rollout_mismatch_max", "rollout_mismatch_p99"):
            assert metrics[f"policy/{quantity}"] == 0.0, quantity
        assert metrics["policy/rollout_ratio_min"] == metrics["policy/rollout_ratio_max"] == 1.0
        # Tokens were sampled from the distribution of these log-probabilities: found by two programs.
        assert metrics["exact/logprob_difference"] < 1e-5
    if "bfloat16" in name:
        assert sum(metrics["exact/corrected_tokens"] for metrics, _ in steps) > 0, "nothing was corrected"
        assert max(metrics["exact/rounds"] for metrics, _ in steps) > 1


@pytest.mark.parametrize("name", [INT8, SLOTS])
def test_the_rollouts_types_and_slots_change_nothing(name, build, found):
    """The responses are the learner's, so a rough draft ends as the same text as a precise one."""
    (precise, params), (rough, other) = (run_case(case, build, found) for case in ("float32", name))
    assert [texts for _, texts in precise] == [texts for _, texts in rough]
    assert [x.tobytes() for x in params] == [x.tobytes() for x in other]


@pytest.mark.slow
def test_on_a_mesh_of_2x1x1(build):
    found, _ = run_steps(build, count=2, devices=2, **COARSE)
    assert all(metrics["policy/rollout_mismatch_max"] == 0.0 for metrics, _ in found)
    assert all(metrics["exact/logprob_difference"] < 1e-5 for metrics, _ in found)
    assert sum(metrics["exact/corrected_tokens"] for metrics, _ in found) > 0


@pytest.mark.slow
def test_groups_that_replace_flat_ones(build):
    """They are corrected in batches of their own; the update's batch has other rows."""
    changes = COARSE | {"data.refill_prompts": 6, "data.synthetic_size": 40, "rollout.group_size": 2}
    found, _ = run_steps(build, count=2, **changes)
    assert sum(metrics["data/replaced_groups"] for metrics, _ in found) > 0
    for metrics, _ in found:
        assert metrics["policy/rollout_mismatch_max"] == 0.0
        assert metrics["policy/rollout_ratio_min"] == metrics["policy/rollout_ratio_max"] == 1.0
        assert metrics["exact/logprob_difference"] < 1e-5


@pytest.mark.slow
def test_without_it_the_same_run_disagrees(build):
    found, _ = run_steps(build, count=1, exact=False, **COARSE)
    assert found[0][0]["policy/rollout_mismatch"] > 1e-4


@pytest.mark.slow
def test_groups_are_graded_once_when_they_are_corrected(build):
    with exact_run(build, **COARSE) as (components, state):
        problems = policy_stages.take_problems(components, first=0)
        seen = {}
        rollout, completions, _ = policy_stages.sample_responses(
            components,
            state.policy.params,
            problems,
            jax.random.key(1, impl="threefry2x32"),
            on_group=lambda index, responses, tokens: seen.setdefault(index, []).append((responses, tokens)),
        )
    group = components.settings.rollout.group_size
    assert sorted(seen) == list(range(len(problems.problems)))
    for index, calls in seen.items():
        (responses, tokens), rows = calls[0], slice(index * group, (index + 1) * group)
        assert len(calls) == 1 and list(responses) == completions[rows]
        assert tokens == engine.list_tokens(rollout)[rows]


def test_a_response_is_continued_with_its_own_random_bits():
    model = tiny_models.CASES["qwen2_tied"]
    params, key = random_params(model), jax.random.key(3, impl="threefry2x32")
    spec = sampling_spec.SamplingSpec(
        temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=9, group_size=3, eos_ids=(3,), segment=4,
        dtype="float32",
    )  # fmt: skip
    prompts, positions = [[5, 6, 7], [9]], [11, 4]
    whole = engine.generate(params, model, one_device(), prompts, positions, key, spec)
    lengths = whole.mask.sum(axis=1)
    rows = [n for n in range(6) if lengths[n] > 4]
    assert len(rows) >= 3
    starts = [1 + n % 3 for n in rows]
    rest = engine.generate(
        params,
        model,
        one_device(),
        [
            [*prompts[n // 3], *whole.tokens[n, :start].tolist()]
            for n, start in zip(rows, starts, strict=True)
        ],
        [positions[n // 3] for n in rows],
        key,
        dataclasses.replace(spec, group_size=1),
        limits=[9 - start for start in starts],
        continued=engine.Continuation([n % 3 for n in rows], starts),
    )
    for i, (n, start) in enumerate(zip(rows, starts, strict=True)):
        expected = whole.tokens[n, start : lengths[n]]
        np.testing.assert_array_equal(rest.tokens[i, : lengths[n] - start], expected)
        assert rest.mask[i].sum() == lengths[n] - start and rest.finished[i] == whole.finished[n]
