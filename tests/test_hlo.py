"""What compiled programs cost: loops, matmuls, collectives and memory, from XLA's text on the CPU and by hand."""

import functools
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cooper_jax.perf import hlo
from cooper_jax.perf.hlo import Collective, analyse_program


def ones(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def cost(function, *arguments, **options) -> hlo.ProgramCost:
    return analyse_program(compiled(function, *arguments).as_text(), **options)


def program(body: str, *others: str, header: str = "HloModule test, num_partitions=8") -> str:
    """An entry computation, and others before it."""
    return "\n\n".join([header, *map(textwrap.dedent, others), f"ENTRY %main () -> f32[] {{\n{body}\n}}"])


# --- loops ---------------------------------------------------------------------------------------------


def test_a_scan_counts_as_often_as_it_runs():
    def layers(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    program = compiled(layers, ones(16, 32), ones(7, 32, 32))
    one = 2 * 16 * 32 * 32
    assert one <= program.cost_analysis()["flops"] < 2 * one
    found = analyse_program(program.as_text())
    assert (found.flops, found.unknown_loops) == (7 * one, 0)


def test_nested_scans_multiply():
    def inner(x, w):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w), x), None

    def outer(x, ws):
        return jax.lax.scan(inner, x, ws)[0] @ ws[0]

    assert cost(outer, ones(16, 32), ones(3, 32, 32)).flops == (3 * 5 + 1) * 2 * 16 * 32 * 32


def test_a_gradient_is_thrice_the_forward_pass():
    def loss(x, ws):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0].sum()

    assert cost(jax.grad(loss, (0, 1)), ones(16, 32), ones(7, 32, 32)).flops == 3 * 7 * 2 * 16 * 32 * 32


def test_loops_that_end_when_data_say_so_are_reported():
    one = 2 * 16 * 16 * 16

    def given(x, n):
        return jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)

    def until(x):
        return jax.lax.while_loop(
            lambda c: (c[0] < 9) & (c[1][0, 0] < 1.0), lambda c: (c[0] + 1, c[1] @ c[1]), (0, x)
        )

    for found in (
        functools.partial(cost, given, ones(16, 16), 3),
        functools.partial(cost, until, ones(16, 16)),
    ):
        assert (found().flops, found().unknown_loops) == (one, 1)
        assert found(unknown_trips=10).flops == 10 * one


COUNTED = """
    %body (p: (s32[], s32[], f32[4,8])) -> (s32[], s32[], f32[4,8]) {{
      %p = (s32[], s32[], f32[4,8]) parameter(0)
      %i = s32[] get-tuple-element(%p), index=0
      %step = s32[] constant({step})
      %next = s32[] add(%i, %step)
      %end = s32[] get-tuple-element(%p), index=1
      %x = f32[4,8] get-tuple-element(%p), index=2
      %w = f32[8,8] constant({{...}})
      %y = f32[4,8] dot(%x, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
      ROOT %t = (s32[], s32[], f32[4,8]) tuple(%next, %end, %y)
    }}

    %compare (a: s32[], b: s32[]) -> pred[] {{
      %a = s32[] parameter(0)
      %b = s32[] parameter(1)
      ROOT %c = pred[] compare(%a, %b), direction={direction}
    }}

    %condition (q: (s32[], s32[], f32[4,8])) -> pred[] {{
      %q = (s32[], s32[], f32[4,8]) parameter(0)
      %j = s32[] get-tuple-element(%q), index=0
      %limit = s32[] get-tuple-element(%q), index=1
      {condition}
    }}
"""


@pytest.mark.parametrize(
    "start, step, end, direction, times",
    [
        (0, 1, 28, "LT", 28),
        (2, 3, 12, "LT", 4),  # 2, 5, 8, 11
        (2, 3, 11, "LE", 4),
        (7, -2, 0, "GT", 4),  # 7, 5, 3, 1
        (7, -2, 1, "GE", 4),
        (0, 4, 12, "NE", 3),
        (5, 1, 5, "LT", 0),
        (0, 5, 12, "NE", None),  # passes by
        (0, 0, 12, "LT", None),  # never ends
        (0, 1, 12, "EQ", None),
    ],
)
def test_trips_follow_from_the_counter(start, step, end, direction, times):
    """XLA:TPU does not say how often a loop runs; the limit is a number that the loop hands on."""
    fused = "ROOT %c = pred[] fusion(%j, %limit), kind=kLoop, calls=%compare"
    entry = f"""
      %start = s32[] constant({start})
      %copy = s32[] copy(%start)
      %end = s32[] constant({end})
      %x = f32[4,8] parameter(0)
      %t = (s32[], s32[], f32[4,8]) tuple(%copy, %end, %x)
      ROOT %w = (s32[], s32[], f32[4,8]) while(%t), condition=%condition, body=%body"""
    found = analyse_program(program(entry, COUNTED.format(step=step, direction=direction, condition=fused)))
    assert found.unknown_loops == (times is None)
    assert found.flops == (1 if times is None else times) * 2 * 4 * 8 * 8
    noted = entry + ', backend_config={"known_trip_count":{"n":"6"}}'
    found = analyse_program(program(noted, COUNTED.format(step=step, direction=direction, condition=fused)))
    assert (found.flops, found.unknown_loops) == (6 * 2 * 4 * 8 * 8, 0)


