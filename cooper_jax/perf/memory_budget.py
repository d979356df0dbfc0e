"""Memory that a training program needs on one device, item by item, from the model's shape and the settings.

The compiler's figure (aot_compile.py) is measured against this budget: it should be at most a quarter larger.  No
figure here comes from a compiled program.

Every item is in memory during some stages of the program.  The budget is that of the stage that needs the most:

    forward      the layers of a microbatch, each of which leaves its input for the backward pass
    head         log-probabilities and their gradients, one chunk of the vocabulary at a time
    backward     the layers again, the last one first: each is recomputed and then differentiated
    optimiser    AdamW on the sum of the gradients, in place

Programs without a gradient have the first two.  Arrays of under 1 byte a token and channel (norms, statistics of
the softmax, metrics) are left out.

n rows of a microbatch on a device   S tokens of a row   T of them read by the head   D width   L layers
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from cooper_jax.kernels import attention, head
from cooper_jax.kernels import platform as platforms
from cooper_jax.model import transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.perf import aot_programs
from cooper_jax.perf.aot_job import CompileJob
from cooper_jax.perf.aot_programs import MicrobatchShape, StepProgram
from cooper_jax.perf.layer_shapes import LayerShapes, shape_layer
from cooper_jax.runtime.mesh import abstract_params
from cooper_jax.runtime.optim import select_trained
from cooper_jax.types import Params

STAGES = ("forward", "head", "backward", "optimiser")
FULL = 4  # bytes of a float32
PARAMETERS, MOMENTS = "parameters", "optimiser's moments"
# Matrices of this many layers are gathered at a time: the layer's that is computed, and the next one's.
LAYERS_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class Item:
    """Bytes that are in memory during some stages of a program, on one device."""

    name: str
    bytes: int
    stages: tuple[str, ...] = STAGES


@dataclasses.dataclass(frozen=True)
class MemoryBudget:
    """The items of a program."""

    items: tuple[Item, ...]

    def count(self, stage: str) -> int:
        """Count the bytes of a stage."""
        return sum(item.bytes for item in self.items if stage in item.stages)

    @property
    def resident(self) -> int:
        """Bytes of the training state, which is in memory outside the program, too."""
        return sum(item.bytes for item in self.items if item.name in (PARAMETERS, MOMENTS))

    @property
    def stage(self) -> str:
        """The stage that needs most memory."""
        return max(STAGES, key=self.count)

    @property
    def bytes(self) -> int:
        """Bytes of that stage."""
        return self.count(self.stage)


def plan_program(job: CompileJob, program: StepProgram) -> MemoryBudget | None:
    """Make the budget of a program of training or scoring; None for a rollout's (rollout_plan.py has theirs)."""
    if program.phase == "rollout":
        return None
    if program.phase in ("logprobs", "policy"):
        section, model, head_name = "policy", job.policy, "logits"
    else:
        assert job.reward is not None
        section, model, head_name = "reward", job.reward, "score"

    # Rows of several kinds (pairs, labelled rows) are computed one after the other: the larger microbatch counts.
    shape = max(program.microbatches, key=lambda shape: shape.positions)
    plan = _Plan(job, section, model, head_name, shape)
    items = plan.list_update() if program.phase in ("policy", "reward") else plan.list_forward()
    return MemoryBudget(tuple(item for item in items if item.bytes))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """One model's microbatch on one device."""

    job: CompileJob
    section: str  # of the config: policy or reward
    model: ModelConfig
    head: str  # logits or score
    shape: MicrobatchShape

    @property
    def layers(self) -> LayerShapes:
        return shape_layer(self.model, self.job.layout)

    @property
    def params(self) -> Params:
        return abstract_params(self.job.layout, transformer.param_specs(self.model, self.head))

    @property
    def compute_bytes(self) -> int:
        """Bytes of an element in the compute type."""
        return jnp.dtype(self.job.cfg[self.section].dtype).itemsize

    def list_forward(self) -> list[Item]:
        """List the items of a forward pass alone."""
        return [
            Item(PARAMETERS, aot_programs.device_bytes(self.params)),
            Item("batch", self.count_batch(fields=2)),
            *self.list_weights(("forward",)),
            Item("one layer's activations", self.count_layer(gradients=False), ("forward",)),
            Item("scores of attention", self.count_scores(), ("forward",)),
            Item("hidden states", self.count_tokens(self.layers.width), ("forward", "head")),
            *self.list_head(gradients=False),
        ]

    def list_update(self) -> list[Item]:
        """List the items of an update."""
        passes, backward = ("forward", "head", "backward"), ("backward",)
        trained = select_trained(self.params)
        elements = aot_programs.device_bytes(trained) // FULL
        layer_gradients = 0 if self.model.lora is not None else self.layers.layer * self.compute_bytes
        # Beside tokens and mask: the response's mask and four numbers a token, as in PolicyBatch.
        fields = 2 if self.section == "reward" else 3 + 4 * self.shape.read / self.shape.tokens
        # One microbatch needs no running sum beside its own gradients.
        summed = passes + ("optimiser",) if self.shape.microbatches > 1 else ("optimiser",)
        return [
            Item(PARAMETERS, aot_programs.device_bytes(self.params)),
            Item(MOMENTS, self.count_moments()),
            Item("batch", self.count_batch(fields)),
            Item("sum of the gradients", elements * FULL, summed),
            *self.list_weights(passes),
            Item("activations kept for the backward pass", self.count_kept(), passes),
            Item("one layer's activations", self.count_layer(gradients=False), ("forward",)),
            Item("one layer's activations and their gradients", self.count_layer(gradients=True), backward),
            Item("scores of attention", self.count_scores(), ("forward", "backward")),
            Item("one layer's gradients, before they are scattered", layer_gradients, backward),
            Item("the microbatch's gradients of the layers", self.count_layer_gradients(trained), backward),
            *self.list_head(gradients=True),
        ]

    # --- weights -----------------------------------------------------------------------------------------

    def list_weights(self, stages: tuple[str, ...]) -> list[Item]:
        """List the copies of the layers' matrices that are computed with."""
        stored = self.params["layers"]["gate"].dtype
        layers = self.layers
        cast = gathered = 0
        if jnp.dtype(self.job.cfg[self.section].dtype) != stored:
            cast = self.count_elements(self.params["layers"]) * self.compute_bytes
        if layers.gather_ways > 1:
            gathered = min(LAYERS_IN_FLIGHT, self.model.layers) * layers.layer * self.compute_bytes
        in_layers = tuple(stage for stage in stages if stage != "head")
        return [
            Item("layers in the compute type", cast, stages),
            Item(f"gathered matrices of {LAYERS_IN_FLIGHT} layers", gathered, in_layers),
        ]

    def count_moments(self) -> int:
        """Count the bytes of the optimiser's moments, from the training state's shapes."""
        state = aot_programs.make_state(self.job, self.section, self.model, self.head)[1]
        return aot_programs.device_bytes(state.opt_state)

    def count_elements(self, tree: Params) -> int:
        """Count the elements of parameters on a device."""
        return sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))

    def count_layer_gradients(self, trained: Params) -> int:
        """Count the gradients of the layers, which the scan over layers returns in the compute type."""
        rest = {name: x for name, x in trained.items() if name not in ("embed", "lm_head")}
        return self.count_elements(rest) * self.compute_bytes

    # --- activations -------------------------------------------------------------------------------------

    def count_tokens(self, channels: int) -> int:
        """Count the bytes of an activation of so many channels."""
        return self.shape.positions * channels * self.compute_bytes

    def count_batch(self, fields: float) -> int:
        """Count the bytes of the batch's i32 and f32 arrays; `fields` numbers a token."""
        return int(self.shape.microbatches * self.shape.positions * fields * 4)

    def count_kept(self) -> int:
        """Count what the forward pass leaves: with remat each layer's input, without it all that a layer reads."""
        layers = self.layers
        channels = layers.width
        if not self.job.cfg[self.section].remat:
            channels = 4 * layers.width + 2 * (layers.queries + layers.keys) + 3 * layers.ffn
        return self.model.layers * self.count_tokens(channels)

    def count_layer(self, gradients: bool) -> int:
        """Count the activations of the layer that is computed.

        Forward, at the feed-forward's product: the residual stream, a norm's output, gate, up and their product.
        Backward, at the same place: the layer's norms, its queries, keys, values and outputs of attention, the
        residual stream between its halves, gate, up, their product and its gradient, and the residual stream's
        gradient.
        """
        layers = self.layers
        if not gradients:
            return self.count_tokens(2 * layers.width + 3 * layers.ffn)
        attention_channels = 2 * (layers.queries + layers.keys)
        return self.count_tokens(4 * layers.width + attention_channels + 4 * layers.ffn)

    def count_scores(self) -> int:
        """Count attention's scores and probabilities in f32, where they are not kept inside a kernel."""
        cfg, layout = self.job.cfg[self.section], self.job.layout
        implementation = attention.default_implementation(
            jnp.dtype(cfg.dtype), self.model.head_dim, layout.platform
        )
        if cfg.packing == "on" and not attention.supports_segments(implementation):
            implementation = "xla"
        if implementation != "xla":
            return 0
        tokens = self.shape.tokens
        block = min(max(attention.QUERY_BLOCK, -(-tokens // attention.BLOCKS)), tokens)
        heads = self.layers.queries // self.model.head_dim
        return 2 * self.shape.rows * heads * block * tokens * FULL

    # --- the head ----------------------------------------------------------------------------------------

    def list_head(self, gradients: bool) -> list[Item]:
        """List the items of the head: a vector's are too small to count."""
        if self.head == "score":
            return []
        layers, rows = self.layers, self.shape.rows * self.shape.read
        copied = layers.gather_ways > 1 or self.compute_bytes != FULL
        items = [
            Item("head in the compute type", copied * layers.head * self.compute_bytes, ("head",)),
            Item("hidden states that the head reads", rows * layers.width * self.compute_bytes, ("head",)),
        ]
        chunk, pallas = count_chunk(self.job, layers, self.shape), has_head_kernel(self.job)
        if not gradients:
            # Kernels keep logits inside.
            return [*items, Item("logits of one chunk", 0 if pallas else rows * chunk * FULL, ("head",))]

        own = 0 if self.model.lora is not None else layers.head // layers.gather_ways * FULL
        return [
            *items,
            Item("logits of one chunk", rows * chunk * FULL, ("head",)),
            Item("their gradient", rows * chunk * self.compute_bytes, ("head",)),
            Item("one chunk's gradient of the head", chunk * layers.width * FULL, ("head",)),
            Item("gradient of the hidden states", rows * layers.width * FULL, ("head",)),
            Item("the microbatch's gradient of the head", own, ("head", "backward")),
        ]


def has_head_kernel(job: CompileJob) -> bool:
    """Tell whether the head runs as a Pallas kernel on the learner's devices."""
    return platforms.is_pallas(platforms.default_implementation(job.layout.platform))


def count_chunk(job: CompileJob, layers: LayerShapes, shape: MicrobatchShape) -> int:
    """Count the vocabulary entries of a chunk, as the head's gradient computes them."""
    most = head.LARGE_CHUNK if has_head_kernel(job) else head.CHUNK
    return head.choose_chunk(layers.vocabulary, most // (shape.rows * shape.read))


def format_budget(name: str, budget: MemoryBudget, compiled: int) -> list[str]:
    """Format a program's budget: its items in the stage that needs most, and the compiler's figure beside.

    compiled: bytes at the compiled program's peak.
    """
    gib = 2**30
    stage = budget.stage
    lines = [
        f"{name}: {compiled / gib:.2f} GiB compiled, {budget.bytes / gib:.2f} budgeted (in the stage: {stage}), "
        f"{compiled / budget.bytes:.2f} times"
    ]
    lines += [f"{item.bytes / gib:8.3f}  {item.name}" for item in budget.items if stage in item.stages]
    return lines
