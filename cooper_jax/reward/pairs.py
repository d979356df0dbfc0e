"""Contrastive pairs: a verified positive and a negative of the same problem.

`pairs.negatives` says where a prompt's slots take their negatives from, in turn; the k-th slot of a kind takes the
k-th positive.

1. Positives: of a prompt's rows that are verified correct and not truncated, up to `per_prompt` are drawn without
   replacement, by (seed, step, the prompt's position in the data order) alone.
2. `assistant` rewrites all of them in one batch.  It is not asked about prompts without a positive.
   `swap` keeps the positive's text and puts it beside another reference of the batch: nothing but the reference
   sets the members apart.  `own_answer` takes rows that the rule finds WRONG and that mark an answer, the highest
   reward downwards: a negative is such a row as it is, the positive the same text beside the answer that it gives
   itself.  What the policy does to be liked then stands in both members, and only the match decides; and there are
   such pairs even where no row is correct.  (Both are ours.)
3. Each rewrite passes the gates of `refusal_of`, the last of which is the rule: it must find the negative WRONG
   against the *reference*; so it must a swapped one against that one, and find a text correct beside its own
   answer, which must be short enough to be a reference (else `too_long`).  Slots that fail are tried again, up to
   `tries` times in all, then masked and counted.

Both members render alike but for their text: a rewrite's outer whitespace is replaced by its positive's.

Departures from the released code: see each gate; there, a negative that nothing can be parsed from passes as wrong.

    B prompts   G samples a prompt   N = B * G rows, prompt-major
"""

from __future__ import annotations

import collections
import dataclasses
import re
import threading
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from cooper_jax.data import prompts
from cooper_jax.reward.assistants import Assistant, Failure, Reply, Request
from cooper_jax.rule import answer_parser
from cooper_jax.rule.verifier import RuleVerifier
from cooper_jax.runtime import keys
from cooper_jax.settings import typed_config
from cooper_jax.types import Completion, Pair, Problem, Verdict

# Refusals, and talk about the task: a solution does neither, and a reward model would learn the phrase.
_REFUSAL = re.compile(
    r"\bsorry\b|\bi(?:'m| am) (?:un)?able to\b|\bi(?:'m| am) not able to\b|\bas an ai\b|\b(?:language|ai) model\b"
    r"|\bi (?:can ?not|can't|won't|will not|must decline)\b"
    r"|\b(?:intentional|deliberate)(?:ly)?\b|\b(?:incorrect|wrong|flawed) (?:solution|answer|version)\b"
    r"|\b(?:rewritten|modified) (?:solution|version)\b",
    re.IGNORECASE,
)
NEGATIVES = ("assistant", "own_answer", "swap")  # sources of negatives
_UNDECIDED = {
    Verdict.CORRECT: "not_wrong",
    Verdict.NO_ANSWER: "unparseable",
    Verdict.UNRECOGNISED: "unrecognised",
    Verdict.TIMEOUT: "rule_timeout",
}


@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """Settings of contrastive pairs: the config's `pairs` section."""

    per_prompt: int  # pairs a prompt, at most
    negatives: tuple[str, ...]  # sources of negatives, in turn
    tries: int  # requests to the assistant, or references, before a pair is masked
    length_ratio: float  # a rewrite is at most this much longer or shorter than its positive (characters)

    def __post_init__(self) -> None:
        problems = typed_config.find_small(self, "pairs", 1, ("per_prompt", "tries", "length_ratio"))
        if not self.negatives or not set(self.negatives) <= set(NEGATIVES):
            problems.append(
                f"pairs.negatives={self.negatives}: it names one or more of {', '.join(NEGATIVES)}, as in "
                "--config.pairs.negatives=\"('assistant','swap')\""
            )
        typed_config.raise_problems(problems)

    @classmethod
    def from_config(cls, section: ConfigDict) -> PairsConfig:
        """Read the `pairs` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "pairs", negatives=tuple(section.negatives))


@dataclasses.dataclass(frozen=True)
class PairResult:
    """`pairs`: one slot each, `per_prompt` a prompt, prompt-major; None where masked.  `refused` says why: the last
    try's reason, counted.  `requests`: how often the assistant was asked."""

    pairs: list[Pair | None]  # [B * per_prompt]
    refused: collections.Counter[str]
    requests: int = 0


