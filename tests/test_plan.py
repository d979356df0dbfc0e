"""The sizes of a rollout: chunks of prompts, columns of caches, and the slots that memory has room for."""

from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import one_device
from tiny_rollouts import TINY, params_of, spec_of

from cooper_jax.configs import base
from cooper_jax.kernels.kv import Format
from cooper_jax.model import transformer
from cooper_jax.rollout import batch_sizes, engine, rollout_plan
from cooper_jax.rollout.rollout_state import RolloutStatic
from cooper_jax.runtime.mesh import Layout, make_mesh, make_shardings


def test_sizes_are_few_and_fit():
    sizes = {1: 1, 7: 7, 8: 8, 9: 10, 12: 12, 13: 14, 100: 112, 128: 128, 129: 160}
    assert {n: rollout_plan.round_to_bucket(n) for n in sizes} == sizes
    for n in range(1, 3000):
        assert n <= rollout_plan.round_to_bucket(n) <= 1.25 * n
    assert len({rollout_plan.round_to_bucket(n) for n in range(1024, 2048)}) <= 5


def test_shared_sizes_hold_what_they_are_for():
    """On a CPU, which computes padding as slowly as text, they are finer."""
    for platform, sizes, widths in (
        ("tpu", [8, 8, 8, 8, 16, 32], [64, 64, 128, 128, 256, 256]),
        ("cpu", [1, 2, 4, 8, 16, 32], [64, 64, 96, 128, 192, 256]),
    ):
        assert [rollout_plan.choose_shared_prompts(n, platform) for n in (1, 2, 3, 8, 9, 32)] == sizes
        assert [rollout_plan.choose_shared_width(n, platform) for n in (1, 64, 96, 97, 130, 193)] == widths
    assert [rollout_plan.prompt_width(n) for n in (1, 32, 33, 256, 257)] == [32, 32, 64, 256, 320]
    assert [rollout_plan.prompt_width(n, 128) for n in (1, 129, 1025)] == [128, 256, 1280]


