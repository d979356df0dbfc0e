"""The policy's losses against those of TRL, which are called as TRL's trainers call them.

Where the two normalise alike: TRL divides by all rows of a batch, this project by those with a token, so the batch
has no row without one.
"""

import collections
import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_algorithms import LONGEST, make_batch, section

from cooper_jax.policy import losses

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from trl import GRPOTrainer, RLOOTrainer  # noqa: E402

# Our algorithm -> the values of TRL's GRPOConfig that stand for it.
GRPO_FORMS = {
    "released": dict(loss_type="bnpo", delta=3.0),
    "grpo": dict(loss_type="grpo"),
    "dr_grpo": dict(loss_type="dr_grpo"),
    "dapo": dict(loss_type="dapo"),
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence"),
    "cispo": dict(loss_type="cispo"),
}


@dataclasses.dataclass
class Batch:
    """Responses of 1 to LONGEST tokens; some are truncated, and one group has advantages of 0."""

    mask: np.ndarray
    logits: np.ndarray
    targets: np.ndarray
    old: np.ndarray
    ref: np.ndarray
    advantages: np.ndarray


@pytest.fixture
def batch():
    mask, logits, targets, old, ref, rewards = make_batch()
    advantages = (rewards - rewards.reshape(-1, 4).mean(1).repeat(4)).astype(np.float32)
    used = mask.any(1)
    return Batch(*(x[used] for x in (mask, logits, targets, old, ref, advantages)))


def make_trainer(batch, logits, **settings):
    """What the loss of a TRL trainer reads of it.  logits: a tensor whose distribution is the policy's."""
    distribution = torch.log_softmax(logits, dim=-1)
    logprobs = torch.take_along_dim(distribution, torch.tensor(batch.targets)[..., None], -1)[..., 0]
    entropies = -(distribution.exp() * distribution).sum(-1)
    accelerator = SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    options = dict(
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        _metrics={"train": collections.defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropies, None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=False,
    )
    args = SimpleNamespace(
        delta=settings.pop("delta", None), use_bias_correction_kl=False, steps_per_generation=1
    )
    return SimpleNamespace(**(options | settings), args=args)


def make_inputs(batch, mask, **more):
    """The batch as TRL's trainers pass it to their loss, without prompts."""
    count = len(mask)
    empty = torch.zeros((count, 0), dtype=torch.long)
    return dict(
        prompt_ids=empty,
        prompt_mask=empty,
        completion_ids=torch.tensor(batch.targets),
        completion_mask=torch.tensor(mask).double(),
        advantages=torch.tensor(batch.advantages).double(),
        old_per_token_logps=torch.tensor(batch.old),
        ref_per_token_logps=torch.tensor(batch.ref),
        num_items_in_batch=torch.tensor(float(mask.sum())),
        **more,
    )


def compute_ours(batch, mask, cfg):
    """Our loss and its gradient."""

    def loss(logits):
        distribution = jax.nn.log_softmax(logits)
        logprobs = jnp.take_along_axis(distribution, jnp.asarray(batch.targets)[..., None], -1)[..., 0]
        entropy = -(jnp.exp(distribution) * distribution).sum(-1)
        old, ref, m = (jnp.asarray(x) for x in (np.float32(batch.old), np.float32(batch.ref), mask))
        weights = losses.token_weights(m, cfg.aggregation, LONGEST)
        return losses.policy_loss(
            logprobs, old, ref, jnp.asarray(batch.advantages), weights, m, cfg, entropy=entropy
        )[0]

    return jax.value_and_grad(loss)(jnp.asarray(batch.logits, jnp.float32))


# TRL's entropy bonus is a mean over tokens, so it has our weights where the loss is such a mean.
WITH_ENTROPY = [("released", 0.3), ("dapo", 0.3), ("cispo", 0.3)]


@pytest.mark.parametrize(
    ("algorithm", "entropy_coef"), [*((name, 0.0) for name in GRPO_FORMS), *WITH_ENTROPY]
)
def test_loss_and_gradient_equal_those_of_trls_grpo(batch, algorithm, entropy_coef):
    cfg = section(algorithm, entropy_coef=entropy_coef)
    mask = batch.mask
    if cfg.mask_truncated:  # TRL's mask_truncated_completions
        mask = mask & ~(mask.sum(1) == LONGEST)[:, None]
        kept = mask.any(1)
        batch = Batch(*(x[kept] for x in dataclasses.astuple(batch)))
        mask = mask[kept]

    logits = torch.tensor(batch.logits, requires_grad=True)
    trainer = make_trainer(
        batch,
        logits,
        beta=cfg.kl_coef,
        epsilon_low=cfg.clip_low,
        epsilon_high=1 + cfg.clip_high if algorithm == "cispo" else cfg.clip_high,
        entropy_coef=entropy_coef,
        _entropy_bonus_enabled=bool(entropy_coef),
        **GRPO_FORMS[algorithm],
    )
    expected = GRPOTrainer._compute_loss(trainer, None, make_inputs(batch, mask))
    expected.backward()

    loss, gradient = compute_ours(batch, mask, cfg)
    np.testing.assert_allclose(loss, expected.item(), atol=1e-5)
    np.testing.assert_allclose(gradient, logits.grad.numpy(), atol=1e-5)
    assert np.abs(logits.grad.numpy()).max() > 1e-3


def test_the_gradient_of_a_first_update_is_that_of_trls_rloo(batch):
    """TRL's ratio is of whole responses, ours of tokens: they agree where both are 1, as in a step's only update.

    TRL's loss is a mean over responses, ours is divided by the longest response as well.
    """
    cfg = section("rloo")
    logits = torch.tensor(batch.logits, requires_grad=True)
    trainer = make_trainer(batch, logits, epsilon_low=cfg.clip_low, epsilon_high=cfg.clip_high)
    own = trainer._get_per_token_logps_and_entropies()[0].detach()
    batch.old = own.numpy()
    sums = (own * torch.tensor(batch.mask)).sum(1)
    RLOOTrainer._compute_loss(trainer, None, make_inputs(batch, batch.mask, old_logps=sums)).backward()

    _, gradient = compute_ours(batch, batch.mask, cfg)
    np.testing.assert_allclose(gradient * LONGEST, logits.grad.numpy(), atol=1e-5)
    assert np.abs(logits.grad.numpy()).max() > 1e-3
