"""The policy on held-out problems: sampled, judged by the rule, the reward model and (synthetic) the oracle.

1. `eval.samples` responses a problem at the evaluation's own temperature and top-p, with fixed keys: two
   evaluations of one policy are equal.
2. The rule's verdict on each, the reward model's score, and exact truth where the problems have it.
3. With `eval.greedy`, the same of the most likely responses, under `eval/greedy/`.
4. For synthetic problems, the share of responses with the habit (data/synthetic.py), `eval/response/habit`, and the
   reward model on labelled completions: as in its training data, and balanced over correctness and habit
   (`reward_sets`), under `eval/rm_original/` and `eval/rm_balanced/`; beside the exact truth on the sampled
   responses, under `eval/rm_policy/`.  Of the balanced set, `by_habit` and `by_truth` say how many logits the habit
   adds to a completion's score, and how many its being right.
"""

from __future__ import annotations

import numpy as np

from cooper_jax import signals, stages, statistics
from cooper_jax.assembly import Cooper, State
from cooper_jax.data import synthetic
from cooper_jax.reward import verifier_model
from cooper_jax.types import Completion, Metrics, Problem


def evaluate(cooper: Cooper, state: State) -> Metrics:
    """Metrics under `eval/`; empty where no problems are held out."""
    if not cooper.held_out:
        return {}
    section = cooper.cfg.eval
    metrics = _responses(cooper, state, section.temperature)
    if section.greedy:
        greedy = _responses(cooper, state, 0.0)
        metrics |= {f"greedy/{name}": value for name, value in greedy.items()}
    metrics |= _reward_model(cooper, state)
    metrics["problems"] = float(len(cooper.held_out))
    return {f"eval/{name}": float(np.asarray(value)) for name, value in metrics.items()}


def _responses(cooper: Cooper, state: State, temperature: float) -> Metrics:
    completions = stages.sample_held_out(cooper, state, temperature)
    rows = [p for p in cooper.held_out for _ in range(len(completions) // len(cooper.held_out))]
    pending = cooper.rule.submit([(p.reference, c.text) for p, c in zip(rows, completions, strict=True)])
    metrics = signals.response_metrics(completions) | signals.oracle_metrics(cooper.oracle, rows, completions)
    if cooper.reward is not None:
        logits = stages.score(cooper, state, rows, completions)
        rewards = np.asarray(verifier_model.rewards(logits))
        metrics |= signals.hacking_metrics(rewards, pending.result())
        if cooper.oracle is not None:
            truth = np.array([cooper.oracle(p, c.text) for p, c in zip(rows, completions, strict=True)])
            metrics |= _figures("rm_policy", truth, logits)
    if cooper.oracle is not None:
        metrics["response/habit"] = float(np.mean([synthetic.has_habit(c.text) for c in completions]))
    return metrics | signals.verdict_metrics(pending.result())


def _reward_model(cooper: Cooper, state: State) -> Metrics:
    """The reward model on labelled synthetic completions."""
    count = cooper.cfg.eval.reward_rows
    if cooper.reward is None or cooper.oracle is None or not count:
        return {}
    out: Metrics = {}
    sets = synthetic.reward_sets(cooper.cfg.seed, count, cooper.cfg.warmup.reward_habit)
    for name, triples in sets.items():
        rows = [Problem(t.question, t.reference) for t in triples]
        logits = stages.score(cooper, state, rows, [Completion(t.completion) for t in triples])
        truth, habit = np.array([(t.label > 0.5, synthetic.has_habit(t.completion)) for t in triples]).T
        out |= _figures(f"rm_{name}", truth, logits)
        if name == "balanced":
            out[f"rm_{name}/by_habit"] = _main_effect(logits, habit, truth)
            out[f"rm_{name}/by_truth"] = _main_effect(logits, truth, habit)
    return out


def _main_effect(logits: np.ndarray, factor: np.ndarray, other: np.ndarray) -> float:
    """How much greater the mean logit is where `factor` holds, the mean of both levels of `other`; all [N]."""
    return float(
        np.mean([logits[factor & level].mean() - logits[~factor & level].mean() for level in (other, ~other)])
    )


def _figures(name: str, truth: np.ndarray, logits: np.ndarray) -> Metrics:
    """truth bool[N], logits f32[N]."""
    return {
        f"{name}/accuracy": float(((logits > 0) == truth).mean()),
        f"{name}/auroc": statistics.auroc(truth, logits),
    }