def test_of_two_limits_the_nearer_counts_and_of_one_unknown_none():
    two = """%five = s32[] constant(5)
      %near = pred[] compare(%five, %j), direction=GT
      %far = pred[] compare(%j, %limit), direction=LT
      ROOT %both = pred[] and(%far, %near)"""
    other = two.replace("compare(%five, %j), direction=GT", 'custom-call(%q), custom_call_target="ready"')
    entry = """
      %zero = s32[] constant(0)
      %end = s32[] constant(20)
      %x = f32[4,8] parameter(0)
      %t = (s32[], s32[], f32[4,8]) tuple(%zero, %end, %x)
      ROOT %w = (s32[], s32[], f32[4,8]) while(%t), condition=%condition, body=%body"""
    found = [
        analyse_program(program(entry, COUNTED.format(step=1, direction="LT", condition=c)), unknown_trips=2)
        for c in (two, other)
    ]
    assert [x.flops for x in found] == [5 * 512, 2 * 512]
    assert [x.unknown_loops for x in found] == [0, 1]
    assert found[1].kernels == {"ready": 3}  # a condition is asked once more than it holds


def test_the_most_expensive_branch_counts():
    def either(x, w, small):
        return jax.lax.cond(small, lambda: x @ w[:, :16], lambda: jnp.tanh(x @ w) @ w[:, :16])

    found = cost(either, ones(16, 32), ones(32, 32), jax.ShapeDtypeStruct((), jnp.bool_))
    assert found.flops == 2 * 16 * 32 * (32 + 16)


# --- arithmetic ----------------------------------------------------------------------------------------


def test_convolutions():
    def convolve(padding, x, w, **options):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
        )

    x, w = ones(2, 8, 8, 3), ones(3, 3, 3, 5)
    assert cost(functools.partial(convolve, "VALID"), x, w).flops == 2 * (2 * 6 * 6 * 5) * (3 * 3 * 3)
    # Padded by one on each side, a window at either end of a row has two of its three columns: 8 * 3 - 2.
    assert cost(functools.partial(convolve, "SAME"), x, w).flops == 2 * (2 * 5 * 3) * (8 * 3 - 2) ** 2
    grouped = functools.partial(convolve, "VALID", feature_group_count=4)
    assert cost(grouped, ones(2, 8, 8, 4), ones(3, 3, 1, 8)).flops == 2 * (2 * 6 * 6 * 8) * (3 * 3 * 1)


@pytest.mark.parametrize(
    "window, labels, left, right, out, flops",
    [
        ("", "bf_io->bf", "128,64", "64,32", "128,32", 2 * 128 * 64 * 32),
        ("", "fb_io->bf", "64,128", "64,32", "128,32", 2 * 128 * 64 * 32),
        ("size=4", "b0f_o0i->bf0", "128,4,64", "32,4,64", "128,32,1", 2 * 128 * 4 * 64 * 32),  # two axes in one
        # A batch of products: of 4 x 4 pairs of entries only those of the same number meet.
        ("size=4 stride=3 lhs_dilate=4", "0bf_0io->0bf", "4,128,64", "4,64,32", "4,128,32", 4 * 2 * 128 * 64 * 32),
        ("size=12 pad=11_11 rhs_reversal=1", "f0b_0oi->b0f", "64,1,128", "12,32,64", "128,12,32",
         12 * 2 * 128 * 64 * 32),
    ],
)  # fmt: skip
def test_dots_as_the_tpu_writes_them(window, labels, left, right, out, flops):
    at = f"window={{{window}}}, " if window else ""
    text = f"""
      %a = bf16[{left}]{{0}} parameter(0)
      %b = bf16[{right}]{{0}} parameter(1)
      ROOT %c = bf16[{out}]{{0}} convolution(%a, %b), {at}dim_labels={labels}"""
    assert analyse_program(program(text)).flops == flops


