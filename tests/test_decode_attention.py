"""Decode attention: every form against a softmax written row by row in float64, and against the xla form."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from cooper_jax.kernels import decode_attention as face
from cooper_jax.kernels import decode_attention_tpu as tpu
from cooper_jax.kernels import decode_attention_triton as triton
from cooper_jax.kernels import kv as caches
from cooper_jax.kernels.schedule import make_schedule

LAYERS, LAYER = 2, 1
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 1e-5}  # int8: against its own dequantised values
KERNELS = ("tpu_interpret", "triton_interpret")
scheduled = jax.jit(make_schedule, static_argnames=("samples", "rows"))


class Case(NamedTuple):
    q: np.ndarray  # f32[N, H, h]
    prompt: tuple[np.ndarray, np.ndarray]  # f32[L, B, K, P, h]
    suffix: tuple[np.ndarray, np.ndarray]  # f32[L, N, K, W, h]
    prompt_of: np.ndarray  # i32[N]
    lengths: np.ndarray  # i32[B]
    first: np.ndarray  # i32[N]
    last: int
    prompt_first: np.ndarray | None = None  # i32[N]


def draw(
    seed,
    prompt_of,
    lengths,
    first,
    last,
    *,
    kv_heads=2,
    group=2,
    head_dim=64,
    prompt_columns=24,
    suffix_columns=24,
):
    """A case with normal entries around the given integers."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    rows, prompts = len(prompt_of), len(lengths)
    prompt, suffix = (
        tuple(normal(LAYERS, n, kv_heads, w, head_dim) for _ in "kv")
        for n, w in ((prompts, prompt_columns), (rows, suffix_columns))
    )
    q = normal(rows, kv_heads * group, head_dim)
    return Case(q, prompt, suffix, *(np.asarray(x, np.int32) for x in (prompt_of, lengths, first)), last)


def stored(case, dtype, packed=True):
    """(q, prompt, suffix) as they are kept, and the case with what that says."""
    form = caches.Format(dtype, packed)
    prompt, suffix = (caches.pack_kv(*map(jnp.asarray, x), form) for x in (case.prompt, case.suffix))
    q = jnp.asarray(case.q, jnp.bfloat16 if dtype == "bfloat16" else jnp.float32)
    read = [tuple(np.asarray(x) for x in caches.unpack_kv(kv, jnp.float32)) for kv in (prompt, suffix)]
    return (q, prompt, suffix), case._replace(q=np.asarray(q, np.float32), prompt=read[0], suffix=read[1])


