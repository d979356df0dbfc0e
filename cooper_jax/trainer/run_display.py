"""What a training run shows while it runs: its phases, a line of figures, rows of evaluations, samples.

1. Phases of a step are named after the five points of step.py: `step 1: rollout (1 of 5)`.  Those of the first
   step, which compile, have lines that stay.
2. An evaluation is a row of a table.  Held-out accuracy, false positives and lengths are those of the held-out
   problems; reward and KL are those of the step's own responses.
3. Every `log.show_samples` steps, and at step 1, one response is shown with its prompt, verdict and reward.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence

from cooper_jax.runtime.console import CONSOLE, Console, escape_controls
from cooper_jax.runtime.console_table import GrowingTable
from cooper_jax.runtime.progress import Pace, Progress, format_duration
from cooper_jax.trainer.run_settings import RunSettings
from cooper_jax.trainer.samples import StepRecord

# A phase of a step -> what it is called, and which of the five points of step.py it is; 0: none.  Verdicts and
# log-probabilities are awaited or computed where that fits best, and would come out of order.
PHASES: dict[str, tuple[str, int]] = {
    "rollout": ("rollout", 1),
    "score": ("scores of the reward model", 2),
    "rule": ("verdicts of the rule verifier", 0),
    "functions": ("rewards", 2),
    "logprobs": ("log-probabilities", 0),
    "copy_weights": ("copy of the weights for the next rollout", 0),
    "policy": ("policy update", 3),
    "pairs": ("pairs for the reward model", 4),
    "reward": ("reward model update", 5),
    "giveaways": ("measurement of giveaways", 0),
    "eval": ("evaluation on held-out problems", 0),
    "checkpoint": ("checkpoint", 0),
}

# Figures of an evaluation: (heading, metrics of which the first that a row has is shown, format).
FIGURES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("held-out", ("eval/oracle/accuracy", "eval/rule/accuracy"), ".1%"),
    ("reward", ("reward/mean",), ".3f"),
    ("false pos.", ("eval/rm/false_positive_rate",), ".1%"),
    ("KL", ("policy/kl",), ".1e"),
    ("tokens", ("eval/response/tokens_mean",), ".1f"),
)
COLUMNS = (("step", 6), *((heading, 8) for heading, _, _ in FIGURES), ("s/step", 6), ("ETA", 8))

# A sample's texts are shortened to so many characters and lines.
SAMPLE_CHARACTERS = 600
SAMPLE_LINES = 12


class RunDisplay:
    """The display of a run; also the observer of its phases.

    Args:
      settings: of the run.
      rows: its rows of metrics so far, of which the last evaluation is shown again when a run resumes.
      step: the step from which it goes on.
      decode: tokens -> text, for the prompts.
    """

    def __init__(
        self,
        settings: RunSettings,
        rows: Sequence[Mapping[str, float]],
        step: int,
        decode: Callable[[Sequence[int]], str],
        console: Console = CONSOLE,
    ):
        self._settings, self._console, self._decode = settings, console, decode
        self._points = 5 if settings.reward.updates_at_steps else 3
        self._first_step = step + 1
        self._named: set[tuple[int, str]] = set()  # phases whose lines are printed
        self._table = GrowingTable(COLUMNS, console)

        pace = Pace(
            settings.steps, step, settings.eval.every, compile_seconds=lambda: console.compile_seconds
        )
        evaluated = [row for row in rows if is_evaluated(row)]
        if evaluated:
            self._print_evaluation(int(evaluated[-1]["step"]), evaluated[-1], None)
            # Without what was compiled in it, as far as it is known: the next one compiles nothing.
            seconds = evaluated[-1].get("time/eval", 0.0) - evaluated[-1].get("time/compile", 0.0)
            if seconds > 0:
                pace.take_first_evaluation(seconds)
        self._progress = Progress(settings.steps, step, console, pace)

    @contextlib.contextmanager
    def _open_named(self, text: str, key: tuple[int, str]):
        # A phase may come several times in a step, of which the first has the line.
        named = key[0] == self._first_step and key not in self._named
        if named:
            self._named.add(key)
        with self._console.open_activity(text, named):
            yield

    def open_phase(self, step: int, name: str) -> contextlib.AbstractContextManager[None]:
        """The context of a phase: it is what the live line shows."""
        text, point = PHASES.get(name, (name, 0))
        place = f" ({point} of {self._points})" if point else ""
        return self._open_named(f"step {step}: {text}{place}", (step, name))

    def show_step(self, step: int, metrics: Mapping[str, float], record: StepRecord) -> None:
        """Show the figures of a complete step, its evaluation and a sample, as far as they are due."""
        self._progress.update(step, metrics)
        every = self._settings.log.show_samples
        if every and (step % every == 0 or step == 1):
            self._console.print_line(describe_sample(step, record, self._decode))
        if is_evaluated(metrics):
            self._print_evaluation(step, metrics, self._progress.pace)

    def _print_evaluation(self, step: int, metrics: Mapping[str, float], pace: Pace | None) -> None:
        cells = [str(step), *(format_figure(metrics, names, spec) for _, names, spec in FIGURES)]
        seconds = left = None
        if pace is not None:
            seconds, left = pace.seconds_per_step, pace.seconds_left
        cells.append("-" if seconds is None else f"{seconds:.1f}")
        cells.append("-" if left is None else format_duration(left))
        self._table.print_row(cells)


def is_evaluated(metrics: Mapping[str, float]) -> bool:
    """True for the metrics of a step after which held-out problems were evaluated."""
    return any(name in metrics for name in FIGURES[0][1])


def format_figure(metrics: Mapping[str, float], names: Sequence[str], spec: str) -> str:
    """The first of the named metrics that there is, as text; - if there is none, or it is not a number."""
    value = next((metrics[name] for name in names if name in metrics), None)
    # A share of no rows is NaN, which is null in metrics.jsonl.
    if value is None or not isinstance(value, float | int) or math.isnan(value):
        return "-"
    return f"{value:{spec}}"


def describe_sample(step: int, record: StepRecord, decode: Callable[[Sequence[int]], str]) -> str:
    """A few lines on a step's first response: prompt, reference, response, verdict and reward."""
    problem, completion = record.problems[0], record.completions[0]
    verdict = record.verdicts[0].value.replace("_", " ")
    cut = ", cut off at the limit of tokens" if completion.truncated else ""
    return "\n".join(
        [
            f"a response of step {step}: {verdict} by the rule, reward {record.rewards[0]:.3f}, "
            f"advantage {record.advantages[0]:+.2f}{cut}",
            # The whole prompt, in which an error of the template is seen.
            *_indent("prompt", decode(record.prompt_tokens[0])),
            *_indent("reference", problem.reference),
            *_indent("response", completion.text),
        ]
    )


def _indent(name: str, text: str) -> list[str]:
    """A text in lines behind its name, shortened; what a terminal would act on is escaped."""
    text = text.rstrip("\n")
    shown = text[:SAMPLE_CHARACTERS]
    lines = escape_controls(shown).split("\n")
    shown_lines = lines[:SAMPLE_LINES]
    left_out = len(text) - len(shown) + sum(len(line) + 1 for line in lines[SAMPLE_LINES:])
    if left_out:
        shown_lines[-1] += f" ... ({left_out} more characters)"
    return [f"  {name if i == 0 else '':9}  {line}" for i, line in enumerate(shown_lines)]
