"""Scores, the two contrasts by hand, and updates of the reward model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from cooper_jax.configs import base
from cooper_jax.data import row_packing
from cooper_jax.model import transformer
from cooper_jax.reward import reward_losses, verifier_model
from cooper_jax.runtime import mesh, optim
from cooper_jax.runtime.mesh import Layout
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.types import LabelledBatch, PackedLabelled, PackedPairs, PairBatch, ScoreBatch

CONFIG = tiny_models.config(vocab_size=30, width=16, head_dim=4, ffn=24)
N, S = 7, 9  # 7 rows in microbatches of 4 leave one to pad
# With Adam's usual eps of 1e-8 the first step is a sign: rounding noise would count in full.
OPT = dataclasses.replace(
    optim.OptimiserConfig.from_config(base.optimiser(lr=1e-2, warmup_steps=0), "reward.optimiser"), eps=1e-3
)


def section(**changes):
    c = base.get_config().reward
    c.update(dict(microbatch=4))
    c.update(changes)
    return reward_losses.RewardUpdateConfig.from_config(c)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def rows(seed):
    """Rows of 2 to S tokens, padded now on the left, now on the right."""
    rng = np.random.default_rng(seed)
    length, left = rng.integers(2, S + 1, N)[:, None], rng.integers(0, 2, N)[:, None]
    column = np.arange(S)[None]
    valid = np.where(left, column >= S - length, column < length)
    tokens = np.where(valid, rng.integers(1, CONFIG.vocab_size, (N, S)), 0)
    return ScoreBatch(tokens=jnp.asarray(tokens, jnp.int32), valid=jnp.asarray(valid))


def pairs(mask=(1, 1, 0, 1, 1, 0, 1)):
    return PairBatch(positive=rows(1), negative=rows(2), mask=jnp.asarray(mask, bool))


@functools.cache
def start():
    """Initial weights blown up, so that scores differ."""
    params = mesh.init_params(
        jax.random.key(0), transformer.param_specs(CONFIG, head="score"), tiny_models.one_device()
    )
    return jax.tree.map(lambda x: x if (x == 1).all() else 1.5 * x, params)  # norms stay


@functools.cache  # compiling is what takes time here
def updates(pair_loss):
    opt = optim.make_optimiser(OPT)
    return opt, verifier_model.make_reward_update(
        CONFIG, section(pair_loss=pair_loss), opt, tiny_models.one_device()
    )


@functools.cache
def scorer(microbatch):
    return verifier_model.make_score_fn(
        CONFIG, tiny_models.one_device(), dtype="float32", microbatch=microbatch
    )


def naive_scores(params, batch):
    """Padding moved to the right, then the head on the last real token."""
    tokens, length = np.zeros((N, S), np.int32), np.asarray(batch.valid).sum(axis=1)
    for n, valid in enumerate(np.asarray(batch.valid)):
        tokens[n, : length[n]] = np.asarray(batch.tokens)[n, valid]
    real = jnp.asarray(np.arange(S)[None] < length[:, None])
    hidden = transformer.hidden_states(
        params, CONFIG, jnp.asarray(tokens), real, dtype=jnp.float32, layout=tiny_models.one_device()
    )
    return (hidden[np.arange(N), length - 1] * params["score"][None]).sum(axis=1)


# --- losses by hand ------------------------------------------------------------------------------------


def test_rewards_are_sigmoids():
    np.testing.assert_allclose(
        reward_losses.rewards_from_logits(jnp.array([0.0, np.log(3.0), -np.log(3.0)])),
        [0.5, 0.75, 0.25],
        rtol=1e-6,
    )


def test_bce_by_hand():
    # sigmoid(log 3) = 3/4: label 1 costs -log(3/4), label 0 -log(1/4).
    loss_and_grad = jax.value_and_grad(reward_losses.bce_loss)
    labels, weights = jnp.array([1.0, 0.0, 0.5]), jnp.array([1.0, 2.0, 4.0])
    loss, gradient = loss_and_grad(jnp.full(3, np.log(3.0), jnp.float32), labels, weights)
    middle = -(np.log(0.75) + np.log(0.25)) / 2
    assert float(loss) == pytest.approx(-np.log(0.75) - 2 * np.log(0.25) + 4 * middle, rel=1e-6)
    np.testing.assert_allclose(gradient, [0.75 - 1, 2 * 0.75, 4 * (0.75 - 0.5)], rtol=1e-6)
    # Far out it is linear, not infinite; and a row of weight 0 may hold anything.
    z, labels, weights = jnp.array([-200.0, jnp.nan]), jnp.array([1.0, jnp.nan]), jnp.array([1.0, 0.0])
    loss, gradient = loss_and_grad(z, labels, weights)
    assert float(loss) == 200.0 and gradient.tolist() == [-1.0, 0.0]


def sigma(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def test_pair_losses_and_gradients_by_hand():
    z_pos, z_neg = np.array([2.0, -1.0, 0.5, 30.0]), np.array([-1.0, 2.0, 0.5, 30.0])
    p_pos, p_neg = sigma(z_pos), sigma(z_neg)
    g_logit, g_sigmoid = sigma(z_neg - z_pos), sigma(p_neg - p_pos)
    expected = {
        "logit": (-np.log(sigma(z_pos - z_neg)), -g_logit, g_logit),
        "sigmoid": (
            -np.log(sigma(p_pos - p_neg)),
            -g_sigmoid * p_pos * (1 - p_pos),
            g_sigmoid * p_neg * (1 - p_neg),
        ),
    }
    for kind, (value, d_pos, d_neg) in expected.items():

        def total(a, b, kind=kind):
            return reward_losses.contrast_loss(a, b, kind).sum()

        a, b = jnp.asarray(z_pos, jnp.float32), jnp.asarray(z_neg, jnp.float32)
        np.testing.assert_allclose(reward_losses.contrast_loss(a, b, kind), value, rtol=1e-5)
        got_pos, got_neg = jax.grad(total, argnums=(0, 1))(a, b)
        np.testing.assert_allclose(got_pos, d_pos, atol=1e-6)
        np.testing.assert_allclose(got_neg, d_neg, atol=1e-6)
    # What sets them apart: the logit contrast never moves the common mode, the sigmoid one does.
    assert abs(expected["sigmoid"][1] + expected["sigmoid"][2])[0] > 0.01
    with pytest.raises(ValueError, match="'hinge'.*logit, sigmoid"):
        reward_losses.contrast_loss(a, b, "hinge")


def test_the_sigmoid_contrast_is_bounded():
    far = jnp.array([200.0])
    low = float(reward_losses.contrast_loss(far, -far, "sigmoid")[0])
    high = float(reward_losses.contrast_loss(-far, far, "sigmoid")[0])
    assert (low, high) == (pytest.approx(0.313262, abs=1e-6), pytest.approx(1.313262, abs=1e-6))
    assert float(reward_losses.contrast_loss(far, -far, "logit")[0]) == 0.0
    assert float(reward_losses.contrast_loss(-far, far, "logit")[0]) == 400.0


# --- scores --------------------------------------------------------------------------------------------


def test_scores_equal_a_naive_model_in_any_microbatch():
    batch = rows(0)
    expected = jax.jit(lambda p: naive_scores(p, batch))(start())
    assert np.std(expected) > 0.1
    for microbatch in (4, 64):
        np.testing.assert_allclose(scorer(microbatch)(start(), batch), expected, atol=1e-5)


def test_padding_may_hold_anything():
    batch = rows(0)
    clean = bits(scorer(4)(start(), batch))
    for token in (5, -1, 10**6):
        dirty = batch.replace(tokens=jnp.where(batch.valid, batch.tokens, token))
        assert bits(scorer(4)(start(), dirty)) == clean
    empty = batch.replace(valid=batch.valid.at[3].set(False))
    assert np.isfinite(scorer(4)(start(), empty)).all()


# --- pair updates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", reward_losses.PAIR_LOSSES)
def test_pair_metrics_by_hand(kind):
    batch = pairs()
    m = np.asarray(batch.mask)
    sides = (batch.positive, batch.negative)
    z_pos, z_neg = (np.asarray(scorer(4)(start(), side), np.float64)[m] for side in sides)
    opt, update = updates(kind)
    _, metrics = update(optim.init_state(start(), opt), batch)
    d = z_pos - z_neg if kind == "logit" else sigma(z_pos) - sigma(z_neg)
    p_pos, p_neg = sigma(z_pos), sigma(z_neg)
    g = sigma(-d)
    push_pos, push_neg = (g, -g) if kind == "logit" else (g * p_pos * (1 - p_pos), -g * p_neg * (1 - p_neg))
    expected = {
        "loss": -np.log(sigma(d)).mean(),
        "pair_loss": -np.log(sigma(d)).mean(),
        "common_push": ((push_pos + push_neg) / 2).mean(),
        "difference_push": ((push_pos - push_neg) / 2).mean(),
        "positive_saturation": (p_pos * (1 - p_pos)).mean(),
        "negative_saturation": (p_neg * (1 - p_neg)).mean(),
        "margin": d.mean(),
        "accuracy": (z_pos > z_neg).mean(),
        "positive_mean": sigma(z_pos).mean(),
        "negative_mean": sigma(z_neg).mean(),
        "valid": 5.0,
        "lr": 0.01,
        "skipped": 0.0,
    }
    assert 0 < expected["accuracy"] < 1  # both orders occur
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert set(metrics) == {*expected, "grad_norm"} and float(metrics["grad_norm"]) > 0


@pytest.mark.parametrize("kind", reward_losses.PAIR_LOSSES)
def test_the_pair_update_is_that_of_a_naive_mean(kind):
    """Over the valid pairs alone, whole, through plain scores: so microbatches and masked pairs add nothing."""
    batch, opt = pairs(), updates(kind)[0]
    m = np.asarray(batch.mask)

    def loss(params):
        s_pos, s_neg = (naive_scores(params, side)[m] for side in (batch.positive, batch.negative))
        if kind == "sigmoid":
            s_pos, s_neg = 1 / (1 + jnp.exp(-s_pos)), 1 / (1 + jnp.exp(-s_neg))
        return jnp.log(1 + jnp.exp(s_neg - s_pos)).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(start())
    expected, _ = optim.apply_update(optim.init_state(start(), opt), grads, value, opt)
    got, metrics = updates(kind)[1](optim.init_state(start(), opt), batch)
    assert float(metrics["pair_loss"]) == pytest.approx(float(value), abs=1e-5)
    for x, y in zip(jax.tree.leaves(got.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_masked_pairs_may_hold_anything():
    opt, update = updates("logit")
    clean = bits(update(optim.init_state(start(), opt), pairs()))
    out = ~pairs().mask[:, None]

    def soil(side, token, valid):
        return ScoreBatch(tokens=jnp.where(out, token, side.tokens), valid=jnp.where(out, valid, side.valid))

    for token, valid in ((0, False), (7, True), (10**6, True)):
        sides = [soil(side, token, valid) for side in (pairs().positive, pairs().negative)]
        dirty = PairBatch(*sides, pairs().mask)
        assert bits(update(optim.init_state(start(), opt), dirty)) == clean


def test_without_a_valid_pair_nothing_moves():
    opt, update = updates("logit")
    state, _ = update(optim.init_state(start(), opt), pairs())  # moments are no longer zero
    kept = bits(state)
    state, metrics = update(state, pairs(mask=[0] * N))
    assert bits(state) == kept
    assert all(float(x) == 0.0 for x in metrics.values()), metrics


def test_a_non_finite_pair_update_is_skipped():
    opt, update = updates("logit")
    broken = {**start(), "score": start()["score"].at[0].set(jnp.inf)}
    state = optim.init_state(broken, opt)
    kept = bits((state.params, state.opt_state))
    state, metrics = update(state, pairs())
    assert bits((state.params, state.opt_state)) == kept
    assert int(state.skipped) == 1 == float(metrics["skipped"]) and int(state.updates) == 0


@pytest.mark.parametrize("kind", reward_losses.PAIR_LOSSES)
def test_pair_updates_learn_and_move_their_state_alone(kind):
    before = bits(start())
    opt, update = updates(kind)
    state = optim.init_state(start(), opt)
    seen = []
    for _ in range(15):
        state, metrics = update(state, pairs())
        seen.append(metrics)
    assert bits(start()) == before  # what the state was made from is not what moved
    assert float(seen[-1]["pair_loss"]) < float(seen[0]["pair_loss"]) and float(seen[-1]["accuracy"]) == 1.0
    for name, x in state.params.items():
        assert bits(x) != bits(start()[name]), name


@pytest.mark.slow
def test_a_mesh_gives_the_pair_update_of_one_device():
    layout = Layout(mesh.make_mesh(2, 2, 2), base.get_config().mesh.rules)
    specs = transformer.param_specs(CONFIG, head="score")
    opt, update = updates("logit")
    single, expected = update(optim.init_state(start(), opt), pairs())
    placed = jax.device_put(start(), mesh.make_shardings(layout, specs))
    update = verifier_model.make_reward_update(CONFIG, section(), opt, layout)
    state, metrics = update(optim.init_state(placed, opt), pairs())
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(single.params), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    places = optim.state_shardings(opt, specs, layout)
    for x, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim)
    score = verifier_model.make_score_fn(CONFIG, layout, dtype="float32", microbatch=4)
    np.testing.assert_allclose(score(placed, rows(0)), scorer(4)(start(), rows(0)), atol=1e-5)


def test_pairs_of_two_widths_are_refused():
    opt, update = updates("logit")
    narrow = jax.tree.map(lambda x: x[:, :-1], rows(2))
    with pytest.raises(ValueError, match="positives are 9 tokens wide, negatives 8"):
        update(optim.init_state(start(), opt), pairs().replace(negative=narrow))


def test_an_unknown_contrast_is_refused_at_once():
    with pytest.raises(SetupError, match="reward.pair_loss='hinge': it is one of logit, sigmoid"):
        section(pair_loss="hinge")


# --- binary cross-entropy ------------------------------------------------------------------------------


def test_bce_updates():
    opt = optim.make_optimiser(OPT)
    update = verifier_model.make_bce_update(CONFIG, section(), opt, tiny_models.one_device())
    batch = rows(3)
    labels = jnp.array([1, 0, 1, 0, 1, 0, 1], jnp.float32)
    weights = jnp.array([1, 1, 0, 2, 1, 1, 1], jnp.float32)
    z = np.asarray(scorer(4)(start(), batch), np.float64)
    nll = np.where(np.asarray(labels) > 0, -np.log(sigma(z)), -np.log(sigma(-z)))
    right = (z > 0) == (np.asarray(labels) > 0)
    state, metrics = update(optim.init_state(start(), opt), batch, labels, weights)
    assert float(metrics["loss"]) == pytest.approx((nll * np.asarray(weights)).sum() / 7, rel=1e-4)
    assert float(metrics["accuracy"]) == pytest.approx((right * np.asarray(weights)).sum() / 7, rel=1e-5)
    # The row of weight 0 may hold anything; nor does the scale of the weights matter.
    dirty = batch.replace(tokens=batch.tokens.at[2].set(10**6), valid=batch.valid.at[2].set(True))
    again, same = update(optim.init_state(start(), opt), dirty, labels.at[2].set(jnp.nan), 2 * weights)
    assert bits((again, same)) == bits((state, metrics))
    for _ in range(15):
        state, metrics = update(state, batch, labels, weights)
    assert float(metrics["loss"]) < 0.3 and float(metrics["accuracy"]) == 1.0
    kept = bits(state)
    state, metrics = update(state, batch, labels, jnp.zeros(N))
    assert bits(state) == kept and all(float(x) == 0.0 for x in metrics.values())


# --- every term --------------------------------------------------------------------------------------

TERMS = dict(pair_weight=0.7, pair_bce=0.9, rollout_bce=1.1)
PAIR_TERMS = ("pair_weight", "pair_bce")
LABELS = np.array([1, 0, 1, 0, 1, 0, 1], np.float32)
WEIGHTS = np.array([0.2, 0.25, 0, 0.25, 0.3, 0, 0], np.float32)


def labelled(weights=WEIGHTS):
    return LabelledBatch(rows=rows(3), labels=jnp.asarray(LABELS), weights=jnp.asarray(weights, jnp.float32))


@functools.cache
def update_of(pair_loss="sigmoid", **terms):
    opt = optim.make_optimiser(OPT)
    return opt, verifier_model.make_reward_update(
        CONFIG, section(pair_loss=pair_loss, **terms), opt, tiny_models.one_device()
    )


@pytest.mark.parametrize("kind", reward_losses.PAIR_LOSSES)
@pytest.mark.parametrize("terms", [*({name: 0.5} for name in PAIR_TERMS), TERMS])
def test_the_gradients_of_a_pair_are_those_of_its_loss(kind, terms):
    """The closed form against finite differences of the loss, in float64 NumPy."""
    cfg = section(pair_loss=kind, **{"pair_weight": 0.0} | terms)
    z_pos, z_neg = np.array([2.0, -1.0, 0.5, 3.0]), np.array([-1.0, 2.0, 0.5, 4.0])

    def loss(a, b):
        s = (a, b) if kind == "logit" else (sigma(a), sigma(b))
        return (
            cfg.pair_weight * -np.log(sigma(s[0] - s[1]))
            + cfg.pair_bce * -(np.log(sigma(a)) + np.log(1 - sigma(b))) / 2
        )

    a, b = jnp.asarray(z_pos, jnp.float32), jnp.asarray(z_neg, jnp.float32)
    found = reward_losses.pair_terms(a, b, cfg)
    assert len(found) == sum(bool(getattr(cfg, name)) for name in PAIR_TERMS)  # no others are computed
    total = sum(weight * term for weight, term in found.values())
    np.testing.assert_allclose(total, loss(z_pos, z_neg), rtol=1e-5)
    d, (d_pos, d_neg) = 1e-5, reward_losses.pair_gradients(a, b, cfg)
    np.testing.assert_allclose(d_pos, (loss(z_pos + d, z_neg) - loss(z_pos - d, z_neg)) / (2 * d), atol=1e-6)
    np.testing.assert_allclose(d_neg, (loss(z_pos, z_neg + d) - loss(z_pos, z_neg - d)) / (2 * d), atol=1e-6)


def test_what_each_term_does_to_what_both_members_share():
    """A shortcut in both members: the positive near 1, the negative above one half."""
    z = jnp.array([4.0]), jnp.array([1.0])

    def push(**terms):
        d_pos, d_neg = reward_losses.pair_gradients(*z, section(**{"pair_weight": 0.0} | terms))
        return float(-(d_pos + d_neg)[0] / 2)

    p_pos, p_neg = sigma(4.0), sigma(1.0)
    assert push(pair_weight=1.0, pair_loss="logit") == 0.0
    g = sigma(p_neg - p_pos)
    assert push(pair_weight=1.0, pair_loss="sigmoid") == pytest.approx(
        g * (p_pos * (1 - p_pos) - p_neg * (1 - p_neg)) / 2
    )
    assert push(pair_bce=1.0) == pytest.approx((1 - p_pos - p_neg) / 4)
    # A negative that is saturated too is out of the sigmoid contrast's reach, not out of the pointwise term's.
    z = jnp.array([12.0]), jnp.array([12.0])
    assert abs(push(pair_weight=1.0, pair_loss="sigmoid")) < 1e-5 and push(pair_bce=1.0) < -0.24


@pytest.mark.slow
def test_an_update_of_all_terms_is_that_of_a_naive_sum():
    batch, taught = pairs(), labelled()
    m = np.asarray(batch.mask)

    def loss(params):
        z_pos, z_neg = (naive_scores(params, side)[m] for side in (batch.positive, batch.negative))
        s_pos, s_neg = 1 / (1 + jnp.exp(-z_pos)), 1 / (1 + jnp.exp(-z_neg))
        contrast = jnp.log(1 + jnp.exp(s_neg - s_pos)).mean()
        members = -(jnp.log(s_pos).mean() + jnp.log(1 - s_neg).mean()) / 2
        p = 1 / (1 + jnp.exp(-naive_scores(params, taught.rows)))
        rollouts = -(WEIGHTS * jnp.where(LABELS > 0, jnp.log(p), jnp.log(1 - p))).sum()
        return 0.7 * contrast + 0.9 * members + 1.1 * rollouts, (
            contrast, members, rollouts, (WEIGHTS * ((p > 0.5) == (LABELS > 0.5))).sum(),
        )  # fmt: skip

    (value, parts), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(start())
    opt, update = update_of(**TERMS)
    expected, _ = optim.apply_update(optim.init_state(start(), opt), grads, value, opt)
    got, metrics = update(optim.init_state(start(), opt), batch, taught)
    for x, y in zip(jax.tree.leaves(got.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    names = ("pair_loss", "pair_bce", "rollout_bce", "rollout_accuracy")
    for name, part in zip(("loss", *names), (value, *parts), strict=True):
        assert float(metrics[name]) == pytest.approx(float(part), abs=1e-5), name
    assert metrics["rollout_rows"] == 4 and metrics["valid"] == 5 and int(got.updates) == 1


def test_rows_alone_are_learned_from_as_before_the_run():
    """The term of labelled rows is `make_bce_update`'s, bit for bit; no pair is read."""
    opt, update = update_of(pair_weight=0.0, rollout_bce=1.0)
    bce = verifier_model.make_bce_update(CONFIG, section(), opt, tiny_models.one_device())
    batch = labelled()
    expected, _ = bce(optim.init_state(start(), opt), batch.rows, batch.labels, batch.weights)
    got, metrics = update(optim.init_state(start(), opt), None, batch)
    assert bits(got) == bits(expected)
    assert "pair_loss" not in metrics and "valid" not in metrics
    assert bits(update(optim.init_state(start(), opt), pairs(), batch)[0]) == bits(got)
    with pytest.raises(ValueError, match="needs pairs or labelled rows"):
        update(optim.init_state(start(), opt), pairs(), None)


