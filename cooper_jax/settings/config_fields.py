"""Documentation of the configuration's fields: type, value and the comment beside each in configs/base.py.

`read_comments` reads the comments from the source of configs/base.py, so that a field is documented in one
place.  `list_fields` joins them with the values of a config.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import io
import tokenize
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from cooper_jax.configs import base
from cooper_jax.settings.renamed_flags import RENAMED_FLAGS, describe_rename


@dataclasses.dataclass(frozen=True)
class Field:
    """A leaf of the configuration."""

    name: str  # dotted: policy.optimiser.lr
    value: Any
    comment: str  # "" where configs/base.py has none

    @property
    def section(self) -> str:
        """The part of the name before the first dot; "" for a field outside all sections."""
        return self.name.split(".")[0] if "." in self.name else ""

    @property
    def type_name(self) -> str:
        """The name of the value's type, for --help."""
        return type(self.value).__name__


def flatten_config(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Map the dotted name of each leaf of the config to its value."""
    out: dict[str, Any] = {}
    for name in config:
        value = config[name]
        if isinstance(value, ConfigDict):
            out |= flatten_config(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out


def list_fields(config: ConfigDict) -> list[Field]:
    """All leaves of a config with the comments of configs/base.py, in the order of that file."""
    comments, values = read_comments(base), flatten_config(config)
    # A ConfigDict sorts its names, so the order comes from the comments.  Fields that configs/base.py does
    # not declare come last.
    declared = [name for name in comments if name in values]
    names = [*declared, *(name for name in values if name not in comments)]
    return [Field(name, values[name], comments.get(name, "")) for name in names]


def describe_unknown_field(
    field: str, fields: Iterable[str], renamed: Mapping[str, str] = RENAMED_FLAGS
) -> str:
    """Write the error message for a field that the config does not have: its new name, or the nearest field.

    field: the dotted name, without `config.`.
    fields: the names of the fields that exist.
    """
    # A known old name explains the error better than a similar new one.
    if (change := describe_rename(field, renamed)) is not None:
        return f"--config.{field} {change}"
    # A misspelt old name is nearer to that name than to any present one.
    nearest = find_nearest(field, [*fields, *renamed])
    hint = f"did you mean --config.{nearest}?" if nearest else "--help lists the fields"
    if nearest and (change := describe_rename(nearest, renamed)) is not None:
        hint = f"{hint} It {change}"
    return f"--config.{field}: the config does not have this field; {hint}"


def find_nearest(field: str, fields: Iterable[str]) -> str | None:
    """The field whose dotted name is nearest to a misspelt one; None if no name is near."""
    fields = list(fields)
    section, _, leaf = field.rpartition(".")

    # First, a similar name in the section that the misspelt name gives.
    siblings = {name.rpartition(".")[2]: name for name in fields if name.rpartition(".")[0] == section}
    if matches := difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.7):
        return siblings[matches[0]]

    # Then, the same last part in another section: `policy.lr` -> `policy.optimiser.lr`.
    same_leaf = [name for name in fields if name.rpartition(".")[2] == leaf]
    if same_leaf:
        return max(same_leaf, key=lambda name: difflib.SequenceMatcher(None, field, name).ratio())

    # Last, a similar name anywhere.
    matches = difflib.get_close_matches(field, fields, n=1, cutoff=0.75)
    return matches[0] if matches else None


def read_comments(module: ModuleType, function: str = "get_config") -> dict[str, str]:
    """Map the dotted names of the fields and sections that a module's `function` declares to their comments.

    The order is that of the declarations; a field without a comment has the text "".  A field's comment
    follows the assignment on its line or, if there is none, fills the lines directly above it.  A function
    that builds a section (`c.policy = trained_model()`) contributes the comments of its own fields.
    """
    # The source is parsed, not executed: comments are not part of a config's values.
    source = inspect.getsource(module)
    tree = ast.parse(source)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    reader = _CommentReader(functions, _read_comments_by_line(source), source.splitlines())
    return reader.read_function(function)


def _read_comments_by_line(source: str) -> dict[int, str]:
    """Map line numbers to the comments on them, without the leading `#`."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ").rstrip() for t in tokens if t.type == tokenize.COMMENT}


@dataclasses.dataclass(frozen=True)
class _CommentReader:
    """Reader of the comments beside the assignments of a source file's functions."""

    functions: Mapping[str, ast.FunctionDef]
    comments: Mapping[int, str]  # line number -> text
    lines: list[str]

    def read_function(self, function: str) -> dict[str, str]:
        """The comments of the fields that a function assigns, those of functions that it calls included."""
        out: dict[str, str] = {}
        for node in self.functions[function].body:
            if not isinstance(node, ast.Assign):
                continue
            # The target `c.policy.lr` is the field policy.lr; the target `c` itself gives the empty name.
            name = ast.unparse(node.targets[0]).partition(".")[2]
            if name:
                out[name] = self._read_comment(node)

            # A section that another function of the module builds.  With the empty name, as in
            # `c = model_source()`, that function's fields belong to this section.
            call = node.value
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Name)
                and call.func.id in self.functions
            ):
                prefix = f"{name}." if name else ""
                out |= {prefix + inner: text for inner, text in self.read_function(call.func.id).items()}
        return out

    def _read_comment(self, node: ast.Assign) -> str:
        """The comment on the lines of an assignment, or else the comment lines directly above it."""
        first, last = node.lineno, node.end_lineno or node.lineno
        # An assignment that the formatter broke over several lines may have its comment on any of them.
        trailing = [self.comments[n] for n in range(first, last + 1) if n in self.comments]
        if trailing:
            return " ".join(trailing)

        above: list[str] = []
        line = first - 1
        while self.lines[line - 1].lstrip().startswith("#"):
            # `--- title ---` is a heading of several fields, not the comment of the next one.
            if self.comments[line].startswith("---"):
                break
            above.insert(0, self.comments[line])
            line -= 1
        return " ".join(above)
