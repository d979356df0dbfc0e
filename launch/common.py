"""Setup that the launch scripts share: the --config flag, messages of setup errors, and the exit codes.

    def main(argv):
        common.begin_job(argv)
        with common.run_job("training"):
            train(common.read_config())

    app.run(main, flags_parser=common.make_flags_parser(__doc__))

Exit codes:

    0    done
    2    an error in the flags, settings or files
    70   a fault that no restart mends, such as weights that are not finite; the message says what to do
    75   stopped by SIGTERM or Ctrl-C, with a checkpoint
    130  ended at once by a second Ctrl-C, or by one before the job had begun
    69   another host was lost (134 where it was the first host)

After 75, 69 and 134 the same command resumes from the newest checkpoint.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from cooper_jax.launch import command_line, library_errors
from cooper_jax.runtime import interrupts
from cooper_jax.runtime.console import CONSOLE
from cooper_jax.settings.config_files import list_shipped_configs, load_config
from cooper_jax.settings.cross_checks import check_fields
from cooper_jax.settings.setup_errors import SetupError, setup_errors

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    f"A config file, or the name of a shipped one: {', '.join(list_shipped_configs())}.",
    lock_config=True,
)
TRACEBACK = flags.DEFINE_bool("traceback", False, "Show the traceback of a setup error.")
QUIET = flags.DEFINE_bool("quiet", False, "Print only warnings, rows of evaluations, and results.")
flags.mark_flag_as_required("config")

# Variables in which launchers of several processes write a process's number.
PROCESS_NUMBERS = ("JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID")


def begin_job(argv: list[str]) -> None:
    """Refuse stray arguments, say that the job begins, silence the libraries and enable the compilation cache.

    Call this before anything is compiled.  Of several processes only the first says something.
    """
    # A stray argument is usually a flag without its dashes, and must not be ignored.
    if len(argv) > 1:
        exit_with_error(f"unexpected arguments {argv[1:]}; flags look like --config.steps=20")
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_handler().addFilter(library_errors.is_news)
    library_errors.shorten_disk_errors()
    # Which process is the first is known for certain when they are connected (hosts.start_hosts).
    if any(os.environ.get(name, "0") not in ("", "0") for name in PROCESS_NUMBERS):
        CONSOLE.silence()
    CONSOLE.set_quiet(QUIET.value)
    interrupts.end_at_interrupt()  # until hosts.start_hosts
    CONSOLE.begin_stage("loading the libraries")
    # Imported here, because --help must not wait for JAX.
    from cooper_jax.runtime.compilation_cache import enable_compilation_cache
    from cooper_jax.runtime.compilations import watch_compilations

    enable_compilation_cache()
    watch_compilations(CONSOLE)


def read_config() -> ConfigDict:
    """Return the config with the flags and its recipe applied; flags take precedence over the recipe.

    Raises SetupError for an unknown recipe, and for every field that is outside its bounds or may hold a secret,
    also in sections that the job does not read.
    """
    from cooper_jax.trainer import recipes

    cfg = CONFIG.value
    check_fields(cfg)
    recipes.apply_presets(cfg, config_flags.get_override_values(flags.FLAGS[CONFIG.name]))
    return cfg


@contextlib.contextmanager
def run_job(doing: str) -> Iterator[None]:
    """Context of a job on one host or several: a setup error exits with code 2, a SIGTERM with code 75.

    doing: what the terminal says while the job does not say more.
    """
    with contextlib.closing(CONSOLE), CONSOLE.open_activity(doing), _run_on_hosts():
        yield


@contextlib.contextmanager
def _run_on_hosts() -> Iterator[None]:
    from cooper_jax.runtime import hosts

    CONSOLE.end_stage()
    # Before the hosts are connected, each reports its own errors.
    try:
        with setup_errors("several hosts"):
            hosts.start_hosts()
    except SetupError as error:
        print_setup_error(error)

    # From here on an error or a signal on one host ends the job on all of them.
    with hosts.run_as_one():
        try:
            yield
        except SetupError as error:
            print_setup_error(error)
        except hosts.Stopped:
            sys.exit(hosts.STOPPED)
        except hosts.RunFault as fault:
            CONSOLE.close()
            if hosts.is_primary() or fault.of_this_host:
                print(f"error: {fault}", file=sys.stderr, flush=True)
            sys.exit(hosts.FAULT)


def print_setup_error(error: SetupError) -> NoReturn:
    """Print one line for each problem and exit with code 2; with --traceback, raise the error."""
    if TRACEBACK.value:
        raise error
    exit_with_error(*error.messages)


def exit_with_error(*messages: str) -> NoReturn:
    """Print one line for each message and exit with code 2."""
    command_line.exit_with_errors(messages)


def make_flags_parser(description: str) -> Callable[[list[str]], list[str]]:
    """Make a `flags_parser` for absl's `app.run`.

    description: the script's docstring, which --help prints.
    """
    return lambda argv: parse_flags(argv, description)


def parse_flags(argv: list[str], description: str = "") -> list[str]:
    """Parse the flags with absl, after reporting all errors in flags and in the config file, one line each.

    --config takes a path or the bare name of a shipped config.  Returns the positional arguments.
    """
    command_line.answer_help(argv, description, flags.FLAGS)

    # --flagfile=FILE is replaced by the flags in the file.
    try:
        expanded = [argv[0], *flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)]
    except flags.Error as error:
        exit_with_error(" ".join(str(error).split()))
    expanded = command_line.resolve_configs(expanded)

    # Our own checks come first, because absl stops at the first error.  If the config cannot be loaded, the
    # flags of its fields are not checked.
    path, config, errors = command_line.find_flag(expanded, CONFIG.name), None, []
    if path is None:
        shipped = ", ".join(list_shipped_configs())
        errors.append(f"--config is missing: give --config=FILE; the shipped configs are {shipped}")
    else:
        try:
            config = load_config(path)
        except SetupError as error:
            errors += error.messages
    errors += command_line.find_flag_errors(expanded, flags.FLAGS, config)
    if errors:
        exit_with_error(*errors)

    # absl and ml_collections find the remaining errors.
    try:
        positional = flags.FLAGS(expanded)
        # ml_collections reports an unreadable config file only when the config is first used.
        _ = CONFIG.value.name
        return positional
    except flags.Error as error:
        exit_with_error(*command_line.describe_absl_errors(error))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        exit_with_error(f"flags: {' '.join(str(error).split())}; --help lists the flags")