def test_rows_that_weigh_nothing_are_not_read():
    opt, update = updates("logit")  # no rollout_bce
    expected = bits(update(optim.init_state(start(), opt), pairs()))
    assert bits(update(optim.init_state(start(), opt), pairs(), labelled())) == expected
    opt, update = update_of(**TERMS)
    clean = bits(update(optim.init_state(start(), opt), pairs(), labelled()))
    out = jnp.asarray(WEIGHTS == 0)
    dirty = LabelledBatch(
        rows=ScoreBatch(jnp.where(out[:, None], 10**6, rows(3).tokens), rows(3).valid | out[:, None]),
        labels=jnp.where(out, jnp.nan, LABELS),
        weights=jnp.asarray(WEIGHTS),
    )
    assert bits(update(optim.init_state(start(), opt), pairs(), dirty)) == clean


def test_an_update_needs_a_valid_pair_or_a_row():
    opt, update = update_of(**TERMS)
    state, _ = update(optim.init_state(start(), opt), pairs(), labelled())
    kept, nothing = bits(state), np.zeros(N)
    state, metrics = update(state, pairs(mask=nothing), labelled(nothing))
    assert bits(state) == kept and all(float(x) == 0.0 for x in metrics.values()), metrics
    state, metrics = update(state, pairs(mask=nothing), labelled())
    assert int(state.updates) == 2 and metrics["valid"] == 0 and metrics["pair_bce"] == 0
    state, metrics = update(state, pairs(), labelled(nothing))
    assert int(state.updates) == 3 and metrics["rollout_rows"] == 0 == metrics["rollout_bce"]


