"""GRPO by hand, by enumeration, against torch, and through the model; imitation beside it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from cooper_jax.configs import base
from cooper_jax.model import transformer
from cooper_jax.policy import grpo, imitation, losses
from cooper_jax.policy.advantages import normalise_rewards
from cooper_jax.runtime import mesh, optim
from cooper_jax.runtime.mesh import Layout
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.types import PolicyBatch

CONFIG = tiny_models.config(
    family="qwen2", vocab_size=29, width=16, head_dim=4, ffn=24, tied=False, vocab_multiple=4
)
P, T, N, TEMPERATURE = 5, 6, 7, 0.7  # 7 rows in microbatches of 4 leave one to pad


def section(**changes):
    c = base.get_config().policy
    c.update(dict(microbatch=4, remat=True, kl_coef=0.1, kl_clamp=0.0))
    c.update(changes)
    return losses.PolicyConfig.from_config(c)


def adamw(**changes):
    c = base.optimiser(lr=1e-2, warmup_steps=0)
    c.update(changes)
    return optim.make_optimiser(optim.OptimiserConfig.from_config(c, "policy.optimiser"))


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def model_params():
    """Initial weights: probabilities are far from uniform."""
    params = mesh.init_params(
        jax.random.key(0), transformer.param_specs(CONFIG, head="logits"), tiny_models.one_device()
    )
    return params


def policy_batch(seed=0):
    """Left-padded prompts of 2 to P tokens, responses of 1 to T - 1 tokens.

    The last response is truncated at T.  The first row is one that fills up a batch: nothing in it is valid,
    and its advantage is NaN.
    """
    rng = np.random.default_rng(seed)
    prompt, length = rng.integers(2, P + 1, N), rng.integers(1, T, N)
    length[-1], prompt[0], length[0] = T, 0, 0
    column = np.arange(P + T)
    valid = (column[None] >= P - prompt[:, None]) & (column[None] < P + length[:, None])
    tokens = np.where(valid, rng.integers(1, CONFIG.vocab_size, (N, P + T)), 0)
    advantages = rng.normal(size=N)
    advantages[0] = np.nan

    def noise(scale):
        return jnp.asarray(rng.normal(size=(N, T)) * scale, jnp.float32)

    return PolicyBatch(
        tokens=jnp.asarray(tokens, jnp.int32),
        valid=jnp.asarray(valid),
        response_mask=jnp.asarray(valid[:, P:]),
        advantages=jnp.asarray(advantages, jnp.float32),
        old_logprobs=noise(1.0) - 3.0,
        ref_logprobs=noise(0.5) - 3.0,
        rollout_logprobs=noise(0.1) - 3.0,
    )


# --- advantages --------------------------------------------------------------------------------------


def advantages(rewards, group_size, *, baseline="group_mean", std="group", eps=0.0, floor=0.0):
    a, share = normalise_rewards(
        jnp.asarray(rewards, jnp.float32), group_size, baseline=baseline, std=std, eps=eps, floor=floor
    )
    return np.asarray(a), float(share)


def test_advantages_by_hand():
    # 1, 2, 3: mean 2, sample deviation 1.  0, 0, 3: mean 1, sample variance (1 + 1 + 4) / 2 = 3.
    a, share = advantages([1, 2, 3, 0, 0, 3], 3)
    np.testing.assert_allclose(a, [-1, 0, 1, *(np.array([-1, -1, 2]) / np.sqrt(3))], rtol=1e-6)
    assert share == 0.0
    np.testing.assert_allclose(advantages([1, 2, 3], 3, eps=1.0)[0], [-0.5, 0, 0.5])
    np.testing.assert_allclose(advantages([1, 2, 3], 3, floor=4.0)[0], [-0.25, 0, 0.25])
    np.testing.assert_allclose(advantages([1, 2, 3], 3, floor=0.5)[0], [-1, 0, 1])
    np.testing.assert_allclose(advantages([0, 0, 3], 3, std="none")[0], [-1, -1, 2])


def test_a_group_without_variance_gets_exact_zeros():
    # .1 summed three times and divided by 3 is not .1 in f32; divided by a deviation of as little, it would count.
    a, share = advantages([0.1, 0.1, 0.1, 0, 1, 2], 3, eps=1e-12)
    assert a[:3].tolist() == [0.0, 0.0, 0.0] and a[5] > 0.9
    assert share == 0.5
    assert advantages([0.7, 0.2, 0.9], 1)[0].tolist() == [0.0, 0.0, 0.0]
    assert advantages([0.7, 0.2, 0.9], 1)[1] == 1.0


def test_a_reward_that_is_not_finite_is_left_out():
    a, share = advantages([1, np.nan, 2, 3, np.inf, 5, np.nan, -np.inf], 4)
    np.testing.assert_allclose(a[:4], [-1, 0, 0, 1], rtol=1e-6)  # as the group 1, 2, 3
    assert a[4:].tolist() == [0.0] * 4  # a single finite reward has nothing beside it
    assert share == 0.5
    assert advantages([np.nan] * 2, 2) == (pytest.approx([0.0, 0.0]), 1.0)


def test_advantages_refuse_a_ragged_batch():
    with pytest.raises(ValueError, match="7 rewards do not split into groups of 4"):
        advantages(np.zeros(7), 4)


# --- weights -----------------------------------------------------------------------------------------


def test_token_weights_by_hand():
    mask = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    by_name = {name: np.asarray(losses.token_weights(mask, name, 4)) for name in losses.AGGREGATIONS}
    m = np.asarray(mask, np.float32)
    np.testing.assert_allclose(by_name["token_mean"], m / 4)
    np.testing.assert_allclose(by_name["sequence_mean"], m * [[1 / 6], [1 / 2], [0]], rtol=1e-6)
    np.testing.assert_allclose(by_name["sequence_sum"], m / 8)
    for name in losses.AGGREGATIONS:
        assert not np.asarray(losses.token_weights(jnp.zeros((2, 3), bool), name, 4)).any()
    with pytest.raises(ValueError, match="'mean'.*token_mean"):
        losses.token_weights(mask, "mean", 4)


# --- KL estimators: a policy of three symbols, enumerated -----------------------------------------------

THETA = np.array([0.3, -1.1, 0.9])
REFERENCE = np.array([0.5, 0.3, 0.2])


def enumerate_kl(estimator, clamp=0.0):
    """The estimate's expected value and its expected gradient, the three samples weighted by the policy."""
    weights = jax.nn.softmax(jnp.asarray(THETA, jnp.float32))

    def expected(theta):
        return (
            weights * losses.kl_estimate(jax.nn.log_softmax(theta), jnp.log(REFERENCE), estimator, clamp)
        ).sum()

    return jax.value_and_grad(expected)(jnp.asarray(THETA, jnp.float32))


