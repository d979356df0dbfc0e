"""The head's kernels compile for chips that are not here, without [rows, vocabulary] and with few temporaries.

On one chip, and on 16 (8 GPUs) as data x tensor with tensor 2: the vocabulary in two shards.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cooper_jax.kernels import head

WIDTHS = {"qwen": (1536, 151_936, 151_936), "llama": (2048, 128_256, 128_256)}  # D, V, entries that are real
ROWS = {"draw": 256, "greedy": 256, "score": 16 * 512, "learn": 16 * 512}
MiB = 2**20


def compiled(chip: str, what: str, model: str, chips: int):
    """(the program, rows a chip, vocabulary a chip, D)."""
    devices = topologies.devices(chip).reshape(-1)
    chips = min(chips, len(devices))
    ways = 2 if chips > 1 else 1
    mesh = Mesh(devices[:chips].reshape(-1, ways), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    (width, vocabulary, real), rows = WIDTHS[model], ROWS[what]
    static = dict(
        vocab_size=real,
        temperature=0.0 if what == "greedy" else 1.0,
        axis_name="tensor" if ways > 1 else None,
        implementation="triton" if chip == "h100" else "tpu",
    )
    by_row, by_entry = P("data"), P("tensor")

    def body(hidden, weights, ids):
        if what in ("draw", "greedy"):
            return tuple(head.head_sample(hidden, weights, ids, **static))
        return head.head_logprobs(hidden, weights, ids[:, 0], **static)

    function = jax.shard_map(
        body, mesh=mesh, in_specs=(by_row, by_entry, by_row), out_specs=by_row, check_vma=False
    )
    if what == "learn":

        def loss(hidden, weights, ids):
            return jnp.sum(function(hidden, weights, ids)[0])

        out = tuple(NamedSharding(mesh, spec) for spec in (by_row, by_entry))
        program = jax.jit(jax.grad(loss, (0, 1)), out_shardings=out)
    else:
        program = jax.jit(function)

    def argument(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    ids = (rows, 2) if what in ("draw", "greedy") else (rows, 1)
    arguments = (
        argument((rows, width), jnp.bfloat16, by_row),
        argument((vocabulary, width), jnp.bfloat16, by_entry),
        argument(ids, jnp.uint32 if what in ("draw", "greedy") else jnp.int32, by_row),
    )
    return program.lower(*arguments).compile(), rows * ways // chips, vocabulary // ways, width


def largest_but_the_head(text: str, vocabulary: int, width: int) -> int:
    """Elements of the largest array in a program's text; the head and its gradient do not count."""
    shapes = re.findall(r"\b(?:pred|bf16|[suf]\d+)\[([\d,]+)\]", text)
    sizes = [1]
    for shape in set(shapes):
        dims = [int(d) for d in shape.split(",")]
        if sorted(d for d in dims if d > 1) == sorted((vocabulary, width)):
            continue
        size = 1
        for d in dims:
            size *= d
        sizes.append(size)
    return max(sizes)


def allowed(what: str, rows: int, vocabulary: int, width: int, chips: int) -> int:
    """Bytes of temporaries.

    What lanes or splits saw, before they merge: at most 6 words for each of 600 a row.  The gradient: that of
    hidden in f32, twice while it is added to; three arrays of a chunk's logits (p, d z, and d z in bf16 with its
    layouts); over a mesh, the head's gradient once more while the shards of rows add theirs.
    """
    seen = rows * 600 * 6 * 4 + 4 * MiB
    if what != "learn":
        return seen
    chunk = max(head.LARGE_CHUNK, 256 * rows) * 4
    return seen + 2 * rows * width * 4 + 3 * chunk + (2 * vocabulary * width * (chips > 1))


CASES = [
    pytest.param(chip, what, model, chips, marks=() if fast else pytest.mark.slow)
    for chip in ("v5e", "v5p", "v6e", "h100")
    for what in ("draw", "greedy", "score", "learn")
    for model in WIDTHS
    for chips in (1, 16)
    for fast in [
        (what, model, chips) in {("draw", "qwen", 16), ("learn", "llama", 1)} and chip in ("v5e", "h100")
    ]
]


@pytest.mark.parametrize("chip, what, model, chips", CASES)
def test_compiles_without_the_logits(chip, what, model, chips):
    program, rows, vocabulary, width = compiled(chip, what, model, chips)
    text = program.as_text()
    assert f"head_{'score' if what == 'learn' else what}" in text  # the kernel is in it
    assert largest_but_the_head(text, vocabulary, width) < rows * vocabulary
    temporaries = program.memory_analysis().temp_size_in_bytes
    print(
        f"temporaries {temporaries / MiB:.1f} MiB of {allowed(what, rows, vocabulary, width, chips) / MiB:.1f}"
    )
    assert temporaries <= allowed(what, rows, vocabulary, width, chips)


def test_a_program_with_the_logits_is_found():
    text = "f32[256,151936]{1,0} dot(bf16[256,1536], bf16[151936,1536]{1,0})"
    assert largest_but_the_head(text, 151_936, 1536) == 256 * 151_936
