"""Evaluation of the policy on held-out problems, by the rule, by the reward model and by exact truth.

1. `eval.samples` responses to each problem are sampled at the evaluation's own temperature and top-p, with
   fixed keys, so two evaluations of one policy are equal.
2. Each response gets the rule's verdict, the reward model's score and, for synthetic problems, exact truth.
3. With `eval.greedy` the same metrics of greedy responses are added under `eval/greedy/`.
4. Problems of several sources are also measured by source, under `eval/by_source/<name>/`.
5. Synthetic problems have more metrics.  `eval/response/habit` is the share of responses with the habit that
   the reward model has learnt to reward (data/synthetic.py).  Accuracy and AUROC of the reward model are
   measured on three sets of completions:

       eval/rm_policy/     the sampled responses
       eval/rm_original/   labelled completions like its training data
       eval/rm_balanced/   labelled completions balanced over correctness and habit; `by_habit` and `by_truth`
                           are the logits that the habit and correctness add on average

    N  responses
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from cooper_jax import statistics
from cooper_jax.data import synthetic
from cooper_jax.reward import reward_losses
from cooper_jax.rule.worker_process import make_item
from cooper_jax.runtime.console import CONSOLE
from cooper_jax.trainer import policy_stages
from cooper_jax.trainer.grading import compute_response_logits
from cooper_jax.trainer.state import Components, State
from cooper_jax.trainer.step_metrics import (
    measure_hacking,
    measure_oracle,
    measure_responses,
    measure_verdicts,
)
from cooper_jax.types import Completion, Metrics, Problem, Verdict


def evaluate_held_out(components: Components, state: State) -> Metrics:
    """Evaluate the policy and return metrics under `eval/`; empty if no problems are held out.

    Raises hosts.Stopped after a SIGTERM.
    """
    if not components.held_out:
        return {}
    section = components.settings.eval
    metrics = _evaluate_responses(components, state, section.temperature)

    # Greedy responses are a second evaluation at temperature 0, with one response per problem.
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
    how = "sampled" if temperature else "greedy"
    CONSOLE.show_detail(f"{how} responses")
    completions = policy_stages.sample_held_out_responses(components, state.policy.params, temperature)
    samples = len(completions) // len(components.held_out)
    problems = [components.held_out[n // samples] for n in range(len(completions))]

    # The rule's worker processes run while the reward model scores on the devices.
    pending_verdicts = components.rule.submit(
        [make_item(p, c.text) for p, c in zip(problems, completions, strict=True)]
    )
    metrics = measure_responses(completions) | measure_oracle(oracle, problems, completions)
    scores = None
    if components.reward is not None:
        CONSOLE.show_detail(f"scores of {how} responses")
        logits = compute_response_logits(components, state.reward_state.params, problems, completions)
        scores = np.asarray(reward_losses.rewards_from_logits(jnp.asarray(logits)))
        metrics |= measure_hacking(scores, pending_verdicts.result())
        if oracle is not None:
            truth = np.array([oracle(p, c.text) for p, c in zip(problems, completions, strict=True)])
            metrics |= _measure_separation("rm_policy", truth, logits)

    # Only synthetic problems have the habit.
    if oracle is not None:
        metrics["response/habit"] = float(np.mean([synthetic.has_habit(c.text) for c in completions]))
    CONSOLE.show_detail("verdicts of the rule verifier")
    verdicts = pending_verdicts.result()
    return metrics | measure_verdicts(verdicts) | _measure_sources(problems, completions, verdicts, scores)


def _measure_sources(
    problems: Sequence[Problem],
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    scores: np.ndarray | None,
) -> Metrics:
    """The metrics of each source's responses; none if all are of one source.

    problems, completions, verdicts: one per response.  scores: f32[N], or None without a reward model.
    """
    rows_by_source: dict[str, list[int]] = {}
    for n, problem in enumerate(problems):
        rows_by_source.setdefault(problem.source, []).append(n)
    if len(rows_by_source) < 2:
        return {}

    metrics: Metrics = {}
    for name, rows in rows_by_source.items():
        verdicts_of_source = [verdicts[n] for n in rows]
        measured = measure_verdicts(verdicts_of_source) | measure_responses([completions[n] for n in rows])
        if scores is not None:
            measured |= measure_hacking(scores[rows], verdicts_of_source)
        metrics |= {f"by_source/{name}/{metric}": value for metric, value in measured.items()}
    return metrics


def _evaluate_reward_model(components: Components, state: State) -> Metrics:
    """Measure the reward model on labelled synthetic completions, the same ones at every evaluation."""
    settings = components.settings
    metrics: Metrics = {}
    reward_sets = synthetic.make_reward_sets(
        settings.seed, settings.eval.reward_rows, settings.supervised.reward_habit
    )
    for name, triples in reward_sets.items():
        CONSOLE.show_detail(f"the reward model on {len(triples)} labelled completions ({name})")
        problems = [Problem(t.question, t.reference) for t in triples]
        completions = [Completion(t.completion) for t in triples]
        logits = compute_response_logits(components, state.reward_state.params, problems, completions)
        truth = np.array([t.label > 0.5 for t in triples])
        metrics |= _measure_separation(f"rm_{name}", truth, logits)

        # In the balanced set habit and correctness are independent, so each one's effect can be separated.
        if name == "balanced":
            habit = np.array([synthetic.has_habit(t.completion) for t in triples])
            metrics[f"rm_{name}/by_habit"] = _compute_main_effect(logits, habit, truth)
            metrics[f"rm_{name}/by_truth"] = _compute_main_effect(logits, truth, habit)
    return metrics


def _compute_main_effect(logits: np.ndarray, factor: np.ndarray, other: np.ndarray) -> float:
    """The mean logit with `factor` minus the mean logit without it, averaged over both levels of `other`.

    logits: f32[N].  factor, other: bool[N].
    """
    differences = []
    for level in (other, ~other):
        differences.append(logits[factor & level].mean() - logits[~factor & level].mean())
    return float(np.mean(differences))


def _measure_separation(name: str, truth: np.ndarray, logits: np.ndarray) -> Metrics:
    """Accuracy (a logit above 0 predicts `correct`) and area under the ROC curve.

    truth: bool[N].  logits: f32[N].
    """
    return {
        f"{name}/accuracy": float(((logits > 0) == truth).mean()),
        f"{name}/auroc": statistics.area_under_roc(truth, logits),
    }
