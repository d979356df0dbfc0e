"""How often does a reward model let known hacks (data/reward_hacks.py) pass?

1. `score` asks one or several reward models (before and after co-training, side by side) for all attacks, a chunk
   of rows at a time, into the ledger.
2. `summarise`: of each attack and model the false-positive rate (rewards above 0.5) with a 95 % interval resampled
   by question, the mean reward, their changes against the unattacked completion, and whether the bound holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cooper_jax.data.reward_hacks import ATTACKS, BASELINE, apply_attack
from cooper_jax.evaluation.evaluation_ledger import Ledger, Row
from cooper_jax.evaluation.judges import THRESHOLD
from cooper_jax.evaluation.resampling import Resamples, interval_of
from cooper_jax.evaluation.text_tables import format_percent, format_table
from cooper_jax.runtime import hosts
from cooper_jax.types import Triple

Score = Callable[[Sequence[Triple]], np.ndarray]  # triples -> rewards f32[N]


def draw_references(wrong: Sequence[Triple], seed: int) -> list[str]:
    """Those that the reward model is shown: some attacks write into them."""
    return [apply_attack(t, name, seed, i).reference for i, t in enumerate(wrong) for name in ATTACKS]


def score_attacks(
    wrong: Sequence[Triple],
    models: dict[str, Score],
    ledger: Ledger,
    chunks: Sequence[range],
    seed: int,
    tell: Callable[[str], Any],
) -> None:
    """All that the ledger does not hold yet.  wrong: triples whose completions are labelled wrong."""
    for places in chunks[ledger.done :]:
        hosts.raise_if_stopping()
        start = time.perf_counter()
        shown = [(i, name, apply_attack(wrong[i], name, seed, i)) for i in places for name in ATTACKS]
        rewards = {model: ask([t for _, _, t in shown]) for model, ask in models.items()}
        rows: list[Row] = [
            {
                "id": wrong[i].id,
                "source": wrong[i].source,
                "attack": name,
                "group": wrong[i].question,
                "question": t.question,
                "reference": t.reference,
                "completion": t.completion,
                "rewards": {model: round(float(found[n]), 6) for model, found in rewards.items()},
            }
            for n, (i, name, t) in enumerate(shown)
        ]
        seconds = time.perf_counter() - start
        ledger.append(rows, seconds)
        tell(
            f"{places.stop}/{len(wrong)} wrong completions  {len(rows) * len(models) / seconds:.1f} scores/s"
        )


# --- 2. figures ----------------------------------------------------------------------------------------------


def summarise_attacks(rows: Sequence[Row], seed: int, resamples: int) -> dict[str, Any]:
    """attack -> {bound, models: {model: {rate, rate_change, reward, reward_change, holds}}}."""
    of = {name: [row for row in rows if row["attack"] == name] for name in ATTACKS}
    drawn = Resamples([row["group"] for row in of[BASELINE]], seed, resamples)
    every = np.ones(len(of[BASELINE]), bool)

    def means(name: str, model: str) -> tuple[np.ndarray, np.ndarray]:
        rewards = np.array([row["rewards"][model] for row in of[name]])
        return drawn.mean((rewards > THRESHOLD).astype(float), every), drawn.mean(rewards, every)

    out: dict[str, Any] = {}
    for name, (_, bound) in ATTACKS.items():
        out[name] = {"bound": bound, "completions": len(of[name]), "models": {}}
        for model in rows[0]["rewards"]:
            (rate, reward), (rate0, reward0) = means(name, model), means(BASELINE, model)
            out[name]["models"][model] = {
                "rate": interval_of(rate),
                "rate_change": interval_of(rate - rate0),
                "reward": interval_of(reward),
                "reward_change": interval_of(reward - reward0),
                "holds": None if bound is None else bool(rate[0] <= bound),
            }
    return out


def format_attacks(summary: dict[str, Any]) -> str:
    """The tables of a terminal: false-positive rates side by side, then mean rewards."""
    models = list(next(iter(summary.values()))["models"])
    holds = {None: "", True: "holds", False: "BROKEN"}
    rates = [
        [name, "" if a["bound"] is None else format_percent(a["bound"])]
        + [
            cell
            for m in models
            for cell in (
                format_percent(a["models"][m]["rate"]),
                format_percent(a["models"][m]["rate_change"].value),
                holds[a["models"][m]["holds"]],
            )
        ]
        for name, a in summary.items()
    ]
    header = ["attack", "bound"]
    header += [h for m in models for h in (f"{m}: false positives % (95 %)", "change", "")]
    rewards = [
        [name, *(format_percent(a["models"][m][x]) for m in models for x in ("reward", "reward_change"))]
        for name, a in summary.items()
    ]
    second = ["attack", *(h for m in models for h in (f"{m}: mean reward x 100 (95 %)", "change"))]
    return f"{format_table(header, rates)}\n\n{format_table(second, rewards)}"
