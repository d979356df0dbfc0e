"""Who says whether a completion is right: each judge gives triples a score, a yes or no, and may abstain.

    model        the reward model: yes above 0.5
    rule         the rule verifier: yes for CORRECT; what it cannot decide is an abstention
    llm          the language model of the config's `judge` section; no readable verdict is an abstention
    last_number  whether the last numbers of completion and reference are equal
    yes          always yes
    prior        the share of right completions of the one who wrote this one, in other data (smoothed)

An abstention counts as no.  As a score it stands between no and yes.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Sequence

import jax
import numpy as np

from cooper_jax.data.answers import NUMBER
from cooper_jax.llm import judge as llm
from cooper_jax.llm.chat import Chat, Failure
from cooper_jax.runtime import hosts
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.types import Triple, Verdict

NAMES = ("model", "rule", "llm", "last_number", "yes", "prior")
THRESHOLD = 0.5  # a reward above it says that the completion is right


@dataclasses.dataclass(frozen=True)
class Opinion:
    """What a judge says of one triple.  `note`: its verdict or why there is none; `reply`: its text, if any."""

    score: float
    abstained: bool = False
    note: str = ""
    reply: str = ""

    @property
    def yes(self) -> bool:
        return self.score > THRESHOLD and not self.abstained


Judge = Callable[
    [Sequence[Triple], int], list[Opinion]
]  # triples, the place of the first of them -> opinions


def opinions_of_rewards(rewards: Sequence[float]) -> list[Opinion]:
    return [Opinion(round(float(p), 6)) for p in rewards]


def opinions_of_verdicts(verdicts: Sequence[Verdict]) -> list[Opinion]:
    def opinion(v: Verdict) -> Opinion:
        return Opinion(float(v is Verdict.CORRECT) if v.decidable else 0.5, not v.decidable, v.value)

    return [opinion(v) for v in verdicts]


def make_llm_judge(chat: Chat, seed: int) -> Judge:
    """An LLM judge; a server is asked by the first host alone.

    Raises SetupError for a server that cannot be reached or refuses the key: that says nothing of any row.
    """

    def ask(triples: Sequence[Triple], first: int) -> list[dict]:
        found = llm.judge_triples(chat, triples, [(seed, 0, first + i, 0) for i in range(len(triples))])
        failed = {i: Failure(j.reason) for i, j in enumerate(found) if not j.reply}
        again = [i for i, failure in failed.items() if failure.transient and not failure.unreachable]
        if again:  # a full server says nothing of a row
            ids = [(seed, 0, first + i, 1) for i in again]
            for i, j in zip(again, llm.judge_triples(chat, [triples[i] for i in again], ids), strict=True):
                found[i] = j
        away = {j.reason for j in found if not j.reply and Failure(j.reason).unreachable}
        if away:
            raise SetupError(
                f"judge: the server does not answer ({', '.join(sorted(away))}): see --config.judge.url, .model "
                "and .key_env; the same command goes on"
            )
        return [dataclasses.asdict(j) for j in found]

    def opinions(triples: Sequence[Triple], first: int) -> list[Opinion]:
        if chat.overlaps and jax.process_count() > 1:
            told = hosts.broadcast_value("judge", lambda: json.dumps(ask(triples, first)).encode())
            found = json.loads(told)
        else:
            found = ask(triples, first)
        return [
            Opinion(0.5, True, j["reason"], j["reply"])
            if j["correct"] is None
            else Opinion(float(j["correct"]), False, "correct" if j["correct"] else "incorrect", j["reply"])
            for j in found
        ]

    return opinions


def find_last_number(text: str) -> float | None:
    """The last number of a text, without its thousands separators."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def judge_by_last_number(triples: Sequence[Triple], first: int) -> list[Opinion]:
    """A completion without a number is wrong."""
    pairs = ((find_last_number(t.completion), find_last_number(t.reference)) for t in triples)
    return [Opinion(float(said is not None and said == right)) for said, right in pairs]


def judge_always_yes(triples: Sequence[Triple], first: int) -> list[Opinion]:
    return [Opinion(1.0) for _ in triples]


def make_prior_judge(known: Sequence[Triple]) -> Judge:
    """By the writer's name: (right + 2 r) / (rows + 2), with r the share of right ones over all rows.

    A writer that is not in `known` gets r.
    """
    overall = float(np.mean([t.label > 0.5 for t in known]))
    labels = defaultdict(list)
    for t in known:
        labels[t.model].append(t.label > 0.5)
    rates = {m: (sum(found) + 2 * overall) / (len(found) + 2) for m, found in labels.items()}
    return lambda triples, first: [Opinion(rates[t.model] if t.model in rates else overall) for t in triples]
