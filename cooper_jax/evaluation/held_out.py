"""The policy on held-out problems: sampled, judged by the rule, the reward model and (synthetic) the oracle.

1. `eval.samples` responses a problem at the evaluation's own temperature and top-p, with fixed keys: two
   evaluations of one policy are equal.
2. The rule's verdict on each, the reward model's score, and exact truth where the problems have it.
"""

from __future__ import annotations

import numpy as np

from cooper_jax import signals, stages
from cooper_jax.assembly import Cooper, State
from cooper_jax.reward import verifier_model
from cooper_jax.types import Metrics


def evaluate(cooper: Cooper, state: State) -> Metrics:
    """Metrics under `eval/`; empty where no problems are held out."""
    if not cooper.held_out:
        return {}
    section = cooper.cfg.eval
    completions = stages.sample_held_out(cooper, state)
    rows = [p for p in cooper.held_out for _ in range(section.samples)]
    pending = cooper.rule.submit([(p.reference, c.text) for p, c in zip(rows, completions, strict=True)])
    metrics = signals.response_metrics(completions) | signals.oracle_metrics(cooper.oracle, rows, completions)
    if cooper.reward is not None:
        logits = stages.score(cooper, state, rows, completions)
        metrics |= signals.hacking_metrics(np.asarray(verifier_model.rewards(logits)), pending.result())
    verdicts = pending.result()
    metrics |= signals.verdict_metrics(verdicts)
    metrics["problems"] = float(len(cooper.held_out))
    return {f"eval/{name}": float(np.asarray(value)) for name, value in metrics.items()}
