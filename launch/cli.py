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

COMMANDS = (
    "train",
    "train_rm",
    "annotate",
    "evaluate",
    "export",
    "bench",
    "compile",
    "study",
    "compare_rollouts",
)
PACKAGE = Path(__file__).parents[1]  # cooper_jax, also in a checkout, where launch is a symlink


def main() -> None:
    """Run the subcommand that the command line names; its exit code is the script's, 2 for an unknown one."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(describe_commands())
        return
    if words[0] == "--version":
        print(f"cooper-jax {__version__}")
        return

    if words[0] not in COMMANDS:
        print(f"error: {words[0]}: not a subcommand; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"cooper-jax {words[0]}", *words[1:]]
    # Run as __main__: the scripts define some flags, and absl finds the script's own, by that name.
    runpy.run_module(f"cooper_jax.launch.{words[0]}", run_name="__main__", alter_sys=True)


def describe_commands() -> str:
    """The text of `cooper-jax --help`: each subcommand with the first line of its script's docstring."""
    lines = ["usage: cooper-jax SUBCOMMAND [FLAGS]", "", "subcommands:"]
    for name in COMMANDS:
        # Parsed, not imported: importing JAX takes seconds.
        tree = ast.parse((PACKAGE / "launch" / f"{name}.py").read_text(encoding="utf-8"))
        lines.append(f"  {name:18}{(ast.get_docstring(tree) or '').splitlines()[0]}")

    configs = sorted(file.stem for file in (PACKAGE / "configs").glob("*.py") if file.stem != "__init__")
    lines += [
        "",
        f"--config takes a path, or the name of a shipped config: {', '.join(configs)}.",
        "`cooper-jax SUBCOMMAND --help` lists the flags of a subcommand.",
    ]
    return "\n".join(lines)
