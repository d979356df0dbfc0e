"""Contrastive pairs: a verified positive and a rewritten negative of the same problem.

1. Positives: of a prompt's rows that are verified correct and not truncated, up to `per_prompt` are drawn without
   replacement, by (seed, step, the prompt's position in the data order) alone.
2. The assistant rewrites all of them in one batch.  It is not asked about prompts without a positive.
3. Each negative passes the gates of `refusal_of`, the last of which is the rule: it must find the negative WRONG
   against the *reference*.  Slots that fail are asked again, up to `tries` times in all, then masked and counted.

Both members render alike but for their text: a negative's outer whitespace is replaced by its positive's.

Departures from the released code: see each gate; there, a negative that nothing can be parsed from passes as wrong.

    B prompts   G samples a prompt   N = B * G rows, prompt-major
"""

from __future__ import annotations

import collections
import dataclasses
import re
import threading
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from cooper_jax.data import prompts
from cooper_jax.reward.assistant import Assistant, Failure, Reply, Request
from cooper_jax.reward.rule import RuleVerifier
from cooper_jax.runtime import keys
from cooper_jax.types import Completion, Pair, Problem, Verdict

# Refusals, and talk about the task: a solution does neither, and a reward model would learn the phrase.
_REFUSAL = re.compile(
    r"\bsorry\b|\bi(?:'m| am) (?:un)?able to\b|\bi(?:'m| am) not able to\b|\bas an ai\b|\b(?:language|ai) model\b"
    r"|\bi (?:can ?not|can't|won't|will not|must decline)\b"
    r"|\b(?:intentional|deliberate)(?:ly)?\b|\b(?:incorrect|wrong|flawed) (?:solution|answer|version)\b"
    r"|\b(?:rewritten|modified) (?:solution|version)\b",
    re.IGNORECASE,
)
_UNDECIDED = {
    Verdict.CORRECT: "not_wrong",
    Verdict.NO_ANSWER: "unparseable",
    Verdict.UNRECOGNISED: "unrecognised",
    Verdict.TIMEOUT: "rule_timeout",
}


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
    negative: str | None = None
    reason: str = "no_positive"


def build(
    problems: Sequence[Problem],
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    group_size: int,
    assistant: Assistant | None,
    rule: RuleVerifier,
    cfg: ConfigDict,
    *,
    seed: int,
    step: int,
    positions: Sequence[int] | None = None,
) -> PairResult:
    """Pairs for one step.

    Args:
      problems: [B].
      completions, verdicts: [N], prompt-major.
      assistant: None asks for no pairs, and gives none.
      cfg: the config's `pairs` section.
      positions: [B], each prompt's position in the data order; by default its place in the batch.

    Returns the pairs, the same whatever order verdicts and replies arrived in.
    """
    if not len(completions) == len(verdicts) == len(problems) * group_size:
        raise ValueError(
            f"{len(problems)} problems of {group_size} samples need {len(problems) * group_size} rows; there are "
            f"{len(completions)} completions and {len(verdicts)} verdicts"
        )
    if cfg.per_prompt < 1 or cfg.tries < 1 or cfg.length_ratio < 1.0:
        raise ValueError(
            f"--config.pairs: per_prompt={cfg.per_prompt}, tries={cfg.tries}, length_ratio={cfg.length_ratio}: "
            "each must be at least 1"
        )
    if assistant is None:
        return PairResult([], collections.Counter())
    slots = []
    for b, problem in enumerate(problems):
        position = positions[b] if positions is not None else b
        rows = range(b * group_size, (b + 1) * group_size)
        good = [n for n in rows if verdicts[n] == Verdict.CORRECT and not completions[n].truncated]
        rng = keys.numpy_stream(seed, "pairs", step, position)
        drawn = [good[i] for i in rng.permutation(len(good))[: cfg.per_prompt]]
        for n in drawn:
            slots.append(_Slot(problem, n, completions[n].text, position * group_size + n - rows.start))
        slots += [_Slot(problem, None, "", 0)] * (cfg.per_prompt - len(drawn))

    open_slots = [slot for slot in slots if slot.row is not None]
    requests = 0
    for attempt in range(cfg.tries):
        if not open_slots:
            break
        asked = [Request(s.problem, s.positive, (seed, step, s.place, attempt)) for s in open_slots]
        requests += len(asked)
        _judge(open_slots, assistant.rewrite(asked), rule, cfg.length_ratio)
        open_slots = [slot for slot in open_slots if slot.negative is None]
    pairs = [
        Pair(slot.problem, slot.positive, slot.negative, slot.row) if slot.negative is not None else None
        for slot in slots
    ]
    return PairResult(pairs, collections.Counter(s.reason for s in slots if s.negative is None), requests)


def _judge(slots: Sequence[_Slot], replies: Sequence[Reply], rule: RuleVerifier, length_ratio: float) -> None:
    """Fills each slot with its negative, or with the reason why it is refused."""
    candidates = []
    for slot, reply in zip(slots, replies, strict=True):
        text = "" if isinstance(reply, Failure) else prompts.like_margins(reply.text, slot.positive)
        slot.reason = refusal_of(slot.positive, reply, length_ratio)
        if not slot.reason:
            candidates.append((slot, text))
    # Gold is the reference, not the positive's own answer.
    verdicts = rule.check([(slot.problem.reference, text) for slot, text in candidates])
    for (slot, text), verdict in zip(candidates, verdicts, strict=True):
        if verdict == Verdict.WRONG:
            slot.negative = text
        else:
            slot.reason = _UNDECIDED[verdict]


def refusal_of(positive: str, reply: Reply, length_ratio: float) -> str:
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


def start(
    problems: Sequence[Problem],
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    group_size: int,
    assistant: Assistant | None,
    rule: RuleVerifier,
    cfg: ConfigDict,
    *,
    seed: int,
    step: int,
    positions: Sequence[int] | None = None,
) -> PendingPairs:
    """`build` in a thread, so that devices need not wait for the assistant; the pairs are the same.

    An assistant that computes on our own devices (`overlaps` is False) is run here and now instead: two threads
    that launch device programs at will could interleave their collectives.
    """
    return PendingPairs(
        lambda: build(
            problems, completions, verdicts, group_size, assistant, rule, cfg,
            seed=seed, step=step, positions=positions,
        ),
        overlaps=assistant is not None and assistant.overlaps,
    )  # fmt: skip
