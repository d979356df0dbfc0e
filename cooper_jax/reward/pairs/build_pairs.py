"""Contrastive pairs of a step: a verified positive and a negative of the same problem.

1. A prompt has `per_prompt` slots; the sources in `pairs.negatives` are assigned to them round-robin.
2. Each slot gets a positive.  For `assistant` and `swap` it is a row that is verified correct and not
   truncated, drawn without replacement; for `own_answer` it is a wrong row that marks an answer.  The draw
   depends only on (seed, step, the prompt's position in the data order).
3. Each source fills its slots with negatives:

       assistant    an assistant rewrites the positive into a wrong solution   rewrites.py (the paper's)
       swap         the positive's text with another problem's reference       swapped_references.py (ours)
       own_answer   a wrong response; the positive is the same text with its   own_answers.py (ours)
                    own answer as the reference

4. Every negative must pass the checks of its source, the last of which is the rule verifier's.  A slot that
   no attempt fills is masked, and the reason of its last attempt is counted.

`start_pairs` runs all of this in a thread, so that devices can work while a server answers the requests.

    B  prompts   G  samples per prompt   N = B * G  rows, prompt-major
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

    per_prompt: int  # maximum number of pairs per prompt
    negatives: tuple[str, ...]  # sources of negatives, assigned to a prompt's slots round-robin
    tries: int  # rewrites, or swapped references, to try before a pair is masked
    length_ratio: float  # maximum ratio of characters between a rewrite and its positive, either way

    def __post_init__(self) -> None:
        # A length_ratio below 1 would refuse every rewrite.
        errors = typed_config.find_below_minimum(self, "pairs", 1, ("per_prompt", "tries", "length_ratio"))
        if not self.negatives or not set(self.negatives) <= set(NEGATIVE_SOURCES):
            errors.append(
                f"pairs.negatives={self.negatives}: it names one or more of {', '.join(NEGATIVE_SOURCES)}, "
                "as in --config.pairs.negatives=\"('assistant','swap')\""
            )
        typed_config.raise_errors(errors)

    @classmethod
    def from_config(cls, section: ConfigDict) -> PairsConfig:
        """Read the `pairs` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "pairs", negatives=tuple(section.negatives))


@dataclasses.dataclass(frozen=True)
class PairResult:
    """The pairs of a step, and the reasons why some slots have none."""

    pairs: list[Pair | None]  # [B * per_prompt], prompt-major; None if masked
    refused: collections.Counter[str]  # reason -> number of slots masked for it
    requests: int = 0  # number of requests to the assistant


def build_pairs(
    problems: Sequence[Problem],
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    group_size: int,
    assistant: Assistant | None,
    rule: RuleVerifier | SharedRule,
    cfg: PairsConfig,
    *,
    # The key of all random draws.
    seed: int,
    step: int,
    positions: Sequence[int] | None = None,
    # Options of own_answer and of the control.
    scores: np.ndarray | None = None,
    exchange: bool = False,
    fits: Callable[[str], bool] | None = None,
) -> PairResult:
    """Build the pairs of one step.  The result does not depend on the order in which replies arrive.

    Args:
      problems: [B].
      completions, verdicts: [N], prompt-major.
      group_size: G.
      assistant: if None and `cfg.negatives` names the assistant, no pairs are built at all.
      positions: [B], each prompt's position in the data order; by default its index in the batch.
      scores: f32[N], the reward model's rewards; `own_answer` uses rows with the highest reward first.
      exchange: mark each pair as exchanged with probability 1/2; the update swaps the members of an exchanged
        pair (a control experiment).
      fits: returns True for an answer that is short enough to be a reference in the reward model's input; by
        default every answer is.

    Raises ValueError if the numbers of rows disagree, and for `own_answer` without scores.
    """
    # Without this check, missing rows would silently assign responses to the wrong prompts.
    if not len(completions) == len(verdicts) == len(problems) * group_size:
        raise ValueError(
            f"{len(problems)} problems of {group_size} samples need {len(problems) * group_size} rows; "
            f"there are {len(completions)} completions and {len(verdicts)} verdicts"
        )
    if "own_answer" in cfg.negatives and scores is None:
        raise ValueError("--config.pairs.negatives names own_answer, which needs the reward model's scores")

    # A run without its assistant makes no pairs at all, rather than pairs from the other sources only.
    if assistant is None and "assistant" in cfg.negatives:
        return PairResult([], collections.Counter())

    # Positives: a prompt without a row that qualifies gets slots that stay masked.
    order_positions = list(positions) if positions is not None else list(range(len(problems)))
    slots = _make_slots(
        problems, completions, verdicts, scores, order_positions, group_size, cfg, seed=seed, step=step
    )

    # Negatives, one source after the other: each judges all its candidates in one batch.
    open_slots = _group_by_source(slots)
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

    # A slot without a positive or a negative becomes None, so that all steps have the same number of pairs.
    pairs = [slot.to_pair() for slot in slots]
    if exchange:
        pairs = _mark_exchanged(pairs, order_positions, seed, step)
    refused = collections.Counter(slot.refusal for slot in slots if slot.negative is None)
    return PairResult(pairs, refused, requests)


