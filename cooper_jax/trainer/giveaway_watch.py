"""The measurement of giveaways over a run: when it is due, and the one warning.

A step appends its rewrites to `State.recent_rewrites`.  Every `log.giveaway_every` steps the training loop calls
`GiveawayWatch.measure`, which runs the probe of reward/pairs/giveaway_probe.py on them.  All hosts have the same
rewrites, and each computes the same metrics.
"""

from __future__ import annotations

from cooper_jax.reward.pairs import giveaway_probe
from cooper_jax.runtime import hosts
from cooper_jax.runtime.metrics import PhaseTimer
from cooper_jax.trainer.run_settings import RunSettings
from cooper_jax.trainer.state import State
from cooper_jax.types import Metrics


class GiveawayWatch:
    """The probe on a run's last rewrites."""

    def __init__(self, settings: RunSettings):
        # Without an assistant there are no rewrites, and other arms make no pairs at their steps.
        rewrites = settings.assistant is not None and settings.reward.updates_at_steps
        self._every = settings.log.giveaway_every if rewrites else 0
        self._warned = False

    def measure(self, state: State, phases: PhaseTimer) -> Metrics:
        """The probe's metrics if they are due at this step, else none; the first high value prints a warning."""
        if not self._every or state.step % self._every:
            return {}
        with phases.phase("giveaways"):
            metrics = giveaway_probe.measure_giveaways(state.recent_rewrites)

        warning = giveaway_probe.describe_giveaways(metrics)
        if warning and not self._warned:
            self._warned = True
            hosts.print_once(warning, always=True)
        return metrics