def test_kl_estimators_against_enumeration():
    pi = np.exp(THETA) / np.exp(THETA).sum()
    d = np.log(pi / REFERENCE)
    divergence = (pi * d).sum()
    reverse_gradient = pi * (d - divergence)  # of KL(pi || ref), in the logits
    forward_gradient = pi - REFERENCE  # of KL(ref || pi)
    expected = {
        "k1": (divergence, np.zeros(3)),
        "k2": ((pi * d**2).sum() / 2, reverse_gradient),
        "k3": (divergence, forward_gradient),
    }
    assert abs(reverse_gradient - forward_gradient).max() > 0.05  # the two can be told apart
    for estimator, (value, gradient) in expected.items():
        got_value, got_gradient = enumerate_kl(estimator)
        np.testing.assert_allclose(got_value, value, atol=1e-6, err_msg=estimator)
        np.testing.assert_allclose(got_gradient, gradient, atol=1e-6, err_msg=estimator)


def test_the_clamp_holds_the_estimate():
    d = jnp.array([-30.0, -1.0, 30.0])
    for estimator, formula in [
        ("k1", lambda d: d),
        ("k2", lambda d: d**2 / 2),
        ("k3", lambda d: np.exp(-d) - 1 + d),
    ]:
        value, gradient = (
            f(d)
            for f in (
                lambda d: losses.kl_estimate(d, jnp.zeros(3), estimator, 2.0),  # noqa: B023
                jax.grad(lambda d: losses.kl_estimate(d, jnp.zeros(3), estimator, 2.0).sum()),  # noqa: B023
            )
        )
        held = np.array([-20.0, -1.0, 20.0])  # the log-ratio itself, against overflow
        np.testing.assert_allclose(value, np.clip(formula(held), -2, 2), rtol=1e-6)
        assert gradient[0] == 0 and gradient[1] != 0 and gradient[2] == 0
    with pytest.raises(ValueError, match="'k4'.*k1, k2, k3"):
        losses.kl_estimate(d, d, "k4", 0.0)


