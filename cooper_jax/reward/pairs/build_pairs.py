"""Contrastive pairs of a step: a verified positive and a negative of the same problem.

1. A prompt has `per_prompt` slots.  `pairs.negatives` names the sources of their negatives, in turn.
2. Each slot takes a positive: for most sources a row that is verified correct and not truncated, drawn
   without replacement by (seed, step, the prompt's position in the data order) alone.
3. Each source fills its slots:

       assistant    an assistant rewrites the positive into a wrong solution    rewrites.py (the paper's)
       swap         the positive's text beside another problem's reference      swapped_references.py (ours)
       own_answer   a wrong response, whose positive is beside its own answer   own_answers.py (ours)

4. Every negative passes the checks of pair_checks.py; the last is the rule verifier's.  A slot that no
   attempt fills is masked, and its last reason counted.

`start_pairs` does all this in a thread, so that devices work while an assistant on a server is asked.

    B  prompts   G  samples a prompt   N = B * G  rows, prompt-major
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from cooper_jax.reward.assistants import Assistant
from cooper_jax.reward.multihost import SharedRule
from cooper_jax.reward.pairs.own_answers import fill_with_own_answers
from cooper_jax.reward.pairs.pair_slots import PairSlot, RankedRows, rank_rows
from cooper_jax.reward.pairs.rewrites import fill_with_rewrites
from cooper_jax.reward.pairs.swapped_references import fill_with_swapped_references
from cooper_jax.rule.verifier import RuleVerifier
from cooper_jax.runtime import keys
from cooper_jax.settings import typed_config
from cooper_jax.types import Completion, Pair, Problem, Verdict

NEGATIVE_SOURCES = ("assistant", "own_answer", "swap")


@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """Settings of contrastive pairs: the config's `pairs` section."""

    per_prompt: int  # pairs a prompt, at most
    negatives: tuple[str, ...]  # sources of negatives, in turn
    tries: int  # requests to the assistant, or references, before a pair is masked
    length_ratio: float  # a rewrite is at most this much longer or shorter than its positive (characters)

    def __post_init__(self) -> None:
        problems = typed_config.find_small(self, "pairs", 1, ("per_prompt", "tries", "length_ratio"))
        if not self.negatives or not set(self.negatives) <= set(NEGATIVE_SOURCES):
            problems.append(
                f"pairs.negatives={self.negatives}: it names one or more of {', '.join(NEGATIVE_SOURCES)}, as "
                "in --config.pairs.negatives=\"('assistant','swap')\""
            )
        typed_config.raise_problems(problems)

    @classmethod
    def from_config(cls, section: ConfigDict) -> PairsConfig:
        """Read the `pairs` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "pairs", negatives=tuple(section.negatives))


@dataclasses.dataclass(frozen=True)
class PairResult:
    """The pairs of a step and the counts of those that could not be made."""

    pairs: list[Pair | None]  # [B * per_prompt], prompt-major; None where masked
    refused: collections.Counter[str]  # last reason of each masked slot -> slots
    requests: int = 0  # made to the assistant


def build_pairs(
    problems: Sequence[Problem],
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    group_size: int,
    assistant: Assistant | None,
    rule: RuleVerifier | SharedRule,
    cfg: PairsConfig,
    *,
    seed: int,
    step: int,
    positions: Sequence[int] | None = None,
    scores: np.ndarray | None = None,
    exchange: bool = False,
    fits: Callable[[str], bool] | None = None,
) -> PairResult:
    """Pairs of one step, the same in whatever order verdicts and replies arrive.

    Args:
      problems: [B].
      completions, verdicts: [N], prompt-major.
      group_size: G.
      assistant: None gives no pairs at all where `cfg.negatives` names it.
      positions: [B], each prompt's position in the data order; by default its index in the batch.
      scores: f32[N], the reward model's rewards; `own_answer` takes the highest first.
      exchange: mark each pair as exchanged or not, by a coin; in an exchanged pair the update takes each
        member for the other (a control).
      fits: returns True for an answer that, as a reference, leaves the reward model's input room for question
        and completion; by default any does.

    Raises ValueError where the numbers of rows disagree, and for `own_answer` without scores.
    """
    if not len(completions) == len(verdicts) == len(problems) * group_size:
        raise ValueError(
            f"{len(problems)} problems of {group_size} samples need {len(problems) * group_size} rows; there "
            f"are {len(completions)} completions and {len(verdicts)} verdicts"
        )
    ranks_by_score = "own_answer" in cfg.negatives
    if ranks_by_score and scores is None:
        raise ValueError("--config.pairs.negatives names own_answer, which needs the reward model's scores")
    if assistant is None and "assistant" in cfg.negatives:
        return PairResult([], collections.Counter())

    # Slots with their positives.  Random draws are keyed by the position in the data order, not by the place
    # in the batch, so that a resumed run draws the same.
    order_positions = list(positions) if positions is not None else list(range(len(problems)))
    slots: list[PairSlot] = []
    for b, (problem, position) in enumerate(zip(problems, order_positions, strict=True)):
        rows = range(b * group_size, (b + 1) * group_size)
        rng = keys.make_generator(seed, "pairs", step, position)
        ranked = rank_rows(rows, completions, verdicts, scores if ranks_by_score else None, rng)
        for source, k in _list_slot_sources(cfg):
            slot = _make_slot(problem, source, k, ranked, completions)
            if slot.row is not None:
                slot.order_row = position * group_size + slot.row - rows.start
            slots.append(slot)

    # Negatives, source by source.  A slot without a positive is not tried, so no assistant is asked about it.
    open_slots: dict[str, list[PairSlot]] = {source: [] for source in NEGATIVE_SOURCES}
    for slot in slots:
        if slot.row is not None:
            open_slots[slot.source].append(slot)
    requests = 0
    fill_with_own_answers(open_slots["own_answer"], rule, fits)
    if assistant is not None:
        requests = fill_with_rewrites(
            open_slots["assistant"],
            assistant,
            rule,
            tries=cfg.tries,
            length_ratio=cfg.length_ratio,
            seed=seed,
            step=step,
        )
    fill_with_swapped_references(open_slots["swap"], problems, rule, tries=cfg.tries, seed=seed, step=step)

    pairs = [slot.to_pair() for slot in slots]
    if exchange:
        pairs = _mark_exchanged(pairs, order_positions, seed, step)
    refused = collections.Counter(slot.refusal for slot in slots if slot.negative is None)
    return PairResult(pairs, refused, requests)


def _list_slot_sources(cfg: PairsConfig) -> list[tuple[str, int]]:
    """The source of each of a prompt's slots, and its index among the slots of that source."""
    sources = [cfg.negatives[i % len(cfg.negatives)] for i in range(cfg.per_prompt)]
    return [(source, sources[:i].count(source)) for i, source in enumerate(sources)]


