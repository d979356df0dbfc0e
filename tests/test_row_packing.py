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


@pytest.mark.parametrize("width", [576, 1536])
def test_padding_of_the_papers_run_with_shared_prompts(width):
    """A fifth fewer tokens are computed, at least, and few of them are padding."""
    rng = np.random.default_rng(2)
    prompts = np.minimum(rng.lognormal(4.7, 0.35, 128).astype(int), 512)
    responses = np.minimum(rng.lognormal(5.2, 0.5, 2048).astype(int), 512)
    tokens, valid = np.zeros((2048, 1024), np.int32), np.zeros((2048, 1024), bool)
    for n, length in enumerate(responses):
        prompt = prompts[n // 16]
        tokens[n, 512 - prompt : 512], tokens[n, 512 : 512 + length] = n // 16 + 1, 1000
        valid[n, 512 - prompt : 512 + length] = True
    computed = {}
    for shares in (False, True):
        plan = row_packing.choose_packing(
            prompts.max() + 512,
            64,
            1,
            width=width,
            bucket=64,
            new_tokens=512,
            shortest_prompt=int(prompts.min()),
            shares_prompts=shares,
        )
        packed = row_packing.pack_policy_rows(tokens, valid, 512, plan)
        rows = np.asarray(packed.rows)
        assert sorted(rows[rows >= 0]) == list(range(2048)), "each response has one place"
        assert row_packing.measure_padding(packed) < 0.1
        computed[shares] = int(packed.count) * packed.tokens.shape[1] * plan.row_tokens
    assert computed[True] < 0.81 * computed[False]


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
    "sequences, shards, longest_in_row, expected",
    [
        (2048, 1, 1, (103, 20)),  # as many rows as the memory has room for
        (400, 1, 1, (37, 11)),  # 400 / 3 rows are expected: twelve microbatches of 11
        (400, 1, 2, (80, 5)),
        (400, 8, 1, (50, 8)),  # a row of each shard
        (2048, 8, 1, (86, 24)),
        (3, 1, 1, (3, 1)),
        (3, 8, 1, (1, 8)),
    ],
)
def test_microbatches_depend_on_the_number_of_sequences_alone(sequences, shards, longest_in_row, expected):
    plan = row_packing.Packing(512, 24 if shards > 1 else 20, longest_in_row)
    assert plan.choose_microbatches(sequences, shards) == expected


@pytest.mark.parametrize("count, microbatch", [(64, 16), (256, 16), (2048, 64)])
def test_batches_of_all_lengths_have_one_shape_and_little_padding(count, microbatch):
    """Prompts of 60 to 250 tokens, and responses of 512 tokens that become shorter while the policy learns."""
    plan = row_packing.choose_packing(
        768, microbatch, 1, width=576, bucket=32, new_tokens=512, shortest_prompt=60
    )
    rng, shapes, paddings = np.random.default_rng(4), set(), []
    for median in (180, 220, 300):
        prompts = np.clip(rng.lognormal(4.7, 0.35, count).astype(int), 60, 250)
        responses = np.clip(rng.lognormal(np.log(median), 0.5, count).astype(int), 1, 512)
        columns = np.arange(250 + 512)
        valid = (columns >= 250 - prompts[:, None]) & (columns < 250 + responses[:, None])
        packed = row_packing.pack_policy_rows(np.ones(valid.shape, np.int32), valid, 512, plan)
        shapes.add(tuple(x.shape for x in jax.tree.leaves(packed)))
        paddings.append(row_packing.measure_padding(packed))
    assert len(shapes) == 1 and np.mean(paddings) < 0.1, (shapes, paddings)


@pytest.mark.parametrize(
    "new_tokens, shortest, expected",
    [
        (32, 20, 32),  # one response of 32, or two with 24 together
        (32, 1, 64),  # two of 31
        (1, 63, 16),  # in steps of 16
        (0, 1, 64),
    ],
)
def test_the_tokens_that_are_read(new_tokens, shortest, expected):
    plan = row_packing.choose_packing(
        64, 1, 1, width=64, bucket=32, new_tokens=new_tokens, shortest_prompt=shortest
    )
    assert plan.row_tokens == 64 and plan.read_tokens == expected


# --- the model -------------------------------------------------------------------------------------------


def pack(batch, microbatch=2, rows_multiple=1, shares_prompts=False, row_tokens=ROW_TOKENS):
    plan = row_packing.Packing(row_tokens, microbatch, shares_prompts=shares_prompts)
    tokens, valid = np.asarray(batch.tokens), np.asarray(batch.valid)
    return row_packing.pack_policy_rows(tokens, valid, T, plan, rows_multiple)


def grouped_batch():
    """`policy_batch` with the prompt of row 1 in rows 1, 3, 4 and 6 as well, not side by side."""
    batch = policy_batch()
    tokens, valid = np.array(batch.tokens), np.array(batch.valid)
    for row in (3, 4, 6):
        tokens[row, :P], valid[row, :P] = tokens[1, :P], valid[1, :P]
    return batch.replace(tokens=jnp.asarray(tokens), valid=jnp.asarray(valid))