def _make_slots(
    problems: Sequence[Problem],
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    scores: np.ndarray | None,
    positions: Sequence[int],
    group_size: int,
    cfg: PairsConfig,
    *,
    seed: int,
    step: int,
) -> list[PairSlot]:
    """The slots of all prompts with their positives: [B * per_prompt], prompt-major.

    Args: as in `build_pairs`, except that `positions` is required.
    """
    # Only own_answer needs the wrong rows, whose ranking parses every wrong response.
    ranking_scores = scores if "own_answer" in cfg.negatives else None
    sources = _list_slot_sources(cfg)

    slots: list[PairSlot] = []
    for b, (problem, position) in enumerate(zip(problems, positions, strict=True)):
        rows = range(b * group_size, (b + 1) * group_size)
        rng = keys.make_generator(seed, "pairs", step, position)
        ranked = rank_rows(rows, completions, verdicts, ranking_scores, rng)
        for source, k in sources:
            slot = _make_slot(problem, source, k, ranked, completions)

            # The row's index in the data order does not depend on how the data are divided into batches.
            if slot.row is not None:
                slot.order_row = position * group_size + slot.row - rows.start
            slots.append(slot)
    return slots


def _group_by_source(slots: Sequence[PairSlot]) -> dict[str, list[PairSlot]]:
    """Source of negatives -> its slots, without those that have no positive."""
    groups: dict[str, list[PairSlot]] = {source: [] for source in NEGATIVE_SOURCES}
    for slot in slots:
        if slot.row is not None:
            groups[slot.source].append(slot)
    return groups


def _list_slot_sources(cfg: PairsConfig) -> list[tuple[str, int]]:
    """(source, k) of each of a prompt's slots, which is the k-th slot of that source, counted from 0."""
    # For example ("assistant", "swap") with 3 slots: (assistant, 0), (swap, 0), (assistant, 1).
    sources = [cfg.negatives[i % len(cfg.negatives)] for i in range(cfg.per_prompt)]
    return [(source, sources[:i].count(source)) for i, source in enumerate(sources)]


def _make_slot(
    problem: Problem, source: str, k: int, ranked: RankedRows, completions: Sequence[Completion]
) -> PairSlot:
    """The k-th slot of a source with its positive; without one if fewer than k + 1 rows qualify."""
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
    """The same pairs, each marked as exchanged with probability 1/2.

    The draws are keyed by (seed, step, the prompt's position).  Masked pairs take a draw too, so the mark
    of a pair does not depend on its neighbours.
    """
    # One generator per prompt, which draws for all its slots.
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
    """Pairs that may still be under construction in a thread; `result` waits for them."""

    def __init__(self, build: Callable[[], PairResult], *, in_thread: bool):
        """Start `build` in a thread, or run it to its end here."""
        self._build = build
        self._result: PairResult | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if in_thread:
            self._thread = threading.Thread(target=self._run, daemon=True, name="pairs")
            self._thread.start()
        else:
            self._result = build()  # errors are raised here, at the caller

    def _run(self) -> None:
        try:
            self._result = self._build()
        except BaseException as error:
            # A thread's exception would only be printed: `result` raises it again in the caller's thread.
            self._error = error

    def result(self) -> PairResult:
        """Wait for the pairs.  Raises the exception that ended their construction, if any."""
        if self._thread is not None:
            self._thread.join()

        # Either the error or the result is set once the thread has ended.
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
    """Run `build_pairs` in a thread, so that devices need not wait for the assistant; the result is the same.

    Without an assistant, or with one that computes on our own devices (`overlaps` is False), `build_pairs`
    runs before this function returns: if two threads launched device programs, hosts could order the
    collectives of the two differently and deadlock.

    Args and errors: as in `build_pairs`.
    """

    # The thread holds references to the arguments; the caller must not change them before `result` returns.
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
    """An empty result, for reward-model updates whose loss reads no pairs."""
    return PendingPairs(lambda: PairResult([], collections.Counter()), in_thread=False)
