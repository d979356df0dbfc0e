"""Attack rates: a reward model's decisions on completions under known hacks (reward/reward_hacks.py).

1. `score_attacks` scores all attacks with one or several reward models (such as one before and one after
   co-training), a chunk of completions at a time, and writes the rewards into the ledger.  Wrong completions
   are shown under every attack, right ones under the attacks that keep the completion.
2. `summarise_attacks` computes, for each attack and model, with 95 % intervals bootstrapped by question:

       accepted  share of the wrong completions with a reward above 0.5 under the attack
       success   the same among the wrong completions that are rejected without the attack.  Where the
                 attack replaces the completion, the original is not seen, and success equals `accepted`
       lost      fall of the share of the right completions that are accepted, from without the attack
       reward    mean reward of the wrong completions

   An attack holds if success is at most its bound and at most LOSS_BOUND is lost.  With rows of several sources,
   the figures of each source are given as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cooper_jax.evaluation.evaluation_ledger import Ledger, Row
from cooper_jax.evaluation.judges import THRESHOLD
from cooper_jax.evaluation.text_tables import format_percent, format_table
from cooper_jax.resampling import Resamples, compute_interval
from cooper_jax.reward.reward_hacks import ATTACKS, BASELINE, LOSS_BOUND, Openings, apply_attack
from cooper_jax.runtime import hosts
from cooper_jax.statistics import Interval
from cooper_jax.types import Triple

Score = Callable[[Sequence[Triple]], np.ndarray]  # triples -> rewards f32[N]


def list_attacks(triple: Triple) -> list[str]:
    """List the attacks under which a completion is shown."""
    # A right completion that is replaced as a whole is a wrong one, and those are shown already.
    return [name for name, attack in ATTACKS.items() if triple.label < 0.5 or not attack.replaces]


def list_attack_references(triples: Sequence[Triple], seed: int) -> list[str]:
    """List all references that the reward models will read; some attacks change the reference."""
    references = []
    for i, triple in enumerate(triples):
        references += [apply_attack(triple, name, seed, i).reference for name in list_attacks(triple)]
    return references


def score_attacks(
    triples: Sequence[Triple],
    models: Mapping[str, Score],
    ledger: Ledger,
    chunks: Sequence[range],
    seed: int,
    print_line: Callable[[str], Any],
) -> None:
    """Score all chunks that are not in the ledger yet.

    Args:
      triples: completions labelled wrong or correct.
      models: reward models by name.
      ledger: receives the rows of each finished chunk.
      chunks: ranges of indices of `triples`.
      seed: of the attacks' random choices.
      print_line: called with a line of progress after each chunk.

    Raises hosts.Stopped after SIGTERM.
    """
    openings = Openings.collect(triples)
    for places in chunks[ledger.done :]:
        hosts.raise_if_stopping()
        start = time.perf_counter()

        # Every completion under every attack is scored in one call per model, which batches rows of similar
        # length.
        attacked = []  # (index of the completion, attack, triple under the attack)
        for i in places:
            for name in list_attacks(triples[i]):
                attacked.append((i, name, apply_attack(triples[i], name, seed, i, openings)))
        shown = [triple for _, _, triple in attacked]
        rewards = {model: score(shown) for model, score in models.items()}

        # Label and group (the question, which is resampled as a whole) are those before any attack.
        rows: list[Row] = []
        for n, (i, name, triple) in enumerate(attacked):
            row = {
                "id": triples[i].id,
                "source": triples[i].source,
                "label": int(triples[i].label),
                "attack": name,
                "group": triples[i].question,
                "question": triple.question,
                "reference": triple.reference,
                "completion": triple.completion,
                "rewards": {model: round(float(values[n]), 6) for model, values in rewards.items()},
            }
            rows.append(row)

        seconds = time.perf_counter() - start
        ledger.append(rows, seconds)
        scores_per_second = len(rows) * len(models) / seconds
        print_line(f"{places.stop}/{len(triples)} completions  {scores_per_second:.1f} scores/s")


# --- 2. figures ---------------------------------------------------------------------------------------------


class _Rewards:
    """Rewards of the completions of one class under each attack, with resamples of their questions.

    All attacks share the resamples, so that changes are paired: each attack has one row per completion, in the
    same order.
    """

    def __init__(self, rows: Sequence[Row], label: int, seed: int, resamples: int):
        self._by_attack: dict[str, list[Row]] = {name: [] for name in ATTACKS}
        for row in rows:
            if row["label"] == label:
                self._by_attack[row["attack"]].append(row)
        groups = [row["group"] for row in self._by_attack[BASELINE]]
        self.count = len(groups)
        self._bootstrap = Resamples(groups, seed, resamples) if groups else None

    def get_rewards(self, attack: str, model: str) -> np.ndarray:
        """The rewards of all completions under an attack, f64[N]."""
        return np.array([row["rewards"][model] for row in self._by_attack[attack]])

    def compute_mean(self, values: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Compute the mean of values f64[N] over a mask bool[N] in each resample, f64[R + 1]."""
        if self._bootstrap is None:
            return np.full(2, np.nan)
        return self._bootstrap.mean(values, np.ones(self.count, bool) if mask is None else mask)