# Rows of whole sequences, and rows in which responses share their prompts: all of a group, or as many as fit.
PACKINGS = {
    "whole": {},
    "shared": {"shares_prompts": True, "row_tokens": 40},
    "split": {"shares_prompts": True},
}


@pytest.fixture(params=PACKINGS)
def packing(request):
    return PACKINGS[request.param]


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


def test_a_shared_prompt_is_computed_once(params):
    batch = grouped_batch()
    lengths, prompt = np.asarray(batch.valid).sum(axis=1), int(np.asarray(batch.valid)[1, :P].sum())
    whole, shared, split = (pack(batch, **options) for options in PACKINGS.values())
    assert (np.asarray(whole.segments) > 0).sum() == lengths.sum() and whole.prefixes is None
    assert (np.asarray(shared.segments) > 0).sum() == lengths.sum() - 3 * prompt
    assert lengths.sum() - 3 * prompt < (np.asarray(split.segments) > 0).sum() < lengths.sum()

    # Each response follows its prompt's positions, and reads the prompt.
    sequences = [
        row[valid].tolist() for row, valid in zip(*map(np.asarray, (batch.tokens, batch.valid)), strict=True)
    ]
    for row in range(shared.segments.shape[1]):
        tokens, segments, prefixes, positions = (
            np.asarray(x[0, row]) for x in (shared.tokens, shared.segments, shared.prefixes, shared.positions)
        )
        for segment in range(1, segments.max() + 1):
            own = segments == segment
            read = own | (segments == prefixes[own][0])
            assert positions[read].tolist() == list(range(read.sum()))
            assert any(sequence[: read.sum()] == tokens[read].tolist() for sequence in sequences)


def test_responses_that_share_a_prompt_do_not_see_each_other(params):
    packed = pack(grouped_batch(), **PACKINGS["shared"])
    rows = jax.tree.map(lambda x: jnp.asarray(x[0]), packed.replace(count=None))
    (row,) = np.flatnonzero((rows.segments != rows.prefixes).any(axis=1))
    segments, prefixes = np.asarray(rows.segments[row]), np.asarray(rows.prefixes[row])

    def states(changed):
        """The hidden states of the row, with other tokens at these columns."""
        tokens = jnp.where(changed, (rows.tokens[row] + 1) % CONFIG.vocab_size, rows.tokens[row])
        hidden = transformer.packed_hidden_states(
            params,
            CONFIG,
            rows.tokens.at[row].set(tokens),
            rows.segments,
            rows.positions,
            rows.prefixes,
            dtype=jnp.float32,
            layout=tiny_models.one_device(),
        )
        return np.asarray(hidden[row])

    before = states(np.zeros_like(segments, bool))
    responses = np.unique(segments[segments != prefixes])
    assert len(responses) == 4
    one = segments == responses[1]
    after = states(one)
    assert bits(before[~one]) == bits(after[~one]) and (before[one] != after[one]).any(axis=1).all()

    # Another prompt changes itself and all its responses.
    after = states(segments == prefixes[one][0])
    reads = prefixes == prefixes[one][0]
    assert (before[reads] != after[reads]).any(axis=1).all() and bits(before[~reads]) == bits(after[~reads])


@pytest.mark.parametrize("loss", ["clip", "gspo", "cispo"])
@pytest.mark.parametrize("microbatch", [1, 2, pytest.param(7, marks=pytest.mark.slow)])
def test_loss_gradient_and_metrics_equal_those_of_unpacked_rows(params, loss, microbatch, packing):
    batch = grouped_batch()
    packed = pack(batch, microbatch, **packing)
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


def test_log_probabilities_equal_those_of_unpacked_rows(params, packing):
    layout, batch = tiny_models.one_device(), grouped_batch()
    options = dict(dtype="float32", temperature=TEMPERATURE)
    expected = grpo.make_logprobs(CONFIG, layout, microbatch=4, **options)(
        params, batch.tokens, batch.valid, T
    )
    found = grpo.make_packed_logprobs(CONFIG, layout, **options)(
        params, pack(batch, **packing), batch.response_mask
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not np.asarray(found)[~np.asarray(batch.response_mask)].any()


@pytest.mark.slow
def test_packed_rows_on_a_mesh(params, packing):
    layout = Layout(mesh.make_mesh(2, 2, 2), base.get_config().mesh.rules)
    batch = grouped_batch()
    expected = gradients_of(tiny_models.one_device())(params, batch)
    placed = jax.device_put(
        params, mesh.make_shardings(layout, transformer.param_specs(CONFIG, head="logits"))
    )
    packed = layout.put(pack(batch, rows_multiple=layout.batch_shards, **packing), None, "batch")
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


@pytest.mark.slow
def test_thresholds_of_filtered_responses(params, packing):
    rng = np.random.default_rng(3)
    batch = grouped_batch()
    batch = batch.replace(thresholds=jnp.asarray(rng.normal(size=(len(batch.tokens), T)), jnp.float32))
    gradients = gradients_of(tiny_models.one_device(), entropy_coef=0.01)
    expected, found = (
        gradients(params, batch),
        gradients(params, batch.without_tokens(), pack(batch, **packing)),
    )
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
