"""Judges of completions: each maps a triple to a score and a yes or no, or abstains.

    model            the reward model: yes above 0.5
    rule             the rule verifier: yes for CORRECT; it abstains if it cannot decide
    rule_then_model  the rule's verdict where it decides, the reward model's where it abstains
    blend            a logistic model of rule, reward model and text; see blended_judge.py
    llm              the language model of the config's `judge` section; it abstains if its verdict is unreadable
    last_number      yes if the last numbers of completion and reference are equal
    yes              always yes
    prior            the accuracy of the model that wrote the completion, measured on other data (smoothed)

An abstention counts as no.  Its score, 0.5, is halfway between no and yes.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cooper_jax.data.answers import NUMBER
from cooper_jax.llm import judge as llm
from cooper_jax.llm.chat import Chat, Failure
from cooper_jax.runtime import hosts
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.types import Triple, Verdict

# Values of --judge.
NAMES = ("model", "rule", "rule_then_model", "blend", "llm", "last_number", "yes", "prior")
# The judges that a combined judge is made of.
PARTS = {"rule_then_model": ("rule", "model"), "blend": ("rule", "model")}
THRESHOLD = 0.5  # a reward above it calls the completion correct


@dataclasses.dataclass(frozen=True)
class Opinion:
    """A judge's opinion of one triple."""

    score: float  # in [0, 1]
    abstained: bool = False

    # For a reader of the results; figures do not depend on them.
    note: str = ""  # the verdict, or the reason for its absence
    reply: str = ""  # a language model's text

    @property
    def yes(self) -> bool:
        """True if the judge calls the completion correct."""
        return self.score > THRESHOLD and not self.abstained


# (triples, index of the first triple among all rows) -> their opinions.  The index seeds random draws.
Judge = Callable[[Sequence[Triple], int], list[Opinion]]


def make_reward_opinions(rewards: Iterable[float]) -> list[Opinion]:
    """Convert rewards to opinions of the reward model."""
    # Six decimals, like the rewards in the items files of benchmarks.
    return [Opinion(round(float(p), 6)) for p in rewards]


def make_verdict_opinions(verdicts: Sequence[Verdict]) -> list[Opinion]:
    """Convert verdicts to opinions of the rule verifier."""
    opinions = []
    for verdict in verdicts:
        score = float(verdict is Verdict.CORRECT) if verdict.decidable else 0.5
        opinions.append(Opinion(score, not verdict.decidable, verdict.value))
    return opinions


def list_needed(names: Iterable[str]) -> set[str]:
    """List the judges that have to be opened for some of NAMES: these, and the parts of combined ones."""
    needed = set(names)
    for name in names:
        needed.update(PARTS.get(name, ()))
    return needed


def list_asked(names: Sequence[str]) -> list[str]:
    """List the judges whose opinions are stored: some of NAMES, and in the place of `blend` its parts."""
    asked = [name for name in names if name != "blend"]
    if "blend" in names:
        asked += [name for name in PARTS["blend"] if name not in names]
    return asked


def remember_last_opinions(judge: Judge) -> Judge:
    """Wrap a judge, so that asking it twice about one chunk computes its opinions once."""
    last: list[tuple[Sequence[Triple], int, list[Opinion]]] = []

    def judge_once(triples: Sequence[Triple], first: int) -> list[Opinion]:
        # Chunks are compared by identity: all judges of a chunk get the same object, which `last` keeps alive.
        if not last or last[0][0] is not triples or last[0][1] != first:
            last[:] = [(triples, first, judge(triples, first))]
        return last[0][2]

    return judge_once


def make_rule_then_model_judge(rule: Judge, model: Judge) -> Judge:
    """Make a judge that follows the rule verifier where it decides, and the reward model where it abstains.

    With the reward model's reward p, the score is

        3/4 + p/4   in [0.75, 1]        the rule finds the completion correct
        3/8 + p/4   in [0.375, 0.625]   the rule abstains
        p/4         in [0, 0.25]        the rule finds it wrong, or without an answer

    The three intervals are disjoint, so every row that the rule accepts ranks above every undecided one, and
    these above those that it rejects; within each class rows rank by p.  Scores of 1 and 0 for decided rows would
    make AUROC count all pairs within a class as ties.  A score is above 1/2 if the rule accepts the completion, or
    if it abstains and p > 1/2.  The score is a rank and not a probability.
    """

    def judge(triples: Sequence[Triple], first: int) -> list[Opinion]:
        opinions = []
        for verdict, reward in zip(rule(triples, first), model(triples, first), strict=True):
            if verdict.abstained:
                lowest = 3 / 8
            else:
                lowest = 3 / 4 if verdict.yes else 0.0
            decider = "model" if verdict.abstained else "rule"
            opinions.append(Opinion(lowest + reward.score / 4, False, f"{decider}; rule: {verdict.note}"))
        return opinions

    return judge


