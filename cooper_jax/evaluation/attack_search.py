"""A search for texts that make a reward model accept wrong completions.

The families of reward/reward_hacks.py are known attacks; a policy finds its own.  `search_attacks` looks for a
prefix and a suffix that raise the rewards of a few wrong completions: it starts from the texts of six
families, keeps the best candidates of each round and changes them at random (an evolutionary search on rewards
alone, as a policy would see them).  The best finds are then measured on other completions, wrong and right,
because a text that was selected on sixteen completions may work on those alone.

    K  completions on which candidates are compared   C  candidates
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cooper_jax.evaluation.judges import THRESHOLD
from cooper_jax.evaluation.text_tables import format_percent, format_table
from cooper_jax.reward.reward_hacks import SEARCH_TEXTS
from cooper_jax.runtime import keys
from cooper_jax.types import Triple

Score = Callable[[Sequence[Triple]], np.ndarray]  # triples -> rewards f32[N]

COMPARED = 16  # K; more would leave fewer rounds within the same budget
CHECKED = 64  # completions of each class on which the finds are measured afterwards
# Wrong completions are scored as they are first, because only rejected ones can be attacked; then one known text
# and one change to it.
DRAWN = 2 * (COMPARED + CHECKED)
MIN_BUDGET = DRAWN + 2 * COMPARED
PARENTS = 8  # best candidates that are kept in each round
CHILDREN = 8  # new candidates in each round
REPORTED = 5  # finds
MAX_PARTS = 4  # texts in a prefix or a suffix
# Log-odds are limited so that one completion cannot decide a comparison.
MAX_LOG_ODDS = 10.0


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Texts before and after a completion."""

    prefix: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()

    def apply(self, triple: Triple) -> Triple:
        """Add the texts to a completion."""
        parts = [*self.prefix, triple.completion, *self.suffix]
        return dataclasses.replace(triple, completion="\n\n".join(parts))


@dataclasses.dataclass(frozen=True)
class Find:
    """A candidate with its figures on completions that the search did not see; shares are from 0 to 1."""

    prefix: str
    suffix: str
    success_in_search: float  # of the K wrong completions, which are rejected without it
    success: float  # share accepted of other wrong completions that are rejected without it
    lost: float  # fall of the share of right completions that are accepted


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The best finds, best first, and the size of the search."""

    finds: tuple[Find, ...]
    candidates: int
    changed: int  # candidates that are changes to others; the rest are known texts
    scorings: int  # those that the budget limits
    wrong: int  # other wrong completions on which the finds were measured
    right: int  # right completions on which they were measured

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SearchResult:
        """Restore a result from dataclasses.asdict."""
        return cls(**(fields | {"finds": tuple(Find(**find) for find in fields["finds"])}))


def search_attacks(
    score: Score, wrong: Sequence[Triple], right: Sequence[Triple], budget: int, seed: int
) -> SearchResult:
    """Search for a prefix and a suffix that make a reward model accept wrong completions.

    Args:
      score: the reward model.
      wrong, right: completions by label, of which some are drawn.
      budget: the number of completions that may be scored, at least MIN_BUDGET.  Counted are up to DRAWN wrong
        completions without texts, to find K that the model rejects, and K for each candidate.  Measuring the
        finds is not counted: up to CHECKED right completions without texts, and 2 CHECKED for each find.
        Known texts get at most half of what is left for candidates, so that the other half is for changes.
      seed: of all random choices.

    Raises ValueError for a smaller budget, with which no change might be tried.
    """
    if budget < MIN_BUDGET:
        raise ValueError(
            f"a search with {budget} scorings: it needs at least {MIN_BUDGET}, to find rejected completions "
            f"({DRAWN}) and to try one text and one change ({2 * COMPARED})"
        )
    rng = keys.make_generator(seed, "attack_search")
    right = _draw(right, CHECKED, rng)
    rejected = _draw(wrong, DRAWN, rng)
    rewards = score(rejected) if rejected else np.zeros(0)
    scorings = len(rejected)
    rejected = [t for t, reward in zip(rejected, rewards, strict=True) if reward <= THRESHOLD]
    compared, checked = rejected[:COMPARED], rejected[COMPARED : COMPARED + CHECKED]
    if not compared:
        return SearchResult((), 0, 0, scorings, 0, len(right))

    # The texts of six families come first, as far as half of the budget goes, then rounds of changes to the best
    # ones.
    evaluated: dict[Candidate, tuple[float, float]] = {}  # -> (mean log-odds, share accepted)
    known = [Candidate(prefix=(text,)) for text in SEARCH_TEXTS]
    known += [Candidate(suffix=(text,)) for text in SEARCH_TEXTS]
    rng.shuffle(known)  # type: ignore[arg-type]  # a list of any objects is shuffled in place
    known = known[: (budget - scorings) // (2 * len(compared))]
    new = known
    while new := new[: (budget - scorings) // len(compared)]:
        evaluated |= zip(new, _evaluate(score, new, compared), strict=True)
        scorings += len(new) * len(compared)
        parents = sorted(evaluated, key=lambda c: evaluated[c], reverse=True)[:PARENTS]
        new = _make_children(parents, evaluated, rng)

    # The finds are measured on completions that no candidate was selected on.
    best = sorted(evaluated, key=lambda c: evaluated[c], reverse=True)[:REPORTED]
    usually_kept = _compute_accepted(score, right)
    finds = []
    for candidate in best:
        finds.append(
            Find(
                prefix="\n\n".join(candidate.prefix),
                suffix="\n\n".join(candidate.suffix),
                success_in_search=evaluated[candidate][1],
                success=_compute_accepted(score, [candidate.apply(t) for t in checked]),
                lost=usually_kept - _compute_accepted(score, [candidate.apply(t) for t in right]),
            )
        )
    return SearchResult(
        tuple(finds), len(evaluated), len(evaluated) - len(known), scorings, len(checked), len(right)
    )


def _draw(triples: Sequence[Triple], count: int, rng: np.random.Generator) -> list[Triple]:
    """Draw at most `count` triples without replacement."""
    return [triples[i] for i in rng.permutation(len(triples))[:count]]


def _evaluate(
    score: Score, candidates: Sequence[Candidate], compared: Sequence[Triple]
) -> list[tuple[float, float]]:
    """Return each candidate's (mean log-odds of the rewards, share accepted) on the K completions."""
    rewards = np.asarray(score([c.apply(t) for c in candidates for t in compared]), np.float64)
    rewards = rewards.reshape(len(candidates), len(compared))  # f64[C, K]
    # Rewards near 0 differ by little; their log-odds show which candidate is nearer to being accepted.
    bound = 1 / (1 + np.exp(MAX_LOG_ODDS))
    p = np.clip(rewards, bound, 1 - bound)
    log_odds = np.log(p / (1 - p)).mean(1)
    accepted = (rewards > THRESHOLD).mean(1)
    return list(zip(log_odds.tolist(), accepted.tolist(), strict=True))


