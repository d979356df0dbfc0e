"""Compares the bounds of launch/compile.py with published speeds and with our own measurements.

    python launch/check_estimates.py
    python launch/check_estimates.py --out=estimates.json

1. `cooper_jax/perf/published_speeds.py` has the rows: measured seconds with model, chip, batch, lengths and source.
2. The roofline of each row's work, divided by the measured time, is the row's share of the roofline.  The geometric
   mean of the shares of a kind of work (rollout, score, update) is its efficiency, at which launch/compile.py makes
   its forecast.
3. Each row is predicted from the others of its kind.  The factor by which the prediction misses is its error.

Below 8 published rows nothing is forecast.  The tables are Markdown, as they stand in docs/compile.md.
"""

import json
import os
import sys
from pathlib import Path

# As a file (not as a module of the package), the script imports the package of its own checkout.
if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Nothing is computed on a device.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import app, flags

from cooper_jax.launch import command_line

OUT = flags.DEFINE_string("out", "", "A JSON file to write.", allow_override=True)


def main(argv: list[str]) -> None:
    """Print the comparison, and write it."""
    if len(argv) > 1:
        command_line.exit_with_errors([f"unexpected arguments {argv[1:]}; the only flag is --out=FILE"])
    # Imported after the flags are parsed, because importing JAX takes seconds.
    from cooper_jax.perf import speed_calibration
    from cooper_jax.settings.setup_errors import SetupError, setup_errors

    calibration = speed_calibration.calibrate()
    print(speed_calibration.format_calibration(calibration))
    if not OUT.value:
        return
    try:
        with setup_errors(f"--out={OUT.value}"):
            written = speed_calibration.calibration_to_json(calibration)
            Path(OUT.value).write_text(json.dumps(written, indent=1) + "\n")
    except SetupError as error:
        command_line.exit_with_errors(error.messages)


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: command_line.parse_own_flags(argv, __doc__, flags.FLAGS))
