"""Functions and classes of the user's own, which flags name as PATH.py:NAME.

1. `read_user_code` reads the file that a flag names.  The text is read once: a file that is edited while a run
   continues changes nothing in the run, its worker processes included.
2. `load_object` imports the text as a module, once per file, and returns the object of that name.
3. `find_missing_arguments` and `choose_arguments` compare a function's signature with the arguments that the
   caller offers.  A function gets those that it names, or all of them if it takes **kwargs.

A path comes from a flag or a config file, never from data.  The file's folder is not added to sys.path, so the
file imports installed packages only, and its digest covers all that it brings.

This module imports no jax: worker processes use it, too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.abc
import importlib.util
import inspect
import re
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from cooper_jax.settings.setup_errors import SetupError

MESSAGE_LENGTH = 500  # characters of an exception's message that are shown

_REFERENCE = re.compile(r"(?P<path>.+\.py):(?P<name>[A-Za-z_]\w*)", re.DOTALL)

# Modules by the path and the digest of their text: several names of one file share one module.
_modules: dict[tuple[str, str], ModuleType] = {}
_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class UserCode:
    """An object in a file of the user's own, and the file's text."""

    path: str  # absolute
    name: str  # of the object in the file
    text: str

    @property
    def digest(self) -> str:
        """A hash of the text, in hex digits."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def label(self) -> str:
        """The file's name and the object's, for messages."""
        return f"{Path(self.path).name}:{self.name}"


def is_user_code(value: str) -> bool:
    """True if a setting names an object in a file: PATH.py:NAME."""
    return _REFERENCE.fullmatch(value.strip()) is not None


def find_reference_errors(value: str, field: str) -> list[str]:
    """Write a message if a setting does not have the form PATH.py:NAME.  field: the field's dotted name."""
    if is_user_code(value):
        return []
    return [f"{field}={value!r}: write PATH.py:NAME, a file and a name in it, as in my_rewards.py:brevity"]


def read_user_code(value: str, field: str) -> UserCode:
    """Read the file of a setting PATH.py:NAME.

    field: the field's dotted name, for messages.

    Raises SetupError for another form, and for a file that cannot be read.
    """
    if errors := find_reference_errors(value, field):
        raise SetupError(*errors)
    match = _REFERENCE.fullmatch(value.strip())
    assert match is not None
    path = Path(match["path"]).expanduser().absolute()
    try:
        return UserCode(str(path), match["name"], path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SetupError(f"{field}={value!r}: there is no file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{field}={value!r}: {path} cannot be read: {error}") from error


def load_object(code: UserCode, field: str) -> Any:
    """Import the text and return the object that it names.

    Raises SetupError if the import fails, and for a name that the file does not have.
    """
    where = f"{field}={code.label!r}"
    try:
        module = _import_text(code)
    # A file may raise anything, SystemExit included.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise SetupError(
            f"{where}: {code.path} cannot be imported: {describe_error(error, code.path)}"
        ) from error
    if not hasattr(module, code.name):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise SetupError(f"{where}: {code.path} has no {code.name!r}; it has {', '.join(names) or 'nothing'}")
    return getattr(module, code.name)


def load_function(code: UserCode, field: str, *, allows_class: bool = False) -> Callable[..., Any]:
    """Import the text and return the function that it names.

    allows_class: it may be a class, which is called to make an object.

    Raises SetupError as `load_object` does, for an object that cannot be called, and for one whose arguments
    Python does not know by name.
    """
    function = load_object(code, field)
    where = f"{field}={code.label!r}"
    if inspect.isclass(function) and not allows_class:
        raise SetupError(
            f"{where}: it is a class; name a function, or an object of the class that can be called"
        )
    if not callable(function):
        raise SetupError(f"{where}: it is {type(function).__name__}, which cannot be called; name a function")
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:
        raise SetupError(f"{where}: Python does not know its arguments; wrap it in a function") from error
    if unnamed := [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]:
        raise SetupError(
            f"{where}: arguments are passed by name, so {', '.join(unnamed)} must not be positional-only"
        )
    if [p.kind for p in parameters] == [inspect.Parameter.VAR_POSITIONAL]:
        raise SetupError(
            f"{where}: arguments are passed by name, so it would get none; name them, or take **kwargs"
        )
    return function


def find_missing_arguments(function: Callable[..., Any], offered: Collection[str]) -> list[str]:
    """The arguments without a default that a function takes and that are not among those `offered`."""
    missing = []
    for parameter in inspect.signature(function).parameters.values():
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if is_named and parameter.default is parameter.empty and parameter.name not in offered:
            missing.append(parameter.name)
    return missing


def list_named_arguments(function: Callable[..., Any]) -> list[str]:
    """The arguments that a function takes by name; those that **kwargs collects are not among them."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def choose_arguments(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the `offered` arguments that a function takes: all of them if it has **kwargs."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(offered)
    names = list_named_arguments(function)
    return {name: value for name, value in offered.items() if name in names}


def describe_error(error: BaseException, path: str) -> str:
    """One line about an exception: its type, its message, and the line of the file in which it arose."""
    text = " ".join(str(error).split())[:MESSAGE_LENGTH]
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines = [error.lineno]
    return f"{said} (line {lines[-1]})" if lines else said


def list_digests(codes: Iterable[UserCode]) -> dict[str, str]:
    """The digest of each file's text, by path."""
    return {code.path: code.digest for code in codes}


def _import_text(code: UserCode) -> ModuleType:
    """Import a text as a module, or return the module that was made of it before."""
    key = code.path, code.digest
    with _lock:
        if key in _modules:
            return _modules[key]

        # The name contains the digest, since two files may have one stem.
        name = f"cooper_user_{Path(code.path).stem}_{code.digest[:12]}"
        spec = importlib.util.spec_from_loader(name, _TextLoader(code), origin=code.path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        module.__file__ = code.path  # scripts find their own data by it

        # Dataclasses and pickles look a class's module up by its name.
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        _modules[key] = module
        return module


class _TextLoader(importlib.abc.SourceLoader):
    """Loads a module from the text that was read, not from the file, which may have changed since."""

    def __init__(self, code: UserCode):
        self._code = code

    def get_filename(self, fullname: str) -> str:
        return self._code.path

    def get_data(self, path: str | bytes) -> bytes:
        return self._code.text.encode("utf-8", "surrogatepass")

    # Without a bytecode cache: nothing is written beside the user's file.
    def path_stats(self, path: str) -> Mapping[str, Any]:
        raise OSError("no cache")
