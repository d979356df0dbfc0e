"""Bytes of device memory that a program must move on one device, item by item, from the model's shape and settings.

The bytes of the compiled text (perf/hlo.py) are measured against this budget.  No figure here comes from a compiled
program.  The rule:

    Every product, attention and norm reads its operands and writes its result once, in the compute type.  A
    chain of elementwise operations is one pass, which reads its inputs and writes its outputs once.  What is
    recomputed is moved again.  Kernels keep their scores and logits inside.

So the budget is that of the algorithm with the fusions that every compiler does, not of an ideal program that would
hold a layer's activations on the chip.

n rows of a microbatch on a device   X tokens of a microbatch on a device   M microbatches   L layers
g devices that a layer's matrices are gathered from; other letters as in layer_shapes.py
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from cooper_jax.model import transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.perf import aot_programs, kernel_costs, memory_budget
from cooper_jax.perf.aot_job import CompileJob
from cooper_jax.perf.aot_programs import MicrobatchShape, StepProgram
from cooper_jax.perf.layer_shapes import LayerShapes, shape_layer
from cooper_jax.runtime.mesh import abstract_params
from cooper_jax.runtime.optim import select_trained

FULL = 4  # bytes of a float32
WEIGHTS, CACHES = "weights", "caches read"  # what a decode step must read, whatever its rows


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one run of a program reads and writes."""

    name: str
    bytes: float


@dataclasses.dataclass(frozen=True)
class Passes:
    """Channels that the activations of one layer read and write per token: D, Q = H h / t, K = K h / t, F.

    The fields are the multiples of each.
    """

    D: float = 0
    Q: float = 0
    K: float = 0
    F: float = 0

    def count(self, layers: LayerShapes) -> float:
        """Count the channels."""
        return self.D * layers.width + self.Q * layers.queries + self.K * layers.keys + self.F * layers.ffn


# A layer forward, in order.  Residual sums are part of the product before them.
FORWARD = {
    "norms": Passes(D=2 + 2),
    "products": Passes(
        # q, k, v: in, out; o: in, residual, out; gate and up: in, out; down: in, residual, out.
        D=3 + 2 + 2 + 2,
        Q=1 + 1,
        K=2,
        F=2 + 1,
    ),
    "rotation and gate": Passes(Q=2, K=2, F=2 + 1),
    "attention": Passes(Q=2, K=2),
}
# Recomputed for the backward pass: all but the last product, whose result nobody reads.
LAST_PRODUCT = Passes(D=2, F=1)
# A layer backward.  A product's backward pass is two products: for its input and for its matrix.
BACKWARD = {
    # Two norms: reads input, gradient and the residual stream's gradient, writes the sum.
    "norms": Passes(D=2 * 4),
    "products for inputs": Passes(
        # down: in, out; gate and up: in, sum; o: in, out; q, k, v: in, sum.
        D=1 + 1 + 1 + 1,
        Q=1 + 1,
        K=2,
        F=1 + 2,
    ),
    "products for matrices": Passes(
        # Both factors of down, gate and up, o, and q, k and v.
        D=1 + 2 + 1 + 3,
        Q=1 + 1,
        K=2,
        F=1 + 2,
    ),
    "rotation and gate": Passes(Q=2, K=2, F=3 + 2),
    # Reads q, k, v, the output and its gradient; writes three gradients.
    "attention": Passes(Q=3 + 1, K=2 + 2),
}


def plan_program(job: CompileJob, program: StepProgram) -> tuple[Traffic, ...]:
    """List what a program must move in one run; () for programs that only move arrays about."""
    if program.name == "prefill":
        return _plan_prefill(job.rollout_job, program)
    if program.name == "segment":
        return _plan_segment(job.rollout_job, program)
    if not program.microbatches:
        return ()

    if program.phase in ("logprobs", "policy"):
        section, model, head_name = "policy", job.policy, "logits"
    else:
        assert job.reward is not None
        section, model, head_name = "reward", job.reward, "score"
    updates = program.phase in ("policy", "reward")
    items: list[Traffic] = []
    for shape in program.microbatches:
        plan = _Plan(job, section, model, head_name, shape)
        items += plan.list_update() if updates else plan.list_forward()
    if updates:
        items += plan.list_optimiser()
    return _merge(items)


def _merge(items: list[Traffic]) -> tuple[Traffic, ...]:
    """Sum items of the same name, and leave out those of 0 bytes."""
    sums: dict[str, float] = {}
    for item in items:
        sums[item.name] = sums.get(item.name, 0.0) + item.bytes
    return tuple(Traffic(name, size) for name, size in sums.items() if size)