def test_grouped_and_transposed_products():
    assert cost(lambda x, w: jnp.einsum("gnd,gdf->gnf", x, w), ones(4, 8, 16), ones(4, 16, 32)).flops == (
        2 * 4 * 8 * 16 * 32
    )
    assert (
        cost(lambda x, w: jnp.einsum("dn,fd->nf", x, w), ones(16, 8), ones(32, 16)).flops == 2 * 8 * 16 * 32
    )


def mesh(*shape: int) -> Mesh:
    return Mesh(np.asarray(jax.devices()).reshape(shape), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def placed(where: Mesh, spec: P, *shape: int):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(where, spec))


def test_a_device_computes_its_part():
    where = mesh(4, 2)
    x, w = placed(where, P("fsdp"), 64, 32), placed(where, P(None, "tensor"), 32, 16)
    assert cost(lambda x, w: x @ w, x, w).flops == 2 * 64 * 32 * 16 / 8


KERNEL = """
    %a = bf16[4,16]{{1,0}} parameter(0)
    ROOT %k = f32[4]{{0}} custom-call(%a), custom_call_target="{target}", frontend_attributes={{kernel_metadata={{
"note":"{{\\"block\\": 512}}"
}}}}, metadata={{op_name="jit(f)/shard_map/head_draw/pallas_call" stack_frame_id=3}}, backend_config={{{config}}}"""


def test_kernels_cost_what_they_declare():
    estimate = '"cost_estimate":{"flops":"700","transcendentals":"9","bytes_accessed":"80"}'
    estimate = f'"custom_call_config":{{"body":"x",{estimate}}}'
    found = analyse_program(program(KERNEL.format(target="tpu_custom_call", config=estimate)))
    assert (found.flops, found.bytes, found.kernels) == (700, 80, {"head_draw": 1})
    silent = program(KERNEL.format(target="__gpu$xla.gpu.triton", config="grid_x = 8 : i32"))
    found = analyse_program(silent)
    assert (found.flops, found.bytes, found.kernels) == (0, 4 * 16 * 2 + 4 * 4, {"head_draw": 1})
    found = analyse_program(silent, declared={"head_draw": (600, 50)})
    assert (found.flops, found.bytes) == (600, 50)


def test_products_that_libraries_compute():
    gemm = """
      %a = bf16[128,64]{1,0} parameter(0)
      %b = bf16[64,32]{1,0} parameter(1)
      ROOT %c = (bf16[128,32]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}"""  # noqa: E501
    assert analyse_program(program(gemm)).flops == 2 * 128 * 64 * 32
    attend = """
      %q = bf16[8,512,16,64]{3,2,1,0} parameter(0)
      ROOT %o = (bf16[8,16,512,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["8", "16", "512", "512"]}, "mask_type": "CAUSAL", "bmm1_dot_dimension_numbers": {"lhs_contracting_dimensions": ["3"]}}}"""  # noqa: E501
    assert (
        analyse_program(program(attend)).flops == 2 * (2 * 8 * 16 * 512 * 512 * 64) / 2
    )  # two products, half of each


# --- collectives ---------------------------------------------------------------------------------------


def test_collectives_in_a_loop():
    """x [4, 8] f32 on each device: 128 bytes; over fsdp of 4 in groups (0 2 4 6), (1 3 5 7)."""
    where = mesh(4, 2)
    spec = P("fsdp", "tensor")

    def turn(x, _):
        y = jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)  # [16, 8]
        x = jax.lax.psum_scatter(jnp.sin(y), "fsdp", scatter_dimension=0, tiled=True)
        x = jnp.cos(jax.lax.psum(x, "tensor"))
        x = jnp.sin(jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]))
        return jnp.cos(jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True)), None

    run = jax.shard_map(
        lambda x: jax.lax.scan(turn, x, None, length=5)[0],
        mesh=where,
        in_specs=spec,
        out_specs=spec,
        check_vma=False,
    )
    found = {c.kind: c for c in cost(run, placed(where, spec, 16, 16)).collectives}
    fsdp, tensor = ((0, 2, 4, 6), (1, 3, 5, 7)), ((0, 1), (2, 3), (4, 5), (6, 7))
    assert {kind: (c.bytes, c.group, c.groups) for kind, c in found.items() if "permute" not in kind} == {
        "all-gather": (512, 4, fsdp),
        "reduce-scatter": (512, 4, fsdp),
        "all-reduce": (128, 2, tensor),
        "all-to-all": (128, 4, fsdp),
    }
    shift = found["collective-permute"]
    assert (shift.bytes, shift.group) == (128, 8)
    assert set(shift.groups) == {(i, (i + 2) % 8) for i in range(8)}
    assert {c.times for c in found.values()} == {5}
    assert {kind: c.sent for kind, c in found.items()} == {
        "all-gather": 5 * 512 * 3 / 4,
        "reduce-scatter": 5 * 512 * 3 / 4,
        "all-reduce": 5 * 2 * 128 / 2,
        "collective-permute": 5 * 128,
        "all-to-all": 5 * 128 * 3 / 4,
    }
    assert found["all-gather"].shape == "f32[16,8]"
    assert "all_gather" in found["all-gather"].name