# --- the loss ----------------------------------------------------------------------------------------


def test_clipping_by_hand():
    """Columns: ratios .5, 1, 1.5 and 4.  Rows: advantages 2 and -2."""
    ratio = np.array([0.5, 1.0, 1.5, 4.0])
    logprobs = jnp.asarray(np.log(ratio)[None].repeat(2, 0), jnp.float32)
    zeros, mask = jnp.zeros((2, 4)), jnp.ones((2, 4), bool)
    cfg = section(clip_low=0.2, clip_high=0.3, dual_clip=3.0, kl_coef=0.0)

    def loss(lp):
        return losses.policy_loss(
            lp, zeros, zeros, jnp.array([2.0, -2.0]), mask.astype(jnp.float32), mask, cfg
        )

    value, sums = loss(logprobs)
    # A = 2: .5 and 1 as they are, 1.5 and 4 held at 1.3.  A = -2: .5 held at .8, 1 and 1.5 as they are, 4 at 3.
    assert float(value) == pytest.approx(-2 * (0.5 + 1 + 1.3 + 1.3) + 2 * (0.8 + 1 + 1.5 + 3), rel=1e-6)
    assert {k: float(sums[k]) for k in ("clip_low", "clip_high", "dual_clip")} == {
        "clip_low": 1.0,
        "clip_high": 2.0,
        "dual_clip": 1.0,
    }
    assert float(sums["ratio_mean"]) == pytest.approx(14.0, rel=1e-6)
    assert (float(sums["ratio_min"]), float(sums["ratio_max"])) == pytest.approx((0.5, 4.0), rel=1e-6)
    gradient = jax.grad(lambda lp: loss(lp)[0])(logprobs)  # -A ratio where nothing is held
    np.testing.assert_allclose(gradient, [[-1, -2, 0, 0], [0, 2, 3, 0]], rtol=1e-6)


def test_a_ratio_beyond_float32_has_a_finite_gradient():
    mask = jnp.ones((2, 1), bool)
    zeros = jnp.zeros((2, 1))
    for advantage in (1.0, -1.0):
        value, gradient = jax.value_and_grad(
            lambda lp, a=advantage: losses.policy_loss(
                lp, zeros, zeros, jnp.full(2, a), zeros + 1.0, mask, section(dual_clip=0.0)
            )[0]
        )(jnp.array([[200.0], [-200.0]]))
        assert np.isfinite(value) and np.isfinite(gradient).all()


def torch_loss(torch, logits, targets, old, ref, adv, mask, cfg, max_new_tokens):
    """Token by token, in plain Python over torch scalars (double precision)."""
    logprobs = torch.log_softmax(logits / TEMPERATURE, dim=-1)
    rows = [n for n in range(mask.shape[0]) if mask[n].any()]
    total = torch.zeros((), dtype=torch.float64)
    for n in rows:
        for t in np.flatnonzero(mask[n]):
            lp = logprobs[n, t, int(targets[n, t])]
            r, a = torch.exp(lp - old[n, t]), adv[n]
            held = min(max(r.item(), 1 - cfg.clip_low), 1 + cfg.clip_high)
            inside = held == r.item()
            surrogate = r * a if inside or (r * a).item() < held * a else torch.tensor(held * a)
            if a < 0 and cfg.dual_clip and surrogate.item() < cfg.dual_clip * a:
                surrogate = torch.tensor(cfg.dual_clip * a)
            d = lp - ref[n, t]
            term = {"k1": d, "k2": d * d / 2, "k3": torch.exp(-d) - 1 + d}[cfg.kl_estimator]
            if cfg.kl_clamp:
                term = torch.clamp(term, -cfg.kl_clamp, cfg.kl_clamp)
            weight = {
                "token_mean": 1 / mask.sum(),
                "sequence_mean": 1 / (mask[n].sum() * len(rows)),
                "sequence_sum": 1 / (len(rows) * max_new_tokens),
            }[cfg.aggregation]
            total = total + weight * (cfg.kl_coef * term - surrogate)
    return total


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(aggregation="sequence_mean", kl_estimator="k1", clip_low=0.1, clip_high=0.5),
        dict(aggregation="sequence_sum", kl_estimator="k2", dual_clip=0.0, kl_clamp=0.5),
        dict(dual_clip=1.5, kl_clamp=0.0, kl_coef=0.5),
    ],
)
def test_loss_and_gradient_equal_torch(changes):
    torch = pytest.importorskip("torch")
    cfg = section(**changes)
    rng = np.random.default_rng(3)
    n, t, v = 8, 12, 5
    logits, targets = rng.normal(size=(n, t, v)), rng.integers(0, v, (n, t))
    mask = np.arange(t)[None] < np.array([12, 1, 0, 5, 12, 7, 3, 9])[:, None]
    adv = rng.normal(size=n)
    lp = torch.log_softmax(torch.tensor(logits) / TEMPERATURE, -1).numpy()
    current = np.take_along_axis(lp, targets[..., None], -1)[..., 0]
    old, ref = current + rng.normal(size=(n, t)), current + 0.5 * rng.normal(size=(n, t))

    theirs = torch.tensor(logits, requires_grad=True)
    expected = torch_loss(torch, theirs, targets, old, ref, adv, mask, cfg, max_new_tokens=12)
    expected.backward()

    def ours(logits):
        logprobs = jax.nn.log_softmax(logits / TEMPERATURE)
        logprobs = jnp.take_along_axis(logprobs, jnp.asarray(targets)[..., None], axis=-1)[..., 0]
        f = [jnp.asarray(x, jnp.float32) for x in (old, ref, adv)]
        m = jnp.asarray(mask)
        return losses.policy_loss(logprobs, *f, losses.token_weights(m, cfg.aggregation, 12), m, cfg)

    (loss, sums), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(loss, expected.item(), atol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-5)
    assert float(sums["clip_low"]) > 0 and float(sums["clip_high"]) > 0  # every branch was taken
    assert (float(sums["dual_clip"]) > 0) == bool(cfg.dual_clip)


