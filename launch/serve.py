"""Serves a policy (OpenAI's chat completions) and a reward model (scores) over HTTP.

    python launch/serve.py --run_dir=runs/tiny
    python launch/serve.py --config.policy.weights=Qwen/Qwen2.5-0.5B-Instruct --config.reward.weights=VERIFYRM_DIR
    python launch/serve.py --config.reward.weights=VERIFYRM_DIR --config.serve.port=8001

--run_dir serves the models of a run of launch/train.py, with the run's settings of the models; otherwise the
config (configs/base.py unless --config names another) names the weights.  The flags --config.serve.* set address,
sizes and limits.  It listens on this machine alone unless --config.serve.host says otherwise; the API key is read
from the environment variable COOPER_API_KEY.  docs/serving.md has the routes, and adapters for TRL and verl.

SIGTERM ends the server after the requests in flight.  Exit codes: 0 ended by a signal; 1 the devices failed; 2 an
error in the flags, settings or files; 75 a SIGTERM before the server was ready.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

# As a file (not as a module of the package), the script imports the package of its own checkout.
if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags, logging
from ml_collections import config_flags

from cooper_jax.launch import common

# At run time this is imported after the flags are parsed, because importing JAX takes seconds.
if TYPE_CHECKING:
    from cooper_jax.evaluation.evaluated_models import ChosenModels

RUN_DIR = flags.DEFINE_string("run_dir", "", "A run of launch/train.py whose models are served.")
STEP = flags.DEFINE_integer("step", -1, "The checkpoint's step; -1 is the newest.", lower_bound=-1)


def main(argv: list[str]) -> None:
    """Serve the models that the flags name."""
    common.begin_job(argv)
    with common.run_job("serving"):
        import_libraries()
        from cooper_jax.serving.server import serve

        if not serve(choose_models()):
            sys.exit(1)


def import_libraries() -> None:
    """Raise SetupError if a library of the extra `serve` is missing."""
    from cooper_jax.runtime.extras import import_extra
    from cooper_jax.settings.setup_errors import setup_errors

    with setup_errors("launch/serve.py"):
        for library in ("starlette", "uvicorn", "prometheus_client"):
            import_extra(library, "serve")


def choose_models() -> ChosenModels:
    """Choose the models to serve: those of --run_dir at --step, or those of the config.

    Raises SetupError for flags that contradict each other, and for a run or a step that does not exist.
    """
    from cooper_jax.api.named_models import choose_model
    from cooper_jax.evaluation.evaluated_models import ChosenModels
    from cooper_jax.settings.setup_errors import SetupError
    from cooper_jax.trainer import run_checkpoint

    cfg = common.read_config()
    if not RUN_DIR.value:
        if STEP.value != -1:
            raise SetupError(f"--step={STEP.value} is a step of a run: give --run_dir=RUN, too")
        return ChosenModels(cfg, Path())

    # Orbax warns of every checkpoint that is opened for reading only.
    logging.set_verbosity(logging.ERROR)
    given = config_flags.get_override_values(flags.FLAGS["config"])
    for name in ("policy.weights", "reward.weights"):
        if name in given:
            raise SetupError(
                f"--config.{name} names other weights than those of --run_dir: leave one of them out"
            )
    chosen = choose_model(RUN_DIR.value, "policy", None if STEP.value == -1 else STEP.value)
    if chosen.run_dir is None:
        raise SetupError(f"--run_dir={RUN_DIR.value} is no run of launch/train.py: it has no checkpoints")
    run_cfg = run_checkpoint.overlay_run(cfg, run_checkpoint.read_run_config(chosen.run_dir), given)
    return ChosenModels(run_cfg, chosen.run_dir, chosen.run_dir, chosen.step)


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the flags; without --config the values are those of configs/base.py."""
    names = {argument.lstrip("-").split("=")[0] for argument in argv[1:] if argument.startswith("-")}
    if "run_dir" in names and "config" in names:
        common.exit_with_error("--config and --run_dir both say what is served: leave one out")
    if "config" not in names:
        argv = [argv[0], "--config=base", *argv[1:]]
        # ml_collections reads the config's fields from sys.argv.
        sys.argv = argv
    return common.parse_flags(argv, __doc__)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
