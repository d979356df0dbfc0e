"""An on-policy start of the reward model: updates on rollouts of the policy at step 0, which stays as it is (ours).

A reward model that was trained on others' completions knows their shortcuts; here it meets the policy's own before
they earn anything.  `reward.warm_start` updates, each on fresh rollouts of problems in an order of their own:
sampled, scored, judged by the rule, paired and learned from as in a Cooper step.  In the model arm the reward model
is frozen after that: a control that tells what the updates at the steps add.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from cooper_jax import signals, stages
from cooper_jax.assembly import Cooper, State
from cooper_jax.data import problems as problem_sets
from cooper_jax.reward.lessons import Replay
from cooper_jax.reward.losses import rewards
from cooper_jax.runtime import hosts, keys

REPORTS = 8  # lines that it prints, at most


def run(cooper: Cooper, state: State) -> State:
    """The state at step 0 with the reward model updated; as it is in the rule arm."""
    count = cooper.cfg.reward.warm_start
    if cooper.reward is None or not count:
        return state
    arm, cfg = cooper.cfg.reward.arm, cooper.cfg.copy_and_resolve_references()
    cfg.reward.arm = "cooper"  # whose stages update it
    cooper = dataclasses.replace(cooper, cfg=cfg)
    for update in range(count):
        hosts.look()
        # Draws of pairs and lessons are keyed by (step, position): no Cooper step has the number 0.
        positions = range(update * cfg.data.prompts_per_step, (update + 1) * cfg.data.prompts_per_step)
        chosen = [problem_sets.problem_at(p, len(cooper.train), cfg.seed, "warm_start") for p in positions]
        problems = [cooper.train[i] for i in chosen]
        rows = [problem for problem in problems for _ in range(cfg.rollout.group_size)]
        _, completions = stages.sample(
            cooper, state, [cooper.train_prompts[i] for i in chosen], positions,
            key=keys.stream(cfg.seed, "warm_start"),
        )  # fmt: skip
        pending = cooper.rule.submit([(p.reference, c.text) for p, c in zip(rows, completions, strict=True)])
        scores = np.asarray(rewards(stages.score(cooper, state, rows, completions)))
        verdicts = pending.result()
        made = stages.propose_pairs(cooper, problems, completions, verdicts, positions, 0, scores).result()
        taught, replay = stages.choose_lessons(
            cooper, state, rows, completions, verdicts, positions, 0, scores
        )
        reward, _ = stages.update_reward_model(cooper, state, made.pairs, taught)
        state = state.replace(reward=reward, replay=replay)
        if (update + 1) % max(1, count // REPORTS) == 0:
            found = signals.hacking_metrics(scores, verdicts)
            hosts.say(
                f"warm start of the reward model: update {update + 1}/{count}  "
                f"rule {signals.verdict_metrics(verdicts)['rule/accuracy']:.1%}  agreement "
                f"{found['rm/rule_agreement']:.3f}  false positives {found['rm/false_positive_rate']:.3f}"
            )
    return state if arm == "cooper" else state.replace(replay=Replay())