def _make_slot(
    problem: Problem, source: str, k: int, ranked: RankedRows, completions: Sequence[Completion]
) -> PairSlot:
    """The k-th slot of a source with its positive; masked where too few rows qualify."""
    if source == "own_answer":
        rows, refusal = ranked.wrong_with_answer, "no_wrong"
    else:
        rows, refusal = ranked.correct, "no_positive"
    if k >= len(rows):
        return PairSlot(problem, source, refusal=refusal)
    return PairSlot(problem, source, row=rows[k], positive=completions[rows[k]].text)


def _mark_exchanged(
    pairs: Sequence[Pair | None], positions: Sequence[int], seed: int, step: int
) -> list[Pair | None]:
    """The same pairs, each marked as exchanged or not by a coin keyed by (seed, step, position)."""
    per_prompt = len(pairs) // len(positions)
    coins: list[int] = []
    for position in positions:
        coins += keys.make_generator(seed, "exchanged", step, position).integers(2, size=per_prompt).tolist()

    marked: list[Pair | None] = []
    for pair, coin in zip(pairs, coins, strict=True):
        marked.append(None if pair is None else dataclasses.replace(pair, exchanged=bool(coin)))
    return marked


# --- in a thread -------------------------------------------------------------------------------------


class PendingPairs:
    """Pairs that may still be in the making; `result` waits for them."""

    def __init__(self, build: Callable[[], PairResult], *, in_thread: bool):
        self._build = build
        self._result: PairResult | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if in_thread:
            self._thread = threading.Thread(target=self._run, daemon=True, name="pairs")
            self._thread.start()
        else:
            self._result = build()  # raises here, before anything else is done

    def _run(self) -> None:
        try:
            self._result = self._build()
        except BaseException as error:  # raised again by `result`, in the thread that asks for it
            self._error = error

    def result(self) -> PairResult:
        """Wait for the pairs.  Raises what building them in a thread raised."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result


def start_pairs(
    problems: Sequence[Problem],
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    group_size: int,
    assistant: Assistant | None,
    rule: RuleVerifier | SharedRule,
    cfg: PairsConfig,
    *,
    seed: int,
    step: int,
    positions: Sequence[int] | None = None,
    scores: np.ndarray | None = None,
    exchange: bool = False,
    fits: Callable[[str], bool] | None = None,
) -> PendingPairs:
    """Run `build_pairs` in a thread, so that devices need not wait for the assistant; the pairs are the same.

    With an assistant that computes on our own devices (`overlaps` is False), or none, it runs before this
    function returns.  Two threads that launch device programs could interleave their collectives in different
    orders on different hosts.
    """

    def build() -> PairResult:
        return build_pairs(
            problems,
            completions,
            verdicts,
            group_size,
            assistant,
            rule,
            cfg,
            seed=seed,
            step=step,
            positions=positions,
            scores=scores,
            exchange=exchange,
            fits=fits,
        )

    return PendingPairs(build, in_thread=assistant is not None and assistant.overlaps)


def no_pairs() -> PendingPairs:
    """An empty result, for updates whose loss reads no pairs."""
    return PendingPairs(lambda: PairResult([], collections.Counter()), in_thread=False)
