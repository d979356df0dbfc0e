"""Evaluation of the policy on held-out problems, by the rule, the reward model and exact truth.

1. `eval.samples` responses are sampled to each problem at the evaluation's own temperature and top-p, with fixed
   keys: two evaluations of one policy are equal.
2. Each gets the rule's verdict, the reward model's score, and exact truth where the problems have it.
3. With `eval.greedy`, the same is measured of the most likely responses, under `eval/greedy/`.
4. Synthetic problems tell more: the share of responses with the habit that the reward model wrongly likes
   (data/synthetic.py), `eval/response/habit`; and how well the reward model separates right from wrong,

       eval/rm_policy/     on the sampled responses,
       eval/rm_original/   on labelled completions like its training data,
       eval/rm_balanced/   on labelled completions balanced over correctness and habit; `by_habit` and `by_truth`
                           say how many logits the habit adds to a score, and how many being right adds.

    N  responses
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from cooper_jax import statistics
from cooper_jax.data import synthetic
from cooper_jax.reward import reward_losses
from cooper_jax.trainer import policy_stages
from cooper_jax.trainer.grading import score_responses
from cooper_jax.trainer.state import Components, State
from cooper_jax.trainer.step_metrics import (
    measure_hacking,
    measure_oracle,
    measure_responses,
    measure_verdicts,
)
from cooper_jax.types import Completion, Metrics, Problem


def evaluate_held_out(components: Components, state: State) -> Metrics:
    """Metrics under `eval/`; empty where no problems are held out.  Raises hosts.Stopped after a SIGTERM."""
    if not components.held_out:
        return {}
    section = components.settings.eval
    metrics = _evaluate_responses(components, state, section.temperature)
    if section.greedy:
        greedy = _evaluate_responses(components, state, 0.0)
        metrics |= {f"greedy/{name}": value for name, value in greedy.items()}
    if components.reward is not None and components.oracle is not None and section.reward_rows:
        metrics |= _evaluate_reward_model(components, state)
    metrics["problems"] = float(len(components.held_out))
    return {f"eval/{name}": float(np.asarray(value)) for name, value in metrics.items()}


def _evaluate_responses(components: Components, state: State, temperature: float) -> Metrics:
    """Sample responses to all held-out problems and measure them."""
    oracle = components.oracle
    completions = policy_stages.sample_held_out(components, state.policy.params, temperature)
    samples = len(completions) // len(components.held_out)
    problems = [components.held_out[n // samples] for n in range(len(completions))]

    # The rule's processes work while the reward model scores.
    pending_verdicts = components.rule.submit(
        [(p.reference, c.text) for p, c in zip(problems, completions, strict=True)]
    )
    metrics = measure_responses(completions) | measure_oracle(oracle, problems, completions)
    if components.reward is not None:
        logits = score_responses(components, state.reward_state.params, problems, completions)
        scores = np.asarray(reward_losses.rewards_from_logits(jnp.asarray(logits)))
        metrics |= measure_hacking(scores, pending_verdicts.result())
        if oracle is not None:
            truth = np.array([oracle(p, c.text) for p, c in zip(problems, completions, strict=True)])
            metrics |= _measure_separation("rm_policy", truth, logits)
    if oracle is not None:
        metrics["response/habit"] = float(np.mean([synthetic.has_habit(c.text) for c in completions]))
    return metrics | measure_verdicts(pending_verdicts.result())


def _evaluate_reward_model(components: Components, state: State) -> Metrics:
    """Measure the reward model on labelled synthetic completions."""
    settings = components.settings
    metrics: Metrics = {}
    sets = synthetic.make_reward_sets(
        settings.seed, settings.eval.reward_rows, settings.supervised.reward_habit
    )
    for name, triples in sets.items():
        problems = [Problem(t.question, t.reference) for t in triples]
        completions = [Completion(t.completion) for t in triples]
        logits = score_responses(components, state.reward_state.params, problems, completions)
        truth = np.array([t.label > 0.5 for t in triples])
        metrics |= _measure_separation(f"rm_{name}", truth, logits)
        if name == "balanced":
            habit = np.array([synthetic.has_habit(t.completion) for t in triples])
            metrics[f"rm_{name}/by_habit"] = _compute_main_effect(logits, habit, truth)
            metrics[f"rm_{name}/by_truth"] = _compute_main_effect(logits, truth, habit)
    return metrics


def _compute_main_effect(logits: np.ndarray, factor: np.ndarray, other: np.ndarray) -> float:
    """The difference of mean logits with and without `factor`, averaged over both levels of `other`.

    logits: f32[N].  factor, other: bool[N].
    """
    differences = []
    for level in (other, ~other):
        differences.append(logits[factor & level].mean() - logits[~factor & level].mean())
    return float(np.mean(differences))


def _measure_separation(name: str, truth: np.ndarray, logits: np.ndarray) -> Metrics:
    """Accuracy and area under the ROC curve.  truth: bool[N].  logits: f32[N]."""
    return {
        f"{name}/accuracy": float(((logits > 0) == truth).mean()),
        f"{name}/auroc": statistics.area_under_roc(truth, logits),
    }