@dataclasses.dataclass
class _Slot:
    problem: Problem
    row: int | None  # of the positive; None without one
    positive: str
    place: int  # the row in the data order: position * G + sample
    source: str = "assistant"
    others: Sequence[str] = ()  # swap: references to try, in this order
    negative: str | None = None
    positive_reference: str = ""  # own_answer: the answer that the text gives
    negative_reference: str = ""
    reason: str = ""

    def pair(self) -> Pair | None:
        if self.negative is None:
            return None
        return Pair(
            self.problem,
            self.positive,
            self.negative,
            self.row,
            self.positive_reference,
            self.negative_reference,
        )


def build_pairs(
    problems: Sequence[Problem],
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    group_size: int,
    assistant: Assistant | None,
    rule: RuleVerifier,
    cfg: PairsConfig,
    *,
    seed: int,
    step: int,
    positions: Sequence[int] | None = None,
    scores: np.ndarray | None = None,
    exchange: bool = False,
    fits: Callable[[str], bool] | None = None,
) -> PairResult:
    """Pairs for one step.

    Args:
      problems: [B].
      completions, verdicts: [N], prompt-major.
      assistant: None gives no pairs at all where `cfg.negatives` names it.
      positions: [B], each prompt's position in the data order; by default its place in the batch.
      scores: f32[N], the reward model's rewards; `own_answer` chooses by them.
      exchange: mark each pair as exchanged or not, by a coin (a control).
      fits: whether an answer, as a reference, leaves the reward model's input room for question and completion; by
        default any does.

    Returns the pairs, the same whatever order verdicts and replies arrived in.
    """
    if not len(completions) == len(verdicts) == len(problems) * group_size:
        raise ValueError(
            f"{len(problems)} problems of {group_size} samples need {len(problems) * group_size} rows; there are "
            f"{len(completions)} completions and {len(verdicts)} verdicts"
        )
    scored = "own_answer" in cfg.negatives
    if scored and scores is None:
        raise ValueError("--config.pairs.negatives names own_answer, which needs the reward model's scores")
    if assistant is None and "assistant" in cfg.negatives:
        return PairResult([], collections.Counter())
    where = list(positions) if positions is not None else list(range(len(problems)))
    slots = []
    for b, problem in enumerate(problems):
        rows = range(b * group_size, (b + 1) * group_size)
        rng = keys.make_generator(seed, "pairs", step, where[b])
        ranked = _rank(rows, completions, verdicts, rng, scores if scored else None)
        for source, k in _kinds(cfg):
            slot = _slot(problem, source, k, ranked, completions, where[b] * group_size - rows.start)
            if source == "swap" and slot.row is not None:
                slot.others, slot.reason = _others(problem, problems, seed, step, slot.place), "no_other"
            slots.append(slot)
    open_slots = [slot for slot in slots if slot.row is not None]
    _beside_own_answers([slot for slot in open_slots if slot.source == "own_answer"], rule, fits)
    requests = _try(
        [slot for slot in open_slots if slot.source in ("assistant", "swap")],
        assistant, rule, cfg, seed=seed, step=step,
    )  # fmt: skip
    pairs = [slot.pair() for slot in slots]
    if exchange:
        pairs = _exchanged(pairs, where, seed, step)
    return PairResult(pairs, collections.Counter(s.reason for s in slots if s.negative is None), requests)


def _kinds(cfg: PairsConfig) -> list[tuple[str, int]]:
    """(source, how many slots before it have the same one) of a prompt's slots, in turn."""
    sources = [cfg.negatives[i % len(cfg.negatives)] for i in range(cfg.per_prompt)]
    return [(source, sources[:i].count(source)) for i, source in enumerate(sources)]