@pytest.mark.slow
def test_a_mesh_gives_the_update_of_all_terms_of_one_device():
    layout = Layout(mesh.make_mesh(2, 2, 2), base.get_config().mesh.rules)
    specs = transformer.param_specs(CONFIG, head="score")
    opt, update = update_of(**TERMS)
    single, expected = update(optim.init_state(start(), opt), pairs(), labelled())
    placed = jax.device_put(start(), mesh.make_shardings(layout, specs))
    update = verifier_model.make_reward_update(CONFIG, section(pair_loss="sigmoid", **TERMS), opt, layout)
    state, metrics = update(optim.init_state(placed, opt), pairs(), labelled())
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(single.params), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    assert metrics.keys() == expected.keys()
    for name in metrics:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


# --- packed rows -----------------------------------------------------------------------------------------

PLAN = row_packing.Packing(row_tokens=23, rows=2)


def listed(batch, used=None):
    """The rows' token ids; [] for rows that are not used."""
    used = np.ones(len(batch.tokens), bool) if used is None else np.asarray(used)
    valid = np.asarray(batch.valid)
    return [np.asarray(batch.tokens)[n, valid[n]].tolist() if used[n] else [] for n in range(len(valid))]


def packed_batches(layout):
    """The pairs and labelled rows of `pairs` and `labelled`, packed."""
    batch, more = pairs(), labelled()
    members = zip(listed(batch.positive, batch.mask), listed(batch.negative, batch.mask), strict=True)
    shards = layout.batch_shards
    pair_rows = row_packing.pack_reward_rows(
        [tokens for pair in members for tokens in pair], PLAN, shards, together=2
    )
    rows = row_packing.pack_reward_rows(listed(more.rows, more.weights > 0), PLAN, shards)
    assert int(rows.count) < rows.tokens.shape[0]  # several share a row
    pair_rows, rows = layout.put((pair_rows, rows), None, "batch")
    return (
        PackedPairs(pair_rows, layout.put(batch.mask)),
        PackedLabelled(rows, *layout.put((more.labels, more.weights))),
    )