@pytest.mark.parametrize(
    "notation, group, groups",
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", 4, ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("replica_groups=[4,2]<=[8]", 2, ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4, ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", 2, ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", 4, ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", 4, ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", 2, ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", 4, None),
        ("replica_groups={}", 8, (tuple(range(8)),)),
    ],
)  # fmt: skip
def test_groups_in_every_notation(notation, group, groups):
    text = f"""
      %x = f32[64]{{0}} parameter(0)
      ROOT %r = f32[64]{{0}} all-reduce(%x), channel_id=1, {notation}, use_global_device_ids=true, to_apply=%add"""
    (found,) = analyse_program(program(text)).collectives
    assert found == Collective("all-reduce", "f32[64]", 256, group, groups, 1)


def test_a_group_of_one_sends_nothing():
    text = """
      %x = f32[64]{0} parameter(0)
      ROOT %r = f32[64]{0} all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%add"""
    assert analyse_program(program(text)).collectives == ()


def test_asynchronous_pairs_count_once():
    """As XLA:GPU writes them, several arrays in one: two gathered to [64, 8] bf16, two of [64, 8] reduced."""
    text = """
      %x = bf16[16,8]{1,0} parameter(0)
      %y = bf16[16,8]{1,0} parameter(1)
      %s = ((bf16[16,8]{1,0}, bf16[16,8]{1,0}), (bf16[64,8]{1,0}, bf16[64,8]{1,0})) all-gather-start(%x, %y), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
      %d = (bf16[64,8]{1,0}, bf16[64,8]{1,0}) all-gather-done(%s)
      %a = bf16[64,8]{1,0} get-tuple-element(%d), index=0
      %b = bf16[64,8]{1,0} get-tuple-element(%d), index=1
      %t = ((bf16[64,8]{1,0}, bf16[64,8]{1,0}), (bf16[16,8]{1,0}, bf16[16,8]{1,0})) reduce-scatter-start(%a, %b), channel_id=2, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, to_apply=%add
      %e = (bf16[16,8]{1,0}, bf16[16,8]{1,0}) reduce-scatter-done(%t)
      %u = bf16[16,8]{1,0} all-reduce-start(%x), channel_id=3, replica_groups=[4,2]<=[8], to_apply=%add
      %f = bf16[16,8]{1,0} all-reduce-done(%u)
      %p = (bf16[16,8]{1,0}, bf16[16,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%f), channel_id=4, source_target_pairs={{0,2},{2,0}}
      ROOT %g = bf16[16,8]{1,0} collective-permute-done(%p)"""  # noqa: E501
    found = [(c.kind, c.shape, c.bytes, c.group) for c in analyse_program(program(text)).collectives]
    assert found == [
        ("all-gather", "(bf16[64,8], bf16[64,8])", 2 * 1024, 4),
        ("reduce-scatter", "(bf16[16,8], bf16[16,8])", 2 * 1024, 4),
        ("all-reduce", "bf16[16,8]", 256, 2),
        ("collective-permute", "bf16[16,8]", 256, 2),
    ]


GATHER = """%g = bf16[64,8]{1,0} all-gather(%x), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}"""  # noqa: E501


