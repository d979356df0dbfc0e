"""The sampler's statistics compile for chips that are not there, and do not copy the logits.

N rows a chip   V vocabulary
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cooper_jax.kernels import sampling

ROWS = 256
CHIPS = ("v5e", "v5p", "v6e", "h100")
VOCABULARIES = {"qwen": 151_936, "qwen_padded": 152_064, "llama": 128_256}
MODES = {
    "temperature": dict(temperature=1.0, top_k=0, top_p=1.0),
    "entropy": dict(temperature=1.0, top_k=0, top_p=1.0, entropy=True),
    "cut": dict(temperature=0.7, top_k=50, top_p=0.95, min_p=0.02),
}


def compiled(chip: str, vocabulary: int, ways: int, mode: str):
    """The draw on one device; with `ways`, on all, rows over `data` and the vocabulary over `tensor`."""
    found = topologies.devices(chip).reshape(-1)
    found = found if ways > 1 else found[:1]
    data = found.size // ways
    mesh = Mesh(found.reshape(data, ways), ("data", "tensor"))
    axis = "tensor" if ways > 1 else None
    draw = functools.partial(
        sampling.sample_logits,
        axis_name=axis,
        implementation="triton" if chip == "h100" else "tpu",
        **MODES[mode],
    )
    at = (P("data", axis), P("data"))
    draw = jax.shard_map(draw, mesh=mesh, in_specs=at, out_specs=P("data"), check_vma=False)
    shapes = ((data * ROWS, vocabulary), (data * ROWS, sampling.LEVELS))
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, at, strict=True)
    ]
    return jax.jit(draw).lower(*arguments).compile()


def bound(vocabulary: int) -> int:
    """Bytes of temporaries: six arrays of block masses f32[N, M'] and eight of single blocks f32[N, W].

    Half the logits would be seven times as much.
    """
    blocks = -(-vocabulary // 128**2) * 128
    return 4 * ROWS * (6 * blocks + 8 * 128)


def check(chip: str, vocabulary: int, ways: int, mode: str) -> None:
    program = compiled(chip, vocabulary, ways, mode)
    kernel = "triton" if chip == "h100" else "tpu_custom_call"
    assert kernel in program.as_text()
    temporaries = program.memory_analysis().temp_size_in_bytes
    assert temporaries < bound(vocabulary), f"{temporaries:,} bytes of temporaries"


@pytest.mark.parametrize(
    "chip, vocabulary, ways, mode",
    [
        ("v5e", "qwen", 1, "temperature"),
        ("v5e", "qwen_padded", 2, "cut"),
        ("v6e", "llama", 1, "cut"),
        ("h100", "qwen_padded", 2, "cut"),
    ],
)
def test_compiles(chip, vocabulary, ways, mode):
    check(chip, VOCABULARIES[vocabulary], ways, mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vocabulary, ways", [("qwen", 1), ("llama", 1), ("qwen_padded", 2), ("llama", 2)])
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_everywhere(chip, vocabulary, ways, mode):
    check(chip, VOCABULARIES[vocabulary], ways, mode)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_shards_that_are_not_whole_blocks_cost_copies(chip):
    """Qwen's 151,936 columns in two: padding the head to 152,064 rows saves them."""
    temporaries = compiled(chip, 151_936, 2, "temperature").memory_analysis().temp_size_in_bytes
    copy = 4 * ROWS * 151_936 // 2
    assert copy < temporaries < 3.1 * copy
