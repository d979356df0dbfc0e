"""Which knobs of a config does code read?  A small flow analysis over syntax trees.

1. A config section flows from the flag (`DEFINE_config_file(...).value`) through assignments, arguments, returned
   values, closures and fields of classes; what reaches a variable is a set of paths, such as {("policy",)}.
2. A knob is read where one of its section's holders is asked for it: `x.lr` or `x["lr"]`.
3. Asking does not count inside f-strings (a message is no use of a value), nor in functions called `check`.

Functions are found by import and name, methods by name alone: it may see a read that is none, and is blind to
getattr and to `**section`.  So a knob that it calls unread is unread, or read in a way that a person cannot
find by searching either.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator

from ml_collections import ConfigDict

FLAG = ("<flag>",)  # the holder of the whole config
PRINTED = {("name",)}  # names are for messages and paths
Path = tuple[str, ...]


def sections_and_leaves(config: ConfigDict, prefix: Path = ()) -> tuple[set[Path], set[Path]]:
    """The paths of a config's sections (the whole one is ()) and of its leaves."""
    sections, leaves = {prefix}, set()
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            below = sections_and_leaves(value, (*prefix, name))
            sections, leaves = sections | below[0], leaves | below[1]
        else:
            leaves.add((*prefix, name))
    return sections, leaves


def unread(config: ConfigDict, sources: dict[str, str]) -> list[str]:
    """Dotted names of the knobs that no module reads.  sources: dotted module name -> text."""
    analysis = Analysis(config, sources)
    return sorted(".".join(path) for path in analysis.leaves - analysis.read)


@dataclasses.dataclass(eq=False)
class Scope:
    """A module, or a function with those around it."""

    module: str
    node: ast.AST
    outer: Scope | None = None
    holds: dict[str, set] = dataclasses.field(default_factory=dict)  # variable -> paths and strings
    functions: dict[str, Scope] = dataclasses.field(default_factory=dict)
    classes: dict[str, Class] = dataclasses.field(default_factory=dict)
    returns: set = dataclasses.field(default_factory=set)

    def __post_init__(self):
        self.nodes = list(_own(self.node))

    def parameters(self) -> list[str]:
        a = self.node.args
        return [p.arg for p in (*a.posonlyargs, *a.args)]

    def keywords(self) -> set[str]:
        return {*self.parameters(), *(p.arg for p in self.node.args.kwonlyargs)}


@dataclasses.dataclass(eq=False)
class Class:
    fields: list[str]  # annotated ones, in order: a dataclass's parameters
    methods: dict[str, Scope]


