"""The job of launch/evaluate.py that measures reward models under attack.

Known hacks (attack_rates.py) are shown to one or several reward models, with wrong and right completions.  On
request, new attacks are searched for (attack_search.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cooper_jax.data import seen_questions
from cooper_jax.data.labelled_completions import load_labelled_completions
from cooper_jax.evaluation import (
    attack_rates,
    attack_search,
    benchmark_jobs,
    benchmark_sets,
    judge_comparison,
)
from cooper_jax.evaluation.attack_search import SearchResult
from cooper_jax.evaluation.evaluated_models import ChosenModels, RewardModel, label_models
from cooper_jax.evaluation.evaluation_ledger import Ledger
from cooper_jax.evaluation.judge_jobs import digest_rows, format_exclusion
from cooper_jax.reward.reward_hacks import ATTACKS, SEARCH_TEXTS, Openings, apply_attack
from cooper_jax.runtime import device_layouts, hosts
from cooper_jax.runtime.remote_files import write_atomically
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.types import Triple

SEARCH = "attack_search.json"


@dataclasses.dataclass(frozen=True)
class AttackedRows:
    """Completions to attack: wrong ones first, then right ones."""

    triples: tuple[Triple, ...]
    total: int  # rows of the chosen part
    seen: int  # those with questions from the reward models' training data, left out or not

    @property
    def wrong(self) -> list[Triple]:
        """Completions labelled wrong."""
        return [t for t in self.triples if t.label < 0.5]

    @property
    def right(self) -> list[Triple]:
        """Completions labelled correct."""
        return [t for t in self.triples if t.label > 0.5]


def load_attacked_rows(path: str, seen: frozenset[str], *, exclude: bool, count: int) -> AttackedRows:
    """Read a file of labelled completions.

    Args:
      seen: fingerprints of the questions in the reward models' training data.
      exclude: leave rows with such questions out.
      count: size of the fixed part of each class; 0: all.

    Raises ValueError if no wrong completion is left, and for malformed files.
    """
    triples = load_labelled_completions(path)
    chosen: list[Triple] = []
    for label in (0.0, 1.0):
        rows = [t for t in triples if t.label == label]
        if not rows and label == 0.0:
            raise ValueError("no completion in it is labelled wrong, and without one no attack can succeed")
        chosen += [rows[i] for i in benchmark_sets.sample_part(len(rows), count)]

    kept, known = seen_questions.split_by_seen(chosen, seen)
    remaining = kept if exclude else chosen
    if not any(t.label < 0.5 for t in remaining):
        raise ValueError(
            f"no wrong completion is left of {len(chosen)} rows: the reward model saw the questions of "
            f"{len(known)}"
        )
    return AttackedRows(tuple(remaining), len(chosen), len(known))


def measure_attacks(
    cfg: ConfigDict,
    chosen: ChosenModels,
    path: str,
    out: Path,
    compare: Sequence[ChosenModels] = (),
    search: int = 0,
) -> None:
    """Measure one or several reward models on the completions of a labelled file, under known hacks.

    Args:
      cfg: the whole config.
      chosen: the source of the first reward model.
      path: the file of labelled completions.
      out: the folder of the results.
      compare: the sources of further reward models, each with its own config.
      search: completions that may be scored in a search for new attacks, for each model: at least
        attack_search.MIN_BUDGET; 0: no search.

    Raises SetupError, and hosts.Stopped after SIGTERM.
    """
    if 0 < search < attack_search.MIN_BUDGET:
        raise SetupError(
            f"--search={search}: a search scores up to {attack_search.DRAWN} wrong completions to find rejected "
            f"ones, then {attack_search.COMPARED} for each text and each change to one: give at least "
            f"{attack_search.MIN_BUDGET}, or 0 for no search"
        )

    # 1. The models, and the questions that any of them was trained on.
    settings = benchmark_jobs.read_benchmark_config(cfg)
    models = (chosen, *compare)
    labelled_models = dict(zip(label_models(models), models, strict=True))
    records = {label: benchmark_jobs.read_seen_questions(model) for label, model in labelled_models.items()}
    fingerprints = frozenset().union(*(record.fingerprints for record in records.values()))

    # 2. The completions.
    with setup_errors(f"--attacks={path}"):
        rows = load_attacked_rows(path, fingerprints, exclude=settings.exclude_seen, count=settings.problems)

    # 3. Settings that decide the rewards: a later start with other values must not continue this ledger.
    outcome_settings: dict[str, Any] = {
        "attacks": list(ATTACKS),
        "attacks.texts": digest_attacked(rows.triples, cfg.seed),
        "seed": cfg.seed,
        "rows": f"{len(rows.triples)}, {digest_rows(rows.triples)}",
        "benchmark.chunk": settings.chunk,
    }
    for label, model in labelled_models.items():
        reward_settings = benchmark_jobs.list_reward_settings(model.cfg, model)
        outcome_settings |= {f"{label}: {name}": value for name, value in reward_settings.items()}

    # 4. Score, a chunk at a time, and search.
    work = judge_comparison.split_rows(len(rows.triples), settings.chunk)
    with contextlib.ExitStack() as stack:
        with setup_errors("--out"):
            shown = [len(attack_rates.list_attacks(t)) for t in rows.triples]
            sizes = [sum(shown[i] for i in places) for places in work]
            ledger = stack.enter_context(Ledger(out, outcome_settings, sizes))
        # A search begins when all chunks are done: a file beside fewer is left from other results.
        finished = ledger.done == len(work)
        found = _read_search(ledger.folder, search) if finished else {}
        missing = [label for label in labelled_models if search and label not in found]
        # Only the models that have work left are loaded: all of them, or those without a search.
        opened = missing if finished else list(labelled_models)
        scorers = {label: _open_scorer(labelled_models[label], rows.triples, cfg.seed) for label in opened}
        with benchmark_jobs.report_interruption(ledger, len(work)):
            attack_rates.score_attacks(rows.triples, scorers, ledger, work, cfg.seed, hosts.print_once)
            # A finished search is stored at once, so that an interruption in the next one does not lose it.
            for label in missing:
                hosts.raise_if_stopping()
                found[label] = attack_search.search_attacks(
                    scorers[label], wrong=rows.wrong, right=rows.right, budget=search, seed=cfg.seed
                )
                _write_search(ledger.folder, search, found)

        # 5. Report.  Only the first process has the rows.
        if hosts.is_primary():
            found = {label: found[label] for label in labelled_models if search}
            summary = attack_rates.summarise_attacks(ledger.rows, cfg.seed, settings.bootstrap)
            seen = f"the reward models are known to have seen the questions of {rows.seen} of {rows.total}"
            note = benchmark_jobs.describe_overlap(seen + format_exclusion(settings, rows.seen), records)
            parts = [attack_rates.format_attacks(summary)]
            parts += [attack_search.format_finds(result, label) for label, result in found.items()]
            parts.append(f"{len(rows.wrong)} wrong and {len(rows.right)} right completions; {note}")
            results = {
                "attacks": summary,
                "search": {label: dataclasses.asdict(result) for label, result in found.items()},
                "seen": rows.seen,
                "record_complete": {label: record.complete for label, record in records.items()},
            }
            benchmark_jobs.write_results(ledger, outcome_settings, results, "\n\n".join(parts))


def _open_scorer(chosen: ChosenModels, triples: Sequence[Triple], seed: int) -> attack_rates.Score:
    """Load a reward model that has room for all references of the attacks on `triples`."""
    layout = device_layouts.make_layouts(chosen.cfg)["reward"]
    reward = RewardModel(chosen.cfg, layout, *chosen.load("reward", layout), chosen.read_calibration())
    reward.check(attack_rates.list_attack_references(triples, seed))
    return reward.rewards


def digest_attacked(triples: Sequence[Triple], seed: int) -> str:
    """Hash all texts that the attacks on `triples` show, to detect another wording of an attack.

    seed: of the attacks' random choices.
    """
    openings = Openings.collect(triples)
    digest = hashlib.blake2b(digest_size=8)
    for i, triple in enumerate(triples):
        shown = [apply_attack(triple, name, seed, i, openings) for name in attack_rates.list_attacks(triple)]
        digest.update(digest_rows(shown).encode())
    return digest.hexdigest()


def _digest_search_texts() -> str:
    """Hash the texts with which a search begins."""
    return hashlib.blake2b("\0".join(SEARCH_TEXTS).encode(), digest_size=8).hexdigest()


def _read_search(out: Path, budget: int) -> dict[str, SearchResult]:
    """Read the results of finished searches with this budget, by model; those of other texts do not count.

    The other settings that decide them are those of the ledger in the same folder.
    """
    if not budget:
        return {}
    path = out / SEARCH
    # The file is on the first host, and all hosts have to make the same search or none.
    text = hosts.broadcast_value("attack search", lambda: path.read_bytes() if path.exists() else b"{}")
    try:
        stored = json.loads(text)
        if not stored or stored["budget"] != budget or stored.get("texts") != _digest_search_texts():
            return {}
        return {label: SearchResult.from_dict(fields) for label, fields in stored["models"].items()}
    except (ValueError, KeyError, TypeError) as error:
        raise SetupError(
            f"{path} cannot be read ({error}): delete it, and the search is made again"
        ) from error


def _write_search(out: Path, budget: int, found: Mapping[str, SearchResult]) -> None:
    """Write the results of the finished searches, so that a later start does not make them again."""
    if hosts.is_primary():
        models = {label: dataclasses.asdict(result) for label, result in found.items()}
        content = {"budget": budget, "texts": _digest_search_texts(), "models": models}
        with setup_errors(f"--out: {SEARCH}"):
            write_atomically(out / SEARCH, json.dumps(content, indent=1).encode())
