"""What training's programs send from device to device, and compute, beside what the config says they must.

GRPO's update, the reference's scoring and the reward model's pair update, of a few layers of Qwen2.5-1.5B's width,
in several microbatches.  What is expected is derived here, from the config alone:

    layers      a microbatch gathers every layer's matrices over fsdp, in the compute type: once to go forward, once
                more to recompute and go backward; their gradients are reduced once, in the compute type
    head        gathered over fsdp once, in the compute type; its gradient reduced once, in float32
    tensor      summed over it: two products of a layer forward, two others backward, and one once more where it is
                recomputed; the embedded tokens; the gradient that the head hands down
    embedding   looked up by columns, which change places with rows; so do their gradients

    D width   V vocabulary   S tokens of a row   n rows of a microbatch on a device   g, t  ways of fsdp, of tensor
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import programs
import pytest
import topologies

from cooper_jax.model import transformer
from cooper_jax.perf import hlo
from cooper_jax.policy import grpo
from cooper_jax.policy.losses import PolicyConfig
from cooper_jax.reward import verifier_model
from cooper_jax.reward.reward_losses import RewardUpdateConfig
from cooper_jax.runtime import optim
from cooper_jax.runtime.mesh import Layout, abstract_params, make_mesh
from cooper_jax.types import PairBatch, PolicyBatch, ScoreBatch, TrainState

MODEL = programs.MODELS["qwen_1p5b"].keep_layers(4)
ROWS, MICROBATCH, PROMPT, RESPONSE = 96, 32, 256, 256  # rows; half as many pairs
MICROBATCHES, TOKENS = ROWS // MICROBATCH, PROMPT + RESPONSE
PARTS = ("layers", "head", "tensor", "embedding")
COMPUTE, FULL = 2, 4  # bytes: bfloat16, float32


@dataclasses.dataclass(frozen=True)
class Case:
    program: str  # update, score, pairs
    chip: str
    fsdp: int
    tensor: int

    @property
    def layout(self) -> Layout:
        rules = programs.CONFIGS["qwen_1p5b"].get_config().mesh.rules
        return Layout(make_mesh(1, self.fsdp, self.tensor, topologies.devices(self.chip)), tuple(rules))

    @property
    def rows(self) -> int:
        """n"""
        return MICROBATCH // self.fsdp


def state(layout: Layout, section, head: str) -> tuple[optim.Optimiser, TrainState]:
    """The optimiser of a config's section, and the state that it would start from."""
    opt = optim.make_optimiser(optim.OptimiserConfig.from_config(section, "optimiser"))
    specs = transformer.param_specs(MODEL, head=head)
    params, count = abstract_params(layout, specs), jax.ShapeDtypeStruct((), jnp.int32)
    start = TrainState(params, jax.eval_shape(opt.tx.init, params), count, count)
    places = optim.state_shardings(opt, specs, layout)
    return opt, jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), start, places)