class Analysis:
    """Runs to a fixed point; `read` then holds the leaves that some code reads."""

    def __init__(self, config: ConfigDict, sources: dict[str, str]):
        self.sections, self.leaves = sections_and_leaves(config)
        self.read: set[Path] = set()
        self.fields: dict[str, set] = {}  # attribute name -> what any object's attribute of that name holds
        self.methods: dict[str, list[Scope]] = {}
        self.imports: dict[str, dict[str, str]] = {}  # module -> local name -> dotted name
        self.modules: dict[str, Scope] = {}
        self.scopes: list[Scope] = []
        for module, text in sources.items():
            tree = ast.parse(text)
            self.modules[module] = scope = Scope(module, tree)
            self.imports[module] = dict(_imports(tree))
            self._declare(scope)
        self.grown = True
        while self.grown:
            self.grown = False
            for scope in self.scopes:
                self._run(scope)

    # --- declarations ---

    def _declare(self, scope: Scope) -> None:
        self.scopes.append(scope)
        for node in scope.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                scope.functions[node.name] = inner = Scope(scope.module, node, scope)
                self._declare(inner)
            elif isinstance(node, ast.ClassDef):
                methods = {}
                for item in node.body:
                    if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                        methods[item.name] = inner = Scope(scope.module, item, scope)
                        self.methods.setdefault(item.name, []).append(inner)
                        self._declare(inner)
                fields = [i.target.id for i in node.body if isinstance(i, ast.AnnAssign)]
                scope.classes[node.name] = Class(fields, methods)

    # --- flow ---

    def _grow(self, held: set, more: set) -> None:
        if not more <= held:
            held |= more
            self.grown = True

    def _run(self, scope: Scope) -> None:
        for node in scope.nodes:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._bind(scope, target, node.value)
            elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
                self._bind(scope, node.target, node.value)
            elif isinstance(node, ast.For | ast.comprehension):
                if isinstance(node.iter, ast.Tuple | ast.List | ast.Set):
                    for element in node.iter.elts:
                        self._bind(scope, node.target, element)
            elif isinstance(node, ast.Return) and node.value is not None:
                self._grow(scope.returns, self._value(scope, node.value))
            elif isinstance(node, ast.Call):
                self._call(scope, node)
        silent = isinstance(scope.node, ast.FunctionDef) and scope.node.name == "check"
        for node in scope.nodes:
            if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Load):
                spoken = getattr(node, "in_message", False)
                for path in self._value(scope, node):
                    if path in self.leaves and (path in PRINTED or not (silent or spoken)):
                        self._grow(self.read, {path})

    def _bind(self, scope: Scope, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            if isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts):
                for t, v in zip(target.elts, value.elts, strict=True):
                    self._bind(scope, t, v)
            return
        held = self._value(scope, value)
        if isinstance(target, ast.Name):
            self._grow(scope.holds.setdefault(target.id, set()), held)
        elif isinstance(target, ast.Attribute):
            self._grow(self.fields.setdefault(target.attr, set()), held)

    def _value(self, scope: Scope, node: ast.expr) -> set:
        """What an expression may hold: paths of sections and leaves, and strings."""
        if isinstance(node, ast.Constant):
            return {node.value} if isinstance(node.value, str) else set()
        if isinstance(node, ast.Name):
            return self._lookup(scope, node.id)
        if isinstance(node, ast.Attribute):
            return self._member(scope, node.value, {node.attr}, node.attr)
        if isinstance(node, ast.Subscript):
            names = {v for v in self._value(scope, node.slice) if isinstance(v, str)}
            return self._member(scope, node.value, names, None)
        if isinstance(node, ast.IfExp):
            return self._value(scope, node.body) | self._value(scope, node.orelse)
        if isinstance(node, ast.BoolOp):
            return set().union(*(self._value(scope, v) for v in node.values))
        if isinstance(node, ast.NamedExpr):
            return self._value(scope, node.value)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr == "DEFINE_config_file":
                return {FLAG}
            return set().union(*(f.returns for f in self._callees(scope, node.func)))
        return set()

    def _member(self, scope: Scope, owner: ast.expr, names: set[str], attribute: str | None) -> set:
        held = {p for p in self._value(scope, owner) if isinstance(p, tuple)}
        if FLAG in held:
            return {()} if names == {"value"} else set()
        if held:
            found = {(*path, name) for path in held if path in self.sections for name in names}
            return {p for p in found if p in self.sections or p in self.leaves}
        return self.fields.get(attribute, set())

    def _lookup(self, scope: Scope | None, name: str) -> set:
        while scope is not None:
            if name in scope.holds:
                return scope.holds[name]
            scope = scope.outer
        return set()

    # --- calls ---

    def _call(self, scope: Scope, node: ast.Call) -> None:
        for callee in self._callees(scope, node.func):
            self._pass(scope, callee, node.args, node.keywords)
        for callee in self._classes(scope, node.func):
            for name, value in zip(callee.fields, node.args, strict=False):
                self._grow(self.fields.setdefault(name, set()), self._value(scope, value))
            for keyword in node.keywords:
                if keyword.arg in callee.fields:
                    self._grow(self.fields.setdefault(keyword.arg, set()), self._value(scope, keyword.value))
            if "__init__" in callee.methods:
                self._pass(scope, callee.methods["__init__"], node.args, node.keywords)
        # A function handed on with its arguments: partial(f, x), pool.submit(f, x).
        for i, argument in enumerate(node.args):
            if isinstance(argument, ast.Name | ast.Attribute):
                for callee in self._callees(scope, argument, methods=False):
                    self._pass(scope, callee, node.args[i + 1 :], node.keywords)

    def _pass(self, scope: Scope, callee: Scope, args: list[ast.expr], keywords: list[ast.keyword]) -> None:
        names = callee.parameters()
        names = names[1:] if names[:1] in (["self"], ["cls"]) else names
        given = list(zip(names, args, strict=False))
        given += [(k.arg, k.value) for k in keywords if k.arg in callee.keywords()]
        for name, value in given:
            self._grow(callee.holds.setdefault(name, set()), self._value(scope, value))

    def _callees(self, scope: Scope, func: ast.expr, methods: bool = True) -> list[Scope]:
        if found := self._find(scope, func, "functions"):
            return [found]
        if methods and isinstance(func, ast.Attribute) and not self._find_module(scope, func.value):
            return self.methods.get(func.attr, [])
        return []

    def _classes(self, scope: Scope, func: ast.expr) -> list[Class]:
        found = self._find(scope, func, "classes")
        return [found] if found else []

    def _find(self, scope: Scope, func: ast.expr, kind: str) -> Scope | Class | None:
        if isinstance(func, ast.Name):
            inner = scope
            while inner is not None:
                if func.id in getattr(inner, kind):
                    return getattr(inner, kind)[func.id]
                inner = inner.outer
            module, _, name = self.imports[scope.module].get(func.id, "").rpartition(".")
            return getattr(self.modules[module], kind).get(name) if module in self.modules else None
        module = self._find_module(scope, func.value) if isinstance(func, ast.Attribute) else None
        return getattr(self.modules[module], kind).get(func.attr) if module else None

    def _find_module(self, scope: Scope, node: ast.expr) -> str | None:
        dotted = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
        first, dot, rest = dotted.partition(".")
        full = self._import(scope, first) + dot + rest
        return full if full in self.modules else None

    def _import(self, scope: Scope, name: str) -> str:
        return self.imports[scope.module].get(name, "")


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _own(root: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a module or function without those of the functions and classes inside it.

    Nodes inside an f-string are marked `in_message`.
    """
    stack = [(child, False) for child in ast.iter_child_nodes(root)]
    while stack:
        node, message = stack.pop()
        message = message or isinstance(node, ast.JoinedStr)
        if message:
            node.in_message = True
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            stack.extend((child, message) for child in ast.iter_child_nodes(node))
