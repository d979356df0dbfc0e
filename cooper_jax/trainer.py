"""The Cooper step (arXiv 2508.05613), and the loop around it.

1. G responses a prompt from the policy.
2. Their rewards, the sigmoid of the reward model's logit before its update; the rule verifies meanwhile.
3. GRPO on the policy, while
4. positives that the rule finds correct are rewritten into negatives by the assistant.
5. The contrastive update of the reward model over the valid pairs; it may learn from labelled rollouts, too.

The arms differ in steps 2 and 5 alone: `rule` takes the verdict as the reward, `model` keeps its reward model
frozen.  Departures from the released code: every random choice is keyed by (seed, step, position), negatives are
checked against the reference and rendered by the one template, and the pair loss is normalised globally.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter

import jax
import numpy as np
from ml_collections import ConfigDict

from cooper_jax import assembly, settings, signals, stages, warmup
from cooper_jax.assembly import Cooper, State
from cooper_jax.data import problems as problem_sets
from cooper_jax.evaluation.held_out import evaluate
from cooper_jax.policy.advantages import group_advantages
from cooper_jax.reward import losses
from cooper_jax.rollout import engine
from cooper_jax.runtime import hosts
from cooper_jax.runtime.checkpoint import Checkpoints
from cooper_jax.runtime.mesh import Layout
from cooper_jax.runtime.metrics import Phases, Progress
from cooper_jax.runtime.rundir import Run, check_shared, run_path
from cooper_jax.types import Completion, Metrics, Pair, Problem, Verdict


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a step saw, for sample dumps; rows are prompt-major."""

    problems: list[Problem]  # [B]
    completions: list[Completion]  # [N]
    verdicts: list[Verdict]  # [N]
    rewards: np.ndarray  # f32[N]
    advantages: np.ndarray  # f32[N]
    pairs: list[Pair | None]
    refused: Counter


def cooper_step(cooper: Cooper, state: State, phases: Phases) -> tuple[State, Metrics, Seen]:
    """One step: the new State, its metrics, and what it saw."""
    cfg, step = cooper.cfg, state.step + 1
    chosen, positions = next_problems(cooper, state)
    problems = [cooper.train[i] for i in chosen]
    rows = [problem for problem in problems for _ in range(cfg.rollout.group_size)]
    prompt_tokens = [cooper.train_prompts[i] for i in chosen]

    rollout_metrics: Metrics = {}
    beside = stages.ScoreBeside(cooper, state) if stages.ScoreBeside.possible(cooper) else None

    def judge(place: int, responses: list[Completion]) -> None:
        """What has ended is judged while the rest is sampled; the verifier remembers it."""
        cooper.rule.submit([(problems[place].reference, c.text) for c in responses])
        if beside is not None:
            beside.add(place * cfg.rollout.group_size, problems[place], responses)

    with phases.phase("rollout"):
        rollout, completions = stages.sample(
            cooper, state, prompt_tokens, positions, on_prompt=judge, report=rollout_metrics.update
        )
    pending = cooper.rule.submit([(p.reference, c.text) for p, c in zip(rows, completions, strict=True)])
    with phases.phase("score"):
        logits = stages.score(cooper, state, rows, completions) if beside is None else beside.result()
    hosts.look()
    with phases.phase("logprobs"):
        batch = stages.logprobs(cooper, state, prompt_tokens, rollout)
    with phases.phase("rule"):
        verdicts = pending.result()

    scores = None if logits is None else np.asarray(losses.rewards(logits))
    hacking = {} if scores is None else signals.hacking_metrics(scores, verdicts)
    rewards = policy_rewards(cfg.reward, scores, verdicts, completions)
    advantages, flat_groups = group_advantages(
        rewards,
        cfg.rollout.group_size,
        std_normalise=cfg.policy.std_normalise,
        eps=cfg.policy.std_eps,
        floor=cfg.policy.std_floor,
    )
    hosts.look()  # the last time: from the update on, the state that a checkpoint would hold is gone
    with phases.phase("pairs"):
        proposed = stages.propose_pairs(cooper, problems, completions, verdicts, positions, step, scores)
        taught, replay = stages.choose_lessons(
            cooper, state, rows, completions, verdicts, positions, step, scores
        )
    with phases.phase("policy"):
        policy, policy_metrics = stages.update_policy(cooper, state, batch, advantages, step)
    with phases.phase("pairs"):
        made = proposed.result()
    with phases.phase("reward"):
        updates = stages.updates_of(cfg.reward, hacking.get("rm/false_positive_rate", 0.0))
        reward, reward_metrics = stages.update_reward_model(cooper, state, made.pairs, taught, updates)

    advantages = np.asarray(advantages)
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/zero_variance_groups": float(flat_groups),
        "data/position": float(positions.stop),
        "data/epoch": positions.stop / len(cooper.train),
        **rollout_metrics,
        **signals.verdict_metrics(verdicts),
        **hacking,
        **signals.response_metrics(completions),
        **signals.pair_metrics(made.pairs, made.refused),
        **signals.oracle_metrics(cooper.oracle, rows, completions),
        **policy_metrics,
        **reward_metrics,
    }
    seen = Seen(problems, completions, verdicts, rewards, advantages, made.pairs, made.refused)
    after = state.replace(policy=policy, reward=reward, step=step, position=positions.stop, replay=replay)
    return after, metrics, seen


