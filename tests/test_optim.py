"""AdamW against torch, guarded updates, microbatches, and where a state lives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import one_device

from cooper_jax.configs import base
from cooper_jax.runtime import mesh, optim
from cooper_jax.runtime.mesh import Layout, ParamSpec
from cooper_jax.settings.setup_errors import SetupError

RULES = (("batch", ("data", "fsdp")), ("embed", "fsdp"), ("ffn", "tensor"), ("layers", None))
SPECS = {
    "w": ParamSpec((4, 6), ("embed", "ffn")),
    "norm": {"scale": ParamSpec((3,), ("layers",), init="ones")},
}


def section(**changes):
    c = base.optimiser(lr=1e-2, warmup_steps=0)
    c.update(changes)
    return optim.OptimiserConfig.from_config(c, "policy.optimiser")


def params_and_grads(steps=1, seed=0):
    rng = np.random.default_rng(seed)

    def draw():
        return {
            "w": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32),
            "norm": {"scale": jnp.asarray(rng.normal(size=3), jnp.float32)},
        }

    return draw(), [draw() for _ in range(steps)]


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.fixture
def layout():
    return Layout(mesh.make_mesh(2, 2, 2), RULES)


# --- AdamW -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [1e9, 0.5])
def test_adamw_equals_torch(clip_norm):
    torch = pytest.importorskip("torch")
    params, grads = params_and_grads(steps=4)
    cfg = section(lr=3e-2, warmup_steps=3, weight_decay=0.1, b1=0.8, b2=0.95, clip_norm=clip_norm)
    opt = optim.make_optimiser(cfg)
    state = optim.init_state(params, opt)
    theirs = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for x in jax.tree.leaves(params)]
    adamw = torch.optim.AdamW(theirs, lr=3e-2, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1)
    warmup = torch.optim.lr_scheduler.LambdaLR(adamw, lambda n: min(1.0, (n + 1) / 3))
    for g in grads:
        state, metrics = optim.apply_update(state, g, jnp.float32(1.0), opt)
        for p, x in zip(theirs, jax.tree.leaves(g), strict=True):
            p.grad = torch.tensor(np.asarray(x))
        norm = torch.nn.utils.clip_grad_norm_(theirs, clip_norm)
        assert float(metrics["lr"]) == pytest.approx(adamw.param_groups[0]["lr"], rel=1e-6)
        assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-6)
        adamw.step()
        warmup.step()
    for ours, p in zip(jax.tree.leaves(state.params), theirs, strict=True):
        np.testing.assert_allclose(ours, p.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert int(state.updates) == 4 and int(state.skipped) == 0


def test_first_update_by_hand():
    # Adam's first step is lr * sign(g), bias-corrected m / sqrt(v) being g / |g|; decay takes lr * 0.1 * p.
    opt = optim.make_optimiser(section(lr=0.5, warmup_steps=2, weight_decay=0.1))
    state = optim.init_state({"p": jnp.array([2.0, -4.0])}, opt)
    state, metrics = optim.apply_update(state, {"p": jnp.array([0.3, 0.4])}, jnp.float32(0.0), opt)
    assert float(metrics["lr"]) == 0.25 and float(metrics["grad_norm"]) == pytest.approx(0.5)
    np.testing.assert_allclose(
        state.params["p"], [2.0 - 0.25 * (1 + 0.2), -4.0 - 0.25 * (1 - 0.4)], rtol=1e-5
    )


def test_a_first_moment_in_bfloat16_learns_as_well():
    """A noisy regression in 64 dimensions: the same loss within a hundredth, from 2 bytes less a weight."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(256, 64)) * np.geomspace(0.1, 3.0, 64), jnp.float32)
    y = x @ jnp.asarray(rng.normal(size=64), jnp.float32) + 0.1 * jnp.asarray(
        rng.normal(size=256), jnp.float32
    )

    def loss_of(params, rows):
        return jnp.mean((x[rows] @ params["w"] - y[rows]) ** 2)

    def train(dtype):
        opt = optim.make_optimiser(section(lr=3e-2, warmup_steps=10, weight_decay=0.0, first_moment=dtype))
        state = optim.init_state({"w": jnp.zeros(64)}, opt)

        @jax.jit
        def update(state, rows):
            loss, grads = jax.value_and_grad(loss_of)(state.params, rows)
            return optim.apply_update(state, grads, loss, opt)[0]

        for step in range(400):
            state = update(state, jnp.asarray(np.random.default_rng(step).integers(256, size=32)))
        return state, float(loss_of(state.params, jnp.arange(256)))

    (full, loss), (half, half_loss) = train("float32"), train("bfloat16")
    assert loss < 0.05 * float(jnp.mean(y**2))  # it has learned
    assert half_loss == pytest.approx(loss, rel=0.01)
    types = [[str(m.dtype) for m in jax.tree.leaves(s.opt_state) if m.shape == (64,)] for s in (full, half)]
    assert types == [["float32", "float32"], ["bfloat16", "float32"]]
    with pytest.raises(SetupError, match="first_moment='int8': it is one of float32, bfloat16"):
        section(first_moment="int8")


