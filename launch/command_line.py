"""Help and error messages of the launch scripts' command lines.

1. `answer_help` answers --help and -h with the script's description, its own flags, and the fields of the
   configuration with their types, values and comments.
2. `resolve_configs` replaces the bare name of a shipped config (--config=tiny) by its path.
3. `find_flag_errors` checks flags before absl parses them, so that all errors are reported at once, one line
   each.

This module does not import jax, because importing it takes seconds and help should be fast.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import tuple_parser

from cooper_jax.configs import base
from cooper_jax.settings.config_fields import Field, describe_unknown_field, flatten_config, list_fields
from cooper_jax.settings.config_files import load_config, resolve_config
from cooper_jax.settings.renamed_flags import RENAMED_FLAGS
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer import recipes

# Flags that ask for help; absl defines the long ones, with pages of library flags.
HELP_NAMES = ("help", "h", "helpfull", "helpshort")
# The parsers that ml_collections uses for the types of fields.
PARSERS: dict[type, flags.ArgumentParser] = {
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
    bool: flags.BooleanParser(),
    str: flags.ArgumentParser(),
    tuple: tuple_parser.TupleParser(),
}


def exit_with_errors(messages: Iterable[str]) -> NoReturn:
    """Print one line for each error and exit with code 2."""
    for message in messages:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_own_flags(argv: list[str], description: str, own: flags.FlagValues) -> list[str]:
    """Parse the flags of a script that takes no config; all errors are reported at once, one line each.

    description: the script's docstring, which --help prints.
    own: the flags that the script defines.
    """
    answer_help(argv, description, own, takes_config=False)
    if errors := find_flag_errors(argv, own, None):
        exit_with_errors(errors)
    # absl finds the remaining errors, such as a required flag that is missing.
    try:
        return own(argv)
    except flags.Error as error:
        exit_with_errors(describe_absl_errors(error))


def describe_absl_errors(error: flags.Error) -> list[str]:
    """Write one line for each flag that absl refuses."""
    lines = []
    for line in str(error).splitlines():
        missing = re.search(r"Flag (--\w+) must have a value other than None", line)
        lines.append(f"{missing[1]} is missing" if missing else line)
    return [f"{line}; --help lists the flags" for line in lines]


# --- config files ---


def resolve_configs(argv: Sequence[str]) -> list[str]:
    """Replace the bare name of a shipped config in the arguments by its path.

    ml_collections reads --config from the arguments by itself, and only takes paths.
    """
    resolved = []
    awaits_value = False  # True after `--config` without `=`: the next argument is the name
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if awaits_value:
            resolved.append(resolve_config(argument))
        elif equals and flag in ("--config", "-config"):
            resolved.append(f"{flag}={resolve_config(value)}")
        else:
            resolved.append(argument)
        awaits_value = not awaits_value and argument in ("--config", "-config")
    return resolved


# --- errors ---


def find_flag(argv: Sequence[str], name: str) -> str | None:
    """The value of a flag among the arguments (`--name=value` or `--name value`); None if it is not given."""
    value = None
    # Later occurrences replace earlier ones, as in absl.
    for i, argument in enumerate(argv[1:], 1):
        if argument == "--":
            break
        flag, equals, text = argument.removeprefix("-").removeprefix("-").partition("=")
        if not argument.startswith("-") or flag != name:
            continue
        if equals:
            value = text
        elif i + 1 < len(argv):
            value = argv[i + 1]
    return value


def find_flag_errors(
    argv: Sequence[str],
    own: flags.FlagValues,
    config: ConfigDict | None,
    renamed: Mapping[str, str] = RENAMED_FLAGS,
) -> list[str]:
    """Write one line for each flag that is misspelt, renamed or has a value of the wrong type.

    own: the flags that the script defines.
    config: None if the script takes no config or the config could not be loaded; the flags of its fields are
      then not checked.
    renamed: the table of renamed fields; tests use tables of their own.
    """
    fields = None if config is None else flatten_config(config)
    errors = []
    arguments = iter(argv[1:])
    for argument in arguments:
        # As in absl: arguments after `--` are positional, and so are those without a dash.
        if argument == "--":
            break
        if not argument.startswith("-") or not argument.strip("-"):
            continue

        flag, equals, value = argument.removeprefix("-").removeprefix("-").partition("=")
        name, negated = _strip_no(flag, own, fields or {})
        try:
            reader = _find_reader(name, own, fields, renamed)
        except LookupError as error:
            errors.append(str(error.args[0]))
            continue

        # Without `=` the value is the next argument; a boolean flag needs none.
        if not equals and (negated or reader.boolean):
            continue
        text = value if equals else next(arguments, None)
        if text is None:
            errors.append(f"{argument}: it has no value; give --{name}=VALUE")
        elif (problem := reader.find_problem(text)) is not None:
            errors.append(f"--{name}={text}: {problem}")
    return errors


@dataclasses.dataclass(frozen=True)
class _ValueReader:
    """Parser of a flag's value, to find values of the wrong type."""

    # None: the value is not checked in this module.
    parser: flags.ArgumentParser | None = None
    type_name: str = ""
    # A boolean flag needs no value.
    boolean: bool = False

    def find_problem(self, text: str) -> str | None:
        """The reason why a text is not a value of the flag; None if it is one."""
        if self.parser is None:
            return None
        try:
            self.parser.parse(text)
        except (ValueError, TypeError) as error:
            reason = " ".join(": ".join(map(str, error.args)).split())
            return f"expected {self.type_name} ({reason})"
        return None