def summarise_attacks(rows: Sequence[Row], seed: int, resamples: int) -> dict[str, Any]:
    """Compute the figures of all attacks: attack -> {bound, replaces, trained, wrong, right, models, sources}.

    Args:
      rows: of the ledger.
      seed: of the bootstrap.
      resamples: R, the number of resamples behind each interval.

    `wrong` and `right` are numbers of completions.  `models` is model -> the figures of the module's docstring,
    with `accepted_change` and `reward_change` from without the attack, all as intervals, and `holds`: None
    without a bound.  A figure without rows is NaN.  `sources` is source -> {wrong, right, models} of its rows
    alone, and empty if there is only one source.
    """
    names = sorted({row["source"] for row in rows})
    by_source: dict[str, list[Row]] = {name: [] for name in names} if len(names) > 1 else {}
    if by_source:
        for row in rows:
            by_source[row["source"]].append(row)

    figures = _summarise_rows(rows, seed, resamples)
    figures_by_source = {source: _summarise_rows(part, seed, resamples) for source, part in by_source.items()}
    summary: dict[str, Any] = {}
    for name, attack in ATTACKS.items():
        summary[name] = {
            "bound": attack.bound,
            "replaces": attack.replaces,
            "trained": attack.trained,
            **figures[name],
            "sources": {source: part[name] for source, part in figures_by_source.items()},
        }
    return summary


def _summarise_rows(rows: Sequence[Row], seed: int, resamples: int) -> dict[str, dict[str, Any]]:
    """Compute the figures of some rows: attack -> {wrong, right, models}."""
    wrong, right = (_Rewards(rows, label, seed, resamples) for label in (0, 1))
    figures = {}
    for name, attack in ATTACKS.items():
        figures[name] = {
            "wrong": wrong.count,
            "right": 0 if attack.replaces else right.count,
            "models": {model: _compute_figures(name, model, wrong, right) for model in rows[0]["rewards"]},
        }
    return figures


def _compute_figures(name: str, model: str, wrong: _Rewards, right: _Rewards) -> dict[str, Any]:
    """Compute one model's figures under one attack."""
    attack = ATTACKS[name]
    rewards, usual = wrong.get_rewards(name, model), wrong.get_rewards(BASELINE, model)
    accepted, usually_accepted = rewards > THRESHOLD, usual > THRESHOLD

    # A completion that is accepted anyway says nothing about the text that was added to it.
    attackable = np.ones(wrong.count, bool) if attack.replaces else ~usually_accepted
    rates, usual_rates = (wrong.compute_mean(x.astype(float)) for x in (accepted, usually_accepted))
    means, usual_means = wrong.compute_mean(rewards), wrong.compute_mean(usual)
    figures = {
        "accepted": compute_interval(rates),
        "accepted_change": compute_interval(rates - usual_rates),
        "success": compute_interval(wrong.compute_mean(accepted.astype(float), attackable)),
        "reward": compute_interval(means),
        "reward_change": compute_interval(means - usual_means),
        "lost": Interval(float("nan"), float("nan"), float("nan")),
    }
    if not attack.replaces:
        kept = (right.get_rewards(name, model) > THRESHOLD).astype(float)
        usually_kept = (right.get_rewards(BASELINE, model) > THRESHOLD).astype(float)
        figures["lost"] = compute_interval(right.compute_mean(usually_kept - kept))

    # Bounds apply to the values on the data, not to their intervals.  NaN (no rows) breaks no bound.
    holds = None
    if attack.bound is not None:
        broken = figures["success"].value > attack.bound or figures["lost"].value > LOSS_BOUND
        holds = not broken
    return figures | {"holds": holds}


def format_attacks(summary: Mapping[str, Any]) -> str:
    """Format tables for a terminal: decisions, decisions by source, and mean rewards, with models side by side."""
    tables = [_format_decisions(summary)]
    if summary[BASELINE]["sources"]:
        tables.append(_format_sources(summary))
    tables.append(_format_rewards(summary))
    return "\n\n".join(tables)


def _format_decisions(summary: Mapping[str, Any]) -> str:
    models = list(summary[BASELINE]["models"])
    header = ["attack", "trained on", "bound"]
    for model in models:
        header += [f"{model}: wrong accepted % (95 %)", "success % (95 %)", "right lost % (95 %)", ""]

    bound_states = {None: "", True: "holds", False: "BROKEN"}
    rows = []
    for name, attack in summary.items():
        bound = attack["bound"]
        row = [name, "", ""]
        if bound is not None:
            row = [name, "yes" if attack["trained"] else "no", format_percent(bound)]
        for model in models:
            figures = attack["models"][model]
            row.append(format_percent(figures["accepted"]))
            # Without an attack there is nothing that could succeed or lose.
            row += [format_percent(figures[x]) if name != BASELINE else "" for x in ("success", "lost")]
            row.append(bound_states[figures["holds"]])
        rows.append(row)
    return format_table(header, rows)


def _format_sources(summary: Mapping[str, Any]) -> str:
    """Success and loss by source, without intervals, which results.json has."""
    header, columns = ["attack"], []
    for source, part in summary[BASELINE]["sources"].items():
        for model in part["models"]:
            columns.append((source, model))
            header += [
                f"{model}, {source} ({part['wrong']} wrong, {part['right']} right): success %",
                "right lost %",
            ]
    rows = []
    for name, attack in summary.items():
        if name != BASELINE:
            row = [name]
            for source, model in columns:
                figures = attack["sources"][source]["models"][model]
                row += [format_percent(figures[x].value) for x in ("success", "lost")]
            rows.append(row)
    return format_table(header, rows)


def _format_rewards(summary: Mapping[str, Any]) -> str:
    models = list(summary[BASELINE]["models"])
    header = ["attack"]
    for model in models:
        header += [f"{model}: mean reward of wrong x 100 (95 %)", "change"]
    rows = []
    for name, attack in summary.items():
        row = [name]
        for model in models:
            figures = attack["models"][model]
            row += [format_percent(figures["reward"]), format_percent(figures["reward_change"])]
        rows.append(row)
    return format_table(header, rows)
