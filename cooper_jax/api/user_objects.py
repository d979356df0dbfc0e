"""Functions and classes of the caller's own, by the names under which a run imports them: PATH.py:NAME.

A run stores these names in its config.json, imports the objects again when it resumes, and gives a judge to its
worker processes.  So an object is named by a file:

1. A function or class at the top level of a .py file has one.  A script that trains is imported for its functions,
   too, so its own call of `train` must stand under `if __name__ == "__main__":`.
2. A function of a notebook's cell has none.  Its source is written to a file of ~/.cache/cooper_jax/functions, with
   imports of the modules that it uses.  A function that uses other names of the notebook is refused.
"""

from __future__ import annotations

import dis
import hashlib
import inspect
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cooper_jax.runtime.remote_files import write_atomically
from cooper_jax.settings.setup_errors import SetupError


def name_object(value: str | Callable[..., Any], argument: str) -> str:
    """The name PATH.py:NAME of a function or class; a text is returned unchanged.

    argument: of `train`, for messages.

    Raises SetupError for an object that a run cannot import by a name.
    """
    if isinstance(value, str):
        return value
    name = getattr(value, "__name__", "")
    if not name.isidentifier() or getattr(value, "__qualname__", name) != name:
        raise SetupError(
            f"{argument}={value!r}: give a function or a class that a `def` or `class` at the top level of a file "
            "or of a notebook's cell defines; lambdas, methods, instances and nested functions cannot be "
            "imported by a name"
        )

    path = _find_file(value)
    if path is None:
        path = _write_source(value, name, argument)
    else:
        # A file that defines the name twice, or wraps the function, would give another object.
        module = sys.modules.get(value.__module__)
        if module is not None and getattr(module, name, None) is not value:
            raise SetupError(f"{argument}={name!r}: {path} has another object of this name: rename one")
    if "," in str(path):
        raise SetupError(f"{argument}={name!r}: its path {path} contains a comma: move the file")
    return f"{path}:{name}"


def _find_file(value: Callable[..., Any]) -> Path | None:
    """The .py file that defines an object; None for one of a notebook's cell."""
    try:
        file = Path(inspect.getsourcefile(value) or "")
    except TypeError:  # built in, or of a program that has no file
        return None
    return file.absolute() if file.suffix == ".py" and file.is_file() else None


def _write_source(value: Callable[..., Any], name: str, argument: str) -> Path:
    """Write the source of a notebook's function to a file, whose name contains a hash of the text.

    Raises SetupError for an object without source, and for a function that uses names of the notebook.
    """
    where = f"{argument}={name!r}"
    advice = f"write it to a file (%%writefile in a notebook) and give {argument} as 'PATH.py:{name}'"
    if not isinstance(value, types.FunctionType):
        raise SetupError(f"{where}: it is defined in no file, and only functions may be: {advice}")
    try:
        source = textwrap.dedent(inspect.getsource(value))
    except OSError:
        raise SetupError(f"{where}: Python has no source of it: {advice}") from None

    used = {n: value.__globals__[n] for n in _list_globals(value.__code__) if n in value.__globals__}
    others = sorted(n for n, x in used.items() if not isinstance(x, types.ModuleType) and n != name)
    if others:
        raise SetupError(
            f"{where} uses {', '.join(others)} of the notebook, which the run cannot import: define them inside "
            f"the function, or {advice}"
        )

    # Annotations stay unevaluated: they may name what only the notebook has.
    lines = ["from __future__ import annotations", ""]
    lines += [
        f"import {x.__name__} as {n}" for n, x in sorted(used.items()) if isinstance(x, types.ModuleType)
    ]
    text = "\n".join(lines) + f"\n\n\n{source}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    path = Path.home() / ".cache" / "cooper_jax" / "functions" / f"{name}_{digest}.py"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    return path


def _list_globals(code: types.CodeType) -> set[str]:
    """The global names that a function's code reads, its comprehensions and inner functions included."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _list_globals(constant)
    return names