def test_what_the_mask_leaves_out_may_be_anything():
    rng = np.random.default_rng(4)
    mask = jnp.asarray(np.arange(5)[None] < np.array([3, 0, 5])[:, None])
    arrays = [jnp.asarray(rng.normal(size=(3, 5)), jnp.float32) for _ in range(3)]
    adv = jnp.asarray(rng.normal(size=3), jnp.float32)
    cfg = section()

    def run(arrays, adv, weights):
        loss = jax.value_and_grad(
            lambda lp: losses.policy_loss(lp, *arrays[1:], adv, weights, mask, cfg), has_aux=True
        )
        return loss(arrays[0])

    weights = losses.token_weights(mask, "token_mean", 5)
    clean = run(arrays, adv, weights)
    for garbage in (np.nan, np.inf, -1e30):
        dirty = [jnp.where(mask, x, garbage) for x in arrays]
        got = run(dirty, adv.at[1].set(garbage), jnp.where(mask, weights, garbage))
        assert bits(got) == bits(clean)


# --- through the model -------------------------------------------------------------------------------


def naive_logprobs(params, batch, temperature):
    """Padding moved to the right, full logits, a plain log-softmax: f32[length] for each row."""
    tokens, rows = np.zeros((N, P + T), np.int32), []
    for n, valid in enumerate(np.asarray(batch.valid)):
        row = np.asarray(batch.tokens)[n, valid]
        tokens[n, : len(row)] = row
        rows.append((len(row), int(np.asarray(batch.response_mask)[n].sum())))
    real = jnp.asarray(np.arange(P + T)[None] < np.array([total for total, _ in rows])[:, None])
    hidden = transformer.hidden_states(
        params, CONFIG, jnp.asarray(tokens), real, dtype=jnp.float32, layout=tiny_models.one_device()
    )
    logits = transformer.compute_logits(params, CONFIG, hidden)[..., : CONFIG.vocab_size]
    lp = jax.nn.log_softmax(logits / temperature)[:, :-1]
    lp = jnp.take_along_axis(lp, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    return [
        lp[n, total - length - 1 : total - 1] if total else lp[n, :0]
        for n, (total, length) in enumerate(rows)
    ]


def naive_loss(params, batch, cfg, temperature, weights=None):
    """The objective of the GRPO paper, row by row with nothing clever.

    weights: of the gain at each token, a list of arrays by row; None: 1.
    """
    total = jnp.zeros(())
    count = int(np.asarray(batch.response_mask).sum())
    for n, lp in enumerate(naive_logprobs(params, batch, temperature)):
        t = lp.shape[0]
        if t == 0:
            continue
        r, a = jnp.exp(lp - batch.old_logprobs[n, :t]), batch.advantages[n]
        gain = jnp.minimum(r * a, jnp.clip(r, 1 - cfg.clip_low, 1 + cfg.clip_high) * a)
        gain = jnp.where(a < 0, jnp.maximum(gain, cfg.dual_clip * a), gain)
        gain = gain if weights is None else weights[n] * gain
        x = batch.ref_logprobs[n, :t] - lp
        total += (cfg.kl_coef * (jnp.exp(x) - 1 - x) - gain).sum() / count
    return total


@functools.cache  # compiling is what takes time here
def gradients_of(temperature, microbatch, epochs=2):
    """With one epoch a step has one update, which does not read the old log-probabilities."""
    cfg = section(microbatch=microbatch, epochs=epochs)
    return jax.jit(
        grpo.make_gradients(CONFIG, cfg, tiny_models.one_device(), temperature=temperature, max_new_tokens=T)
    )


@functools.cache
def logprobs_of(temperature, microbatch):
    return grpo.make_logprobs(
        CONFIG, tiny_models.one_device(), microbatch=microbatch, dtype="float32", temperature=temperature
    )


def assert_trees_close(got, expected, atol=1e-5):
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def params():
    return model_params()


@pytest.fixture(scope="module")
def standard(params):
    """(loss, gradients, metrics) of the standard batch, in microbatches of 4."""
    return gradients_of(TEMPERATURE, 4)(params, policy_batch())


@pytest.fixture(scope="module")
def naive(params):
    """Log-probabilities of the standard batch by row, and its (loss, gradients)."""
    batch, cfg = policy_batch(), section()

    def run(params):
        loss = jax.value_and_grad(lambda p: naive_loss(p, batch, cfg, TEMPERATURE))(params)
        return naive_logprobs(params, batch, TEMPERATURE), loss

    return jax.jit(run)(params)


def test_loss_and_gradient_equal_a_naive_model(standard, naive):
    loss, got, metrics = standard
    expected, grads = naive[1]
    np.testing.assert_allclose(loss, expected, atol=1e-5)
    assert tree_norm(grads) > 0.05  # there is something to compare
    assert_trees_close(got, grads)
    assert float(metrics["loss"]) == pytest.approx(float(loss))


def tree_norm(tree):
    return np.sqrt(sum(float((np.asarray(x) ** 2).sum()) for x in jax.tree.leaves(tree)))


def test_metrics_by_hand(standard, naive):
    batch = policy_batch()
    m = np.asarray(batch.response_mask)
    lp = np.concatenate([np.asarray(x) for x in naive[0]])
    old, ref, sampler = (
        np.asarray(x)[m] for x in (batch.old_logprobs, batch.ref_logprobs, batch.rollout_logprobs)
    )
    a = np.asarray(batch.advantages)[:, None].repeat(T, 1)[m]
    ratio = np.exp(lp - old)
    expected = {
        "ratio_mean": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "kl": (np.exp(ref - lp) - 1 - ref + lp).mean(),
        "clip_low": ((a < 0) & (ratio < 0.8)).mean(),
        "clip_high": ((a > 0) & (ratio > 1.2)).mean(),
        "dual_clip": ((a < 0) & (ratio > 3)).mean(),
        "rollout_mismatch": np.abs(old - sampler).mean(),
        "advantage_mean": np.asarray(batch.advantages)[1:].mean(),
        "advantage_abs": np.abs(np.asarray(batch.advantages)[1:]).mean(),
    }
    metrics = standard[2]
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert 0 < float(metrics["entropy"]) < np.log(CONFIG.vocab_size)
    assert float(metrics["loss"]) == pytest.approx(float(metrics["pg_loss"] + 0.1 * metrics["kl"]), abs=1e-5)


def sampler_weights(batch, correction, cap):
    """Importance weights of the response tokens, by row, and the ratios of whole responses."""
    weights, ratios = [], []
    for n, mask in enumerate(np.asarray(batch.response_mask)):
        difference = np.asarray(batch.old_logprobs, np.float64)[n, mask]
        difference = difference - np.asarray(batch.rollout_logprobs, np.float64)[n, mask]
        ratios.append(np.exp(difference.sum()))
        ratio = np.exp(difference) if correction.startswith("token") else np.full(len(difference), ratios[-1])
        bounded = np.minimum(ratio, cap)
        inside = (ratio >= 1 / cap) & (ratio <= cap)
        weights.append(inside * 1.0 if correction.endswith("mask") else bounded)
    return weights, ratios


@pytest.mark.parametrize(
    "correction, cap",
    [
        ("token", 2.0),
        pytest.param("sequence", 8.0, marks=pytest.mark.slow),
        pytest.param("token_mask", 2.0, marks=pytest.mark.slow),
        ("sequence_mask", 8.0),
    ],
)
def test_the_gain_is_weighted_by_the_ratio_of_policy_and_sampler(params, correction, cap):
    batch, cfg = policy_batch(), section(epochs=2, correction=correction, correction_cap=cap)
    weights, ratios = sampler_weights(batch, correction, cap)
    every = np.concatenate(weights)
    assert every.min() < 0.9 and every.max() >= 1.0
    expected = jax.jit(jax.grad(lambda p: naive_loss(p, batch, cfg, TEMPERATURE, weights)))(params)
    compute = grpo.make_gradients(
        CONFIG, cfg, tiny_models.one_device(), temperature=TEMPERATURE, max_new_tokens=T
    )
    _, found, metrics = jax.jit(compute)(params, batch)
    assert_trees_close(found, expected)
    assert float(metrics["correction"]) == pytest.approx(every.mean(), rel=1e-5)
    assert float(metrics["rollout_ratio_min"]) == pytest.approx(min(*ratios, 1.0), rel=1e-4)
    assert float(metrics["rollout_ratio_max"]) == pytest.approx(max(*ratios, 1.0), rel=1e-4)


def test_microbatches_leave_the_gradient_unchanged(params, standard):
    loss, grads, metrics = gradients_of(TEMPERATURE, 64)(params, policy_batch())
    np.testing.assert_allclose(loss, standard[0], atol=1e-6)
    assert_trees_close(grads, standard[1], atol=1e-6)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], standard[2][name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
def test_the_first_update_has_ratio_one(params, temperature):
    # Old log-probabilities of garbage: the only update of a step does not read them.
    batch = policy_batch()
    batch = batch.replace(old_logprobs=jnp.full_like(batch.old_logprobs, jnp.nan))
    _, grads, metrics = gradients_of(temperature, 4, epochs=1)(params, batch)
    for name in ("ratio_mean", "ratio_min", "ratio_max"):
        assert float(metrics[name]) == 1.0, name
    for name in ("clip_low", "clip_high", "dual_clip"):
        assert float(metrics[name]) == 0.0, name
    # Computed beforehand they say the same, to rounding.
    gradients = gradients_of(temperature, 4)
    old = logprobs_of(temperature, 4)(params, batch.tokens, batch.valid, T)
    _, same, metrics = gradients(params, batch.replace(old_logprobs=old))
    assert abs(float(metrics["ratio_max"]) - 1) < 1e-5 and abs(float(metrics["ratio_min"]) - 1) < 1e-5
    for name in ("clip_low", "clip_high", "dual_clip"):
        assert float(metrics[name]) == 0.0, name
    assert_trees_close(same, grads)
    # With those of another temperature the ratio is not 1: the test can tell.
    off = logprobs_of(TEMPERATURE if temperature == 1.0 else 1.0, 4)(params, batch.tokens, batch.valid, T)
    _, _, metrics = gradients(params, batch.replace(old_logprobs=off))
    assert abs(float(metrics["ratio_max"]) - 1) > 0.01


def test_logprobs_equal_a_naive_model_in_any_microbatch(params, naive):
    batch = policy_batch()
    for microbatch in (4, 64):
        got = logprobs_of(TEMPERATURE, microbatch)(params, batch.tokens, batch.valid, T)
        for row, mask, expected in zip(
            np.asarray(got), np.asarray(batch.response_mask), naive[0], strict=True
        ):
            np.testing.assert_allclose(row[mask], expected, atol=1e-5)
            assert not row[~mask].any()
    with pytest.raises(ValueError, match="a response of 11 columns in rows of 11"):
        logprobs_of(TEMPERATURE, 4)(params, batch.tokens, batch.valid, P + T)


def test_what_follows_eos_changes_nothing(params, standard):
    batch = policy_batch()
    after = ~batch.response_mask
    assert after.sum() > 5
    columns = jnp.pad(after, ((0, 0), (P, 0)))
    nan = {
        name: jnp.where(after, jnp.nan, getattr(batch, name))
        for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs")
    }
    for token in (7, -1, 10**6):  # another token; two that no vocabulary has
        dirty = batch.replace(tokens=jnp.where(columns, token, batch.tokens), **nan)
        assert bits(gradients_of(TEMPERATURE, 4)(params, dirty)) == bits(standard)
    # A token inside does change it.
    inside = batch.replace(tokens=batch.tokens.at[N - 1, P].set(batch.tokens[N - 1, P] % 28 + 1))
    assert bits(gradients_of(TEMPERATURE, 4)(params, inside)[0]) != bits(standard[0])


# --- updates -----------------------------------------------------------------------------------------


def update_of(cfg, opt, layout):
    return grpo.make_update(CONFIG, cfg, opt, layout, temperature=TEMPERATURE, max_new_tokens=T)


@pytest.fixture(scope="module")
def plain_update():
    opt = adamw(
        eps=1e-3
    )  # with Adam's usual 1e-8 the first step is a sign: rounding noise would count in full
    return opt, update_of(section(), opt, tiny_models.one_device())


def test_an_update_moves_its_state_alone(params, plain_update):
    opt, update = plain_update
    before = bits(params)
    state, metrics = update(optim.init_state(params, opt), policy_batch())
    assert bits(params) == before  # the reference shares these
    assert int(state.updates) == 1 and int(state.skipped) == 0 and float(metrics["skipped"]) == 0
    assert float(metrics["lr"]) == pytest.approx(1e-2) and float(metrics["grad_norm"]) > 0
    for path, x in jax.tree.leaves_with_path(state.params):
        old = dict(jax.tree.leaves_with_path(params))[path]
        assert (np.asarray(x) != np.asarray(old)).any(), jax.tree_util.keystr(path)


def test_a_non_finite_update_is_skipped(params, plain_update):
    opt, update = plain_update
    state = optim.init_state(params, opt)
    kept = bits((state.params, state.opt_state))
    batch = policy_batch()
    state, metrics = update(state, batch.replace(advantages=batch.advantages.at[2].set(jnp.nan)))
    assert bits((state.params, state.opt_state)) == kept
    assert int(state.skipped) == 1 and int(state.updates) == 0 and float(metrics["skipped"]) == 1


def test_a_batch_without_tokens_moves_nothing(params, plain_update):
    opt, update = plain_update
    state = optim.init_state(params, opt)
    kept = bits(state)
    batch = policy_batch()
    state, metrics = update(state, batch.replace(response_mask=jnp.zeros_like(batch.response_mask)))
    assert bits(state) == kept
    assert all(np.isfinite(float(x)) for x in metrics.values())


def test_updates_raise_the_advantaged_responses(params, plain_update):
    opt, update = plain_update
    batch = policy_batch()
    scored = logprobs_of(TEMPERATURE, 4)
    before = scored(params, batch.tokens, batch.valid, T)
    sign = jnp.array([0.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    batch = batch.replace(advantages=sign, ref_logprobs=before)
    state = optim.init_state(params, opt)
    for _ in range(5):
        state, _ = update(state, batch)
    moved = (scored(state.params, batch.tokens, batch.valid, T) - before).sum(axis=1)
    assert (np.asarray(moved * sign)[1:] > 0).all()


def test_a_mesh_gives_the_update_of_one_device(params, plain_update):
    layout = Layout(mesh.make_mesh(2, 2, 2), base.get_config().mesh.rules)
    opt, batch = plain_update[0], policy_batch()
    specs = transformer.param_specs(CONFIG, head="logits")
    single, expected = plain_update[1](optim.init_state(params, opt), batch)
    placed = jax.device_put(params, mesh.make_shardings(layout, specs))
    state, metrics = update_of(section(), opt, layout)(optim.init_state(placed, opt), batch)
    assert_trees_close(state.params, single.params)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    places = optim.state_shardings(opt, specs, layout)
    for x, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim)
    scored = grpo.make_logprobs(CONFIG, layout, microbatch=4, dtype="float32", temperature=TEMPERATURE)
    np.testing.assert_allclose(
        scored(placed, batch.tokens, batch.valid, T),
        logprobs_of(TEMPERATURE, 4)(params, batch.tokens, batch.valid, T),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "change",
    [
        dict(kl_estimator="k4"),
        dict(aggregation="mean"),
        dict(epochs=0),
        dict(clip_low=-0.1),
        dict(dual_clip=1.1),
    ],
)
def test_sections_that_no_update_can_follow_are_refused(change):
    (field,) = change
    with pytest.raises(SetupError, match=f"policy.{field}="):
        section(**change)


# --- a step's minibatches ------------------------------------------------------------------------------


def recorder(seen):
    """An update that notes its rows, known by their advantages, and reports made-up metrics."""

    def update(state, batch):
        seen.append(np.asarray(batch.advantages).tolist())
        i = float(len(seen))
        return state + 1, {k: jnp.float32(i) for k in ("loss", "skipped", "ratio_min", "ratio_max")}

    return update


def numbered():
    """Six rows, known by their advantages."""
    batch = policy_batch().replace(advantages=jnp.arange(float(N)))
    return jax.tree.map(lambda x: x[:6], batch)


def test_a_step_passes_over_every_row_once_an_epoch():
    seen, cfg = [], section(epochs=2, minibatches=3)
    state, metrics = grpo.update_on_rollouts(0, numbered(), jax.random.key(5), cfg, recorder(seen))
    assert state == 6 == grpo.count_updates(cfg) and [len(rows) for rows in seen] == [2] * 6
    first, second = sum(seen[:3], []), sum(seen[3:], [])
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second and first != sorted(first)  # permuted, afresh for each epoch
    assert {k: float(v) for k, v in metrics.items()} == {
        "loss": 3.5,
        "skipped": 21.0,
        "ratio_min": 1.0,
        "ratio_max": 6.0,
    }
    again = []
    grpo.update_on_rollouts(0, numbered(), jax.random.key(5), cfg, recorder(again))
    assert again == seen
    other = []
    grpo.update_on_rollouts(0, numbered(), jax.random.key(6), cfg, recorder(other))
    assert other != seen


def test_a_single_minibatch_keeps_the_order():
    seen = []
    grpo.update_on_rollouts(0, numbered(), jax.random.key(0), section(epochs=2), recorder(seen))
    assert seen == [list(range(6))] * 2


def test_steps_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match="policy.minibatches = 4 does not divide the step's 6 rows"):
        grpo.update_on_rollouts(0, numbered(), jax.random.key(0), section(minibatches=4), recorder([]))


# --- imitation -----------------------------------------------------------------------------------------


@functools.cache
def imitate(microbatch):
    opt = adamw(eps=1e-3)
    return opt, imitation.make_imitation_update(
        CONFIG, tiny_models.one_device(), opt, dtype="float32", remat=True, microbatch=microbatch
    )


def test_imitation_equals_a_naive_model(params):
    batch = policy_batch()
    rows = jax.jit(lambda p: naive_logprobs(p, batch, 1.0))(params)
    expected = -float(sum(x.sum() for x in rows)) / sum(len(x) for x in rows)
    states = []
    for microbatch, mask in (
        (4, batch.response_mask),
        (64, jnp.pad(batch.response_mask, ((0, 0), (P, 0)))),
    ):
        opt, update = imitate(microbatch)
        state, metrics = update(optim.init_state(params, opt), batch.tokens, batch.valid, mask)
        assert float(metrics["loss"]) == pytest.approx(expected, abs=1e-5)
        assert float(metrics["tokens"]) == sum(len(x) for x in rows)
        states.append(state.params)
    assert_trees_close(states[0], states[1], atol=1e-6)


def test_imitation_learns_and_keeps_to_its_mask(params):
    opt, update = imitate(4)
    batch = policy_batch()
    state, metrics = update(optim.init_state(params, opt), batch.tokens, batch.valid, batch.response_mask)
    columns = jnp.pad(~batch.response_mask, ((0, 0), (P, 0)))
    dirty = jnp.where(columns, 10**6, batch.tokens)
    assert bits(update(optim.init_state(params, opt), dirty, batch.valid, batch.response_mask)) == bits(
        (state, metrics)
    )
    first = float(metrics["loss"])
    for _ in range(20):
        state, metrics = update(state, batch.tokens, batch.valid, batch.response_mask)
    assert float(metrics["loss"]) < 0.5 * first
    kept = bits(state)
    state, metrics = update(state, batch.tokens, batch.valid, jnp.zeros_like(batch.response_mask))
    assert bits(state) == kept and float(metrics["loss"]) == 0.0