def test_the_rate_warms_up_and_stays():
    opt = optim.make_optimiser(section(lr=1.0, warmup_steps=4))
    rates = [float(opt.schedule(jnp.int32(n))) for n in range(7)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert float(optim.make_optimiser(section(lr=0.5, warmup_steps=0)).schedule(jnp.int32(0))) == 0.5


def test_rates_fall_to_zero():
    def rates(decay, warmup):
        opt = optim.make_optimiser(section(lr=1.0, warmup_steps=warmup, decay=decay), 6)
        return [float(opt.schedule(jnp.int32(n))) for n in range(7)]

    assert rates("linear", 2) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])
    half = 0.5**0.5
    cosine = [0.5, 1.0, 1.0, (1 + half) / 2, 0.5, (1 - half) / 2, 0.0]
    assert rates("cosine", 2) == pytest.approx(cosine, abs=1e-6)
    assert rates("constant", 0) == [1.0] * 7
    with pytest.raises(
        SetupError, match="policy.optimiser.decay='step': it is one of constant, linear, cosine"
    ):
        section(decay="step")


@pytest.mark.parametrize("change", [dict(lr=-1.0), dict(clip_norm=0.0), dict(b1=1.0), dict(eps=0.0)])
def test_values_out_of_range_are_refused(change):
    ((field, value),) = change.items()
    with pytest.raises(ValueError, match=f"policy.optimiser.{field}={value}: it must be"):
        section(**change)


# --- states ------------------------------------------------------------------------------------------


def test_init_copies_because_updates_donate():
    params, (grads,) = params_and_grads()
    before = bits(params)
    opt = optim.make_optimiser(section())
    state = optim.init_state(params, opt)
    step = jax.jit(lambda s, g: optim.apply_update(s, g, jnp.float32(1.0), opt)[0], donate_argnums=0)
    moved = step(state, grads)
    assert bits(params) == before  # readable, and as they were
    assert bits(moved.params) != before


def test_only_float32_becomes_a_master_weight():
    with pytest.raises(ValueError, match=r"\['w'\].*bfloat16.*float32"):
        optim.init_state({"w": jnp.zeros(3, jnp.bfloat16)}, optim.make_optimiser(section()))


