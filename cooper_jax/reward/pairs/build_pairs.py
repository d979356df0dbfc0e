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

`build_pairs` does all of this, and `start_pairs` does it in a thread, so that devices can work while a server
answers the requests.

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
    length_ratio: float  # maximum ratio of the lengths in characters of a rewrite and its positive

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
class PairInputs:
    """The inputs from which one step's pairs are built.

    Raises ValueError if the numbers of rows disagree, and for the source own_answer without scores.
    """

    # The step's responses.
    problems: Sequence[Problem]  # [B]
    completions: Sequence[Completion]  # [N]
    verdicts: Sequence[Verdict]  # [N]
    group_size: int  # G

    # Without an assistant, no pairs at all are built if `cfg.negatives` names it.
    assistant: Assistant | None
    rule: RuleVerifier | SharedRule
    cfg: PairsConfig

    # Read for the source own_answer only: True for an answer that is short enough to be a reference.
    reference_fits: Callable[[str], bool]

    # All random draws are keyed by (seed, step, the prompt's position in the data order).
    seed: int
    step: int
    positions: Sequence[int] | None = None  # [B]; None: each prompt's index in the batch

    # Texts of the control tokens of the tokenizers in use: a rewrite that spells one out is refused.
    special_tokens: frozenset[str] = frozenset()

    # Read for the source own_answer only.
    scores: np.ndarray | None = None  # f32[N]: the reward model's rewards; high rewards are used first

    # A control experiment: mark each pair as exchanged with probability 1/2.  The update swaps the members of
    # an exchanged pair.
    shuffle_labels: bool = False

    def __post_init__(self) -> None:
        # Without this check, missing rows would silently assign responses to the wrong prompts.
        num_rows = len(self.problems) * self.group_size
        if not len(self.completions) == len(self.verdicts) == num_rows:
            raise ValueError(
                f"{len(self.problems)} problems of {self.group_size} samples need {num_rows} rows; "
                f"there are {len(self.completions)} completions and {len(self.verdicts)} verdicts"
            )
        if self.uses_own_answers and self.scores is None:
            raise ValueError(
                "--config.pairs.negatives names own_answer, which needs the reward model's scores"
            )

    @property
    def uses_own_answers(self) -> bool:
        """True if own_answer is one of the sources of negatives."""
        return "own_answer" in self.cfg.negatives

    @property
    def prompt_positions(self) -> Sequence[int]:
        """The position of each prompt that keys its draws, [B]."""
        return range(len(self.problems)) if self.positions is None else self.positions


@dataclasses.dataclass(frozen=True)
class PairResult:
    """The pairs of a step, and the reasons why some slots have none."""

    # [B * per_prompt], prompt-major; None if masked.  Empty if the run makes no pairs.
    pairs: list[Pair | None] = dataclasses.field(default_factory=list)

    # Reason -> number of slots masked for it.
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    requests: int = 0  # number of requests to the assistant


def build_pairs(inputs: PairInputs) -> PairResult:
    """Build the pairs of one step.  The result does not depend on the order in which replies arrive."""
    cfg, assistant, rule = inputs.cfg, inputs.assistant, inputs.rule
    seed, step = inputs.seed, inputs.step

    # A run without its assistant makes no pairs at all, rather than pairs from the other sources only.
    if assistant is None and "assistant" in cfg.negatives:
        return PairResult()

    # Positives: a prompt without a row that qualifies gets slots that stay masked.
    slots = _make_slots(inputs)

    # Negatives, one source after the other: each judges the candidates of a round in one batch.
    open_slots = _group_by_source(slots)
    requests = 0
    fill_with_own_answers(open_slots["own_answer"], rule, inputs.reference_fits)
    if assistant is not None:
        requests = fill_with_rewrites(
            open_slots["assistant"],
            assistant,
            rule,
            tries=cfg.tries,
            length_ratio=cfg.length_ratio,
            special_tokens=inputs.special_tokens,
            seed=seed,
            step=step,
        )
    fill_with_swapped_references(
        open_slots["swap"], inputs.problems, rule, tries=cfg.tries, seed=seed, step=step
    )

    # A slot without a positive or a negative becomes None, so that all steps have the same number of pairs.
    pairs = [slot.to_pair() for slot in slots]
    if inputs.shuffle_labels:
        pairs = _mark_exchanged(pairs, inputs.prompt_positions, seed, step)
    refused = collections.Counter(slot.refusal for slot in slots if slot.negative is None)
    return PairResult(pairs, refused, requests)


def _make_slots(inputs: PairInputs) -> list[PairSlot]:
    """The slots of all prompts with their positives: [B * per_prompt], prompt-major."""
    # Only own_answer needs the wrong rows, whose ranking parses every wrong response.
    ranking_scores = inputs.scores if inputs.uses_own_answers else None
    sources = _list_slot_sources(inputs.cfg)

    slots: list[PairSlot] = []
    for b, (problem, position) in enumerate(zip(inputs.problems, inputs.prompt_positions, strict=True)):
        rows = range(b * inputs.group_size, (b + 1) * inputs.group_size)
        rng = keys.make_generator(inputs.seed, "pairs", inputs.step, position)
        ranked = rank_rows(rows, inputs.completions, inputs.verdicts, ranking_scores, rng)
        for source, k in sources:
            slot = _make_slot(problem, source, k, ranked, inputs.completions)

            # The row's index in the data order does not depend on how the data are divided into batches.
            if slot.row is not None:
                slot.order_row = position * inputs.group_size + slot.row - rows.start
            slots.append(slot)
    return slots


def _group_by_source(slots: Sequence[PairSlot]) -> dict[str, list[PairSlot]]:
    """The slots that have a positive, by their source of negatives."""
    groups: dict[str, list[PairSlot]] = {source: [] for source in NEGATIVE_SOURCES}
    for slot in slots:
        if slot.row is not None:
            groups[slot.source].append(slot)
    return groups


def _list_slot_sources(cfg: PairsConfig) -> list[tuple[str, int]]:
    """A prompt's slots as (source, k): each is the k-th slot of its source, counted from 0."""
    # For example, 3 slots of the sources assistant and swap are (assistant, 0), (swap, 0), (assistant, 1).
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


def start_pairs(inputs: PairInputs) -> PendingPairs:
    """Run `build_pairs` in a thread, so that devices need not wait for the assistant; the result is the same.

    An assistant that computes on this run's own devices (`overlaps` is False) must not run in a thread.  If
    two threads launched device programs, hosts could order the collectives of the two differently and
    deadlock.  `build_pairs` then runs before this function returns, as it does without an assistant.

    The caller must not change the inputs before `result` returns, since the thread reads them.
    """
    in_thread = inputs.assistant is not None and inputs.assistant.overlaps
    return PendingPairs(lambda: build_pairs(inputs), in_thread=in_thread)


def no_pairs() -> PendingPairs:
    """An empty result, for reward-model updates whose loss reads no pairs."""
    return PendingPairs(PairResult, in_thread=False)
