"""The console script `cooper-jax`: runs one of the launch scripts, with a shipped config by its bare name.

cooper-jax train --config=tiny --config.steps=2       as python launch/train.py --config=configs/tiny.py ...
cooper-jax train --config=path/to/mine.py
cooper-jax train --help
"""

import ast
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

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
        fail(f"{words[0]}: not a subcommand; there are {', '.join(COMMANDS)}")
    sys.argv = [f"cooper-jax {words[0]}", *resolve_configs(words[1:])]
    # As __main__, for that is how the scripts tell absl which flags are theirs.
    runpy.run_module(f"cooper_jax.launch.{words[0]}", run_name="__main__", alter_sys=True)


def describe_commands() -> str:
    """The text of `cooper-jax --help`: each subcommand with the first line of its script's docstring."""
    lines = ["usage: cooper-jax SUBCOMMAND [FLAGS]", "", "subcommands:"]
    for name in COMMANDS:
        # Parsed, not imported: importing JAX takes seconds.
        tree = ast.parse((PACKAGE / "launch" / f"{name}.py").read_text(encoding="utf-8"))
        lines.append(f"  {name:18}{(ast.get_docstring(tree) or '').splitlines()[0]}")

    shipped = ", ".join(list_configs())
    lines += [
        "",
        f"--config takes a path, or the name of a shipped config: {shipped}.",
        "`cooper-jax SUBCOMMAND --help` lists the flags of a subcommand.",
    ]
    return "\n".join(lines)


def list_configs() -> list[str]:
    """The names of the shipped configs."""
    return sorted(file.stem for file in (PACKAGE / "configs").glob("*.py") if file.stem != "__init__")


def resolve_configs(words: Sequence[str]) -> list[str]:
    """The command line with the path of a shipped config in place of its bare name.

    A name without a slash and without `.py` is a shipped config's; any other is a path and stays as it is.
    """
    resolved = []
    awaits_value = False
    for word in words:
        flag, equals, value = word.partition("=")
        if awaits_value:  # `--config tiny`
            resolved.append(resolve_config(word))
        elif equals and flag in ("--config", "-config"):
            resolved.append(f"{flag}={resolve_config(value)}")
        else:
            resolved.append(word)
        awaits_value = not awaits_value and word in ("--config", "-config")
    return resolved


def resolve_config(name: str) -> str:
    """The path of the config that --config names."""
    if not name or "/" in name or name.endswith(".py"):
        return name
    if name not in list_configs():
        fail(f"--config={name}: no shipped config has this name; there are {', '.join(list_configs())}")
    return str(PACKAGE / "configs" / f"{name}.py")


def fail(message: str) -> NoReturn:
    """Print one line and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