def make_llm_judge(chat: Chat, seed: int) -> Judge:
    """Make a judge that asks a language model; a server is asked by the first host only.

    The judge raises SetupError for a server that cannot be reached or refuses the key, since that is not an
    opinion on a row.
    """

    def ask(triples: Sequence[Triple], first: int) -> list[dict[str, Any]]:
        """Ask about triples; returns judgements as dictionaries, which hosts can exchange."""
        # The ids are (seed, step, row, attempt): a reply depends on the row's index, not on the chunk.
        judgements = llm.judge_triples(chat, triples, [(seed, 0, first + i, 0) for i in range(len(triples))])

        # A temporary failure (such as a full server) is not an opinion on a row either: ask once more.
        failures = {i: Failure(j.reason) for i, j in enumerate(judgements) if not j.reply}
        repeated = [i for i, failure in failures.items() if failure.transient and not failure.unreachable]
        if repeated:
            ids = [(seed, 0, first + i, 1) for i in repeated]
            answers = llm.judge_triples(chat, [triples[i] for i in repeated], ids)
            for i, judgement in zip(repeated, answers, strict=True):
                judgements[i] = judgement

        # Rows that fail for another reason remain as abstentions.
        unreachable = {j.reason for j in judgements if not j.reply and Failure(j.reason).unreachable}
        if unreachable:
            words = getattr(chat, "server_words", {})
            reasons = [
                f"{reason}: {words[reason]}" if reason in words else reason for reason in sorted(unreachable)
            ]
            raise SetupError(
                f"judge: the server does not answer ({', '.join(reasons)}): check "
                "--config.judge.url, .model and .key_env; the same command resumes"
            )
        return [dataclasses.asdict(j) for j in judgements]

    def judge(triples: Sequence[Triple], first: int) -> list[Opinion]:
        # A local model runs on all hosts together; a server must not be asked once per host.
        if chat.overlaps and jax.process_count() > 1:
            answer = hosts.broadcast_value("judge", lambda: json.dumps(ask(triples, first)).encode())
            judgements = json.loads(answer)
        else:
            judgements = ask(triples, first)
        return [_make_llm_opinion(judgement) for judgement in judgements]

    return judge


def _make_llm_opinion(judgement: Mapping[str, Any]) -> Opinion:
    """Convert a judgement's fields to an opinion."""
    correct, reply = judgement["correct"], judgement["reply"]
    if correct is None:
        return Opinion(0.5, True, judgement["reason"], reply)
    return Opinion(float(correct), False, "correct" if correct else "incorrect", reply)


def find_last_number(text: str) -> float | None:
    """Find the last number of a text, without its thousands separators; None without a number."""
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def judge_by_last_number(triples: Sequence[Triple], first: int) -> list[Opinion]:
    """A `Judge`: yes if completion and reference end in the same number; without a number, no."""
    opinions = []
    for triple in triples:
        answer = find_last_number(triple.completion)
        correct = answer is not None and answer == find_last_number(triple.reference)
        opinions.append(Opinion(float(correct)))
    return opinions


def judge_always_yes(triples: Sequence[Triple], first: int) -> list[Opinion]:
    """A `Judge` that calls every completion correct."""
    return [Opinion(1.0) for _ in triples]


def make_prior_judge(labelled: Sequence[Triple]) -> Judge:
    """Make a judge that knows only the name of the model that wrote the completion.

    labelled: labelled triples, other than those that will be judged.

    The score is (correct + 2 r) / (rows + 2) over the labelled rows of that model, where r is the accuracy
    over all labelled rows.  A model without labelled rows has the score r.
    """
    # Smoothing counts as two more rows with the overall accuracy.
    overall = float(np.mean([t.label > 0.5 for t in labelled]))
    labels = defaultdict(list)
    for t in labelled:
        labels[t.model].append(t.label > 0.5)
    rates = {}
    for model, decisions in labels.items():
        rates[model] = (sum(decisions) + 2 * overall) / (len(decisions) + 2)

    def judge(triples: Sequence[Triple], first: int) -> list[Opinion]:
        return [Opinion(rates.get(t.model, overall)) for t in triples]

    return judge
