"""The fenced commands and programs of the pages, in order, and how each is run here.

`list_commands` reads README.md, CONTRIBUTING.md, kernels/README.md and docs/*.md.  A fenced block is split into
whole shell commands: continued lines are one, and so are loops and here-documents.  `find_rule` finds the rule of
page_command_rules.py for a command, and `prepare` makes of both what is run.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "kernels" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
)
FENCE = re.compile(r"^ *```(bash|python)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
# Words of a command that stand for something of the reader's own: =VERIFYRM_DIR, gs://BUCKET/run, HOST:8000, ... .
PLACEHOLDER = re.compile(
    r"(?<![\w$./-])(?:gs://)?[A-Z][A-Z_]+(?![\w=])|(?<=[=/])[A-Z][A-Z_]+\b|(?<!\w)\.\.\."
)
# Names that look like placeholders and are none.
WORDS = {"EOF", "TPU", "GPU", "CPU", "JAX", "HEAD"}


@dataclasses.dataclass(frozen=True)
class Command:
    """A shell command, or a Python program, of a page."""

    page: str  # relative to the repository
    line: int
    language: str  # bash or python
    text: str  # without comments at the ends of lines, continued lines joined

    @property
    def place(self) -> str:
        """PAGE:LINE."""
        return f"{self.page}:{self.line}"

    @property
    def is_setting(self) -> bool:
        """True for a command that only sets variables, for the commands that follow it on its page."""
        return self.language == "bash" and SETTING.fullmatch(self.text) is not None


SETTING = re.compile(
    r"(?:export +)?(?:\w+=(?:\"[^\"]*\"|[^\s\"(]*)[; ]*)+"  # NAME="value"; OTHER=value
    r"|\w+=\(\)"  # an empty array
    r"|for \w+ in [^;\n]*; do\n(?: *\w+\+=\(.*\)\n)+done"  # a loop that fills one
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How commands are run here, or why they are not."""

    pattern: str  # a regular expression that is found in the command
    skip: str = ""  # the reason for not running it; "": it is run
    page: str = ""  # the page on which it applies; "": all
    append: str = ""  # words that are added to each line with a script of ours
    replace: tuple[tuple[str, str], ...] = ()  # (regular expression, text)
    needs: tuple[str, ...] = ()  # names of page_fixtures.FIXTURES
    until: str = ""  # of a server: the output after which it is stopped, and must exit with code 0
    exits: tuple[int, ...] = (0,)
    seconds: int = 1800  # the time that it may take
    short: bool = False  # seconds rather than minutes: also run by the slow test
    # Of rules for Python programs, and of them alone: the command that runs it, in which {file} is the program; "-"
    # with a reason for not running it.
    run: str = ""


# --- reading the pages -----------------------------------------------------------------------------------


def list_commands(pages: tuple[Path, ...] = PAGES) -> list[Command]:
    """The commands and programs of pages, in order."""
    commands = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        name = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name
        for block in FENCE.finditer(text):
            line = text.count("\n", 0, block.start(2)) + 1
            if block[1] == "python":
                commands.append(Command(name, line, "python", block[2]))
            else:
                for offset, command in split_commands(block[2]):
                    commands.append(Command(name, line + offset, "bash", command))
    return commands


def split_commands(block: str) -> list[tuple[int, str]]:
    """Split the text of a shell block: (lines before the command, the command) each."""
    commands = []
    lines = block.split("\n")
    at = 0
    while at < len(lines):
        if not lines[at].strip() or lines[at].lstrip().startswith("#"):
            at += 1
            continue
        end = at + 1
        while end < len(lines) and not is_whole("\n".join(lines[at:end])):
            end += 1
        commands.append((at, clean_command("\n".join(lines[at:end]))))
        at = end
    return commands


def is_whole(text: str) -> bool:
    """True for the text of whole shell commands, of which nothing is missing at the end."""
    if text.endswith("\\"):
        return False
    # Bash takes a here-document that does not end for a whole one.
    if (here := re.search(r"<<'?(\w+)'?", text)) and not re.search(rf"^\s*{here[1]}$", text, re.MULTILINE):
        return False
    # Asked only about what may go on, since it takes milliseconds.
    if not re.search(r"['\"({]|^\s*(for|while|if|case)\b", text):
        return True
    return subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True).returncode == 0


def clean_command(text: str) -> str:
    """Join continued lines and take away comments at the ends of lines."""
    lines = re.sub(r" *\\\n *", " ", text).split("\n")
    return "\n".join(re.sub(r"\s+# .*$", "", line).rstrip() for line in lines).strip("\n")


# --- what is run -----------------------------------------------------------------------------------------


def find_rule(command: Command, rules: tuple[Rule, ...]) -> Rule:
    """The first rule for a command.  Raises ValueError, naming the page and the line, for a command without one."""
    for rule in rules:
        is_for_language = bool(rule.run) == (command.language == "python")
        if is_for_language and rule.page in ("", command.page) and re.search(rule.pattern, command.text):
            return rule
    first = command.text.strip().split("\n")[0]
    raise ValueError(f"{command.place}: no rule of tests/page_command_rules.py is for {first!r}: add one")


def prepare(command: Command, rule: Rule) -> str:
    """The shell text that is run for a command.

    Raises ValueError, naming the place, for a placeholder that the rule leaves, and for a replacement of nothing.
    """
    text = command.text if command.language == "bash" else rule.run
    for pattern, replacement in rule.replace if command.language == "bash" else ():
        text, count = re.subn(pattern, replacement, text)
        if not count:
            raise ValueError(f"{command.place}: the rule replaces {pattern!r}, which is not in {text!r}")
    if rule.append:
        text = "\n".join(append_words(line, rule.append) for line in text.split("\n"))
    if left := find_placeholders(text):
        raise ValueError(f"{command.place}: {', '.join(left)} stand for something: let the rule replace them")
    return text


def append_words(line: str, words: str) -> str:
    """Add words to a line that runs a script; others are unchanged."""
    return f"{line} {words}" if re.search(r"\b(?:launch|tests|examples)/\w+\.py|\bpytest\b", line) else line


def find_placeholders(text: str) -> list[str]:
    """The words of a command that stand for something of the reader's own."""
    # A heredoc is a program of its own.
    text = re.sub(r"<<'?(\w+)'?.*", "", text, flags=re.DOTALL)
    names = {match[0] for match in PLACEHOLDER.finditer(text)}
    return sorted(names - WORDS - set(re.findall(r"\b(\w+)=", text)))


def make_program(command: Command, rule: Rule) -> str:
    """The text of a Python program, with the rule's replacements."""
    text = command.text
    for pattern, replacement in rule.replace:
        text, count = re.subn(pattern, replacement, text)
        if not count:
            raise ValueError(f"{command.place}: the rule replaces {pattern!r}, which is not in the program")
    return text
