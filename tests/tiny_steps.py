"""A run of the tiny config cut down to single steps, with stand-ins for the rule verifier and the assistant."""

import contextlib
import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from cooper_jax.configs import tiny
from cooper_jax.runtime import keys, run_directory
from cooper_jax.runtime.checkpoint import Checkpoints
from cooper_jax.runtime.metrics import PhaseTimer
from cooper_jax.trainer import grading, policy_stages
from cooper_jax.trainer.resume import save_checkpoint, start_or_resume
from cooper_jax.trainer.setup import build_components
from cooper_jax.trainer.step import cooper_step, finish_step
from cooper_jax.types import Completion, Pair, Verdict

B, G = 3, 2  # 6 rows: no multiple of the four batch shards below


def config(**changes):
    """The tiny config without its supervised phases: an untrained policy that solves nothing."""
    c = tiny.get_config()
    small = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn": 16}
    c.update_from_flattened_dict(
        {f"{model}.arch.{name}": value for model in ("policy", "reward") for name, value in small.items()}
        | {
            "data.prompts_per_step": B,
            "data.synthetic_size": 8,
            "rollout.group_size": G,
            "rollout.max_new_tokens": 6,
            "policy.microbatch": 4,
            "reward.microbatch": 4,
            "reward.allow_untrained_head": True,
            "supervised.policy_steps": 0,
            "supervised.reward_steps": 0,
            "eval.every": 0,
            "eval.problems": 4,
            "mesh.data": -1,
            "mesh.fsdp": 1,
        }
        | changes
    )
    return c


def make_builder(monkeypatch, path):
    """(devices, **changes) -> (Components, State) on the first so many virtual devices."""
    everything = jax.devices()

    def build(devices: int = 1, **changes):
        monkeypatch.setattr(jax, "devices", lambda *_: everything[:devices])
        return build_components(config(**changes), path)

    return build


def take_step(components, state, phases=None):
    """A step, completed at once: the next state, the step's metrics and its record."""
    phases = PhaseTimer() if phases is None else phases
    return finish_step(cooper_step(components, state, phases), phases)


class AlwaysRight:
    """A rule verifier that likes what it reads, for a policy that solves nothing, and finds rewrites wrong."""

    def check(self, items):
        return [Verdict.WRONG for _ in items]

    def submit(self, items):
        return [Verdict.CORRECT for _ in items]

    def collect(self, pending):
        return [verdict for verdicts in pending for verdict in verdicts]


class Rewrites:
    """An assistant that changes one word."""

    overlaps, concurrency = False, None

    def rewrite(self, requests):
        return [Completion(r.positive + " not") for r in requests]


class Undecided:
    """A rule verifier with every verdict, by the text; what an assistant or a swap makes is wrong."""

    def check(self, items):
        return [Verdict.WRONG for _ in items]

    def submit(self, items):
        return [list(Verdict)[zlib.crc32(item[1].encode()) % 4] for item in items]

    def collect(self, pending):
        return [verdict for verdicts in pending for verdict in verdicts]


def solved(components):
    """The same machinery with a positive for every response that ends, and a quarter of all tokens ending one."""
    sampling = dataclasses.replace(components.policy.sampling, eos_ids=tuple(range(0, 600, 4)))
    policy = dataclasses.replace(components.policy, sampling=sampling)
    return dataclasses.replace(components, policy=policy, rule=AlwaysRight(), assistant=Rewrites())


def without_models(components, noted=None):
    """The same step with no model in it: rewards that count up; minibatches are noted by their advantages.

    noted: the list to which each minibatch's advantages are added.
    """

    def update(state, batch):
        if noted is not None:
            noted.append(np.asarray(batch.advantages).tolist())
        return state, {"loss": jnp.zeros(())}

    def logprobs(params, tokens, valid, width):
        return jnp.zeros((len(tokens), width))

    def score(params, batch):
        return np.arange(len(batch.tokens), dtype=np.float32)

    def update_reward(state, *_):
        return state, {"lr": jnp.zeros(()), "skipped": jnp.zeros(())}

    policy = dataclasses.replace(
        components.policy, packs_rows=False, update=update, logprobs=logprobs, reference_logprobs=logprobs
    )
    reward = dataclasses.replace(
        components.reward, packs_rows=False, compute_logits=score, update=update_reward
    )
    return dataclasses.replace(
        components, policy=policy, reward=reward, rule=AlwaysRight(), assistant=Rewrites()
    )


def host(tree):
    return [np.array(x) for x in jax.tree.leaves(tree)]  # copies: views would keep the arrays alive


def unchanged(before, after):
    return [a.tobytes() == b.tobytes() for a, b in zip(before, host(after), strict=True)]


def sample(components, state, problems):
    """A rollout of a batch of problems, with the key of the first step."""
    key = keys.make_key(components.settings.seed, "rollout", 1)
    rollout, _, _ = policy_stages.sample_responses(components, state.policy.params, problems, key)
    return rollout


def score(components, reward, problems, completions):
    """A reward model's logits."""
    return grading.compute_response_logits(components, reward.params, problems, completions)


def a_pair(problem):
    return Pair(problem, "It is 3. #### 3", "It is 4. #### 4", 0)


@contextlib.contextmanager
def begun(components, state, path):
    """The state as a run begins or resumes it, with its run directory and checkpoints."""
    run = run_directory.RunDirectory(path, config(), resume=True)
    with run, Checkpoints(path, keep=1) as kept:
        yield start_or_resume(components, state, run, kept), run, kept


ALL_TERMS = {
    "data.prompts_per_step": 4,
    "rollout.group_size": 4,
    "reward.pair_bce": 0.5,
    "reward.rollout_bce": 1.0,
    "reward.rollout_rows": 6,
    "reward.updates": 2,
    "reward.warmup_updates": 2,
    "reward.replay": 5,
    "reward.replay_rows": 4,
    "pairs.per_prompt": 2,
    "pairs.negatives": ("assistant", "swap"),
}


def steps(build, path, count, change=lambda components: components, **changes):
    """So many steps, begun or resumed, of a run that decides at random: the state on the host, and the metrics."""
    with build(**ALL_TERMS | changes) as (components, state):
        components = change(dataclasses.replace(solved(components), rule=Undecided()))
        with begun(components, state, path) as (state, run, kept):
            found, first = [], state.replay
            for _ in range(count):
                state, metrics, _ = take_step(components, state)
                found.append(metrics)
                run.log(state.step, metrics)
            if count:
                save_checkpoint(components, state, run, kept)
            return host(state), found, state.replay, first
