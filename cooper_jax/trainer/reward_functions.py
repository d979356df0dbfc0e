"""Rewards by name (reward.functions): the user's own functions and built-in rewards, combined.

1. `load_reward_functions` imports the functions at the start of a run and checks their arguments.
2. `StepRewards.add_group` starts the functions on a group of responses as soon as the group has ended, while
   the devices sample the others.  Functions that name `verdicts` or `scores` among their arguments start when
   these are known.  On several hosts each group belongs to one host.
3. `StepRewards.collect` waits for all functions, exchanges their values between the hosts, and combines them.

A function has the form of TRL's reward functions, so that these carry over:

    def f(prompts, completions, **columns) -> list[float | None]

It is called once per group, by name, with lists of G values: `ARGUMENTS` below and every column of the problem's
data row.  None is no reward: the value takes no part in the sum and in the group's statistics.  A response
without any reward is masked.  A call that fails gives None to its group and is counted; a function that fails at
every call ends the run.

    K  functions   B  prompts   G  samples per prompt   N = B * G  rows, prompt-major
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cooper_jax.data.policy_prompts import PromptStyle, make_policy_messages
from cooper_jax.runtime import hosts
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.settings.user_code import (
    UserCode,
    choose_arguments,
    find_missing_arguments,
    list_named_arguments,
    load_function,
    read_user_code,
)
from cooper_jax.trainer.function_runner import Call, CallResult, FunctionRunner
from cooper_jax.trainer.rewards import REWARDS, RewardConfig, compute_rewards
from cooper_jax.types import Completion, Metrics, Problem, Verdict

# The arguments of every function, beside the columns.  `completion_ids` is TRL's name of `completion_tokens`.
ARGUMENTS = (
    "prompts",  # the question with data.instruction, as text or as messages
    "completions",  # the responses, likewise
    "question",
    "reference",
    "completion_tokens",  # token ids, the EOS included
    "completion_ids",
    "completion_lengths",  # numbers of sampled tokens
    "truncated",  # True for a response without an EOS
)
# A function that names one of these starts when it is known.
LATE_ARGUMENTS = ("verdicts", "scores")

# A function that fails at this many calls in a row, and at all calls of a step, ends the run.
FAILURES_IN_A_ROW = 8

# Metrics `reward/NAME` that exist already.
_TAKEN_NAMES = ("mean", "std", "zero_variance_groups", "masked", "overlong")


@dataclasses.dataclass
class RewardTerm:
    """One of the rewards that are combined."""

    name: str  # in metrics: reward/NAME
    weight: float
    code: UserCode | None  # None for a built-in reward, whose key in REWARDS is `name`

    # Of a user's function.
    function: Callable[..., Any] | None = None
    runner: FunctionRunner | None = None
    needs_verdicts: bool = False
    needs_scores: bool = False
    failed_in_a_row: int = 0  # calls, in the order of the data
    has_warned: bool = False  # True once a failure has been printed

    @property
    def is_late(self) -> bool:
        """True if the function starts when verdicts and scores are known."""
        return self.needs_verdicts or self.needs_scores


@dataclasses.dataclass(frozen=True)
class CombinedRewards:
    """The rewards of a step's responses."""

    total: np.ndarray  # f32[N]; NaN: masked
    by_name: Mapping[str, np.ndarray]  # f32[N] each, NaN: no reward; empty without reward.functions
    failures: Metrics = dataclasses.field(
        default_factory=dict
    )  # counts of the functions' failures, by metric
    penalty: np.ndarray | None = None  # f32[N], a part of the total: reward.overlong_tokens

    @property
    def masked(self) -> np.ndarray:
        """bool[N]: the responses without any reward by the functions."""
        return np.isnan(self.total) if self.by_name else np.zeros(len(self.total), bool)

    @property
    def metrics(self) -> Metrics:
        """The mean of each reward, and the counts of failures."""
        metrics = dict(self.failures)
        if self.penalty is not None:
            metrics["reward/overlong"] = float(self.penalty.mean())
        if self.by_name:
            known = self.total[~np.isnan(self.total)]
            metrics |= {f"reward/{name}": _mean_over_numbers(values) for name, values in self.by_name.items()}
            metrics["reward/masked"] = float(len(self.total) - len(known))
            metrics["reward/mean"] = _mean_over_numbers(known)
            metrics["reward/std"] = float(known.std()) if len(known) else float("nan")
        return metrics

    def concatenate(self, other: CombinedRewards) -> CombinedRewards:
        """The rewards of these responses and then those of `other`, of the same run."""
        penalty = None
        if self.penalty is not None and other.penalty is not None:
            penalty = np.concatenate([self.penalty, other.penalty])
        failures = {
            name: self.failures.get(name, 0.0) + other.failures.get(name, 0.0)
            for name in {**self.failures, **other.failures}
        }
        return CombinedRewards(
            np.concatenate([self.total, other.total]),
            {name: np.concatenate([values, other.by_name[name]]) for name, values in self.by_name.items()},
            failures,
            penalty,
        )

    def take(self, rows: np.ndarray) -> CombinedRewards:
        """The rewards of some rows; the failures stay those of all.  rows: i[n]."""
        return dataclasses.replace(
            self,
            total=self.total[rows],
            by_name={name: values[rows] for name, values in self.by_name.items()},
            penalty=None if self.penalty is None else self.penalty[rows],
        )