@dataclasses.dataclass(frozen=True)
class _Ranked:
    """A prompt's rows, in the orders that sources take them in."""

    drawn: Sequence[int]  # verified correct and whole, at random
    answering: Sequence[int] = ()  # wrong, whole and marking an answer, the highest reward first


def _rank(
    rows: range,
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    rng: np.random.Generator,
    scores: np.ndarray | None,
) -> _Ranked:
    """scores: None leaves out the order by reward."""
    good = [n for n in rows if verdicts[n] == Verdict.CORRECT and not completions[n].truncated]
    drawn = [good[i] for i in rng.permutation(len(good))]
    if scores is None:
        return _Ranked(drawn)
    answering = [
        n for n in rows
        if verdicts[n] == Verdict.WRONG and not completions[n].truncated and marked_answer(completions[n].text)
    ]  # fmt: skip
    return _Ranked(drawn, sorted(answering, key=lambda n: -scores[n]))  # stable: ties by row


def _slot(
    problem: Problem, source: str, k: int, ranked: _Ranked, completions: Sequence[Completion], offset: int
) -> _Slot:
    """The k-th slot of a source, with its positive's text (`own_answer`: the one text of both members).

    offset: from a row in the batch to its place in the data order.
    """
    own = source == "own_answer"
    rows = ranked.answering if own else ranked.drawn
    if k >= len(rows):
        return _Slot(problem, None, "", 0, source, reason="no_wrong" if own else "no_positive")
    return _Slot(problem, rows[k], completions[rows[k]].text, rows[k] + offset, source)


def _try(
    slots: Sequence[_Slot],
    assistant: Assistant | None,
    rule: RuleVerifier,
    cfg: PairsConfig,
    *,
    seed: int,
    step: int,
) -> int:
    """Fills slots that may fail, up to `tries` times.  Returns how often the assistant was asked."""
    requests = 0
    for attempt in range(cfg.tries):
        if not slots:
            break
        rewritten = [s for s in slots if s.source == "assistant"]
        asked = [Request(s.problem, s.positive, (seed, step, s.place, attempt)) for s in rewritten]
        requests += len(asked)
        if asked:
            _judge(rewritten, assistant.rewrite(asked), rule, cfg.length_ratio)
        _swap([s for s in slots if s.source == "swap" and attempt < len(s.others)], attempt, rule)
        slots = [slot for slot in slots if slot.negative is None]
    return requests


def _exchanged(pairs: Sequence[Pair | None], positions: Sequence[int], seed: int, step: int) -> list:
    """The same pairs, each marked as exchanged or not by a coin of its prompt's position."""
    each = len(pairs) // len(positions)
    coins = [keys.make_generator(seed, "exchanged", step, p).integers(2, size=each) for p in positions]
    return [
        pair and dataclasses.replace(pair, exchanged=bool(coin))
        for pair, coin in zip(pairs, np.concatenate(coins), strict=True)
    ]


def _others(problem: Problem, problems: Sequence[Problem], seed: int, step: int, place: int) -> Sequence[str]:
    """The batch's other references, each once, in an order of this slot's own."""
    found = list(dict.fromkeys(p.reference for p in problems if p.reference != problem.reference))
    order = keys.make_generator(seed, "swapped", step, place).permutation(len(found))
    return [found[i] for i in order]


def _beside_own_answers(
    slots: Sequence[_Slot], rule: RuleVerifier, fits: Callable[[str], bool] | None
) -> None:
    """Fills each slot, whose text the rule finds WRONG, or says why the text beside its own answer is not right.

    An answer that does not fit as a reference is refused first: the policy wrote it, it may be hundreds of digits
    long, and a reference is never cut.
    """
    short = []
    for slot in slots:
        if fits is None or fits(marked_answer(slot.positive)):
            short.append(slot)
        else:
            slot.reason = "too_long"
    slots = short
    answers = [marked_answer(slot.positive) for slot in slots]
    items = [(answer, slot.positive) for answer, slot in zip(answers, slots, strict=True)]
    verdicts = rule.check(items) if items else []
    for slot, answer, verdict in zip(slots, answers, verdicts, strict=True):
        if verdict == Verdict.CORRECT:
            slot.negative, slot.positive_reference = slot.positive, answer
        else:
            slot.reason = _UNDECIDED.get(verdict, "not_right")


