"""Config files: the shipped ones by name, others by path, and changes of their fields.

This module does not import jax, because importing it takes seconds and help should be fast.
"""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cooper_jax.configs import base
from cooper_jax.settings.config_fields import describe_unknown_field, flatten_config
from cooper_jax.settings.secrets import MAY_HOLD_SECRETS
from cooper_jax.settings.setup_errors import ErrorCollector, SetupError

# The folder of the shipped configs.
CONFIGS = Path(base.__file__).resolve().parent


def list_shipped_configs() -> list[str]:
    """Names of the config files that come with the project."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "__init__")


def resolve_config(name: str) -> str:
    """The path of the config that --config names.

    name: the bare name of a shipped config, which has neither a slash nor `.py`.  Any other text is a path
      and is returned unchanged.  An ARGUMENT of the file (NAME:ARGUMENT) is kept after the path.
    """
    stem, colon, argument = name.partition(":")
    if stem not in list_shipped_configs():
        return name
    return f"{CONFIGS / stem}.py{colon}{argument}"


def load_config(path: str) -> ConfigDict:
    """The config that a file's get_config() returns.

    path: FILE, FILE:ARGUMENT as ml_collections reads it, or the bare name of a shipped config.

    Raises SetupError with one line that names the file and, for an error in the file, the line and the error.
    """
    name, *argument = resolve_config(path).split(":", 1)
    file = Path(name)
    if not file.is_file():
        shipped = ", ".join(list_shipped_configs())
        raise SetupError(
            f"--config={path}: No such file or directory: {name!r}; the shipped configs are {shipped}, as in "
            "--config=tiny"
        )

    # A config file is the user's code: any exception in it is an error of the setup.
    try:
        spec = importlib.util.spec_from_file_location("checked_config", file)
        if spec is None or spec.loader is None:
            raise SetupError(f"--config={path}: not a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config(*argument)
    except SetupError:
        raise
    except Exception as error:
        raise SetupError(f"--config={path}: {_locate_error(error, file)}") from error

    if not isinstance(config, ConfigDict):
        raise SetupError(f"--config={path}: get_config() returns {type(config).__name__}, not a ConfigDict")

    # A misspelt field in a config file would be ignored without this check.
    declared = flatten_config(base.get_config())
    unknown = [
        describe_unknown_field(name, declared) for name in flatten_config(config) if name not in declared
    ]
    if unknown:
        raise SetupError(*(f"--config={path}: as in {problem}" for problem in unknown))
    return config


def _locate_error(error: Exception, file: Path) -> str:
    """The line of a config file that raised an exception, and the exception in one line."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file
    ]
    # A syntax error has no frame in the file, since the file did not run.
    if isinstance(error, SyntaxError) and error.lineno is not None:
        lines.append(error.lineno)
    place = f"line {lines[-1]}: " if lines else ""
    first_line = (str(error.msg if isinstance(error, SyntaxError) else error).splitlines() or [""])[0]
    return f"{place}{type(error).__name__}: {first_line}"


def set_overrides(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Set fields of a config by their dotted names, in place.

    Raises SetupError with every field that does not exist and every value of another type.
    """
    declared = flatten_config(config)
    errors = ErrorCollector()
    for name, value in overrides.items():
        if name not in declared:
            errors.messages.append(describe_unknown_field(name, declared))
            continue
        try:
            config.update_from_flattened_dict({name: value})
        except TypeError as error:
            # The error's text repeats the value, too.
            if name.rpartition(".")[2] in MAY_HOLD_SECRETS:
                errors.messages.append(f"{name}: it must be text, not {type(value).__name__}")
                continue
            errors.messages.append(f"{name}={value!r}: {' '.join(str(error).split())}")
    errors.raise_if_any()
