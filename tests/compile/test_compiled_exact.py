"""Exact mode on TPUs and GPUs: the program that samples from the learner's forward pass.

The other one, log-probabilities of the learner, is that of scoring (test_compiled_programs.py).  A run is exact on
any device, since the rollout's log-probabilities and the update's are outputs of that program on the same arrays.
"""

import jax
import jax.numpy as jnp
import pytest
from programs import Case
from test_compiled_programs import sizes

from cooper_jax.model import transformer
from cooper_jax.perf.aot_compile import compile_program
from cooper_jax.policy.losses import PolicyConfig
from cooper_jax.rollout import exact
from cooper_jax.runtime.mesh import abstract_params

CASES = [
    pytest.param(Case("qwen_1p5b", "v5e", 2), id="qwen-v5e"),
    pytest.param(Case("llama3p2_1b", "h100", 2), id="llama-h100"),
]


@pytest.mark.parametrize("case", CASES)
def test_the_learner_samples_without_all_logits(case):
    job, layout = case.job, case.job.layout
    settings, spec = PolicyConfig.from_config(job.cfg.policy), job.rollout.spec
    resample = exact.make_resample(
        job.policy,
        layout,
        microbatch=settings.microbatch,
        dtype=settings.dtype,
        spec=spec,
        implementation=job.rollout.implementation,
    )

    def rows(dtype, *shape):
        axes = ("batch", *(None,) * len(shape))
        return jax.ShapeDtypeStruct((job.rows, *shape), dtype, sharding=layout.sharding(axes))

    width = sum(job.row_tokens)
    key = jax.ShapeDtypeStruct((), jax.random.key(0, impl="threefry2x32").dtype, sharding=layout.replicated)
    lowered = resample.lower(
        abstract_params(layout, transformer.param_specs(job.policy)),
        rows(jnp.int32, width), rows(jnp.bool_, width), rows(jnp.int32), rows(jnp.int32), key,
    )  # fmt: skip
    compiled = compile_program("resample", lowered, layout)

    # Nothing is larger than the head, which the logits of all columns of a microbatch would be.
    vocabulary = job.policy.padded_vocab // case.tensor
    head = job.policy.width * vocabulary
    assert settings.microbatch // layout.batch_shards * spec.max_new_tokens * vocabulary > 2 * head
    assert max(sizes(compiled.text).values()) <= head
    assert compiled.temporaries + compiled.arguments < 16e9