@pytest.mark.parametrize(
    ("implementation", "kv_dtype", "multiple"),
    [("xla", "", 1), ("xla", "int8", 1), ("tpu", "", 32), ("tpu", "int8", 128), ("triton", "bfloat16", 32)],
)
def test_columns_are_whole_tiles_of_what_reads_them(implementation, kv_dtype, multiple):
    """One column for each token that is fed, and where requests wait a quarter or a segment more."""
    for new_tokens, segment, waiting in ((1, 64, 65), (300, 64, 373), (301, 100, 400)):
        spec = spec_of(max_new_tokens=new_tokens, segment=segment, kv_dtype=kv_dtype)
        setting = RolloutStatic(TINY, one_device(), spec, implementation)
        for least, columns in (
            (max(new_tokens - 1, 1), engine.count_cache_columns(setting, waiting=False)),
            (waiting, engine.count_cache_columns(setting, waiting=True)),
        ):
            assert least <= columns < least + multiple and columns % multiple == 0
        width = engine._prompt_width(setting, 130)
        assert width == (256 if multiple == 128 else 160)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 40), st.integers(1, 300)), min_size=1, max_size=20),
    shards=st.integers(1, 4),
    budget=st.sampled_from([32, 96, 256, 4096]),
    fixed_rows=st.booleans(),
)
def test_chunks_hold_every_prompt_once(lengths, shards, budget, fixed_rows):
    """In the shard that it belongs to, padded to less than twice its length."""
    prompts = [[i + 1] * n for i, n in enumerate(lengths)]
    size = rollout_plan.round_to_bucket(-(-len(prompts) // shards))
    width = rollout_plan.prompt_width(max(lengths))
    with mock.patch.object(rollout_plan, "PREFILL_TOKENS", budget):
        chunks = list(rollout_plan.make_chunks(prompts, shards, size, width, fixed_rows=fixed_rows))
        empty = list(rollout_plan.make_empty_chunks(shards, size, width))
    # Whatever the prompts are, these are all shapes.
    shapes_of_all = {c.tokens.shape for c in empty}
    assert not fixed_rows or {c.tokens.shape for c in chunks} <= shapes_of_all
    assert all((c.source == -1).all() and (c.lengths == 1).all() for c in empty)
    seen = {}
    for chunk in chunks:
        own = chunk.tokens.shape[1]
        tokens = chunk.tokens.reshape(shards, -1, own)
        assert own == width or own in [32 * 2**k for k in range(5)]
        assert tokens.shape[1] == 1 or tokens.shape[1] * own <= budget
        filled = np.zeros(tokens.shape[:2], bool)
        for place, row in enumerate(chunk.source):
            if row < 0:
                continue
            shard = place // size
            seen[place] = seen.get(place, 0) + 1
            prompt = prompts[place]
            assert chunk.lengths.reshape(shards, -1)[shard, row] == len(prompt)
            assert tokens[shard, row].tolist() == prompt + [0] * (own - len(prompt))
            assert own == 32 or 2 * len(prompt) > own or own == width
            filled[shard, row] = True
        assert filled.any() and not tokens[~filled].any()
        assert (chunk.lengths.reshape(shards, -1)[~filled] == 1).all()
    assert seen == dict.fromkeys(range(len(prompts)), 1)
    shapes = {c.tokens.shape for c in chunks}
    assert len(shapes) == len({shape[1] for shape in shapes}), "one program a width"


def test_a_chunk_is_no_longer_than_its_prompts_need():
    """Widths double from 32 on; the last is that of the cache."""
    prompts = [[1] * n for n in (3, 32, 33, 64, 65, 150)]
    chunks = list(rollout_plan.make_chunks(prompts, 1, 6, rollout_plan.prompt_width(150)))
    assert [c.tokens.shape for c in chunks] == [(2, 32), (2, 64), (1, 128), (1, 160)]
    assert [np.nonzero(c.source >= 0)[0].tolist() for c in chunks] == [[0, 1], [2, 3], [4], [5]]


def test_a_batch_has_few_sizes():
    def columns(most, segment, pallas=False):
        static = SimpleNamespace(pallas=pallas, spec=SimpleNamespace(segment=segment))
        return batch_sizes.list_columns(static, most)

    assert columns(511, 64) == (128, 256, 511) and columns(31, 8) == (8, 16, 31)
    assert columns(6, 16) == (6,) and columns(512, 64, pallas=True) == (512,)
    sizes = columns(511, 64)
    chosen = [batch_sizes.choose_columns(sizes, n) for n in (1, 128, 129, 300, 900)]
    assert chosen == [128, 128, 256, 511, 511]
    assert [batch_sizes.shrink_slots(n, 2) for n in (256, 16, 15)] == [128, 8, None]
    assert [batch_sizes.shrink_slots(n, 4) for n in (1024, 31)] == [256, None]


# --- memory ----------------------------------------------------------------------------------------------


def test_slots_are_what_the_budget_has_room_for():
    """12 GiB are there before the first slot; the error names what is needed and what was given."""
    needs = rollout_plan.Memory(
        weights=8 * rollout_plan.GIB,
        prompts=3 * rollout_plan.GIB,
        requests=rollout_plan.GIB,
        slot=rollout_plan.GIB // 4,
    )
    assert needs.total(4) == 13 * rollout_plan.GIB
    assert [needs.slots(int(gib * rollout_plan.GIB)) for gib in (12.25, 12.49, 12.5, 80)] == [1, 1, 2, 272]
    with pytest.raises(ValueError, match="needs 12.250 GiB .*memory_gib allows 12.188"):
        needs.slots(int(12.1875 * rollout_plan.GIB))
    with pytest.raises(ValueError, match="weights 8.000, prompts 3.000, requests 1.000, the slot 0.250"):
        needs.slots(0)


@pytest.mark.parametrize("own_prompts", [False, True])
def test_memory_is_of_one_device(own_prompts):
    """Weights as they lie there; heads and vocabulary cut over two devices, rows not."""
    layout = Layout(make_mesh(2, 1, 2, jax.devices()[:4]), tuple(base.get_config().mesh.rules))
    weights = jax.device_put(params_of(), make_shardings(layout, transformer.param_specs(TINY)))
    needs = rollout_plan.plan_memory(
        weights,
        TINY,
        layout,
        Format("int8", packed=True),
        prompts=3,
        width=64,
        group=4,
        new_tokens=10,
        columns=20,
        own_prompts=own_prompts,
    )
    norms = 2 * 2 * 16 + 16
    matrices = 2 * 64 * 16 + 2 * (16 * (16 + 8 + 8 + 16) + 3 * 16 * 24)
    assert needs.weights == 4 * (norms + matrices // 2)
    token = 2 * 1 * (2 * 4 + 2 * 4)  # layers, heads, keys and values and their scales
    activations, logits = 4 * (4 * 16 + 3 * 24 + 4 * 16), 4 * 3 * 64 // 2
    assert needs.prompts == 3 * 64 * (token + activations)
    assert needs.requests == 3 * 4 * (10 * 8 + logits)
    assert needs.slot == 2 * (20 + 64 * own_prompts) * token + activations + logits
