"""The calibration of a run's rewards (reward.calibrated): read beside the weights, kept in the run directory.

A run keeps the calibration that it began with.  In the arm `cooper`, and in a warm-up, the reward model changes
and the calibration does not: it is that of `reward.weights`.
"""

from __future__ import annotations

from cooper_jax.model.loading import Directory
from cooper_jax.reward import calibration
from cooper_jax.reward.calibration import Calibration
from cooper_jax.runtime import hosts
from cooper_jax.runtime.checkpoint import list_steps
from cooper_jax.settings.setup_errors import setup_errors
from cooper_jax.trainer.run_settings import RunSettings


def load_run_calibration(settings: RunSettings, run_dir: Directory) -> Calibration | None:
    """Read a run's calibration, and write it into the run directory; None if the run is not calibrated.

    A run that resumes reads the calibration in its directory, which the export of its reward model and
    evaluations with --run_dir read too.  A new run reads the one beside `reward.weights`.

    Raises SetupError, naming the path, for a missing or damaged file.
    """
    if not settings.reward.calibrated:
        return None

    def read() -> bytes:
        # A checkpoint was trained with the calibration in the run directory, whatever lies beside the weights by
        # now.  Without a checkpoint, the file may be left from an earlier start with other weights.
        place = run_dir if list_steps(run_dir) else settings.reward_model.weights
        found = calibration.read_calibration(place)
        calibration.write_calibration(run_dir, found)
        return calibration.encode_calibration(found)

    # Only the first host reads and writes files; the broadcast gives all hosts the same rewards.
    with setup_errors("reward.calibrated=True"):
        encoded = hosts.broadcast_value("calibration", read)
        return calibration.decode_calibration(encoded, f"{run_dir / calibration.CALIBRATION}")
