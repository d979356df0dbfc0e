"""Attack rates: how often a reward model accepts wrong completions under known hacks (data/reward_hacks.py).

1. `score_attacks` asks one or several reward models (before and after co-training, side by side) about all
   attacks, a chunk of completions at a time, and writes the rewards into the ledger.
2. `summarise_attacks` computes, for each attack and model, the false-positive rate (rewards above 0.5) with a
   95 % interval bootstrapped by question, the mean reward, their changes against the unattacked completions,
   and whether the attack's bound holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cooper_jax.data.reward_hacks import ATTACKS, BASELINE, apply_attack
from cooper_jax.evaluation.evaluation_ledger import Ledger, Row
from cooper_jax.evaluation.judges import THRESHOLD
from cooper_jax.evaluation.resampling import Resamples, compute_interval
from cooper_jax.evaluation.text_tables import format_percent, format_table
from cooper_jax.runtime import hosts
from cooper_jax.types import Triple

Score = Callable[[Sequence[Triple]], np.ndarray]  # triples -> rewards f32[N]


def list_attack_references(wrong: Sequence[Triple], seed: int) -> list[str]:
    """All references that reward models will read, since some attacks change the reference."""
    references = []
    for i, triple in enumerate(wrong):
        references += [apply_attack(triple, name, seed, i).reference for name in ATTACKS]
    return references


def score_attacks(
    wrong: Sequence[Triple],
    models: Mapping[str, Score],
    ledger: Ledger,
    chunks: Sequence[range],
    seed: int,
    print_line: Callable[[str], Any],
) -> None:
    """Score all chunks that the ledger does not hold yet.

    Args:
      wrong: triples whose completions are labelled wrong.
      models: reward models by name.
      chunks: indices of `wrong`.
      print_line: called with a line of progress after each chunk.

    Raises hosts.Stopped after SIGTERM.
    """
    for places in chunks[ledger.done :]:
        hosts.raise_if_stopping()
        start = time.perf_counter()
        attacked = []  # (index of the completion, attack, triple under the attack)
        for i in places:
            attacked += [(i, name, apply_attack(wrong[i], name, seed, i)) for name in ATTACKS]
        triples = [triple for _, _, triple in attacked]
        rewards = {model: score(triples) for model, score in models.items()}

        rows: list[Row] = []
        for n, (i, name, triple) in enumerate(attacked):
            row = {
                "id": wrong[i].id,
                "source": wrong[i].source,
                "attack": name,
                "group": wrong[i].question,
                "question": triple.question,
                "reference": triple.reference,
                "completion": triple.completion,
                "rewards": {model: round(float(values[n]), 6) for model, values in rewards.items()},
            }
            rows.append(row)

        seconds = time.perf_counter() - start
        ledger.append(rows, seconds)
        scores_per_second = len(rows) * len(models) / seconds
        print_line(f"{places.stop}/{len(wrong)} wrong completions  {scores_per_second:.1f} scores/s")


# --- 2. figures ---------------------------------------------------------------------------------------------


def summarise_attacks(rows: Sequence[Row], seed: int, resamples: int) -> dict[str, Any]:
    """Figures of all attacks: attack -> {bound, completions, models}.

    `models` is model -> {rate, rate_change, reward, reward_change, holds}, of which all but `holds` are
    intervals.
    """
    by_attack: dict[str, list[Row]] = {name: [] for name in ATTACKS}
    for row in rows:
        by_attack[row["attack"]].append(row)
    # All attacks share the resamples of the same questions, so that changes are paired.
    drawn = Resamples([row["group"] for row in by_attack[BASELINE]], seed, resamples)
    every = np.ones(len(by_attack[BASELINE]), bool)

    def compute_means(name: str, model: str) -> tuple[np.ndarray, np.ndarray]:
        """(false-positive rates, mean rewards), each f64[R + 1]."""
        rewards = np.array([row["rewards"][model] for row in by_attack[name]])
        return drawn.mean((rewards > THRESHOLD).astype(float), every), drawn.mean(rewards, every)

    summary: dict[str, Any] = {}
    for name, (_, bound) in ATTACKS.items():
        summary[name] = {"bound": bound, "completions": len(by_attack[name]), "models": {}}
        for model in rows[0]["rewards"]:
            rates, rewards = compute_means(name, model)
            baseline_rates, baseline_rewards = compute_means(BASELINE, model)
            summary[name]["models"][model] = {
                "rate": compute_interval(rates),
                "rate_change": compute_interval(rates - baseline_rates),
                "reward": compute_interval(rewards),
                "reward_change": compute_interval(rewards - baseline_rewards),
                "holds": None if bound is None else bool(rates[0] <= bound),
            }
    return summary


def format_attacks(summary: Mapping[str, Any]) -> str:
    """The tables for a terminal: false-positive rates side by side, then mean rewards."""
    models = list(next(iter(summary.values()))["models"])
    rate_header, reward_header = ["attack", "bound"], ["attack"]
    for model in models:
        rate_header += [f"{model}: false positives % (95 %)", "change", ""]
        reward_header += [f"{model}: mean reward x 100 (95 %)", "change"]

    holds = {None: "", True: "holds", False: "BROKEN"}
    rate_rows, reward_rows = [], []
    for name, attack in summary.items():
        rate_row = [name, "" if attack["bound"] is None else format_percent(attack["bound"])]
        reward_row = [name]
        for model in models:
            figures = attack["models"][model]
            rate_row += [format_percent(figures["rate"]), format_percent(figures["rate_change"].value)]
            rate_row.append(holds[figures["holds"]])
            reward_row += [format_percent(figures["reward"]), format_percent(figures["reward_change"])]
        rate_rows.append(rate_row)
        reward_rows.append(reward_row)
    return f"{format_table(rate_header, rate_rows)}\n\n{format_table(reward_header, reward_rows)}"