def _find_reader(
    name: str, own: flags.FlagValues, fields: Mapping[str, Any] | None, renamed: Mapping[str, str]
) -> _ValueReader:
    """The reader of a flag's value.  Raises LookupError, with the line to print, for an unknown flag."""
    # The config's file has been loaded already.
    if name == "config":
        return _ValueReader()
    if name in own:
        return _ValueReader(own[name].parser, own[name].flag_type(), own[name].boolean)
    if not name.startswith("config."):
        raise LookupError(_describe_unknown_flag(name, own, fields or {}))

    # A field of the config.
    field = name.removeprefix("config.")
    if fields is None:
        return _ValueReader()
    if field in fields:
        kind = type(fields[field])
        return _ValueReader(PARSERS.get(kind), kind.__name__, kind is bool)

    # `--config.mesh.rules[0]=...` sets an element of a tuple and `--config.policy={...}` a section; absl
    # checks their values.
    container = field.partition("[")[0]
    if container in fields or any(known.startswith(f"{container}.") for known in fields):
        return _ValueReader()
    raise LookupError(describe_unknown_field(field, fields, renamed))


def _strip_no(name: str, own: flags.FlagValues, fields: Mapping[str, Any]) -> tuple[str, bool]:
    """Split a negated flag, as in --notraceback and --noconfig.resume: (the flag's name, True if negated)."""
    rest = name.removeprefix("no")
    if rest == name or name in own:
        return name, False
    # Only boolean flags can be negated; `node` is not the negation of `de`.
    own_boolean = rest in own and own[rest].boolean
    field = rest.removeprefix("config.")
    field_boolean = field != rest and isinstance(fields.get(field), bool)
    return (rest, True) if own_boolean or field_boolean else (name, False)


def _describe_unknown_flag(name: str, own: flags.FlagValues, fields: Mapping[str, Any]) -> str:
    """Write the error message for a flag that does not exist, with the nearest flag."""
    known = [*(n for n in own if n not in HELP_NAMES), *(f"config.{field}" for field in fields)]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if name in fields:
        nearest = [f"config.{name}"]  # the prefix was left out
    hint = f"did you mean --{nearest[0]}?" if nearest else "--help lists the flags"
    return f"--{name}: there is no such flag; {hint}"


# --- help ---


def find_help_request(argv: Sequence[str]) -> str | None:
    """The section in --help=SECTION; "" for plain --help or -h, None if the arguments ask for no help."""
    for argument in argv[1:]:
        name, _, section = argument.removeprefix("-").removeprefix("-").partition("=")
        if argument.startswith("-") and name in HELP_NAMES:
            return section
    return None


def answer_help(
    argv: Sequence[str], description: str, own: flags.FlagValues, takes_config: bool = True
) -> None:
    """Print the help and exit with code 0 if --help or -h is among the arguments.

    Fields are shown with the values of the file that --config names.
    """
    section = find_help_request(argv)
    if section is None:
        return
    # None if --config is not given; "" for a script without a config.
    path = find_flag(argv, "config") if takes_config else ""
    try:
        print_help(description, own, path, section)
    except SetupError as error:
        exit_with_errors(error.messages)
    sys.exit(0)


