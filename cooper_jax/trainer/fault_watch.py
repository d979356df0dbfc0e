"""Faults that no restart mends: weights, rewards or updates that are not finite, and updates that never come.

1. `check_weights` is called on the state that a run starts from and on each state before it is saved, so that
   weights that are not finite never replace a good checkpoint.
2. `FaultWatch.check` reads the metrics of each complete step.  With `faults=stop` the first value that is not
   finite ends the run; with `faults=skip` the updates that it makes impossible are left out
   (`optim.apply_update` does that), up to `faults_in_a_row` steps.  A reward model that gets no update for
   `idle_steps` steps, although there were responses to make pairs of, ends it too: it would be the frozen one,
   which a policy learns to fool.  The counts are in each checkpoint, since a machine that is preempted every few
   steps would never reach these limits otherwise.

A fault raises RunFault, on all hosts at the same call, since all have the same metrics; the exit code is 70.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from cooper_jax.runtime import hosts
from cooper_jax.runtime.finiteness import describe_non_finite
from cooper_jax.runtime.hosts import RunFault
from cooper_jax.trainer.loop_config import FaultConfig
from cooper_jax.trainer.state import State, list_models

# Refusals of slots for which there was no response to begin with: the policy's doing, not the assistant's.
_WITHOUT_RESPONSE = ("pairs/refused_no_positive", "pairs/refused_no_wrong")
_REFUSED = "pairs/refused_"

# metric -> what is not finite if the metric is not
_FINITE: dict[str, str] = {
    "reward/mean": "rewards",
    "rm/mean": "scores of the reward model",
    "response/tokens_mean": "lengths of responses",
}
# metric -> the update that was left out because its loss or its gradients were not finite, if it is above 0
_LEFT_OUT: dict[str, str] = {
    "policy/skipped": "loss or gradients of the policy's update",
    "rm/skipped": "loss or gradients of the reward model's update",
}


def check_weights(state: State, saved: str) -> None:
    """Raise RunFault if weights or optimiser states of the trained models are not finite.  Collective.

    saved: what is there to go back to, for the message.
    """
    for model, train_state in list_models(state).items():
        if bad := describe_non_finite({model: train_state}):
            raise RunFault(
                f"step {state.step}: {bad}; this state is not saved ({saved}): check the weights that the run "
                f"began with, or start a new --config.run_dir with a lower --config.{model}.optimiser.lr"
            )


class FaultWatch:
    """Counts faults over the steps of a run.

    updates_reward: the arm updates the reward model at its steps.
    """

    def __init__(self, settings: FaultConfig, updates_reward: bool):
        self._settings, self._updates_reward = settings, updates_reward
        self._faulty = 0  # steps in a row
        self._idle = 0
        self._refused: Counter[str] = Counter()  # reasons, over the idle steps
        self._without_responses = 0  # steps in a row without a response to make a pair of

    def to_json(self) -> dict[str, Any]:
        """The counts, for a checkpoint."""
        return {
            "faulty": self._faulty,
            "idle": self._idle,
            "refused": dict(self._refused),
            "without_responses": self._without_responses,
        }

    def restore(self, counts: Mapping[str, Any]) -> None:
        """Go on from the counts of a checkpoint; from 0 if it has none."""
        self._faulty, self._idle = counts.get("faulty", 0), counts.get("idle", 0)
        self._refused = Counter(counts.get("refused", {}))
        self._without_responses = counts.get("without_responses", 0)

    def check(self, step: int, metrics: Mapping[str, float], save: Callable[[], None]) -> None:
        """Check the metrics of a complete step.  Raises RunFault.

        save: saves the state of this step, which is good; called before a run without due updates ends.
        """
        found = [what for name, what in _FINITE.items() if not math.isfinite(metrics.get(name, 0.0))]
        found += [what for name, what in _LEFT_OUT.items() if metrics.get(name, 0.0) > 0]
        self._faulty = self._faulty + 1 if found else 0
        limit = 0 if self._settings.faults == "stop" else self._settings.faults_in_a_row
        if found and self._faulty <= limit:
            hosts.print_once(
                f"warning: step {step}: {' and '.join(found)} are not finite, so an update was left out "
                f"({self._faulty} of {limit} steps in a row that --config.faults_in_a_row allows)",
                always=True,
            )
        if self._faulty > limit:
            times = f" in {self._faulty} steps in a row" if limit else ""
            raise RunFault(
                f"step {step}: {' and '.join(found)} are not finite{times}; the run ends with its last checkpoint: "
                "start a new --config.run_dir with lower learning rates, or look for the responses in samples.jsonl"
            )

        if self._updates_reward:
            self._count_idle(step, metrics, save)

    def _count_idle(self, step: int, metrics: Mapping[str, float], save: Callable[[], None]) -> None:
        """Count the steps without an update of the reward model that was due; too many end the run."""
        refused = {name: count for name, count in metrics.items() if name.startswith(_REFUSED)}
        due = any(count for name, count in refused.items() if name not in _WITHOUT_RESPONSE)
        if metrics.get("rm/updates", 0.0) > 0:
            self._idle, self._refused, self._without_responses = 0, Counter(), 0
            return
        if not due:
            self._count_without_responses(step)
            return
        self._without_responses = 0
        self._idle += 1
        for name, count in refused.items():
            self._refused[name.removeprefix(_REFUSED)] += int(count)
        if self._settings.idle_steps and self._idle >= self._settings.idle_steps:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self._refused.most_common())
            # The run that goes on from here has all its steps again.
            idle, self._idle, self._refused = self._idle, 0, Counter()
            save()
            raise RunFault(
                f"step {step}: the reward model got no update for {idle} steps, although there were "
                "responses to make pairs of; it would be a frozen one.  Reasons for which pairs were refused: "
                f"{reasons}.  The step is saved: mend the cause (often the assistant's server or key) and start "
                "the same command again, or allow it with --config.idle_steps=0"
            )

    def _count_without_responses(self, step: int) -> None:
        """Warn after every `idle_steps` steps in a row without a response that a pair could be made of.

        No fault: a weak policy may need many steps to its first verified response.
        """
        self._without_responses += 1
        if self._settings.idle_steps and self._without_responses % self._settings.idle_steps == 0:
            hosts.print_once(
                f"warning: step {step}: the reward model got no update for {self._without_responses} steps, since "
                "there was no response to make a pair of (pairs/refused_no_positive: the rule verified none): "
                "until there is one, it is frozen",
                always=True,
            )