def test_what_the_tpu_does_beside_a_collective_counts_once():
    """A gather that starts in one fusion, goes on in another, beside a product, and ends in a third."""
    start = f"""
    %start (x: bf16[16,8]) -> (bf16[16,8], bf16[64,8]) {{
      %x = bf16[16,8]{{1,0}} parameter(0)
      {GATHER}
      ROOT %s = (bf16[16,8]{{1,0}}, bf16[64,8]{{1,0}}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
    }}"""
    beside = f"""
    %beside (x: bf16[16,8], a: bf16[4,8], b: bf16[8,2]) -> (bf16[4,2], bf16[64,8]) {{
      %x = bf16[16,8]{{1,0}} parameter(0)
      %a = bf16[4,8]{{1,0}} parameter(1)
      %b = bf16[8,2]{{1,0}} parameter(2)
      %y = bf16[4,2]{{1,0}} convolution(%a, %b), dim_labels=bf_io->bf
      {GATHER}
      ROOT %t = (bf16[4,2]{{1,0}}, bf16[64,8]{{1,0}}) tuple(%y, %g)
    }}"""
    done = f"""
    %done (x: bf16[16,8]) -> bf16[64,8] {{
      %x = bf16[16,8]{{1,0}} parameter(0)
      {GATHER}
      ROOT %d = bf16[64,8]{{1,0}} custom-call(%x, %g), custom_call_target="AsyncCollectiveDone"
    }}"""
    entry = """
      %w = bf16[16,8]{1,0} parameter(0)
      %a = bf16[4,8]{1,0} parameter(1)
      %b = bf16[8,2]{1,0} parameter(2)
      %f1 = (bf16[16,8]{1,0}, bf16[64,8]{1,0}) fusion(%w), calls=%start, metadata={op_name="jit(f)/dot"}
      %f2 = (bf16[4,2]{1,0}, bf16[64,8]{1,0}) fusion(%w, %a, %b), kind=kOutput, calls=%beside
      ROOT %f3 = bf16[64,8]{1,0} fusion(%w), kind=kCustom, calls=%done"""
    found = analyse_program(program(entry, start, beside, done))
    assert [(c.kind, c.bytes, c.times, c.name) for c in found.collectives] == [
        ("all-gather", 1024, 1, "jit(f)/dot")
    ]
    assert found.flops == 2 * 4 * 8 * 2
    gathered, product = 256 + 1024, 2 * (4 * 8 + 8 * 2 + 4 * 2)
    assert found.bytes == gathered + product


def test_an_all_reduce_of_which_a_slice_is_taken_is_a_reduce_scatter():
    """XLA:TPU writes it so: each of 8 devices keeps 8 of 64 rows of f32[64, 4]."""
    fused = """
    %all-reduce-scatter (x: f32[64,4]) -> f32[8,4] {
      %x = f32[64,4]{1,0} parameter(0)
      %r = f32[64,4]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
      %id = u32[] partition-id()
      %eight = u32[] constant(8)
      %at = u32[] multiply(%id, %eight)
      %zero = u32[] constant(0)
      ROOT %s = f32[8,4]{1,0} dynamic-slice(%r, %at, %zero), dynamic_slice_sizes={8,4}
    }"""
    entry = """
      %x = f32[64,4]{1,0} parameter(0)
      ROOT %f = f32[8,4]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter"""
    found = analyse_program(program(entry, fused))
    assert found.collectives == (Collective("reduce-scatter", "f32[8,4]", 1024, 8, (tuple(range(8)),), 1),)
    assert found.collectives[0].sent == 1024 * 7 / 8
    assert found.bytes == 1024 + 128
    whole = fused.replace("ROOT %s", "%s").replace(
        "    }", "      ROOT %t = (f32[64,4]{1,0}, f32[8,4]) tuple(%r, %s)\n    }"
    )
    (kept,) = analyse_program(program(entry, whole)).collectives
    assert kept.kind == "all-reduce"


# --- memory --------------------------------------------------------------------------------------------


def test_updates_in_place_and_slices_count_as_slices():
    """A loop of 100 turns over f32[100, 64]: each reads a row, and writes one."""

    def rows(xs):
        return jax.lax.scan(lambda _, x: (None, jnp.sin(x)), None, xs)[1]

    row, whole = 64 * 4, 100 * 64 * 4
    found = cost(rows, ones(100, 64)).bytes
    # Read from the array and written to it; before and after, a few times more where steps are not fused.
    assert 2 * 100 * row <= found <= 12 * 100 * row + 4 * whole < 100 * whole


