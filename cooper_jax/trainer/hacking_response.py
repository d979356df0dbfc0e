"""What the training loop does about an alarm of the guard against reward hacking (hacking_guard.py).

    warn       a line on the terminal, as with every other action
    freeze     the step reads it (step.py): the policy is not updated while the alarm lasts
    fallback   the step reads it: the rule's verdict is the reward from the next step on
    rollback   RollBack is raised, and the loop continues from a checkpoint before the alarm with the rule's reward
    stop       the step is saved, and RunFault ends the run with exit code 70

What is due depends on the guard's state alone, so a run that was stopped between an alarm and its action makes up
for it when it resumes.  All hosts have the same state.
"""

from __future__ import annotations

from collections.abc import Callable

from cooper_jax.runtime import hosts
from cooper_jax.runtime.hosts import RunFault
from cooper_jax.trainer.hacking_detector import DETECTOR
from cooper_jax.trainer.hacking_guard import GuardState, wants_rollback, wants_stop

# What follows an alarm, for its message.
_CONSEQUENCES = {
    "warn": "nothing else happens with --config.hacking_guard=warn",
    "freeze": "the policy is not updated until the alarm ends, the reward model is",
    "fallback": "from the next step on the rule's verdict is the reward",
    "rollback": "the run goes back to a checkpoint before it, and the rule's verdict is the reward from there on",
    "stop": "the run ends",
}


class RollBack(Exception):
    """The run is to go back to a checkpoint before its first alarm; all hosts raise this at the same step."""


class HackingResponse:
    """Says once that an alarm was raised or has ended, and takes a run back or ends it.

    guard: at the step from which the run goes on, whose alarms have been told.
    """

    def __init__(self, action: str, guard: GuardState):
        self._action, self._told = action, guard

    def act(self, step: int, guard: GuardState, save: Callable[[], None]) -> None:
        """Do what is due after a complete step.  Raises RollBack and RunFault.

        save: saves the state of this step, for a run that ends.
        """
        if self._action == "off":
            return
        told, self._told = self._told, guard
        if guard.alarms > told.alarms:
            hosts.print_once(
                f"warning: step {step}: the policy has probably begun to hack the reward model: "
                f"{describe_signals(guard)}; {_CONSEQUENCES[self._action]}.  Read responses in samples.jsonl "
                "(docs/hacked.md)",
                always=True,
            )
        elif told.is_alarmed and not guard.is_alarmed:
            hosts.print_once(
                f"step {step}: the alarm about reward hacking has ended: {describe_signals(guard)}"
            )

        if wants_rollback(guard, self._action):
            raise RollBack
        if wants_stop(guard, self._action):
            save()
            raise RunFault(
                f"step {step}: the policy has probably begun to hack the reward model: {describe_signals(guard)}.  "
                "The step is saved; the same command stops here again.  Read responses in samples.jsonl, then "
                "continue with --config.hacking_guard=fallback (the rule's verdict is the reward), =rollback (the "
                "same from a checkpoint before the alarm) or =warn"
            )


def describe_signals(guard: GuardState) -> str:
    """The detector's signals and its excess, for messages."""
    past = DETECTOR.average_past(guard.detector)
    # There is no past in a run that goes on with another version's detector.
    before = dict(zip((part.signal for part in DETECTOR.parts), past, strict=False))
    signals = " and ".join(
        part.signal if (value := before.get(part.signal)) is None else f"{part.signal} ({value:.3g} before)"
        for part in DETECTOR.parts
    )
    return f"excess {guard.detector.excess:.1f} of {DETECTOR.limit:g} by {signals}"