def next_problems(cooper: Cooper, state: State) -> tuple[list[int], range]:
    """The step's problems: their indices, and their places in the endless order of epochs."""
    positions = range(state.position, state.position + cooper.cfg.data.prompts_per_step)
    chosen = [problem_sets.problem_at(p, len(cooper.train), cooper.cfg.seed) for p in positions]
    return chosen, positions


def policy_rewards(
    cfg: ConfigDict, scores: np.ndarray | None, verdicts: list[Verdict], completions: list[Completion]
) -> np.ndarray:
    """What the policy is rewarded with, f32[N]: the reward model's scores, or the rule arm's rewards without them.

    Controls (ours; cfg: the config's `reward` section), in this order: `binary` rounds a score to 0 or 1, `either`
    adds the rule (1 for what it finds correct), `guard` takes everything from a response that is truncated or in
    which the rule finds no answer.
    """
    if scores is None:
        return rewards_of(verdicts)
    if cfg.binary:
        scores = (scores > 0.5).astype(np.float32)
    if cfg.either:
        scores = np.maximum(scores, rewards_of(verdicts))
    if cfg.guard:
        rows = zip(verdicts, completions, strict=True)
        scores = np.where([c.truncated or v is Verdict.NO_ANSWER for v, c in rows], np.float32(0), scores)
    return scores


def rewards_of(verdicts: list[Verdict]) -> np.ndarray:
    """The rule arm's rewards f32[N]: 1 for what is verified correct, 0 for everything else.

    An abstention earns nothing either: it is the paper's baseline that a rule misses what it cannot read.
    """
    return np.array([v is Verdict.CORRECT for v in verdicts], np.float32)


def samples_of(cooper: Cooper, seen: Seen) -> list[dict]:
    """Some prompts of a step as JSON objects: what was asked, sampled, judged and paired.

    `log.samples` of them: those with a valid pair first, then the others, in the step's order.
    """
    group = cooper.cfg.rollout.group_size
    slots = len(seen.pairs) // len(seen.problems)
    pairs = [seen.pairs[b * slots : (b + 1) * slots] for b in range(len(seen.problems))]
    order = sorted(range(len(seen.problems)), key=lambda b: not any(pairs[b]))  # stable
    out = []
    for b in order[: cooper.cfg.log.samples]:
        problem, rows = seen.problems[b], range(b * group, (b + 1) * group)
        out.append(
            {
                "id": problem.id,
                "question": problem.question,
                "reference": problem.reference,
                "responses": [
                    {
                        "text": seen.completions[n].text,
                        "truncated": seen.completions[n].truncated,
                        "verdict": seen.verdicts[n].value,
                        "reward": float(seen.rewards[n]),
                        "advantage": float(seen.advantages[n]),
                    }
                    for n in rows
                ],
                "pairs": [
                    {
                        "positive": p.positive,
                        "positive_reference": p.positive_reference or problem.reference,
                        "negative": p.negative,
                        "negative_reference": p.negative_reference or problem.reference,
                    }
                    for p in pairs[b]
                    if p is not None
                ],
            }
        )
    return out


