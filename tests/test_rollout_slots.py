"""Slots: rows do not depend on them, on meshes or on memory; what they cost, and what is said of it."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_models import one_device
from tiny_rollouts import (
    KEY,
    MOST,
    POSITIONS,
    PROMPTS,
    SPEC,
    TINY,
    assert_cut,
    assert_same,
    count_traces,
    params_of,
    rollout,
    rows_of,
    sampled,
    spec_of,
)

from cooper_jax.configs import base
from cooper_jax.model import transformer
from cooper_jax.rollout import engine
from cooper_jax.rollout import slots as programs
from cooper_jax.rollout.engine import copy_rollout_weights, generate
from cooper_jax.runtime.mesh import Layout, make_mesh, make_shardings


class Segments(list):
    """(rows, columns of the cache) of every segment that runs."""

    def __init__(self):
        super().__init__()
        self.decoded = []  # tokens a slot, in each
        self.requests = []  # in the slots, as each begins

    def clear(self):
        super().clear()
        self.decoded.clear()
        self.requests.clear()

    def steps(self):
        return int(sum(self.decoded))


@pytest.fixture
def segments(monkeypatch):
    seen, run = Segments(), programs.decode_segment

    def segment(weights, slots, requests, prompts, **static):
        before = int(slots.write_column)
        seen.requests.append(np.asarray(slots.request))
        seen.append((slots.request.size, slots.suffix[0].data[0].shape[3]))
        out = run(weights, slots, requests, prompts, **static)
        seen.decoded.append(int(out[0].write_column) - before)
        return out

    monkeypatch.setattr(programs, "decode_segment", segment)
    return seen


# --- what rows do not depend on --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "slots", [pytest.param(1, marks=pytest.mark.slow), 5, pytest.param(11, marks=pytest.mark.slow)]
)
def test_rows_do_not_depend_on_their_slots(slots, segments):
    """Fewer slots than rows: who ends makes room for the next, and every row is what it was."""
    whole = sampled()
    assert_same(rollout(max_rows=slots), whole)
    lengths = whole.mask.sum(axis=1)
    # Slots wait for others at most until an eighth of them does, or a segment ends.
    least = -(-(lengths - 1).sum() // slots)
    assert least <= segments.steps() <= least + lengths.max() + SPEC.segment * len(lengths) // slots


@pytest.mark.slow
def test_each_row_has_its_own_limit():
    limits = np.array([1, 9, 2, 3, 1, 9, 4, 4, 5, 1, 1, 2])
    for slots in (None, 5):
        assert_cut(rollout(limits=limits, max_rows=slots), sampled(), limits)


@pytest.mark.slow
def test_the_longest_limits_begin_first(segments):
    """And requests that end with their first token take no slot."""
    limits, order = np.array([2, 9, 2, 3, 1, 8, 4, 4, 5, 1, 7, 2]), []
    rollout(spec_of(eos_ids=()), limits=limits, max_rows=5)
    for request in segments.requests:
        order += [i for i in request[0] if i < 12 and i not in order]
    assert limits[order].tolist() == [9, 8, 7, 5, 4, 4, 3, 2, 2, 2]


@pytest.mark.slow
def test_the_last_rows_move_into_fewer_slots(segments):
    """One long row among 24: the batch is halved while it goes on, and it stays what it was."""
    spec = spec_of(group_size=6, max_new_tokens=16, eos_ids=())
    limits = np.full(24, 2)
    limits[[5, 17]] = 16, 12
    whole = rollout(spec)
    for slots in (None, 7):
        segments.clear()
        assert_cut(rollout(spec, limits=limits, max_rows=slots), whole, limits)
        sizes = [rows for rows, _ in segments]
        assert sizes[-1] == 3 and sizes == sorted(sizes, reverse=True)


@pytest.mark.slow
def test_a_cpu_compiles_few_sizes_of_the_cache(segments):
    """A quarter, a half and all of the columns that the longest response needs, in whole segments."""
    rollout(spec_of(group_size=1, max_new_tokens=38, eos_ids=(), segment=4))
    assert list(dict.fromkeys(columns for _, columns in segments)) == [12, 20, 37]


@pytest.mark.slow
def test_the_cache_moves_back_when_its_columns_end(monkeypatch):
    """A few slots and many short rows: the write column runs off, and comes back, while a long row goes on."""
    moves, resize = [], programs.resize_cache
    monkeypatch.setattr(programs, "resize_cache", lambda s, by, **k: moves.append(by) or resize(s, by, **k))
    spec = spec_of(group_size=16, max_new_tokens=24, eos_ids=(), segment=8)
    limits = np.random.default_rng(0).integers(1, 6, 64)
    limits[[3, 20, 40]] = 24
    assert_cut(rollout(spec, limits=limits, max_rows=3), rollout(spec), limits)
    assert sum(by > 0 for by in moves) >= 2 and min(moves) >= 0


@pytest.mark.slow
def test_a_mesh_gives_the_same(monkeypatch):
    """2 x 2 x 2 devices; five prompts are padded to eight, two a shard."""
    layout = Layout(make_mesh(2, 2, 2), tuple(base.get_config().mesh.rules))
    params = jax.device_put(params_of(), make_shardings(layout, transformer.param_specs(TINY)))
    prompts, positions = PROMPTS + [[30, 31]], POSITIONS + [44]
    alone, traces = sampled(), count_traces(monkeypatch)
    meshed = generate(params, TINY, layout, prompts, positions, KEY, SPEC)
    assert meshed.tokens.shape[0] == 15
    assert_same(rows_of(meshed, slice(12)), alone)
    first_step = list(traces)
    assert first_step.count("prefill_prompts") == 1 and "decode_step" in first_step
    generate(params, TINY, layout, prompts, positions, jax.random.key(7), SPEC)
    assert traces == first_step, "the second step compiles nothing"
    # Two slots a shard, each with its shard's own queue of six.
    groups = Groups()
    slots = generate(params, TINY, layout, prompts, positions, KEY, SPEC, max_rows=8, on_groups=groups)
    assert_same(rows_of(slots, slice(12)), alone)
    groups.check(slots)


# --- groups, handed out early ----------------------------------------------------------------------------


class Groups(dict):
    """The rows of each prompt, as they were handed out."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __call__(self, places, rows):
        self.calls.append(places)
        assert places, "a call has something to say"
        for n, i in enumerate(places):
            assert i not in self, "once"
            self[i] = jax.tree.map(lambda x, n=n: x[n * 3 : n * 3 + 3], rows)

    def check(self, whole):
        assert sorted(self) == list(range(len(whole.tokens) // 3))
        for i, rows in self.items():
            assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(rows)), "on the host"
            want = rows_of(whole, slice(i * 3, i * 3 + 3))
            jax.tree.map(np.testing.assert_array_equal, rows, want)


@pytest.mark.parametrize("slots", [None, 5])
def test_groups_are_handed_out_when_their_last_row_has_ended(slots, segments):
    """The second prompt has the long rows: the others are there before it."""
    limits = np.array([1, 1, 1, 9, 9, 1, 3, 2, 3, 2, 1, 2])
    groups, seen = Groups(), []

    def on_groups(places, rows):
        seen.append((places, len(segments)))
        groups(places, rows)

    whole = rollout(spec_of(eos_ids=()), limits=limits, max_rows=slots, on_groups=on_groups)
    groups.check(whole)
    assert seen[0] == ([0], 0), "one token each: drawn before the first segment"
    assert seen[-1] == ([1], len(segments)) and len(seen) > 2


# --- what it costs ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_segments_cover_the_limit_and_stop_when_all_rows_have_ended(segments):
    r = rollout(spec_of(eos_ids=()))
    assert segments == [(12, 4), (12, 8)] and segments.steps() == 8
    assert r.mask.all() and not r.finished.any()
    segments.clear()
    r = rollout(spec_of(segment=2, eos_ids=MOST))
    slowest = r.mask.sum(1).max()
    # Inside its last segment too, decoding ends with the last row.
    assert segments == [(12, 2), (6, 8)] and slowest > 3
    assert segments.steps() == slowest - 1
    segments.clear()
    r = rollout(spec_of(eos_ids=tuple(range(60))))
    assert segments == [] and r.finished.all() and r.mask.sum() == 12


def test_the_report_says_how_evenly_the_work_lay():
    def report_of(**options):
        out = []
        rollout(spec_of(eos_ids=()), report=out.append, **options)
        return out

    assert report_of() == [{"rollout/steps": 8.0, "rollout/slot_use": 1.0, "rollout/imbalance": 1.0}]
    # Four steps of six slots and four of three; two rows decode 8 tokens more than their first and one decodes 4.
    limits = np.array([1, 1, 1, 9, 9, 1, 1, 5, 1, 1, 1, 1])
    (said,) = report_of(limits=limits)
    assert said == {"rollout/steps": 8.0, "rollout/slot_use": 20 / 36, "rollout/imbalance": 1.0}
    (said,) = report_of(limits=np.ones(12, int))
    assert said == {"rollout/steps": 0.0, "rollout/slot_use": 1.0, "rollout/imbalance": 1.0}


@pytest.mark.slow
def test_the_imbalance_is_of_the_busiest_shard():
    layout = Layout(make_mesh(2, 2, 2), tuple(base.get_config().mesh.rules))
    params = jax.device_put(params_of(), make_shardings(layout, transformer.param_specs(TINY)))
    limits, said = np.r_[[9] * 3, [1] * 9], []
    generate(
        params, TINY, layout, PROMPTS, POSITIONS, KEY, spec_of(eos_ids=()), limits=limits, report=said.append
    )
    # A prompt a shard: 27 tokens on the first, 3 on each of the others.
    assert said == [{"rollout/steps": 8.0, "rollout/slot_use": 0.25, "rollout/imbalance": 27 / 9}]


@pytest.mark.slow
def test_nothing_is_compiled_twice(monkeypatch):
    spec = spec_of(max_new_tokens=11, eos_ids=())  # of this test alone
    traces = count_traces(monkeypatch)
    rollout(spec)
    assert traces == ["prefill_prompts", "decode_step", "decode_step", "decode_step"]
    changed = jax.tree.map(lambda x: x * 1.01, params_of())
    generate(
        changed, TINY, one_device(), [[1, 2], [3], [4] * 32, [5]], [7, 8, 9, 10**6], jax.random.key(1), spec
    )
    weights = copy_rollout_weights(changed, TINY, one_device(), "float32")
    generate(weights, TINY, one_device(), PROMPTS, POSITIONS, KEY, dataclasses.replace(spec))
    assert len(traces) == 4


# --- memory ----------------------------------------------------------------------------------------------


def test_slots_are_as_many_as_asked_for_and_as_rows():
    setting = SimpleNamespace(spec=spec_of(group_size=4), shards=2)

    def slots(max_rows):
        return engine.count_slots(None, setting, 9, 16, max_rows, None)

    assert [slots(n) for n in (None, 1000, 31, 2)] == [64, 64, 15, 1]
    with pytest.raises(ValueError, match="max_rows 1 .* 2 batch shards"):
        slots(1)


def test_memory_decides_the_slots_and_not_the_rows(segments):
    """The bytes of this model, written out; five slots and a half fit."""
    weights = 4 * (
        3 * 64 * 16  # embed, lm_head and its transpose
        + 2 * (16 * (16 + 8 + 8 + 16) + 3 * 16 * 24 + 2 * 16)  # q, k, v, o; gate, up, down; norms
        + 16
    )
    token = 4 * 2 * 2 * 2 * 4  # f32, k and v, layers, heads, head_dim
    activations, logits = 4 * (4 * 16 + 3 * 24 + 4 * 16), 4 * 3 * 64
    prompts, requests = 4 * 32 * (token + activations), 12 * (9 * 8 + logits)
    columns = 8 + 4  # a segment more than the longest response has
    slot = 2 * (columns + 32) * token + activations + logits  # caches are moved by copies
    fixed = weights + prompts + requests

    whole = sampled()
    segments.clear()
    assert_same(rollout(memory_gib=(fixed + 5.5 * slot) / 2**30), whole)
    assert {rows for rows, _ in segments} == {5}
    segments.clear()
    assert_same(rollout(memory_gib=1.0), whole)
    assert {rows for rows, _ in segments} == {12}
    with pytest.raises(ValueError, match="one slot needs 0.000 GiB .*memory_gib allows 0.000"):
        rollout(memory_gib=(fixed + slot - 1) / 2**30)


def test_a_caller_can_end_a_rollout_between_two_segments():
    """The hook runs before the prefill and before each segment; what it raises reaches the caller."""
    calls = []
    whole = rollout(between_segments=lambda: calls.append(0))
    np.testing.assert_array_equal(whole.tokens, rollout().tokens)
    assert len(calls) > 2

    class Enough(Exception):
        pass

    def end():
        calls.append(0)
        if len(calls) == 2:
            raise Enough

    calls.clear()
    with pytest.raises(Enough):
        rollout(between_segments=end)
    assert len(calls) == 2