def test_scores_of_packed_rows_equal_those_of_a_naive_model():
    batch = rows(3)
    packed = row_packing.pack_reward_rows(listed(batch), PLAN)
    found = scorer(4)(start(), packed)[:N]
    np.testing.assert_allclose(found, naive_scores(start(), batch), atol=1e-5)


@pytest.mark.parametrize("on_a_mesh", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_update_on_packed_rows_is_that_on_unpacked_ones(on_a_mesh):
    opt, update = update_of(pair_bce=0.5, rollout_bce=0.25)
    expected, metrics = update(optim.init_state(start(), opt), pairs(), labelled())
    layout, params = tiny_models.one_device(), start()
    if on_a_mesh:
        layout = Layout(mesh.make_mesh(2, 2, 2), base.get_config().mesh.rules)
        specs = transformer.param_specs(CONFIG, head="score")
        params = jax.device_put(params, mesh.make_shardings(layout, specs))
        cfg = section(pair_loss="sigmoid", pair_bce=0.5, rollout_bce=0.25)
        update = verifier_model.make_reward_update(CONFIG, cfg, opt, layout)
    state, found = update(optim.init_state(params, opt), *packed_batches(layout))
    assert found.keys() == metrics.keys() and metrics["valid"] == 5
    for name, value in metrics.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.slow
def test_packed_pairs_without_a_valid_one_move_nothing():
    opt, update = update_of()
    empty = row_packing.pack_reward_rows([[]] * 6, PLAN, together=2)
    kept = bits(optim.init_state(start(), opt))
    state, metrics = update(optim.init_state(start(), opt), PackedPairs(empty, np.zeros(3, bool)))
    assert bits(state) == kept and all(np.isfinite(float(x)) for x in metrics.values())