def test_a_state_lies_where_its_parameters_lie(layout):
    opt = optim.make_optimiser(section())
    params = mesh.init_params(jax.random.key(0), SPECS, layout)
    state = optim.init_state(params, opt)
    places = optim.state_shardings(opt, SPECS, layout)
    assert jax.tree.structure(places) == jax.tree.structure(state)
    for x, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (4, 6)]
    assert len(moments) == 2  # AdamW's two
    assert all(m.sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor") for m in moments)


# --- updates that do not take place ------------------------------------------------------------------


@pytest.mark.parametrize("case", ["loss nan", "loss inf", "gradient nan", "gradient inf"])
def test_a_non_finite_update_is_skipped_and_counted(case):
    params, (first, bad, last) = params_and_grads(steps=3)
    opt = optim.make_optimiser(section(warmup_steps=5))
    value = jnp.float32(case.split()[1])
    loss = value if case.startswith("loss") else jnp.float32(1.0)
    bad = bad if case.startswith("loss") else {**bad, "w": bad["w"].at[1, 2].set(value)}
    state, _ = optim.apply_update(optim.init_state(params, opt), first, jnp.float32(1.0), opt)
    same, metrics = optim.apply_update(state, bad, loss, opt)
    assert bits((same.params, same.opt_state, same.updates)) == bits(
        (state.params, state.opt_state, state.updates)
    )
    assert int(same.skipped) == 1 and float(metrics["skipped"]) == 1.0 and float(metrics["lr"]) == 0.0
    # What follows is as if the bad one had never been.
    after, _ = optim.apply_update(same, last, jnp.float32(1.0), opt)
    straight, _ = optim.apply_update(state, last, jnp.float32(1.0), opt)
    assert bits((after.params, after.opt_state)) == bits((straight.params, straight.opt_state))


def test_an_update_without_data_moves_nothing_and_is_not_counted():
    params, (first, _) = params_and_grads(steps=2)
    opt = optim.make_optimiser(section())
    state, _ = optim.apply_update(optim.init_state(params, opt), first, jnp.float32(1.0), opt)
    zeros = jax.tree.map(jnp.zeros_like, params)
    same, metrics = optim.apply_update(state, zeros, jnp.float32(0.0), opt, enabled=jnp.bool_(False))
    assert bits(same) == bits(state)
    assert {k: float(v) for k, v in metrics.items()} == {"grad_norm": 0.0, "lr": 0.0, "skipped": 0.0}
    # The guard is needed: decay and moments would have moved the weights.
    moved, _ = optim.apply_update(state, zeros, jnp.float32(0.0), opt)
    assert bits(moved.params) != bits(state.params)


# --- microbatches ------------------------------------------------------------------------------------


def test_rows_are_dealt_out_in_turn():
    rows = jnp.arange(1, 6)
    np.testing.assert_array_equal(optim.split_rows(rows, 2, one_device()), [[1, 4], [2, 5], [3, 0]])
    np.testing.assert_array_equal(optim.split_rows(rows, 8, one_device()), [[1, 2, 3, 4, 5]])
    # No larger than even parts need: 6 rows at most 4 at a time are 3 + 3, not 4 + 2.
    assert optim.split_rows(jnp.arange(6), 4, one_device()).shape == (2, 3)
    with pytest.raises(ValueError, match="microbatch is 0"):
        optim.split_rows(rows, 0, one_device())


def test_a_microbatch_is_a_multiple_of_the_batch_shards(layout):
    split = jax.jit(lambda x: optim.split_rows(x, 3, layout))
    out = split(jnp.arange(1, 11))
    assert out.shape == (3, 4)  # 3 rows at a time become 4, one for each shard
    assert sorted(np.asarray(out).ravel()) == [0, 0, *range(1, 11)]
    # A shard's neighbouring rows stay with it: row i of 12 lives on shard i // 3, as does place i // 3 of 4.
    np.testing.assert_array_equal(split(jnp.arange(12)), np.arange(12).reshape(4, 3).T)


def squares(params, rows):
    """A weighted sum of losses whose rows of zeros count for nothing."""
    out = rows["weight"] * jnp.tanh(rows["x"] @ params["w"]) ** 2
    return out.sum(), {"count": (rows["weight"] > 0).sum(), "most": rows["x"].max()}


@pytest.mark.parametrize("microbatch", [1, 2, 3, 5, 7, 100])
def test_microbatches_leave_loss_and_gradient_unchanged(microbatch):
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.normal(size=3), jnp.float32)}
    batch = {
        "x": jnp.asarray(rng.normal(size=(7, 3)), jnp.float32),
        "weight": jnp.asarray(rng.uniform(size=7) + 0.1, jnp.float32),
    }
    (loss, _), grads = jax.value_and_grad(squares, has_aux=True)(params, batch)
    places = mesh.make_shardings(one_device(), {"w": ParamSpec((3,), (None,))})
    got_loss, got, aux = optim.accumulate_gradients(squares, params, batch, microbatch, one_device(), places)
    np.testing.assert_allclose(got_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(got["w"], grads["w"], rtol=1e-5)
    assert int(aux["count"].sum()) == 7 and aux["count"].shape == (-(-7 // min(microbatch, 7)),)
    assert float(aux["most"].max()) == float(batch["x"].max())


def test_accumulation_on_a_mesh_equals_one_device(layout):
    rng = np.random.default_rng(2)
    specs = {"w": ParamSpec((8,), ("embed",))}
    params = mesh.init_params(jax.random.key(1), specs, layout)
    batch = {
        "x": jnp.asarray(rng.normal(size=(10, 8)), jnp.float32),
        "weight": jnp.ones(10, jnp.float32),
    }
    places = mesh.make_shardings(layout, specs)
    run = jax.jit(lambda p, b: optim.accumulate_gradients(squares, p, b, 4, layout, places))
    loss, grads, _ = run(params, batch)
    single = jax.device_put(params, jax.devices()[0])
    (expected, _), expected_grads = jax.value_and_grad(squares, has_aux=True)(single, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(grads["w"], expected_grads["w"], rtol=1e-5, atol=1e-6)
    assert grads["w"].sharding.is_equivalent_to(places["w"], 1)


@pytest.mark.parametrize("microbatch", [1, 2, 4, 9])
def test_map_rows_keeps_the_order(microbatch):
    x = jnp.arange(7.0)
    out = optim.map_rows(
        lambda rows: (rows**2, rows[:, None] * jnp.ones((1, 2))), x, microbatch, one_device()
    )
    np.testing.assert_array_equal(out[0], np.arange(7.0) ** 2)
    np.testing.assert_array_equal(out[1], np.repeat(np.arange(7.0)[:, None], 2, axis=1))


def test_map_rows_on_a_mesh(layout):
    run = jax.jit(lambda x: optim.map_rows(lambda rows: 2 * rows, x, 3, layout))
    np.testing.assert_array_equal(run(layout.put(np.arange(8), "batch")), 2 * np.arange(8))
    np.testing.assert_array_equal(run(np.arange(10)), 2 * np.arange(10))
