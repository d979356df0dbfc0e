"""Contrastive pairs of a step: a verified positive and a negative of the same problem.

1. A prompt has `per_prompt` slots; the sources in `pairs.negatives` are assigned to them round-robin.
2. Each slot gets a positive.  For `assistant` and `swap` it is a response that is verified correct and not
   truncated; for `own_answer` it is a wrong response that marks an answer (for example with \\boxed).  The
   order in which they are taken depends only on (seed, step, the prompt's position in the data order).  No
   source takes a response twice, but the k-th slots of `assistant` and `swap` share theirs.
3. Each source fills its slots with negatives:

       assistant    a wrong solution into which an assistant rewrites the      rewrites.py (the paper's)
                    positive
       swap         the positive's text with another problem's reference       swapped_references.py (ours)
       own_answer   a wrong response with the problem's reference; the         own_answers.py (ours)
                    positive is the same text with its own answer as the
                    reference

4. Every pair must pass the checks of its source, the last of which is the rule verifier's: of the negative,
   or for `own_answer` of the positive.  A slot without a pair that passes is masked, and the reason why its
   last attempt failed is counted.

The assistant takes seconds, and can begin as soon as a group has verdicts: concurrent_rewrites.py asks it while
the devices compute.  `build_pairs` waits for its rewrites and makes the rest.

    B  prompts   G  samples per prompt   N = B * G  rows, prompt-major
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from cooper_jax.reward.pairs.concurrent_rewrites import ConcurrentRewrites, Rewrites
from cooper_jax.reward.pairs.own_answers import fill_with_own_answers
from cooper_jax.reward.pairs.pair_slots import PairSlot, make_prompt_slots
from cooper_jax.reward.pairs.pair_task import NEGATIVE_SOURCES, PairTask
from cooper_jax.reward.pairs.rewrites import fill_with_rewrites
from cooper_jax.reward.pairs.swapped_references import fill_with_swapped_references
from cooper_jax.runtime import keys
from cooper_jax.types import Completion, Pair, Verdict


@dataclasses.dataclass(frozen=True)
class PairResult:
    """The pairs of a step, and the reasons why some slots have none."""

    # [B * per_prompt], prompt-major; None if masked.  Empty if the run makes no pairs.
    pairs: list[Pair | None] = dataclasses.field(default_factory=list)

    # Reason -> number of slots masked for it.
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    requests: int = 0  # number of requests to the assistant


def build_pairs(
    task: PairTask,
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    scores: np.ndarray | None = None,
    rewrites: ConcurrentRewrites | None = None,
) -> PairResult:
    """Build the pairs of one step.  The result does not depend on when replies arrive.  Collective.

    Args:
      completions, verdicts: [N].
      scores: f32[N], the reward model's rewards, the highest of which own_answer uses first; read for it alone.
      rewrites: the assistant's, which were started earlier for all groups; None: they are made here.

    Raises ValueError if the numbers of rows disagree, and for the source own_answer without scores.
    """
    check_rows(task, completions, verdicts, scores)

    # A run without its assistant makes no pairs at all, rather than pairs from the other sources only.
    if task.lacks_assistant:
        return PairResult()

    # Positives: a prompt without a row that qualifies gets slots that stay masked.
    slots = _make_slots(task, completions, verdicts, scores)

    # Negatives, one source after the other: each judges the candidates of a round in one batch.
    open_slots = _group_by_source(slots)
    fill_with_own_answers(open_slots["own_answer"], task.rule, task.reference_fits)
    requests = 0
    if "assistant" in task.cfg.negatives:
        requests = _fill_with_rewrites(task, slots, completions, verdicts, rewrites)
    fill_with_swapped_references(
        open_slots["swap"], task.problems, task.rule, tries=task.cfg.tries, seed=task.seed, step=task.step
    )

    # A slot without a positive or a negative becomes None, so that all steps have the same number of pairs.
    pairs = [slot.to_pair() for slot in slots]
    if task.shuffle_labels:
        pairs = _mark_exchanged(task, pairs)
    refused = collections.Counter(slot.refusal for slot in slots if slot.negative is None)
    return PairResult(pairs, refused, requests)


def check_rows(
    task: PairTask, completions: Sequence[Completion], verdicts: Sequence[Verdict], scores: np.ndarray | None
) -> None:
    """Raise ValueError if the numbers of rows disagree, or if own_answer lacks the scores."""
    # Without this check, missing rows would silently assign responses to the wrong prompts.
    num_rows = len(task.problems) * task.group_size
    if not len(completions) == len(verdicts) == num_rows:
        raise ValueError(
            f"{len(task.problems)} problems of {task.group_size} samples need {num_rows} rows; "
            f"there are {len(completions)} completions and {len(verdicts)} verdicts"
        )
    if task.uses_own_answers and scores is None:
        raise ValueError("--config.pairs.negatives names own_answer, which needs the reward model's scores")


def _fill_with_rewrites(
    task: PairTask,
    slots: Sequence[PairSlot],
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    rewrites: ConcurrentRewrites | None,
) -> int:
    """Fill the assistant's slots; returns the number of requests.  slots: of all sources, prompt-major."""
    assert task.assistant is not None
    if not task.assistant.overlaps:
        # It computes on this run's own devices, with all hosts.  If it did so in a thread, two threads would launch
        # device programs: hosts could order the collectives of the two differently and deadlock.
        return fill_with_rewrites(
            _group_by_source(slots)["assistant"],
            task.assistant,
            task.rule,
            tries=task.cfg.tries,
            length_ratio=task.cfg.length_ratio,
            special_tokens=task.special_tokens,
            seed=task.seed,
            step=task.step,
        )

    if rewrites is None:
        rewrites = ConcurrentRewrites(task)
        rewrites.add_groups(completions, verdicts)
    made: Rewrites = rewrites.collect()
    for i, slot in enumerate(slots):
        if slot.source != "assistant" or slot.row is None:
            continue
        row, negative, refusal = made.by_slot.get((i // task.cfg.per_prompt, slot.k), (None, None, ""))
        if row == slot.row:
            slot.negative, slot.refusal = negative, refusal
        else:
            # Only a verdict that was none at one of two times, such as that of a worker that stalled.
            slot.refusal = "unstable_verdict"
    return made.requests


def _make_slots(
    task: PairTask,
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    scores: np.ndarray | None,
) -> list[PairSlot]:
    """The slots of all prompts with their positives: [B * per_prompt], prompt-major."""
    slots: list[PairSlot] = []
    for index in range(len(task.problems)):
        rows = slice(index * task.group_size, (index + 1) * task.group_size)

        # Only own_answer needs the wrong rows, whose ranking parses every wrong response.
        group_scores = None
        if task.uses_own_answers and scores is not None:
            group_scores = scores[rows]
        slots += make_prompt_slots(task, index, completions[rows], verdicts[rows], group_scores)
    return slots


def _group_by_source(slots: Sequence[PairSlot]) -> dict[str, list[PairSlot]]:
    """The slots that have a positive, by their source of negatives."""
    groups: dict[str, list[PairSlot]] = {source: [] for source in NEGATIVE_SOURCES}
    for slot in slots:
        if slot.row is not None:
            groups[slot.source].append(slot)
    return groups


def _mark_exchanged(task: PairTask, pairs: Sequence[Pair | None]) -> list[Pair | None]:
    """The same pairs, each marked as exchanged with probability 1/2.

    The draws are keyed by (seed, step, the prompt's position).  Masked pairs take a draw too, so the mark
    of a pair does not depend on its neighbours.
    """
    # One generator per prompt, which draws for all its slots.
    coins: list[int] = []
    for position in task.prompt_positions:
        rng = keys.make_generator(task.seed, "exchanged", task.step, position)
        coins += rng.integers(2, size=task.cfg.per_prompt).tolist()

    marked: list[Pair | None] = []
    for pair, coin in zip(pairs, coins, strict=True):
        marked.append(None if pair is None else dataclasses.replace(pair, exchanged=bool(coin)))
    return marked