def print_help(description: str, own: flags.FlagValues, config_path: str | None, section: str) -> None:
    """Print a script's description, its flags and the configuration's fields.

    config_path: the file whose values are shown; None: those of configs/base.py; "": the script takes no
      config.
    section: print the fields of this section alone; "": print everything.

    Raises SetupError for a file that cannot be loaded and for an unknown section.
    """
    width = max(60, min(100, shutil.get_terminal_size().columns))
    blocks = []
    if not section:
        own_flags = _format_own_flags(own, width, has_sections=config_path != "")
        blocks += [_wrap_description(description, width), own_flags]

    # The recipe of a config file changes other fields; the help shows the values that a run would have.
    if config_path != "":
        config = load_config(config_path) if config_path else base.get_config()
        recipes.apply_presets(config, ())
        blocks.append(_format_fields(list_fields(config), config_path or "configs/base.py", section, width))
    try:
        print("\n\n".join(blocks), flush=True)
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough.  At exit Python flushes stdout once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _format_own_flags(own: flags.FlagValues, width: int, has_sections: bool) -> str:
    """Format the flags that this package and the main program define, without those of libraries.

    has_sections: False for a script without a config, whose help has no sections.
    """
    package = __name__.rpartition(".")[0]
    lines = ["Flags:"]
    modules = own.flags_by_module_dict()
    ours = [m for m in modules if m == sys.argv[0] or m == "__main__" or m.startswith(f"{package}.")]

    for flag in itertools.chain.from_iterable(modules[module] for module in ours):
        shown = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
        default = f", {flag.default!r}" if flag.default not in (None, []) else ""
        # absl appends a remark to the help of repeatable flags.
        text = flag.help.partition(";\n")[0]
        lines.append(_wrap(f"{shown} ({flag.flag_type()}{default}): {text}", width))
    help_text = (
        "This text; --help=SECTION: one section of the configuration alone." if has_sections else "This text."
    )
    lines.append(_wrap(f"--help, -h: {help_text}", width))
    return "\n".join(lines)


def _format_fields(fields: Sequence[Field], source: str, section: str, width: int) -> str:
    """Format the fields under headings, one for each section of the configuration.

    source: the file that the values are from.
    section: format the fields of this section alone; "": all.
    """
    # The section may also be one inside another, such as policy.optimiser, or a single field.
    if section:
        prefix = section.removeprefix("config.").rstrip(".")
        fields = [f for f in fields if f.name == prefix or f.name.startswith(f"{prefix}.")]
        if not fields:
            names = {f.section for f in list_fields(base.get_config())} - {""}
            raise SetupError(
                f"--help={section}: there is no such section; it is one of {', '.join(sorted(names))}"
            )

    lines = [f"Fields of the configuration (type, value in {source}): each is a flag."]
    heading = None
    for field in fields:
        if field.section != heading:
            heading = field.section
            lines += ["", heading] if heading else [""]
        comment = f": {field.comment}" if field.comment else ""
        lines.append(_wrap(f"--config.{field.name} ({field.type_name}, {field.value!r}){comment}", width))
    return "\n".join(lines)


def _wrap_description(description: str, width: int) -> str:
    """Wrap the paragraphs and numbered items of a docstring; indented lines (commands) are not changed."""
    blocks = []
    for block in description.strip().split("\n\n"):
        if block.startswith(" "):
            blocks.append(block)
            continue
        # Each numbered item starts on a line of its own.
        items = re.split(r"\n(?=\d+\. )", block)
        # An item's later lines are indented in the docstring; filled, that indentation would be a gap.
        lines = [re.sub(r"\n\s+", " ", item) for item in items]
        blocks.append("\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in lines))
    return "\n\n".join(blocks)


def _wrap(text: str, width: int) -> str:
    """Wrap the description of a flag with a hanging indent."""
    return textwrap.fill(
        text,
        width,
        initial_indent="  ",
        subsequent_indent="      ",
        break_long_words=False,
        break_on_hyphens=False,
    )