def train(cfg: ConfigDict) -> None:
    """Run `cfg.steps` Cooper steps, or what is left of them after the newest checkpoint in the run directory.

    Raises hosts.Stopped after a SIGTERM, when a checkpoint of the last whole step is complete.
    """
    settings.check(cfg)
    with settings.boundary("run_dir"):
        path = run_path(cfg)
    with contextlib.ExitStack() as stack:
        with settings.boundary("run_dir"):
            check_shared(path)
            run = stack.enter_context(Run(path, cfg, resume=cfg.resume))
        cooper, state = stack.enter_context(assembly.build(cfg, path))
        with settings.boundary("run_dir"):
            checkpoints = stack.enter_context(Checkpoints(path, keep=cfg.checkpoint.keep))
        hosts.say(describe(cooper))
        try:
            state = warmup.start_or_resume(cooper, state, run, checkpoints, evaluate)
        except hosts.Stopped:
            hosts.say("stopped by a signal before step 0 was saved; the same command begins again")
            raise
        if state.step >= cfg.steps:
            hosts.say(f"{path} holds {state.step} steps already; raise --config.steps to go on")
            return
        progress = stack.enter_context(
            contextlib.closing(Progress(cfg.steps, state.step, quiet=not hosts.primary()))
        )
        phases = Phases()
        while state.step < cfg.steps:
            start, stopped = time.perf_counter(), None
            try:
                hosts.look()
                state, metrics, seen = cooper_step(cooper, state, phases)
            except hosts.Stopped:
                with settings.boundary("checkpoint"):
                    checkpoints.wait()  # it may be under way
                    if state.step not in checkpoints.steps():
                        warmup.save(cooper, state, run, checkpoints)
                    checkpoints.wait()
                hosts.say(f"stopped by a signal; step {state.step} is saved")
                raise
            seconds = time.perf_counter() - start
            sampled = sum(c.tokens for c in seen.completions)
            metrics |= {"time/step": seconds, "time/tokens_per_second": sampled / seconds}
            if cfg.eval.every and state.step % cfg.eval.every == 0:
                try:
                    with phases.phase("eval"):
                        metrics |= evaluate(cooper, state)
                except hosts.Stopped as caught:
                    # The step is whole: it is logged, without its evaluation, and saved.
                    stopped = caught
            with settings.boundary("run_dir"):
                run.log(state.step, metrics | phases.collect())
                if cfg.log.samples_every and (state.step % cfg.log.samples_every == 0 or state.step == 1):
                    run.dump_samples(state.step, samples_of(cooper, seen))
            progress.update(state.step, metrics)
            if stopped or state.step % cfg.checkpoint.every == 0 or state.step == cfg.steps:
                # The pause: arrays are copied, and written in the background.
                with settings.boundary("checkpoint"), phases.phase("checkpoint"):
                    warmup.save(cooper, state, run, checkpoints)
            if stopped:
                with settings.boundary("checkpoint"):
                    checkpoints.wait()
                hosts.say(f"stopped by a signal; step {state.step} is saved, not evaluated")
                raise stopped
        with settings.boundary("checkpoint"):
            checkpoints.wait()
    hosts.say(f"{path}: {cfg.steps} steps done; metrics.jsonl, samples.jsonl and checkpoints/ are there")


def _sizes(layout: Layout) -> str:
    return " x ".join(f"{name} {size}" for name, size in layout.mesh.shape.items())


def describe(cooper: Cooper) -> str:
    """What is about to run, in one line."""
    cfg, config = cooper.cfg, cooper.policy.model.config
    mesh = _sizes(cooper.layout)
    apart = {"reward": cooper.reward and cooper.reward.layout, "reference": cooper.policy.reference_layout}
    mesh += "".join(f", {n} {_sizes(x)}" for n, x in apart.items() if x is not None and x != cooper.layout)
    processes = jax.process_count()
    mesh += f" on {processes} hosts" if processes > 1 else ""
    problems, held_out = (
        f"{len(kept)} {what}"
        + (f" ({dropped} dropped: longer than {cfg.data.max_prompt_tokens} tokens)" if dropped else "")
        for kept, what, dropped in zip(
            (cooper.train, cooper.held_out), ("problems", "held out"), cooper.dropped, strict=True
        )
    )
    kernels = cfg.rollout.kernels
    kernels = engine.kernels_of(config, cooper.layout) if kernels == "auto" else kernels
    if not (cfg.eval.every and cooper.held_out):
        held_out = "no evaluation"
        if cfg.eval.every:
            held_out += " (give --config.data.eval=FILE or --config.data.eval_from_train=N)"
    return (
        f"{cfg.name}: arm {cfg.reward.arm}, {config.family} of {config.layers} layers x {config.width}, "
        f"{problems}, {held_out}, {cfg.data.prompts_per_step} x {cfg.rollout.group_size} responses a step, "
        f"mesh {mesh}, kernels {kernels}"
    )