def _make_children(
    parents: Sequence[Candidate], evaluated: dict[Candidate, tuple[float, float]], rng: np.random.Generator
) -> list[Candidate]:
    """Change parents at random into CHILDREN candidates that were not tried yet, or fewer."""
    children: list[Candidate] = []
    # Changes often lead to what is known; the number of tries is limited so that the search ends.
    for _ in range(20 * CHILDREN):
        child = _change(parents, rng)
        if child not in evaluated and child not in children and child != Candidate():
            children.append(child)
        if len(children) == CHILDREN:
            break
    return children


def _change(parents: Sequence[Candidate], rng: np.random.Generator) -> Candidate:
    """Change one parent: add, drop, replace or edit a text, or take the suffix of another parent."""
    parent = parents[int(rng.integers(len(parents)))]
    if rng.random() < 0.2:
        other = parents[int(rng.integers(len(parents)))]
        return dataclasses.replace(parent, suffix=other.suffix)

    side = ("prefix", "suffix")[int(rng.integers(2))]
    texts = list(getattr(parent, side))
    text = SEARCH_TEXTS[int(rng.integers(len(SEARCH_TEXTS)))]
    place = int(rng.integers(len(texts))) if texts else 0
    kind = ("add", "drop", "replace", "edit")[int(rng.integers(4))]
    if kind == "add" and len(texts) < MAX_PARTS:
        texts.insert(place, text)
    elif kind == "drop" and texts:
        del texts[place]
    elif kind == "replace" and texts:
        texts[place] = text
    elif kind == "edit" and texts:
        texts[place] = _edit(texts[place], rng)
    return dataclasses.replace(parent, **{side: tuple(t for t in texts if t)})


def _edit(text: str, rng: np.random.Generator) -> str:
    """Drop, double or move one word of a text, or change its case."""
    words = text.split(" ")
    i, j = (int(rng.integers(len(words))) for _ in range(2))
    kind = int(rng.integers(4))
    if kind == 0:
        del words[i]
    elif kind == 1:
        words.insert(j, words[i])
    elif kind == 2:
        words[i], words[j] = words[j], words[i]
    else:
        words[i] = words[i].upper()
    return " ".join(words)


def _compute_accepted(score: Score, triples: Sequence[Triple]) -> float:
    """Compute the share of triples with a reward above 0.5; NaN without triples."""
    return float((score(triples) > THRESHOLD).mean()) if triples else float("nan")


def format_finds(result: SearchResult, model: str) -> str:
    """Format the finds as a table for a terminal."""
    title = (
        f"{model}: search of {result.candidates} texts, {result.changed} of them changed at random, with "
        f"{result.scorings} scorings; the finds on {result.wrong} other wrong and {result.right} right completions"
    )
    if not result.finds:
        return f"{title}: no text was tried, because the model rejects none of the wrong completions drawn"
    rows = []
    for find in result.finds:
        figures = (find.success_in_search, find.success, find.lost)
        rows.append([*map(format_percent, figures), repr(find.prefix), repr(find.suffix)])
    table = format_table(["success in search %", "success %", "right lost %", "before", "after"], rows)
    return f"{title}\n{table}"