def test_bytes_of_fusions_and_slices():
    update = """
    %update (x: f32[28,64], row: f32[1,64], i: s32[]) -> f32[28,64] {
      %x = f32[28,64]{1,0} parameter(0)
      %row = f32[1,64]{1,0} parameter(1)
      %i = s32[] parameter(2)
      %zero = s32[] constant(0)
      %new = f32[1,64]{1,0} negate(%row)
      ROOT %u = f32[28,64]{1,0} dynamic-update-slice(%x, %new, %i, %zero)
    }"""
    take = """
    %take (x: f32[28,64], i: s32[]) -> bf16[64] {
      %x = f32[28,64]{1,0} parameter(0)
      %i = s32[] parameter(1)
      %zero = s32[] constant(0)
      %c = bf16[28,64]{1,0} convert(%x)
      %s = bf16[1,64]{1,0} dynamic-slice(%c, %i, %zero), dynamic_slice_sizes={1,64}
      ROOT %b = bf16[64]{0} bitcast(%s)
    }"""

    def moved(instruction: str) -> float:
        text = f"""
      %x = f32[28,64]{{1,0}} parameter(0)
      %row = f32[1,64]{{1,0}} parameter(1)
      %i = s32[] parameter(2)
      %ids = s32[5]{{0}} parameter(3)
      %five = f32[5,64]{{1,0}} parameter(4)
      %chip = f32[28,64]{{1,0:T(8,128)S(1)}} parameter(5)
      ROOT %r = {instruction}"""
        return analyse_program(program(text, update, take)).bytes

    row, whole, number = 64 * 4, 28 * 64 * 4, 4
    assert moved("f32[28,64]{1,0} negate(%x)") == 2 * whole
    assert moved("f32[28,64]{1,0} fusion(%x, %row, %i), kind=kLoop, calls=%update") == 2 * row + number
    assert moved("bf16[64]{0} fusion(%x, %i), kind=kLoop, calls=%take") == row + row / 2 + number
    assert moved("f32[1,64]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,64}") == 2 * row
    assert moved("f32[28,64]{1,0} dynamic-update-slice(%x, %row, %i, %i)") == 2 * row
    assert moved("f32[5,64]{1,0} gather(%x, %ids), slice_sizes={1,64}") == 2 * 5 * row
    scatter = "f32[28,64]{1,0} scatter(%x, %ids, %five), to_apply=%add"
    assert moved(scatter) == (1 + 2) * 5 * row + 5 * number  # five rows come, and are added to five others
    assert moved("f32[28,64]{1,0} bitcast(%x)") == 0
    assert moved("f32[28,64]{1,0} fusion(%chip, %row, %i), kind=kLoop, calls=%update") == 2 * row + number
    # On a TPU's chip only what comes from memory or goes there counts.
    assert moved("f32[28,64]{1,0:T(8,128)S(1)} negate(%x)") == whole
    assert moved("f32[28,64]{1,0:T(8,128)S(1)} negate(%chip)") == 0
    assert (
        moved("(f32[28,64]{1,0:T(8,128)S(1)}, f32[28,64]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)")
        == whole
    )
    assert (
        moved("((f32[28,64]{1,0}), f32[1,64]{1,0}, s32[]{:S(2)}) slice-start(%x), slice={[0:1], [0:64]}")
        == 2 * row
    )


# --- text that is none ---------------------------------------------------------------------------------


def test_unknown_instructions_move_their_arrays():
    text = """
      %x = f32[64]{0} parameter(0)
      ROOT %y = f32[32]{0} brand-new-thing(%x), answer={42}"""
    assert analyse_program(program(text)).bytes == (64 + 32) * 4


GOOD = """HloModule m

%inner (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %b = f32[4]{0} negate(%a)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %y = f32[4]{0} fusion(%x), kind=kLoop, calls=%inner
}
"""


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("ENTRY %main", "%main", "no ENTRY"),
        ("calls=%inner\n}", "calls=%inner", "does not end"),
        ("fusion(%x)", "fusion(%z)", "reads z"),
        ("calls=%inner", "calls=%outer", "a computation 'outer'"),
        ("fusion(%x), kind", "fusion(%x, kind", "not closed"),
        ("f32[4]{0} negate(%a)", "negated", "not an instruction"),
        ("  ROOT %b", "  %b", "0 roots"),
        ("%a = f32[4]{0} parameter(0)", "a line that says nothing", "not an instruction"),
    ],
)
def test_malformed_text_is_refused(old, new, message):
    assert analyse_program(GOOD).bytes == 32
    assert old in GOOD
    with pytest.raises(ValueError, match=message):
        analyse_program(GOOD.replace(old, new))
    with pytest.raises(ValueError, match="no ENTRY"):
        analyse_program("")
