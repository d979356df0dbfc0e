"""The guard against reward hacking: a detector that watches a run's metrics over its steps, and its state.

1. `observe` takes the metrics of each complete step.  The detector (hacking_detector.py) compares signals with the
   run's own past, and an alarm is raised when they have been worse for long enough.
2. The state is a part of `State` and of a checkpoint's record, so a resumed run raises the same alarms.
3. `rewards_by_rule` and `freezes_policy` tell a step what an alarm changes in it; hacking_response.py ends a run,
   or takes it back, for one.
4. `replay` runs the detector over the stored rows of a run, as if they had just been measured.

All hosts have the same metrics, and so the same state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from cooper_jax.trainer.hacking_detector import DETECTOR, LEARNED_RESPONSES, Detector, DetectorState
from cooper_jax.types import Metrics


@dataclasses.dataclass(frozen=True)
class GuardState:
    """What the guard knows after a step."""

    detector: DetectorState = DetectorState()
    is_alarmed: bool = False  # the alarm has not ended
    alarms: int = 0  # raised so far; one that has ended may be raised again
    first_alarm: int = 0  # the step of the first; 0: there was none
    rolled_back: bool = False  # the run has gone back to a checkpoint before its first alarm

    def to_json(self) -> dict[str, Any]:
        """The state as JSON values, for a checkpoint's record."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> GuardState:
        """Undo `to_json`.

        The past of an earlier version's detector, which watched another number of signals, is left out: the
        detector begins anew, and what the guard has done so far stays.
        """
        past = tuple(tuple(values) for values in stored["detector"]["past"])
        known = DetectorState(past, stored["detector"]["excess"])
        if past and len(past[0]) != len(DETECTOR.parts):
            known = DetectorState()
        return cls(**{**stored, "detector": known})


def observe(
    state: GuardState,
    step: int,
    metrics: Mapping[str, float],
    responses: int = LEARNED_RESPONSES,
    detector: Detector = DETECTOR,
) -> GuardState:
    """The state after a step with these metrics.

    A step that lacks a signal, or whose signal is NaN, leaves the state as it is.

    responses: of a step, which its signals' noise depends on.
    """
    detector = detector.scale_noise(responses)
    values = detector.read(metrics)
    if values is None:
        return state
    after = detector.observe(state.detector, values)
    is_alarmed = detector.is_alarmed(after)
    is_new = is_alarmed and not state.is_alarmed
    return dataclasses.replace(
        state,
        detector=after,
        is_alarmed=is_alarmed,
        alarms=state.alarms + is_new,
        first_alarm=state.first_alarm or (step if is_new else 0),
    )


def measure_guard(before: GuardState, after: GuardState, action: str) -> Metrics:
    """The guard's metrics of a step.

    before, after: the states before and after it; the former decided what the guard changed in the step.
    action: one of GUARD_ACTIONS.
    """
    return {
        "guard/excess": after.detector.excess,
        "guard/alarm": float(after.is_alarmed),
        "guard/alarms": float(after.alarms),
        "guard/by_rule": float(rewards_by_rule(before, action)),
        "guard/frozen": float(freezes_policy(before, action)),
    }


def rewards_by_rule(state: GuardState, action: str) -> bool:
    """True if the rule's verdict is the reward of the next step, and of all that follow."""
    return (action == "fallback" and state.alarms > 0) or (action == "rollback" and state.rolled_back)


def freezes_policy(state: GuardState, action: str) -> bool:
    """True if the next step does not update the policy."""
    return action == "freeze" and state.is_alarmed


def wants_rollback(state: GuardState, action: str) -> bool:
    """True if the run is to go back to a checkpoint before its first alarm."""
    return action == "rollback" and state.alarms > 0 and not state.rolled_back


def wants_stop(state: GuardState, action: str) -> bool:
    """True if the run is to end."""
    return action == "stop" and state.is_alarmed


def mark_rolled_back(state: GuardState, alarmed: GuardState) -> GuardState:
    """The state at the checkpoint to which a run goes back.

    state: at that checkpoint.  alarmed: after the alarm.
    """
    return dataclasses.replace(
        state, rolled_back=True, alarms=alarmed.alarms, first_alarm=alarmed.first_alarm
    )


def replay(
    rows: Iterable[Mapping[str, Any]], responses: int = LEARNED_RESPONSES, detector: Detector = DETECTOR
) -> GuardState:
    """The state after the stored rows of a run, ascending in step.  A null of JSON counts as NaN.

    responses: of a step.
    """
    state = GuardState()
    for row in rows:
        measured = {name: value for name, value in row.items() if value is not None}
        state = observe(state, int(row["step"]), measured, responses, detector)
    return state