@dataclasses.dataclass
class RewardFunctions:
    """The functions of a run."""

    config: RewardConfig
    terms: tuple[RewardTerm, ...]
    columns: tuple[str, ...]  # of the training problems
    prompt_style: PromptStyle  # of the policy
    has_warned: bool = False  # True once a step without any reward has been reported

    def close(self) -> None:
        """End the functions' threads."""
        for term in self.terms:
            if term.runner is not None:
                term.runner.close()


def load_reward_functions(
    config: RewardConfig, problems: Sequence[Problem], prompt_style: PromptStyle
) -> RewardFunctions | None:
    """Import the functions that a config names; None if it names none.

    Args:
      problems: those that the policy is trained on, whose columns are passed to the functions.
      prompt_style: settings of the policy's prompts, which the functions get.

    Raises SetupError with one message for each function that cannot be used.
    """
    if not config.function_names:
        return None

    columns: dict[str, None] = {}  # a set in the order of the data
    for problem in problems:
        columns |= dict.fromkeys(problem.columns)

    messages: list[str] = []
    terms: list[RewardTerm] = []
    for entry, weight in zip(config.function_names, config.weights, strict=True):
        try:
            terms.append(_load_term(entry, weight, config, columns))
        except SetupError as error:
            messages += error.messages
    if messages:
        raise SetupError(*messages)
    _name_apart(terms)

    # Threads are started when all functions are known to be usable.
    for term in terms:
        if term.code is not None and term.function is not None:
            term.runner = FunctionRunner(term.function, term.code.path, config.function_timeout)
    return RewardFunctions(config, tuple(terms), tuple(columns), prompt_style)


def _load_term(entry: str, weight: float, config: RewardConfig, columns: Collection[str]) -> RewardTerm:
    """Load one entry of reward.functions.  columns: of the training data."""
    if entry in REWARDS:
        return RewardTerm(entry, weight, None)

    field = "reward.functions"
    code = read_user_code(entry, field)
    function = load_function(code, field)
    if missing := find_missing_arguments(function, {*ARGUMENTS, *LATE_ARGUMENTS, *columns}):
        raise SetupError(
            f"{field}={code.label!r} takes {', '.join(missing)}, which is neither an argument "
            f"({', '.join((*ARGUMENTS, *LATE_ARGUMENTS))}) nor a column of the training data "
            f"({', '.join(sorted({*columns} - {*ARGUMENTS, *LATE_ARGUMENTS})) or 'none'})"
        )

    # In the rule arm the name may be a column's.
    named = list_named_arguments(function)
    needs_scores = "scores" in named and (config.has_model or "scores" not in columns)
    if needs_scores and not config.has_model:
        raise SetupError(
            f"{field}={code.label!r} takes scores, and the rule arm has no reward model: set "
            "--config.reward.arm=model"
        )
    return RewardTerm(
        code.name,
        weight,
        code,
        function=function,
        needs_verdicts="verdicts" in named,
        needs_scores=needs_scores,
    )


def _name_apart(terms: Sequence[RewardTerm]) -> None:
    """Add the file's name to names that occur twice, or that other metrics have."""
    counts = Counter(term.name for term in terms)
    for term in terms:
        if term.code is not None and (counts[term.name] > 1 or term.name in (*_TAKEN_NAMES, *REWARDS)):
            term.name = f"{Path(term.code.path).stem}.{term.name}"
    if repeated := [name for name, count in Counter(term.name for term in terms).items() if count > 1]:
        raise SetupError(f"reward.functions: two functions are called {', '.join(repeated)}: rename one")