def lower(case: Case):
    cfg, layout = programs.CONFIGS["qwen_1p5b"].get_config(), case.layout

    def array(kind, *shape):
        axes = ("batch", None)[: len(shape)]
        return jax.ShapeDtypeStruct(shape, kind, sharding=layout.sharding(axes))

    def tokens(rows):
        return array(jnp.int32, rows, TOKENS), array(jnp.bool_, rows, TOKENS)

    if case.program == "score":
        score = grpo.make_logprobs(
            MODEL, layout, microbatch=MICROBATCH, dtype=cfg.policy.dtype, temperature=1.0
        )
        return score.lower(abstract_params(layout, transformer.param_specs(MODEL)), *tokens(ROWS), RESPONSE)
    if case.program == "update":
        cfg.policy.microbatch = MICROBATCH
        opt, start = state(layout, cfg.policy.optimiser, "logits")
        mask, reals = (array(kind, ROWS, RESPONSE) for kind in (jnp.bool_, jnp.float32))
        batch = PolicyBatch(*tokens(ROWS), mask, array(jnp.float32, ROWS), reals, reals, reals)
        return grpo.make_update(
            MODEL, PolicyConfig.from_config(cfg.policy), opt, layout, temperature=1.0, max_new_tokens=RESPONSE
        ).lower(start, batch)
    cfg.reward.microbatch = MICROBATCH // 2
    opt, start = state(layout, cfg.reward.optimiser, "score")
    members = (ScoreBatch(*tokens(ROWS // 2)) for _ in range(2))
    batch = PairBatch(*members, array(jnp.bool_, ROWS // 2))
    reward = RewardUpdateConfig.from_config(cfg.reward)
    return verifier_model.make_reward_update(MODEL, reward, opt, layout).lower(start, batch)


@functools.cache
def cost(case: Case) -> hlo.ProgramCost:
    rows = ROWS // case.fsdp * RESPONSE // MICROBATCHES
    head = 2 * rows * MODEL.padded_vocab // case.tensor * MODEL.width
    # XLA:GPU's text does not say what a kernel costs.
    return hlo.analyse_program(lower(case).compile().as_text(), declared={"head_score": (head, 0)})


def matrices() -> dict[str, int]:
    """Elements of a layer's matrices."""
    specs = transformer.param_specs(MODEL)["layers"]
    return {
        name: math.prod(s.shape[1:]) for name, s in specs.items() if len(s.shape) > 2 and "bias" not in name
    }


# --- bytes sent ----------------------------------------------------------------------------------------


def expected(case: Case) -> dict[str, float]:
    """Bytes that a device sends, by rings: (g - 1) / g of an array to gather or to reduce it."""
    g, t, layers, updates = case.fsdp, case.tensor, MODEL.layers, case.program != "score"
    ring, sums = (g - 1) / g, 2 * (t - 1) / t
    layer = sum(matrices().values()) / t * COMPUTE
    head = MODEL.padded_vocab / t * MODEL.width if case.program != "pairs" else 0
    tokens = case.rows * MODEL.width * TOKENS * COMPUTE  # of activations on a device
    summed = (5 if updates else 2) * layers + 1 + (RESPONSE / TOKENS if case.program == "update" else 0)
    each = {
        "layers": ring * layers * layer * (3 if updates else 1),
        "head": ring * head * (COMPUTE + (FULL if updates else 0)),
        "tensor": sums * tokens * summed,
        "embedding": ring * tokens * (2 if updates else 1),
    }
    return {part: MICROBATCHES * sent for part, sent in each.items()}


def part_of(case: Case, c: hlo.Collective) -> str:
    if case.tensor > 1 and all(len({i // case.tensor for i in group}) == 1 for group in c.groups):
        return "tensor"
    if c.kind == "all-to-all":
        return "embedding"
    whole = str(MODEL.padded_vocab // case.tensor) in c.shape
    # Its gradients' sums may have lost their names, or gone in with others; the layers' are not in float32.
    other = "f32" in c.shape and "dot_general" not in c.name
    return "head" if whole or other or "/shard_map" in c.name else "layers"


def sent(case: Case, part: str) -> float:
    """As compiled.

    XLA:TPU takes some products apart so that pieces of a matrix travel while others are multiplied.  Its loops send
    g + 1 pieces where g - 1 are needed, which is theirs, not ours.
    """
    spare = (case.fsdp - 1) / (case.fsdp + 1)
    found = (c for c in cost(case).collectives if part_of(case, c) == part)
    return sum(c.sent * (spare if c.kind == "collective-permute" else 1) for c in found)


PROGRAMS, MESHES = ("update", "score", "pairs"), (("v5e", 16, 1), ("v5e", 8, 2), ("h100", 8, 1))
SLOW = {*itertools.product(("update", "pairs"), ("v5e",), (16, 8)), ("score", "v5e", 8)}


def cases(parts: tuple[str, ...]):
    for program, mesh in itertools.product(PROGRAMS, MESHES):
        for part in parts:
            marks = [pytest.mark.slow] if (program, *mesh[:2]) in SLOW else []
            name = "-".join(map(str, (program, *mesh, *filter(None, [part]))))
            yield pytest.param(Case(program, *mesh), part, id=name, marks=marks)


@pytest.mark.parametrize("case, part", cases(PARTS))
def test_no_more_is_sent_than_must_be(case, part):
    must, is_sent = expected(case)[part], sent(case, part)
    slack = 0.01 * sum(expected(case).values())
    print(f"{part}: {is_sent / 1e6:.1f} MB sent, {must / 1e6:.1f} expected")
    assert must / 1.2 - slack < is_sent < must * 1.2 + slack


@pytest.mark.parametrize("case, part", cases(("",)))
def test_matrices_travel_in_the_compute_type(case, part):
    found = [c for c in cost(case).collectives if part_of(case, c) == "layers" and c.bytes > 2**20]
    assert {c.shape.strip("(").split("[")[0] for c in found} == {"bf16"}


# --- arithmetic ----------------------------------------------------------------------------------------


def flops(case: Case) -> float:
    """Of a device.  Backward is twice forward; a layer's last product, which nobody reads, is not recomputed."""
    layer, updates = matrices(), case.program != "score"
    tokens = ROWS // case.fsdp * TOKENS
    passes = sum(layer.values()) * (4 if updates else 1) - (layer["down"] if updates else 0)
    total = 2 * tokens * MODEL.layers * passes / case.tensor
    head = 2 * tokens * RESPONSE / TOKENS * MODEL.padded_vocab * MODEL.width / case.tensor
    total += {"update": 4, "score": 1, "pairs": 0}[case.program] * head
    if case.chip == "h100":  # cuDNN's attention; the TPU's does not say what it costs
        scores = ROWS // case.fsdp * MODEL.heads / case.tensor * TOKENS**2 / 2  # causal
        total += 2 * scores * MODEL.head_dim * MODEL.layers * (9 if updates else 2)
    return total


@pytest.mark.parametrize("case, part", cases(("",)))
def test_every_loop_is_counted(case, part):
    found = cost(case)
    assert found.unknown_loops == 0
    assert found.flops == pytest.approx(flops(case), rel=0.01)
