"""Packed rows: the planner, and loss, gradients and log-probabilities equal to those of a row for each sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from test_grpo import CONFIG, TEMPERATURE, P, T, assert_trees_close, bits, model_params, policy_batch, section

from cooper_jax.configs import base
from cooper_jax.data import row_packing
from cooper_jax.model import transformer
from cooper_jax.policy import grpo
from cooper_jax.runtime import mesh
from cooper_jax.runtime.mesh import Layout

ROW_TOKENS = 17


# --- the planner -----------------------------------------------------------------------------------------


def test_each_sequence_has_one_place_and_rows_are_within_their_limits():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 60, 300).tolist()
    rows = row_packing.assign_rows(lengths, capacity=64, most=4)
    assert sorted(sum(rows, [])) == [i for i, n in enumerate(lengths) if n]
    assert all(sum(lengths[i] for i in row) <= 64 and len(row) <= 4 for row in rows)
    assert rows == row_packing.assign_rows(lengths, capacity=64, most=4)


def test_rows_of_real_lengths_are_nearly_full():
    # Lognormal, like the answers of an instruction-tuned model to GSM8K: a few are five times the median.
    rng = np.random.default_rng(1)
    lengths = np.minimum(rng.lognormal(5.3, 0.5, 2048).astype(int) + 120, 1024)
    rows = row_packing.assign_rows(lengths.tolist(), capacity=1024, most=32)
    assert lengths.sum() / (len(rows) * 1024) > 0.95


@pytest.mark.parametrize("shards", [1, 16])
def test_padding_of_the_papers_run(shards):
    """128 prompts with 16 responses, up to 512 + 512 tokens, in microbatches of 64; lengths like those of GSM8K."""
    rng = np.random.default_rng(2)
    prompts = np.minimum(rng.lognormal(4.7, 0.35, 128).astype(int), 512).repeat(16)
    lengths = prompts + np.minimum(rng.lognormal(5.2, 0.5, 2048).astype(int), 512)
    plan = row_packing.choose_packing(1024, 64, shards, width=1536, bucket=64)
    sequences = [[1] * n for n in lengths]
    packed = row_packing.pack_reward_rows(sequences, plan, shards)
    assert row_packing.measure_padding(packed) < 0.1
    assert int((np.asarray(packed.segments) > 0).sum()) == lengths.sum()


def test_a_sequence_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="sequence 1 has 65 tokens; a packed row has 64"):
        row_packing.assign_rows([3, 65], 64, 4)


@pytest.mark.parametrize(
    "longest, microbatch, shards, width, expected",
    [
        (64, 16, 1, 192, (192, 5)),  # the width
        (64, 16, 1, 600, (256, 4)),  # four sequences
        (700, 16, 1, 192, (704, 16)),  # the longest sequence
        (64, 16, 8, 600, (128, 8)),  # two sequences are a shard's part of a microbatch
        (64, 1, 8, 600, (64, 8)),
    ],
)
def test_the_sizes_of_rows(longest, microbatch, shards, width, expected):
    plan = row_packing.choose_packing(longest, microbatch, shards, width=width, bucket=32)
    assert (plan.row_tokens, plan.rows) == expected
    # No more tokens than the microbatch of unpacked rows.
    assert plan.row_tokens * plan.rows <= -(-microbatch // shards) * shards * -(-longest // 32) * 32


@pytest.mark.parametrize(
    "used, shards, expected",
    [
        (100, 1, (20, 20)),  # five full microbatches
        (41, 1, (29, 14)),  # three of 14: 42 rows
        (31, 1, (25, 16)),  # two of 16
        (19, 1, (20, 20)),  # in steps of two above 16
        (8, 1, (50, 8)),
        (0, 1, (400, 1)),
        (30, 8, (25, 16)),  # two rows of each shard, twice
        (17, 8, (17, 24)),
    ],
)
def test_microbatches_are_few_and_nearly_full(used, shards, expected):
    assert (
        row_packing.Packing(512, 24 if shards > 1 else 20).choose_microbatches(used, 400, shards) == expected
    )


def test_microbatches_have_few_sizes():
    plan, sizes = row_packing.Packing(512, 64), set()
    for used in range(1, 1000):
        _, rows = plan.choose_microbatches(used, 2048, 1)
        sizes.add(rows)
        passes = -(-used // rows)
        assert rows <= 64 and passes <= 2 * -(-used // 64) and passes * rows <= 1.125 * used + 1
    assert len(sizes) <= 32


# --- the model -------------------------------------------------------------------------------------------


def pack(batch, microbatch=2, rows_multiple=1):
    plan = row_packing.Packing(ROW_TOKENS, microbatch)
    tokens, valid = np.asarray(batch.tokens), np.asarray(batch.valid)
    return row_packing.pack_policy_rows(tokens, valid, T, plan, rows_multiple)


@functools.cache
def gradients_of(layout, **changes):
    cfg = section(**changes)
    return jax.jit(grpo.make_gradients(CONFIG, cfg, layout, temperature=TEMPERATURE, max_new_tokens=T))


@pytest.fixture(scope="module")
def params():
    return model_params()


def test_sequences_of_a_row_do_not_see_each_other(params):
    batch = policy_batch()
    packed = pack(batch)
    layout = tiny_models.one_device()
    rows = jax.tree.map(lambda x: jnp.asarray(x[0]), packed.replace(count=None))
    assert (rows.segments.max(axis=1) >= 2).all()
    hidden = transformer.packed_hidden_states(
        params, CONFIG, rows.tokens, rows.segments, rows.positions, dtype=jnp.float32, layout=layout
    )
    # Another first sequence leaves the second one's states as they are, bit for bit.
    first = rows.segments == 1
    other = transformer.packed_hidden_states(
        params,
        CONFIG,
        jnp.where(first, (rows.tokens + 1) % CONFIG.vocab_size, rows.tokens),
        rows.segments,
        rows.positions,
        dtype=jnp.float32,
        layout=layout,
    )
    second = np.asarray(rows.segments == 2)
    assert bits(hidden[second]) == bits(other[second])
    assert (hidden[np.asarray(first)] != other[np.asarray(first)]).any()


@pytest.mark.parametrize("loss", ["clip", "gspo", "cispo"])
@pytest.mark.parametrize("microbatch", [1, 2, 7])
def test_loss_gradient_and_metrics_equal_those_of_unpacked_rows(params, loss, microbatch):
    batch = policy_batch()
    packed = pack(batch, microbatch)
    assert int(packed.count) * packed.tokens.shape[1] < 6  # six sequences share rows
    changes = dict(loss=loss, epochs=2, entropy_coef=0.01, correction="sequence")
    if loss == "cispo":
        changes["dual_clip"] = 0.0
    gradients = gradients_of(tiny_models.one_device(), **changes)
    expected = gradients(params, batch)
    found = gradients(params, batch.without_tokens(), packed)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
    assert_trees_close(found[1], expected[1])
    for name in expected[2]:
        np.testing.assert_allclose(found[2][name], expected[2][name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_log_probabilities_equal_those_of_unpacked_rows(params):
    layout, batch = tiny_models.one_device(), policy_batch()
    options = dict(dtype="float32", temperature=TEMPERATURE)
    expected = grpo.make_logprobs(CONFIG, layout, microbatch=4, **options)(
        params, batch.tokens, batch.valid, T
    )
    found = grpo.make_packed_logprobs(CONFIG, layout, **options)(params, pack(batch), batch.response_mask)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not np.asarray(found)[~np.asarray(batch.response_mask)].any()


def test_packed_rows_on_a_mesh(params):
    layout = Layout(mesh.make_mesh(2, 2, 2), base.get_config().mesh.rules)
    batch = policy_batch()
    expected = gradients_of(tiny_models.one_device())(params, batch)
    placed = jax.device_put(
        params, mesh.make_shardings(layout, transformer.param_specs(CONFIG, head="logits"))
    )
    packed = layout.put(pack(batch, rows_multiple=layout.batch_shards), None, "batch")
    found = gradients_of(layout)(placed, batch.without_tokens(), packed)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
    assert_trees_close(found[1], expected[1])
    for name in expected[2]:
        np.testing.assert_allclose(found[2][name], expected[2][name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_batch_without_any_sequence_has_no_gradient(params):
    batch = policy_batch()
    nothing = jnp.zeros_like(batch.valid)
    empty = batch.replace(valid=nothing, response_mask=nothing[:, P:])
    packed = pack(empty)
    assert int(packed.count) == 0
    loss, grads, metrics = gradients_of(tiny_models.one_device())(params, empty.without_tokens(), packed)
    assert float(loss) == 0 and not any(np.asarray(x).any() for x in jax.tree.leaves(grads))
    assert all(np.isfinite(float(x)) for x in metrics.values())


def test_a_single_microbatch_that_is_empty_has_no_gradient(params):
    """It is computed, since there is no loop."""
    batch = policy_batch()
    batch = jax.tree.map(lambda x: x[:1], batch)  # a row without a token
    packed = pack(batch, 4)
    assert packed.tokens.shape[0] == 1 and int(packed.count) == 0
    loss, grads, metrics = gradients_of(tiny_models.one_device())(params, batch.without_tokens(), packed)
    assert float(loss) == 0 and not any(np.asarray(x).any() for x in jax.tree.leaves(grads))
    assert all(np.isfinite(float(x)) for x in metrics.values())


def test_thresholds_of_filtered_responses(params):
    rng = np.random.default_rng(3)
    batch = policy_batch()
    batch = batch.replace(thresholds=jnp.asarray(rng.normal(size=(len(batch.tokens), T)), jnp.float32))
    gradients = gradients_of(tiny_models.one_device(), entropy_coef=0.01)
    expected, found = gradients(params, batch), gradients(params, batch.without_tokens(), pack(batch))
    unfiltered = gradients(params, batch.replace(thresholds=None))
    assert abs(float(expected[0]) - float(unfiltered[0])) > 1e-3
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
    assert_trees_close(found[1], expected[1])


def test_a_response_without_a_prompt_is_refused():
    batch = policy_batch()
    valid = np.asarray(batch.valid).copy()
    valid[3, :P] = False
    with pytest.raises(ValueError, match="row 3 has a response and no prompt"):
        pack(batch.replace(valid=jnp.asarray(valid)))
