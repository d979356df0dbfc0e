"""Runs the fenced commands and programs of the pages, in order, on this machine's CPU.

    python tests/run_page_commands.py                        all that can be run: hours on one busy core
    python tests/run_page_commands.py --page=docs/report.md  one page; repeatable
    python tests/run_page_commands.py --list                 what would be run, and what not and why

Each page has a scratch folder with a copy of the repository, in which its commands are run one after the other,
with the small settings of page_command_rules.py.  The outcome of each is printed: passed, failed (with the end of
its output), or not run with the reason.  The exit code is 1 if one failed.

Programs compile without optimisations and share a compilation cache, as in the tests.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import page_commands  # noqa: E402
import page_fixtures  # noqa: E402
from page_command_rules import RULES  # noqa: E402
from page_commands import Command, Rule  # noqa: E402

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
# Lines of the output of a command that failed.
LINES_SHOWN = 15


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a command."""

    command: Command
    state: str  # PASSED, FAILED or NOT_RUN
    reason: str = ""  # of one that is not run; the end of the output of one that failed
    seconds: float = 0.0


def make_environment(folder: Path) -> dict[str, str]:
    """The environment of the commands.  folder: of programs that stand in for installed ones, and of the cache."""
    shims = folder / "bin"
    shims.mkdir(parents=True)
    for name, words in (("python", ""), ("cooper-jax", " -m cooper_jax.launch.cli")):
        (shims / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{words} "$@"\n')
        (shims / name).chmod(0o755)
    environment = dict(os.environ)
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "PYTHONPATH", "COOPER_TEST_CACHE"):
        environment.pop(name, None)
    return environment | {
        "PATH": f"{shims}:{os.environ['PATH']}",
        "PYTHONPATH": ".",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "TOKENIZERS_PARALLELISM": "false",
    }


class PageRunner:
    """Runs commands in scratch folders.  folder: an empty one, for everything."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._environment = make_environment(folder / "shared")
        self._store = page_fixtures.Store(folder / "fixtures", self._environment)

    def run_page(self, commands: list[Command]):
        """Run the commands of one page, and yield their outcomes."""
        place = self._folder / commands[0].page.replace("/", "_")
        settings: list[str] = []
        for command in commands:
            if command.is_setting:
                settings.append(command.text)
                continue
            rule = page_commands.find_rule(command, RULES)
            if rule.skip:
                yield Outcome(command, NOT_RUN, rule.skip)
                continue
            if not place.exists():
                page_fixtures.copy_repository(place)
            for name in rule.needs:
                self._store.provide(name, place)
            yield self._run(command, rule, settings, place)

    def _run(self, command: Command, rule: Rule, settings: list[str], place: Path) -> Outcome:
        text = page_commands.prepare(command, rule)
        if command.language == "python":
            program = place / f"program_{command.line}.py"
            program.write_text(page_commands.make_program(command, rule))
            text = text.format(file=program.name)
        log = place / f"output_{command.line}.txt"
        began = time.perf_counter()
        code = run_shell("\n".join(["set -e", *settings, text]), place, self._environment, rule, log)
        seconds = time.perf_counter() - began
        if code in rule.exits:
            return Outcome(command, PASSED, seconds=seconds)
        output = log.read_text(errors="replace").splitlines()[-LINES_SHOWN:]
        return Outcome(command, FAILED, "\n".join([f"exit code {code} of: {text}", *output]), seconds)


def run_shell(text: str, folder: Path, environment: dict[str, str], rule: Rule, log: Path) -> int:
    """Run a shell text; returns its exit code, 124 if it takes longer than the rule allows.

    A server is stopped by SIGTERM once its output has what the rule says.
    """
    with log.open("wb") as out:
        # A group of its own, whose processes end together.
        process = subprocess.Popen(
            ["bash", "-c", text],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return _wait(process, rule, log)
        finally:
            # What it has left running; nothing if all have ended.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def _wait(process: subprocess.Popen, rule: Rule, log: Path) -> int:
    deadline = time.monotonic() + rule.seconds
    stopped = False
    while time.monotonic() < deadline:
        code = process.poll()
        if code is not None:
            # A server that ends by itself has failed.
            return code if stopped or not rule.until else code or 1
        if rule.until and not stopped and re.search(rule.until, log.read_text(errors="replace")):
            os.killpg(process.pid, signal.SIGTERM)
            stopped = True
        time.sleep(0.1)
    return 124


def print_outcome(outcome: Outcome) -> None:
    first = outcome.command.text.strip().split("\n")[0]
    shown = first if len(first) <= 90 else f"{first[:87]}..."
    seconds = "" if outcome.state == NOT_RUN else f"{outcome.seconds:.0f} s"
    print(f"{outcome.state:8}{seconds:>6}  {outcome.command.place:28} {shown}", flush=True)
    if outcome.reason:
        for line in outcome.reason.split("\n"):
            print(f"{'':16}{line}", flush=True)


def main() -> None:
    """Run or list the commands of the chosen pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", action="append", help="a page, such as docs/report.md; repeatable")
    parser.add_argument("--list", action="store_true", help="list the commands, and run none")
    parser.add_argument("--keep", type=Path, help="a new folder for the scratch folders, which is kept")
    options = parser.parse_args()

    pages: dict[str, list[Command]] = {}
    for command in page_commands.list_commands():
        pages.setdefault(command.page, []).append(command)
    chosen = options.page or list(pages)
    if unknown := [page for page in chosen if page not in pages]:
        sys.exit(f"{', '.join(unknown)}: no page with fenced commands; there are {', '.join(pages)}")
    if options.list:
        list_rules([command for page in chosen for command in pages[page]])
        return

    # So that the command that is running ends, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = options.keep or Path(tempfile.mkdtemp(prefix="page_commands_"))
    folder.mkdir(parents=True, exist_ok=True)
    runner, counts = PageRunner(folder), collections.Counter()
    for page in chosen:
        for outcome in runner.run_page(pages[page]):
            print_outcome(outcome)
            counts[outcome.state] += 1
    print(", ".join(f"{counts[state]} {state}" for state in (PASSED, FAILED, NOT_RUN)))
    if not options.keep:
        shutil.rmtree(folder)
    sys.exit(1 if counts[FAILED] else 0)


def list_rules(commands: list[Command]) -> None:
    """Print what would be run of each command, or why it is not run."""
    for command in commands:
        if command.is_setting:
            continue
        rule = page_commands.find_rule(command, RULES)
        if rule.skip:
            print_outcome(Outcome(command, NOT_RUN, rule.skip))
        else:
            print(f"{'run':16}{command.place:28} {page_commands.prepare(command, rule)}")


if __name__ == "__main__":
    main()