def marked_answer(text: str) -> str:
    """The answer that a text marks; empty where it marks none."""
    span = answer_parser.find_answer(text)
    return text[slice(*span)].strip() if span else ""


def _swap(slots: Sequence[_Slot], attempt: int, rule: RuleVerifier) -> None:
    """Fills each slot with its positive beside another reference, or with the reason why that is no negative."""
    verdicts = rule.check([(s.others[attempt], s.positive) for s in slots]) if slots else []
    for slot, verdict in zip(slots, verdicts, strict=True):
        if verdict == Verdict.WRONG:
            slot.negative, slot.negative_reference = slot.positive, slot.others[attempt]
        else:
            slot.reason = _UNDECIDED[verdict]


def _judge(slots: Sequence[_Slot], replies: Sequence[Reply], rule: RuleVerifier, length_ratio: float) -> None:
    """Fills each slot with its negative, or with the reason why it is refused."""
    candidates = []
    for slot, reply in zip(slots, replies, strict=True):
        text = "" if isinstance(reply, Failure) else prompts.copy_margins(reply.text, slot.positive)
        slot.reason = refusal_reason(slot.positive, reply, length_ratio)
        if not slot.reason:
            candidates.append((slot, text))
    # Gold is the reference, not the positive's own answer.
    verdicts = rule.check([(slot.problem.reference, text) for slot, text in candidates])
    for (slot, text), verdict in zip(candidates, verdicts, strict=True):
        if verdict == Verdict.WRONG:
            slot.negative = text
        else:
            slot.reason = _UNDECIDED[verdict]


def refusal_reason(positive: str, reply: Reply, length_ratio: float) -> str:
    """Why a reply cannot be a negative, as far as the text alone tells; "" where the rule is to decide."""
    if isinstance(reply, Failure):
        return "assistant_" + reply.reason.replace(" ", "_")
    if reply.truncated:
        return "truncated"
    bare, positive = reply.text.strip(), positive.strip()
    if not bare:
        return "unparseable"
    if bare == positive:
        return "unchanged"
    if set(map(str.lower, _REFUSAL.findall(bare))) - set(map(str.lower, _REFUSAL.findall(positive))):
        return "refusal"
    if max(len(bare), len(positive)) > length_ratio * min(len(bare), len(positive)):
        return "length"
    return ""


class PendingPairs:
    """Pairs on their way."""

    def __init__(self, work: Callable[[], PairResult], *, overlaps: bool):
        self._result: PairResult | None = None
        self._error: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True, name="pairs") if overlaps else None
        if self._thread is not None:
            self._thread.start()
        else:
            self._result = work()  # an error is raised here, before anything else is done

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:  # raised again where the result is asked for
            self._error = error

    def result(self) -> PairResult:
        """Waits for the pairs; raises what building them in a thread raised."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result


def start_pairs(
    problems: Sequence[Problem],
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    group_size: int,
    assistant: Assistant | None,
    rule: RuleVerifier,
    cfg: PairsConfig,
    *,
    seed: int,
    step: int,
    positions: Sequence[int] | None = None,
    scores: np.ndarray | None = None,
    exchange: bool = False,
    fits: Callable[[str], bool] | None = None,
) -> PendingPairs:
    """`build` in a thread, so that devices need not wait for the assistant; the pairs are the same.

    An assistant that computes on our own devices (`overlaps` is False) is run here and now instead: two threads
    that launch device programs at will could interleave their collectives.
    """
    return PendingPairs(
        lambda: build_pairs(
            problems, completions, verdicts, group_size, assistant, rule, cfg,
            seed=seed, step=step, positions=positions, scores=scores, exchange=exchange, fits=fits,
        ),
        overlaps=assistant is not None and assistant.overlaps,
    )  # fmt: skip


def no_pairs() -> PendingPairs:
    """No pairs, where nobody asks for any."""
    return PendingPairs(lambda: PairResult([], collections.Counter()), overlaps=False)
