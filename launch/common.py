"""What the launchers share: the --config flag, one line for what is wrong, and the exit codes.

    def main(argv):
        common.begin(argv)
        with common.running():
            train(common.config())

    app.run(main, flags_parser=common.parse_flags)

Exit codes: 0 done; 2 an error in the flags, settings or files; 75 stopped by SIGTERM, with a checkpoint; 69 another
host was lost (134: the first one).  After 75, 69 and 134 the same command goes on.  `--help` ends with absl's 1.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where in the code a configuration error was found.")
flags.mark_flag_as_required("config")


def begin(argv: list[str]) -> None:
    """Before anything of ours is imported: no stray arguments, quiet libraries, kept programs."""
    if len(argv) > 1:
        fail(f"unexpected arguments {argv[1:]}; flags look like --config.steps=20")
    logging.set_verbosity(logging.WARNING)
    keep_what_is_compiled()


def config() -> ConfigDict:
    """The config with the flags applied, and the recipe where no flag says otherwise.

    Raises SetupError for a recipe that is not there.
    """
    from cooper_jax import recipes

    cfg = CONFIG.value
    recipes.apply(cfg, config_flags.get_override_values(flags.FLAGS[CONFIG.name]))
    return cfg


@contextlib.contextmanager
def running() -> Iterator[None]:
    """A job, on one host or several: setup errors become one line and exit code 2, a signal exit code 75."""
    from cooper_jax import settings
    from cooper_jax.runtime import hosts

    try:
        with settings.boundary("several hosts"):
            hosts.start()
    except settings.SetupError as error:
        refuse(error)
    with hosts.together():
        try:
            yield
        except settings.SetupError as error:
            refuse(error)
        except hosts.Stopped:
            sys.exit(hosts.STOPPED)


def refuse(error: Exception) -> None:
    """One line for the user and exit code 2; --traceback shows where it was found."""
    if TRACEBACK.value:
        raise error
    fail(str(error))


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def keep_what_is_compiled() -> None:
    """XLA's programs are kept on the disk, with several hosts on the first's: a second start compiles nothing."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "cooper_jax" / "xla"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's own parsing; flags, values and fields that mean nothing, and absent config files, become one line."""
    try:
        left = flags.FLAGS(argv)
        _ = CONFIG.value.name  # a config file that could not be read says so when it is first used
        return left
    except flags.Error as error:
        fail(f"{'; '.join(str(error).splitlines())}: --help lists the flags")
    except (AttributeError, KeyError) as error:
        given = ", ".join(a for a in argv if a.startswith("--config."))
        fail(
            f"{given}: a flag names a field that the config does not have ({error}); configs/base.py lists them all"
        )
    except OSError as error:
        fail(" ".join(str(error).split()))  # of a config file: four lines
