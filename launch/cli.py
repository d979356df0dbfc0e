"""Console script `cooper-jax`, which runs the launch scripts as subcommands.

cooper-jax train --config=tiny --config.steps=2       as python launch/train.py --config=tiny ...
cooper-jax train --config=path/to/mine.py
cooper-jax train --help
"""

import ast
import runpy
import sys
from pathlib import Path

from cooper_jax import __version__

# The scripts that are subcommands, in the order of the help.
COMMANDS = (
    "train",
    "train_rm",
    "serve",
    "annotate",
    "evaluate",
    "export",
    "bench",
    "compile",
    "check_estimates",
    "check_device",
    "study",
    "report",
    "compare_rollouts",
)
# The package cooper_jax, also in a checkout, where cooper_jax/launch is a symlink.
PACKAGE = Path(__file__).parents[1]


def main() -> None:
    """Run the subcommand that the command line names.

    The exit code is that of the script, or 2 for an unknown subcommand.
    """
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(describe_commands())
        return
    if arguments[0] == "--version":
        print(f"cooper-jax {__version__}")
        return

    command = arguments[0]
    if command not in COMMANDS:
        print(f"error: {command}: not a subcommand; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"cooper-jax {command}", *arguments[1:]]
    # Run as __main__: the scripts answer --help only under this name, and absl takes the flags of __main__
    # for those of the main program.
    runpy.run_module(f"cooper_jax.launch.{command}", run_name="__main__", alter_sys=True)


def describe_commands() -> str:
    """The text of `cooper-jax --help`: each subcommand with the first line of its script's docstring."""
    lines = ["usage: cooper-jax SUBCOMMAND [FLAGS]", "", "subcommands:"]
    for name in COMMANDS:
        # The script is parsed, not imported, because importing JAX takes seconds.
        tree = ast.parse((PACKAGE / "launch" / f"{name}.py").read_text(encoding="utf-8"))
        lines.append(f"  {name:18}{(ast.get_docstring(tree) or '').splitlines()[0]}")

    configs = sorted(file.stem for file in (PACKAGE / "configs").glob("*.py") if file.stem != "__init__")
    lines += [
        "",
        f"--config takes a path, or the name of a shipped config: {', '.join(configs)}.",
        "`cooper-jax SUBCOMMAND --help` lists the flags of a subcommand.",
    ]
    return "\n".join(lines)
