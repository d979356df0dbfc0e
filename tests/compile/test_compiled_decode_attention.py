"""The decode-attention kernels through XLA's TPU and GPU compilers: they compile, and no cache is copied."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cooper_jax.kernels import decode_attention as face
from cooper_jax.kernels import kv as caches
from cooper_jax.kernels.schedule import make_schedule

LAYERS, ROWS, PROMPTS, PROMPT_COLUMNS, SUFFIX_COLUMNS = (
    4,
    256,
    32,
    512,
    576,
)  # rows and prompts of one data shard


class Heads(NamedTuple):
    queries: int
    kv: int
    width: int


LLAMA, QWEN = Heads(32, 8, 64), Heads(12, 2, 128)  # Llama-3.2-1B and Qwen2.5-1.5B
QWEN3, GEMMA3 = Heads(16, 8, 128), Heads(4, 1, 256)  # Qwen3-0.6B and 1.7B, and Gemma 3 1B and 270M

# What XLA calls the things that write an array anew.  A fusion is not among them: the update in place is one, and
# one that is not in place needs memory, which is counted.
COPIES = (
    "copy",
    "copy-start",
    "transpose",
    "convert",
    "slice",
    "dynamic-slice",
    "gather",
    "concatenate",
    "pad",
)
INSTRUCTION = re.compile(r"= \(?\w+\[([\d,]*)\]\S* ([\w-]+)\(")


def compiled(chip, heads, dtype, *, shards=(1, 1), loop=False, samples=None, windows=False):
    """A step's attention over a mesh of data x tensor; with `loop`, all layers', each writing its column first.

    windows: every row reads its prompt and its suffix from columns of its own on.
    """
    data, tensor = shards
    mesh = Mesh(topologies.devices(chip).reshape(-1)[: data * tensor].reshape(shards), ("data", "tensor"))
    form = caches.Format(dtype, packed=True)
    suffix_columns = -(-SUFFIX_COLUMNS // 128) * 128 if dtype == "int8" else SUFFIX_COLUMNS

    def array(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    def cache(rows, columns):
        shapes = jax.eval_shape(
            lambda: caches.make_empty_kv((LAYERS, rows * data, heads.kv, columns), heads.width, form)
        )
        return jax.tree.map(lambda x: array(x.shape, x.dtype, None, "data", "tensor"), shapes)

    cached = P(None, "data", "tensor")
    rows = P("data")

    def step(q, new, prompt, suffix, prompt_of, lengths, first, last):
        plan = make_schedule(prompt_of, lengths, samples=samples)
        kernel = "triton" if chip == "h100" else "tpu"

        def layer(i, carry):
            q, suffix = carry
            if loop:
                suffix = jax.tree.map(
                    lambda x, y: written(x, y, i, last), suffix, caches.pack_kv(new + q[:, :1], new, form)
                )
            out = face.decode_attention(
                q, prompt, suffix, plan, first, last, i, first if windows else None, implementation=kernel
            )
            return out, suffix

        if loop:
            return jax.lax.fori_loop(0, LAYERS, layer, (q, suffix))
        return layer(last, (q, suffix))[0]

    q_spec = P("data", "tensor")
    in_specs = (q_spec, q_spec, cached, cached, rows, rows, rows, P())
    out_specs = (q_spec, cached) if loop else q_spec
    mapped = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    i32 = jnp.int32
    program = jax.jit(mapped, donate_argnums=(3,) if loop else ()).lower(
        array((ROWS * data, heads.queries, heads.width), jnp.bfloat16, "data", "tensor"),
        array((ROWS * data, heads.kv, heads.width), jnp.bfloat16, "data", "tensor"),
        cache(PROMPTS, PROMPT_COLUMNS),
        cache(ROWS, suffix_columns),
        array((ROWS * data,), i32, "data"),
        array((PROMPTS * data,), i32, "data"),
        array((ROWS * data,), i32, "data"),
        array((), i32),
    )
    return program.compile()


def written(cache, new, layer, column):
    """cache [L, N, K, W, ..] with `new` [N, K, ..] at (layer, :, :, column)."""
    start = (layer, 0, 0, column) + (0,) * (cache.ndim - 4)
    return jax.lax.dynamic_update_slice(cache, jnp.expand_dims(new, (0, 3)), start)


def check(program, heads, tensor=1):
    """Nothing as large as one layer of one cache is written, and what memory is taken is the queries'."""
    kv_heads = heads.kv // tensor
    smallest = kv_heads * 2 * heads.width * min(PROMPTS * PROMPT_COLUMNS, ROWS * SUFFIX_COLUMNS)
    for shape, name in INSTRUCTION.findall(program.as_text()):
        size = math.prod(int(n) for n in shape.split(",") if n)
        assert name not in COPIES or size < smallest, f"{name} of [{shape}]"
    # In f32, groups and lanes padded to whole registers, in two orders, on the way in and on the way out; and some
    # room for the schedule.
    queries = ROWS * kv_heads * 8 * max(heads.width, 128) * 4
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * queries + 2**20
    return memory


def test_llama_on_v5e_updates_its_cache_in_place():
    memory = check(compiled("v5e", LLAMA, "bfloat16", loop=True), LLAMA)
    suffix = LAYERS * ROWS * LLAMA.kv * SUFFIX_COLUMNS * 2 * LLAMA.width * 2
    assert memory.alias_size_in_bytes >= suffix


def test_qwen_int8_on_a_mesh_of_v6e():
    check(compiled("v6e", QWEN, "int8", shards=(8, 2), loop=True), QWEN, tensor=2)


def test_llama_on_h100_updates_its_cache_in_place():
    memory = check(compiled("h100", LLAMA, "bfloat16", loop=True), LLAMA)
    suffix = LAYERS * ROWS * LLAMA.kv * SUFFIX_COLUMNS * 2 * LLAMA.width * 2
    assert memory.alias_size_in_bytes >= suffix


@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_gemma_3_with_windows(chip):
    """Heads of width 256, one of them of keys: the windows need no copy and no more memory."""
    check(compiled(chip, GEMMA3, "bfloat16", loop=True, windows=True), GEMMA3)


@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_qwen3(chip):
    check(compiled(chip, QWEN3, "bfloat16", loop=True), QWEN3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("heads", [QWEN3, GEMMA3])
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "h100"])
def test_windows_everywhere(chip, heads, dtype):
    check(compiled(chip, heads, dtype, loop=True, windows=True, samples=ROWS // PROMPTS), heads)


@pytest.mark.slow
@pytest.mark.parametrize("loop, samples", [(True, None), (False, ROWS // PROMPTS)])
@pytest.mark.parametrize("mesh", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("heads", [LLAMA, QWEN])
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "h100"])
def test_everywhere(chip, heads, dtype, mesh, loop, samples):
    shards = (1, 1) if not mesh else (4, 2) if chip == "h100" else (8, 2)
    check(compiled(chip, heads, dtype, shards=shards, loop=loop, samples=samples), heads, tensor=shards[1])


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "h100"])
@pytest.mark.parametrize("heads", [Heads(9, 3, 64), Heads(32, 32, 128), Heads(16, 2, 256)])
def test_other_heads(chip, heads):
    """SmolLM2-135M's; one query a key, where blocks must shrink; width 256."""
    check(compiled(chip, heads, "bfloat16", loop=True), heads)