# --- a step ------------------------------------------------------------------------------------------


class StepRewards:
    """The rewards of one step's responses."""

    def __init__(self, functions: RewardFunctions, problems: Sequence[Problem]):
        """problems: [B]."""
        self._functions = functions
        self._problems = problems
        self._arguments: dict[int, dict[str, list]] = {}  # by the problem's index in the batch
        self._calls: list[dict[int, Call]] = [{} for _ in functions.terms]  # [K], by the same index

    def add_group(self, index: int, responses: Sequence[Completion], tokens: Sequence[Sequence[int]]) -> None:
        """Start the functions on the G responses to problem `index`, and return without waiting.

        tokens: [G], the token ids of each response.
        """
        if not hosts.is_assigned(index):
            return
        self._arguments[index] = self._make_arguments(self._problems[index], responses, tokens)
        for k, term in enumerate(self._functions.terms):
            if not term.is_late:
                self._start(k, index, {})

    def collect(
        self,
        scores: np.ndarray | None,
        verdicts: Sequence[Verdict],
        completions: Sequence[Completion],
        penalty: np.ndarray | None = None,
    ) -> CombinedRewards:
        """Wait for all functions and combine the rewards.  Collective: the same arguments on all hosts.

        Args:
          scores: f32[N]; None in the rule arm.
          verdicts, completions: [N].
          penalty: f32[N], added to the sums; None: 0.

        Raises SetupError if a function fails always, hosts.Stopped after SIGTERM in a run of one process.
        """
        group_size = len(completions) // len(self._problems)
        self._start_late(scores, verdicts, group_size)
        results = self._exchange_results()

        values = np.full((len(self._functions.terms), len(completions)), np.nan, np.float32)  # [K, N]
        failures: Metrics = {}
        for k, term in enumerate(self._functions.terms):
            if term.code is None:
                values[k] = compute_rewards([term.name], scores, verdicts, completions)
            else:
                for index, result in enumerate(results[k]):
                    values[k, index * group_size : (index + 1) * group_size] = [
                        np.nan if value is None else value for value in result.values
                    ]
                failures |= _count_failures(term, results[k])
                _check_failures(term, results[k])

        total = sum_rewards(values, [term.weight for term in self._functions.terms])
        if np.isnan(total).all() and not self._functions.has_warned:
            self._functions.has_warned = True
            hosts.print_once(
                "warning: no response of this step has a reward: all functions returned None or failed, so the "
                "policy learns nothing from it; reward/masked counts such responses",
                always=True,
            )
        if penalty is not None:
            total = total + penalty
        by_name = {term.name: values[k] for k, term in enumerate(self._functions.terms)}
        return CombinedRewards(total, by_name, failures, penalty)

    def _make_arguments(
        self, problem: Problem, responses: Sequence[Completion], tokens: Sequence[Sequence[int]]
    ) -> dict[str, list]:
        """The arguments of a group's calls, by name: lists of G values."""
        size = len(responses)
        messages = make_policy_messages(problem.question, problem.messages, self._functions.prompt_style)
        prompt: Any = "\n".join(content for _, content in messages)
        completions: list[Any] = [response.text for response in responses]
        if self._functions.config.function_messages:
            prompt = [{"role": role, "content": content} for role, content in messages]
            completions = [[{"role": "assistant", "content": text}] for text in completions]

        # A column cannot take the place of an argument.
        arguments = {name: [problem.columns.get(name)] * size for name in self._functions.columns}
        ids = [list(row) for row in tokens]
        return arguments | {
            "prompts": [prompt] * size,
            "completions": completions,
            "question": [problem.question] * size,
            "reference": [problem.reference] * size,
            "completion_tokens": ids,
            "completion_ids": ids,
            "completion_lengths": [response.tokens for response in responses],
            "truncated": [response.truncated for response in responses],
        }

    def _start(self, k: int, index: int, late: Mapping[str, list]) -> None:
        """Start the k-th term's function on a group.  late: more arguments."""
        term = self._functions.terms[k]
        if term.function is None or term.runner is None:
            return
        arguments = self._arguments[index] | dict(late)
        rows = len(arguments["completions"])

        # Lists of its own: a function may change them.
        chosen = {name: list(value) for name, value in choose_arguments(term.function, arguments).items()}
        self._calls[k][index] = term.runner.submit(chosen, rows)

    def _start_late(self, scores: np.ndarray | None, verdicts: Sequence[Verdict], group_size: int) -> None:
        """Start the functions that need verdicts or scores."""
        for index in self._arguments:
            rows = slice(index * group_size, (index + 1) * group_size)
            late: dict[str, list] = {"verdicts": [verdict.value for verdict in verdicts[rows]]}
            if scores is not None:
                late["scores"] = [float(score) for score in scores[rows]]
            for k, term in enumerate(self._functions.terms):
                if term.is_late:
                    self._start(k, index, late)

    def _exchange_results(self) -> list[list[CallResult]]:
        """Wait for this host's calls, and return those of all hosts: [K][B]; [] for a built-in reward."""
        own: dict[str, Any] = {}
        for k, term in enumerate(self._functions.terms):
            if term.runner is not None:
                for index, call in self._calls[k].items():
                    own[f"{k}/{index}"] = dataclasses.astuple(term.runner.wait(call))

        found: dict[str, Any] = {}
        for part in hosts.exchange_json("rewards", own):
            found |= part
        results: list[list[CallResult]] = []
        for k, term in enumerate(self._functions.terms):
            indices = range(len(self._problems)) if term.runner is not None else range(0)
            results.append([_decode_result(found[f"{k}/{index}"]) for index in indices])
        return results