def expected(case):
    """f64[N, H, h], a row and a head at a time."""
    out = np.zeros(case.q.shape)
    rows, heads, h = out.shape
    group = heads // case.suffix[0].shape[2]
    for n in range(rows):
        b, own = case.prompt_of[n], slice(max(case.first[n], 0), case.last + 1)
        begin = 0 if case.prompt_first is None else case.prompt_first[n]
        shared = slice(begin, case.lengths[b] if b >= 0 else 0)
        for head in range(heads):
            k, v = (
                np.concatenate([p[LAYER, b, head // group, shared], s[LAYER, n, head // group, own]]).astype(
                    np.float64
                )
                for p, s in zip(case.prompt, case.suffix, strict=True)
            )
            if len(k):
                z = k @ case.q[n, head].astype(np.float64) / np.sqrt(h)
                p = np.exp(z - z.max())
                out[n, head] = p @ v / p.sum()
    return out


def attend(form, arrays, case, *, samples=None, slots=None, block=None, params=True):
    """The form's answer, f32[N, H, h], in tiles of `slots` rows and blocks of `block` columns."""
    call = {
        "xla": functools.partial(face.decode_attention, implementation="xla"),
        "tpu_interpret": functools.partial(tpu.decode_attention, interpret=params, block=block or tpu.BLOCK),
        "triton_interpret": functools.partial(
            triton.decode_attention, interpret=True, block=block or triton.BLOCK
        ),
    }[form]

    @jax.jit
    def run(q, prompt, suffix, prompt_of, lengths, first, last, layer, prompt_first):
        plan = make_schedule(prompt_of, lengths, samples=samples, rows=slots)
        return call(q, prompt, suffix, plan, first, last, layer, prompt_first)

    scalars = (case.first, jnp.int32(case.last), jnp.int32(LAYER), case.prompt_first)
    out = run(*arrays, case.prompt_of, case.lengths, *scalars)
    assert out.dtype == arrays[0].dtype
    return np.asarray(out, np.float32)


@st.composite
def cases(draw_from, column_step):
    """Unsorted rows, idle ones, empty prompts and suffixes; columns that blocks of 16 seldom divide."""
    pick = lambda low, high: draw_from(st.integers(low, high))  # noqa: E731
    rows, prompts = pick(1, 5), pick(1, 3)
    prompt_columns, suffix_columns = (
        column_step * pick(1, 40 // column_step),
        column_step * pick(1, 40 // column_step),
    )
    length = st.one_of(st.sampled_from([0, 1, prompt_columns]), st.integers(0, prompt_columns))
    last = pick(0, suffix_columns - 1)
    return draw(
        pick(0, 2**20),
        [pick(-1, prompts - 1) for _ in range(rows)],
        [draw_from(length) for _ in range(prompts)],
        [pick(0, last + 2) for _ in range(rows)],
        last,
        kv_heads=pick(1, 2),
        group=pick(1, 8),
        head_dim=draw_from(st.sampled_from([64, 128])),
        prompt_columns=prompt_columns,
        suffix_columns=suffix_columns,
    )


def up(x, to):
    return -(-x // to) * to


def check(form, case, dtype, **options):
    arrays, read = stored(case, dtype)
    want = expected(read)
    np.testing.assert_allclose(attend(form, arrays, case, **options), want, atol=TOLERANCE[dtype], rtol=1e-5)
    return want


@settings(max_examples=5, deadline=None, derandomize=True)
@given(case=cases(column_step=1), dtype=st.sampled_from(["float32", "bfloat16", "int8"]))
def test_xla_is_a_softmax(case, dtype):
    check("xla", case, dtype)


@pytest.mark.slow
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    case=cases(column_step=1), dtype=st.sampled_from(["float32", "bfloat16", "int8"]), slots=st.integers(1, 4)
)
def test_triton_is_a_softmax(case, dtype, slots):
    check("triton_interpret", case, dtype, slots=slots, block=16)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(case=cases(column_step=8), dtype=st.sampled_from(["float32", "bfloat16"]), slots=st.integers(1, 4))
def test_tpu_is_a_softmax(case, dtype, slots):
    check("tpu_interpret", case, dtype, slots=slots, block=16)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(case=cases(column_step=8), dtype=st.sampled_from(["float32", "bfloat16"]), slots=st.integers(1, 4))
def test_tpu_is_a_softmax_at_length(case, dtype, slots):
    check("tpu_interpret", case, dtype, slots=slots, block=16)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    case=cases(column_step=1), dtype=st.sampled_from(["float32", "bfloat16", "int8"]), slots=st.integers(1, 4)
)
def test_triton_is_a_softmax_at_length(case, dtype, slots):
    check("triton_interpret", case, dtype, slots=slots, block=16)


# Rows of three prompts out of order, two of them idle; a prompt of no keys, one of one; two rows without a suffix,
# one of which has nothing at all.
MIXED = dict(
    prompt_of=[2, 0, -1, 2, 1, -1, 2],
    lengths=[17, 0, 24],
    first=[3, 21, 22, 0, 19, 5, 22],
    last=21,
    suffix_columns=40,
)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("form", KERNELS)
def test_forms_agree(form, dtype):
    """With the face's own blocks, through the face."""
    case = draw(0, **MIXED)
    arrays, read = stored(case, dtype)
    args = (
        *arrays,
        scheduled(case.prompt_of, case.lengths),
        case.first,
        jnp.int32(case.last),
        jnp.int32(LAYER),
    )
    run = jax.jit(face.decode_attention, static_argnames="implementation")
    out = [np.asarray(run(*args, implementation=name), np.float32) for name in (form, "xla")]
    np.testing.assert_allclose(out[0], out[1], atol=TOLERANCE[dtype])
    np.testing.assert_allclose(out[0], expected(read), atol=TOLERANCE[dtype])
    assert not out[0][2].any(), "a row with no prompt and no suffix has zeros"


@pytest.mark.parametrize("form", KERNELS)
def test_int8_is_near_what_was_stored(form):
    """Against the values before quantisation: two blocks of 128 columns, as int8's scales want them."""
    case = draw(
        1,
        [1, 0, 1],
        [130, 256],
        [0, 140, 20],
        150,
        kv_heads=1,
        group=4,
        prompt_columns=256,
        suffix_columns=256,
    )
    arrays, read = stored(case, "int8")
    out = attend(form, arrays, case, slots=2)
    np.testing.assert_allclose(out, expected(read), atol=1e-5)
    # An int8 step is max |x| / 127, some 0.02 at these sizes; errors of many keys average out.
    np.testing.assert_allclose(out, expected(case), atol=0.02)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
def test_xla_groups_samples(packed, dtype):
    """With `samples`, and by an index, from caches packed and apart."""
    case = draw(2, [0, 0, 0, 1, 1, 1], [5, 24], [17, 20, 19, 18, 20, 23], 20, suffix_columns=40)
    arrays, read = stored(case, dtype, packed)
    for options in (dict(samples=3), {}):
        out = attend("xla", arrays, case, **options)
        np.testing.assert_allclose(out, expected(read), atol=TOLERANCE[dtype])


@pytest.mark.parametrize("form", KERNELS)
def test_prompt_major_rows(form):
    samples = 3
    prompt_of = np.repeat(np.arange(2), samples)
    check(
        form,
        draw(3, prompt_of, [9, 24], np.arange(2 * samples), 5),
        "float32",
        samples=samples,
        slots=2,
        block=8,
    )


@pytest.mark.parametrize("form", KERNELS)
def test_what_is_not_needed_is_not_read(form):
    """NaN in other layers, in prompts without readers, and in columns that no row needs: on TPU, to whole tiles."""
    tile = tpu.SUBLANES if form == "tpu_interpret" else 1
    case = draw(4, **{**MIXED, "prompt_of": [2, 0, -1, 2, 2, -1, 2], "prompt_columns": 40}, kv_heads=1)
    want = expected(case)
    for x in case.prompt:
        x[:LAYER] = np.nan
        x[LAYER, 1] = np.nan
        for b, length in enumerate(case.lengths):
            x[LAYER, b, :, up(length, tile) :] = np.nan
    end = up(case.last + 1, tile)
    for x in case.suffix:
        x[:LAYER] = np.nan
        x[LAYER, :, :, end:] = np.nan
        for n, first in enumerate(case.first):
            x[LAYER, n, :, : first // tile * tile if first <= case.last else None] = np.nan
    arrays, _ = stored(case, "float32")
    np.testing.assert_allclose(attend(form, arrays, case, slots=2, block=16), want, atol=1e-5)


# Rows of `WINDOWED` in tiles of two: a tile whose rows begin in different blocks; one whose windows are behind the
# prompt; an idle row; a row that reads one last key of its prompt.
WINDOWED = dict(prompt_of=[0, 1, -1, 0, 1, 1], lengths=[40, 33], first=[3, 10, 22, 15, 0, 21], last=20)
PROMPT_FIRST = np.array([17, 35, 0, 39, 32, 33], np.int32)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ("xla", *KERNELS))
def test_windows_over_prompts(form, dtype):
    """Each row attends to its prompt from a column of its own on."""
    case = draw(8, **WINDOWED, prompt_columns=40)._replace(prompt_first=PROMPT_FIRST)
    assert (np.abs(expected(case) - expected(case._replace(prompt_first=None))).max((1, 2)) > 0.01).sum() == 5
    check(form, case, dtype, slots=2, block=16)


@pytest.mark.parametrize("form", KERNELS)
def test_the_shape_of_gemma_3_1b(form):
    """Four query heads of 256 over one key/value head, with windows."""
    case = draw(8, **WINDOWED, prompt_columns=40, kv_heads=1, group=4, head_dim=256)
    check(form, case._replace(prompt_first=PROMPT_FIRST), "bfloat16", slots=2, block=16)


@pytest.mark.slow
@pytest.mark.parametrize("form", KERNELS)
def test_the_shape_of_qwen3_1p7b(form):
    """Two query heads of 128 over each of eight key/value heads."""
    case = draw(8, **WINDOWED, prompt_columns=40, kv_heads=8, group=2, head_dim=128)
    check(form, case._replace(prompt_first=None), "bfloat16", slots=2, block=16)


def test_windows_of_grouped_samples():
    """The xla form with `samples`: rows of one prompt share a product, each with a window of its own."""
    case = draw(9, [0, 0, 0, 1, 1, 1], [5, 24], [17, 20, 19, 18, 20, 23], 20)
    case = case._replace(prompt_first=np.array([0, 2, 5, 7, 24, 23], np.int32))
    check("xla", case, "float32", samples=3)


@pytest.mark.parametrize("form", KERNELS)
def test_prompt_columns_before_the_windows_are_not_read(form):
    """NaN before the block of the oldest column that a tile's rows read."""
    case = draw(10, [0, 0], [40], [5, 5], 4, prompt_columns=40, kv_heads=1)
    case = case._replace(prompt_first=np.array([35, 33], np.int32))
    want = expected(case)
    for x in case.prompt:
        x[:, :, :, : 32 if form == "tpu_interpret" else 33] = np.nan
    arrays, _ = stored(case, "float32")
    np.testing.assert_allclose(attend(form, arrays, case, slots=2, block=16), want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, columns, block, cores", [("float32", 40, 16, 1), ("int8", 24, 128, 2)])
def test_no_races(dtype, columns, block, cores):
    """The interpreter's vector clocks see no access that a copy could overtake."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    # Four tiles: one without columns, one without a prompt, two of one prompt.
    case = draw(
        5,
        [1, 0, -1, 1, 1],
        [17, 20],
        [3, 22, 20, 0, 21],
        21,
        kv_heads=1,
        prompt_columns=columns,
        suffix_columns=columns,
    )
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores)
    check("tpu_interpret", case, dtype, slots=2, block=block, params=params)
    assert not interpret_pallas_call.races.races_found


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), shape=st.sampled_from([(5, 20, 3), (1, 4, 5), (3, 7, 1), (2, 9, 4)]))
def test_schedule_seats_every_row_once(data, shape):
    prompts, rows, size = shape
    prompt_of = np.asarray([data.draw(st.integers(-1, prompts - 1)) for _ in range(rows)], np.int32)
    lengths = np.arange(1, prompts + 1, dtype=np.int32)
    plan = jax.tree.map(np.asarray, scheduled(prompt_of, lengths, rows=size))
    assert len(plan.rows) % 2 == 0
    np.testing.assert_array_equal(plan.rows.reshape(-1)[plan.slot_of], np.arange(rows))
    assert (plan.rows >= 0).sum() == rows
    for tile, prompt, length in zip(plan.rows, plan.tile_prompt, plan.tile_length, strict=True):
        readers = prompt_of[tile[tile >= 0]]
        if (readers >= 0).any():
            assert set(readers) == {prompt} and length == lengths[prompt]
        else:
            assert length == 0


@pytest.mark.parametrize("samples, tiles, slots", [(8, 4, 8), (16, 4, 16), (24, 8, 12), (3, 4, 3)])
def test_schedule_of_samples_wastes_no_slot(samples, tiles, slots):
    plan = scheduled(np.repeat(np.arange(4), samples), np.ones(4, np.int32), samples=samples)
    assert plan.rows.shape == (tiles, slots)
    assert (plan.rows >= 0).all()


def test_errors_name_the_fix():
    case = draw(6, [0], [4], [0], 3)
    with pytest.raises(ValueError, match="packed"):
        q, prompt, suffix = stored(case, "float32", packed=False)[0]
        plan = scheduled(case.prompt_of, case.lengths)
        face.decode_attention(q, prompt, suffix, plan, case.first, 3, 1, implementation="triton_interpret")
    with pytest.raises(ValueError, match="multiple of 64"):
        narrow = draw(6, [0], [4], [0], 3, head_dim=32)
        attend("tpu_interpret", stored(narrow, "float32")[0], narrow)
    with pytest.raises(ValueError, match="powers of two"):
        odd = draw(6, [0], [4], [0], 3, head_dim=80)
        attend("triton_interpret", stored(odd, "float32")[0], odd)
    with pytest.raises(ValueError, match="multiple of 128"):
        attend("tpu_interpret", stored(case, "int8")[0], case, block=16)
    with pytest.raises(ValueError, match="samples"):
        make_schedule(case.prompt_of, case.lengths, samples=2)


def test_triton_takes_narrower_heads():
    check("triton_interpret", draw(7, **MIXED, head_dim=32, kv_heads=1), "float32", block=16)