# --- scores and updates ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All microbatches of one kind of a program."""

    job: CompileJob
    section: str  # of the config: policy or reward
    model: ModelConfig
    head: str  # logits or score
    shape: MicrobatchShape

    @property
    def layers(self) -> LayerShapes:
        return shape_layer(self.model, self.job.layout)

    @property
    def itemsize(self) -> int:
        """Bytes of an element in the compute type."""
        return jnp.dtype(self.job.cfg[self.section].dtype).itemsize

    @property
    def remat(self) -> bool:
        return self.job.cfg[self.section].remat

    @property
    def trained_elements(self) -> float:
        """Elements of the trained parameters on this device."""
        specs = transformer.param_specs(self.model, self.head)
        return aot_programs.device_bytes(select_trained(abstract_params(self.job.layout, specs))) / FULL

    def per_layer(self, passes: Passes) -> float:
        """Count the bytes of passes over one layer's activations, in all layers and microbatches."""
        channels = passes.count(self.layers)
        return self.shape.microbatches * self.model.layers * self.shape.positions * channels * self.itemsize

    def per_token(self, channels: float, share: float = 1.0) -> float:
        """Count the bytes of channels of a share of the tokens, outside the layers, in all microbatches."""
        return self.shape.microbatches * self.shape.positions * share * channels * self.itemsize

    def list_forward(self) -> list[Traffic]:
        """List what a forward pass moves."""
        return [
            *self.list_weights(products=1),
            *(Traffic(f"layers forward: {name}", self.per_layer(p)) for name, p in FORWARD.items()),
            self.count_edges(passes=1),
            *self.list_head(gradients=False),
        ]

    def list_update(self) -> list[Traffic]:
        """List what the microbatches of an update move."""
        items = [Traffic(f"layers forward: {name}", self.per_layer(p)) for name, p in FORWARD.items()]
        if self.remat:
            # Each layer's input is written once more, and read.
            kept = self.per_layer(Passes(D=2))
            again = sum(map(self.per_layer, FORWARD.values())) - self.per_layer(LAST_PRODUCT)
            items += [Traffic("activations kept", kept), Traffic("layers forward again", again)]
        items += [Traffic(f"layers backward: {name}", self.per_layer(p)) for name, p in BACKWARD.items()]
        if self.model.lora is not None:
            items = [item for item in items if "for matrices" not in item.name]
        return [
            *self.list_weights(products=2 + self.remat),
            *items,
            *self.list_gradients(),
            self.count_edges(passes=2),
            *self.list_head(gradients=True),
        ]

    # --- weights and gradients ---------------------------------------------------------------------------

    def list_weights(self, products: int) -> list[Traffic]:
        """List the layers' matrices.  products: how often each is multiplied in a microbatch."""
        layers, size = self.layers, self.itemsize
        elements = self.model.layers * layers.layer
        shard = elements / layers.gather_ways
        # Cast once for the whole program.
        cast = shard * (FULL + size) if size != FULL else 0
        # Gathered forward, and once more for recomputation and the backward pass.
        gathers = min(products, 2) if layers.gather_ways > 1 else 0
        return [
            Traffic("layers cast", cast),
            Traffic("layers gathered", self.shape.microbatches * gathers * (shard + elements) * size),
            Traffic("matrices multiplied", self.shape.microbatches * products * elements * size),
        ]

    def list_gradients(self) -> list[Traffic]:
        """List the gradients of the layers' matrices, and the running sum of all gradients."""
        layers, count = self.layers, self.shape.microbatches
        scattered = 0.0
        if self.model.lora is None:
            elements = self.model.layers * layers.layer
            shard = elements / layers.gather_ways
            # Written by the product, read to be scattered, and the shard written.
            ways = layers.gather_ways > 1
            scattered = count * (elements + ways * (elements + shard)) * self.itemsize
        sums = 0.0
        if count > 1:
            # Zeros, and then for each microbatch: reads the sum and the gradient, writes the sum.
            sums = self.trained_elements * (FULL + count * (2 * FULL + self.itemsize))
        return [Traffic("gradients of matrices", scattered), Traffic("sum of the gradients", sums)]

    def list_optimiser(self) -> list[Traffic]:
        """List AdamW's traffic: the norm reads the gradients, the update reads them and rewrites the rest."""
        state = aot_programs.make_state(self.job, self.section, self.model, self.head)[1]
        moments = aot_programs.device_bytes(state.opt_state)
        return [Traffic("optimiser", self.trained_elements * (2 * FULL + 2 * FULL) + 2 * moments)]

    # --- the ends of the model ---------------------------------------------------------------------------

    def count_edges(self, passes: int) -> Traffic:
        """Count the embedding, the last norm, and the move of hidden states to the columns of their tokens.

        passes: 2 with the backward pass.
        """
        layers = self.layers
        # Looked up, exchanged and written (4 D), the norm (2 D), moved (2 D), those that the head reads (2 D).
        read = 2 * layers.width * self.shape.read / self.shape.tokens
        moved = passes * self.per_token(8 * layers.width + read)
        if passes == 2 and self.model.lora is None:
            # The embedding's gradient: zeros, to which the tokens' are added.
            moved += self.shape.microbatches * layers.head / layers.gather_ways * FULL
        return Traffic("embedding and last hidden states", moved)

    def list_head(self, gradients: bool) -> list[Traffic]:
        """List the head's traffic: a vector's is too small to count."""
        if self.head == "score":
            return []
        layers, size, count = self.layers, self.itemsize, self.shape.microbatches
        rows = self.shape.rows * self.shape.read
        hidden = rows * layers.width * size

        # Its shard is cast, then gathered.
        shard = layers.head / layers.gather_ways
        copied = shard * (FULL + size) if size != FULL else 0
        if layers.gather_ways > 1:
            copied += (shard + layers.head) * size
        pallas = memory_budget.has_head_kernel(self.job)
        logits = rows * layers.vocabulary
        # Plain XLA writes and reads the logits of a chunk, kernels keep them inside.
        forward = layers.head * size + hidden + (0 if pallas else 2 * logits * FULL)
        items = [Traffic("head cast and gathered", count * copied), Traffic("head forward", count * forward)]
        if not gradients:
            return items

        # For each chunk: logits in f32 written and read, their gradient written and read by two products; the
        # chunk's matrix read twice and its gradient written and scattered; the sum of the gradient of the hidden
        # states read and written.
        chunks = -(-layers.vocabulary // memory_budget.count_chunk(self.job, layers, self.shape))
        trains = self.model.lora is None
        ways = layers.gather_ways > 1
        moved: float = logits * (2 * FULL + 2 * size) + 2 * layers.head * size
        moved += chunks * (2 * rows * layers.width * FULL + hidden)
        if trains:
            moved += logits * size + chunks * hidden + (1 + ways) * layers.head * FULL + 2 * shard * FULL
        return [*items, Traffic("head backward", count * moved)]


# --- rollout ---------------------------------------------------------------------------------------------


def _plan_prefill(job: CompileJob, program: StepProgram) -> tuple[Traffic, ...]:
    """List what one chunk of prompts moves: a forward pass with the rollout's weights, and the cache's columns."""
    (shape,), static = program.microbatches, job.rollout
    layers, size = shape_layer(job.policy, job.layout), jnp.dtype(static.spec.dtype).itemsize
    tokens = job.policy.layers * shape.positions

    # The layers' loop stacks keys and values, which are then moved to their prompts' rows of the cache.
    cache = 3 * tokens * _count_cache_token(job)
    items = [Traffic("weights multiplied", job.policy.layers * layers.layer * size)]
    items += [
        Traffic(f"layers forward: {name}", tokens * passes.count(layers) * size)
        for name, passes in FORWARD.items()
    ]
    embedding = shape.positions * 2 * layers.width * size
    return (*items, Traffic("cache written", cache), Traffic("embedding", embedding))


def _plan_segment(job: CompileJob, program: StepProgram) -> tuple[Traffic, ...]:
    """List what a decode segment moves: weights and caches once a token, and the activations of its rows."""
    static, rows, steps = job.rollout, job.slots, program.trips
    layers, size = shape_layer(job.policy, job.layout), jnp.dtype(static.spec.dtype).itemsize
    count = job.policy.layers

    weights = (count * layers.layer + layers.head) * size
    _, cache_read = kernel_costs.decode_cost(job, aot_programs.average_keys(job))["decode_attention"]
    activations = sum(passes.count(layers) for passes in FORWARD.values()) * size
    return (
        Traffic(WEIGHTS, steps * weights),
        Traffic(CACHES, steps * count * cache_read),
        Traffic("cache written", steps * count * rows * _count_cache_token(job)),
        Traffic("activations", steps * count * rows * activations),
    )


def _count_cache_token(job: CompileJob) -> float:
    """Bytes of one token's keys and values in one layer."""
    heads = shape_layer(job.policy, job.layout).keys // job.policy.head_dim
    return job.rollout.kv_format.bytes_per_token(1, heads, job.policy.head_dim)


def format_budget(name: str, items: tuple[Traffic, ...], moved: float) -> list[str]:
    """Format a program's budget beside the bytes of its compiled text."""
    must = sum(item.bytes for item in items)
    lines = [f"{name}: {moved / 1e9:.2f} GB moved, {must / 1e9:.2f} budgeted, {moved / must:.2f} times"]
    read = sum(item.bytes for item in items if item.name in (WEIGHTS, CACHES))
    if read:
        lines[0] += f"; {moved / read:.2f} times weights and caches alone"
    return lines + [f"{item.bytes / 1e9:10.2f}  {item.name}" for item in items]
