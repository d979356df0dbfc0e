"""Data flows one way: who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the ground up; a module imports from its own floor's folder and from floors below it.
FLOORS = (
    ("cooper_jax.kernels", "cooper_jax.configs", "cooper_jax.__version__"),
    ("cooper_jax.types", "cooper_jax.statistics"),
    ("cooper_jax.settings",),
    ("cooper_jax.runtime",),
    ("cooper_jax.data", "cooper_jax.resampling"),
    ("cooper_jax.model",),
    ("cooper_jax.rollout",),
    ("cooper_jax.rule", "cooper_jax.llm"),
    ("cooper_jax.policy", "cooper_jax.reward"),
    ("cooper_jax.trainer",),
    ("cooper_jax.perf", "cooper_jax.evaluation", "cooper_jax.annotation", "cooper_jax.reward_training"),
    ("cooper_jax.study", "cooper_jax.api", "cooper_jax.serving", "cooper_jax.export"),
    ("cooper_jax.report",),
    ("cooper_jax.launch",),
)
OURS = ("cooper_jax", "kernels", "configs", "launch", "tests")
# Folders of the top level that are imported through a symlink in cooper_jax, and by no other name: a module
# that is imported under two names is loaded twice.
LINKED = ("kernels", "configs", "launch")


def imports(source: str) -> set[str]:
    """Our own modules that a module's text imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in OURS}


def floor(module: str) -> tuple[int, str]:
    """A module's floor and its room there."""
    for level, rooms in enumerate(FLOORS):
        for room in rooms:
            if module == room or module.startswith(room + "."):
                return level, room
    raise AssertionError(f"{module} has no floor: give it one here")


def complaints(module: str, source: str) -> list[str]:
    level, room = floor(module)
    out = []
    for name in sorted(imports(source)):
        below, where = floor(name)
        if not (below < level or where == room) or room == "cooper_jax.types":
            out.append(f"{module} imports {name}")
    return out


def modules() -> dict[str, str]:
    texts = {}
    for folder in ("cooper_jax", *LINKED):
        for file in (ROOT / folder).rglob("*.py"):  # which does not follow the symlinks
            if file.name != "__init__.py":
                name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
                texts[f"cooper_jax.{name}" if folder in LINKED else name] = file.read_text()
    return texts


def test_imports_go_down():
    assert [c for name, source in modules().items() for c in complaints(name, source)] == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("cooper_jax.kernels.attention", "from cooper_jax.types import Params"),
        ("cooper_jax.types", "from cooper_jax.runtime import keys"),
        ("cooper_jax.rule.verifier", "from cooper_jax.policy import losses"),
        ("cooper_jax.policy.grpo", "from cooper_jax.reward.pairs import build_pairs"),
        ("cooper_jax.reward.pairs.build_pairs", "def f():\n    from cooper_jax.policy import losses"),
        ("cooper_jax.rollout.engine", "from cooper_jax.policy.grpo import make_update"),
        ("cooper_jax.runtime.mesh", "from cooper_jax.data import problems"),
        ("cooper_jax.trainer.train_loop", "from cooper_jax.launch import train"),
    ],
)
def test_an_import_that_goes_up_is_found(module, source):
    assert complaints(module, source)


def test_linked_folders_have_one_name():
    for folder in LINKED:
        link = ROOT / "cooper_jax" / folder
        assert link.is_symlink() and str(link.readlink()) == f"../{folder}"
    found = {}
    for folder in ("cooper_jax", "tests", *LINKED):
        for file in (ROOT / folder).rglob("*.py"):
            tops = {name.split(".")[0] for name in imports(file.read_text())}
            if tops & set(LINKED):
                found[str(file.relative_to(ROOT))] = sorted(tops & set(LINKED))
    assert found == {}


def imported_modules(known: dict[str, str]) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports; an imported name stands for the module that holds it."""

    def module_of(name: str) -> str | None:
        while name and name not in known:
            name = name.rpartition(".")[0]
        return name or None

    return {m: {module_of(n) for n in imports(source)} - {None} for m, source in known.items()}


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports another that is left when all that import none are taken away."""
    graph = {name: set(targets) for name, targets in graph.items()}
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    return sorted(graph)


def test_no_cycles():
    assert cycle(imported_modules(modules())) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_no_placeholders_are_left():
    """A marker of text to come, `@` twice, would be printed as it stands."""
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/**/*.md"), *ROOT.glob("*/**/*.py")]:
        if ".venv" not in path.parts[len(ROOT.parts)] and path != Path(__file__):
            assert "@" * 2 not in path.read_text(), path