def _decode_result(encoded: Sequence[Any]) -> CallResult:
    """A result as `dataclasses.astuple` and JSON have encoded it."""
    values, *rest = encoded
    return CallResult(tuple(values), *rest)


def sum_rewards(values: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """The weighted sum of the rewards of each row, f32[N]; NaN for a row without any.

    values: f32[K, N]; NaN: no reward, which adds nothing to the sum.
    """
    known = ~np.isnan(values)
    weighted = np.where(known, values.astype(np.float64) * np.array(weights)[:, None], 0.0)
    return np.where(known.any(0), weighted.sum(0), np.nan).astype(np.float32)


def _mean_over_numbers(values: np.ndarray) -> float:
    """The mean of the values that are not NaN; NaN without any."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _count_failures(term: RewardTerm, results: Sequence[CallResult]) -> Metrics:
    """Count a function's failed calls by their reason, and its rows without a reward; zeros are left out."""
    counts = Counter(result.failure for result in results if result.failure)
    counts["not_finite"] = sum(result.not_finite for result in results)

    # None that the function returned itself; those of failed calls and of NaN are counted above.
    returned = [result for result in results if not result.failure]
    counts["none"] = sum(result.values.count(None) for result in returned) - counts["not_finite"]
    return {f"reward/{term.name}/{reason}": float(count) for reason, count in counts.items() if count}


def _check_failures(term: RewardTerm, results: Sequence[CallResult]) -> None:
    """Print a function's first failure; raise SetupError if it has failed at all calls for long enough.

    A call fails, too, if all its rewards are not finite.  One that returns None alone does not: a function may have
    nothing to say about a prompt.
    """
    assert term.code is not None
    failed = [result for result in results if result.failure]
    if failed and not term.has_warned:
        term.has_warned = True
        hosts.print_once(
            f"warning: reward.functions={term.code.label!r} failed ({failed[0].failure}), so the responses to a "
            f"prompt get no reward from it; later failures are counted in reward/{term.name}/...: "
            f"{failed[0].message}",
            always=True,
        )
    not_finite = sum(result.not_finite for result in results)
    if not_finite and not term.has_warned:
        term.has_warned = True
        hosts.print_once(
            f"warning: reward.functions={term.code.label!r} returned {not_finite} rewards that are not finite, as "
            f"NaN is; these, and later ones, count as None and in reward/{term.name}/not_finite",
            always=True,
        )
    for result in results:
        has_failed = result.failure or result.not_finite == len(result.values)
        term.failed_in_a_row = term.failed_in_a_row + 1 if has_failed else 0
    if term.failed_in_a_row >= max(FAILURES_IN_A_ROW, len(results)):
        last = results[-1]
        what = (
            f"{last.failure}): {last.message}"
            if last.failure
            else "not_finite): no reward was a finite number"
        )
        raise SetupError(
            f"reward.functions={term.code.label!r} failed at each of its last {term.failed_in_a_row} calls; the "
            f"last failure ({what}"
        )
