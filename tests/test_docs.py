"""The pages of the documentation: generated ones are current, and what pages name exists."""

import ast
import functools
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import reference_pages
import step_noting
import step_text
import tiny_steps

from cooper_jax.configs import base
from cooper_jax.runtime import metric_glossary
from cooper_jax.settings.config_fields import flatten_config
from cooper_jax.settings.renamed_flags import RENAMED_FLAGS

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md"]
FIELDS = flatten_config(base.get_config())
SECTIONS = {name.rpartition(".")[0] for name in FIELDS} | {name.partition(".")[0] for name in FIELDS}
HEADS = sorted({name.partition(".")[0] for name in SECTIONS} - {""})
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def read_page(page: Path) -> tuple[str, str]:
    """A page's text without its fenced blocks, and all its shell commands."""
    text = page.read_text(encoding="utf-8")
    commands = [block[2] for block in FENCE.finditer(text) if block[1] == "bash"]
    return FENCE.sub("", text), "\n".join(commands).replace("\\\n", " ")


def name_page(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --- generated pages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", reference_pages.RENDERERS)
def test_a_reference_page_is_current(name):
    """`python tests/reference_pages.py --write` renews it."""
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == reference_pages.RENDERERS[name]()


def test_the_configuration_reference_has_every_field_with_its_meaning():
    rows = re.findall(
        r"^\| `([\w.]+)` \| (.*?) \| (.*) \|$", (ROOT / "docs/configuration.md").read_text(), re.M
    )
    assert sorted(name for name, _, _ in rows) == sorted(FIELDS)
    assert [name for name, _, meaning in rows if len(meaning) < 5] == []


def outline_page(page: str) -> list[str]:
    """The lines of a page without what differs between two steps: numbers, texts, rows of tables."""
    page = re.sub(r"```text\n.*?```", "```text```", page, flags=re.DOTALL)
    page = re.sub(r"(refused-pairs\)\): ).*?\.$", r"\1...", page, flags=re.MULTILINE)
    lines = []
    for line in page.splitlines():
        if line.startswith("|") and lines and lines[-1].startswith("|"):
            # Names of arrays, metrics and files belong to the outline.
            cells = re.findall(r"`(?:[a-z_]+/[a-z_./]+)`|^\| [a-z_ .-]+ \|", line)
            lines += [f"| {cell}" for cell in cells if not cell.startswith(("| assistant", "| end of"))]
        else:
            lines.append(re.sub(r"[-+]?\d+(\.\d+)?", "#", line))
    kinds = {f"| | {kind} |" for kind in step_noting.KINDS}
    return [line for line in lines if line not in kinds]


@pytest.mark.slow
def test_the_walk_through_a_step_is_of_todays_step(build):
    """docs/one_step.md has the parts, arrays and metrics of a page that is written now.

    The step here is of untrained models, whose responses are all found right, or wrong.
    """
    changes = tiny_steps.ALL_TERMS | {
        "policy.packing": "off",
        "reward.rollout_bce": 0.0,
        "reward.replay": 0,
        "reward.replay_rows": 0,
        "reward.pair_loss": "sigmoid",
        "reward.warmup_updates": 0,
        "pairs.per_prompt": len(step_noting.KINDS),
        "pairs.negatives": step_noting.KINDS,
    }
    with build(**changes) as (components, state):
        step = step_noting.note_step(tiny_steps.solved(components), state)
    page = step_text.render_page(step)
    assert outline_page(page) == outline_page((ROOT / "docs/one_step.md").read_text(encoding="utf-8"))
    # The page's own arithmetic is that of the step.
    assert f"{step.record.advantages[step.rows[0]]:+.3f}" in page


# --- settings, metrics, files, commands ----------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_settings_that_a_page_names_exist(page):
    """`section.field`, `section.field=value` and --config.section.field, also in commands."""
    text, commands = read_page(page)
    # The left columns of docs/migrating.md are other trainers' options.
    if page.name == "migrating.md":
        text = re.sub(r"^\| .*? \|", "|", text, flags=re.MULTILINE)
    # Files and modules are no fields.
    pattern = re.compile(rf"((?:{'|'.join(HEADS)})(?:\.\w+)+)(?:=.*)?")
    named = [m[1] for code in re.findall(r"`([^`\n]+)`", text) if (m := pattern.fullmatch(code))]
    named = [n for n in named if n.rpartition(".")[2] not in ("py", "json", "jsonl", "md", "sh")]
    named += re.findall(r"--(?:no)?config\.([a-z_]+(?:\.[a-z_0-9]+)*)", f"{text}\n{commands}")
    missing = {n for n in named if n not in FIELDS and n not in SECTIONS and n not in RENAMED_FLAGS}
    assert sorted(missing) == []


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_metrics_that_a_page_names_exist(page):
    text, _ = read_page(page)
    groups = {entry.partition("/")[0] for s in metric_glossary.RUN_METRICS.values() for entry in s}
    pattern = re.compile(rf"(?:{'|'.join(groups)})/[\w/]+")
    glossaries = (metric_glossary.RUN_METRICS, metric_glossary.REWARD_TRAINING_METRICS)
    for code in re.findall(r"`([^`\n]+)`", text):
        # A page may write `time/PHASE` or `pairs/refused_` for several.
        if not pattern.fullmatch(code) or code.endswith(("_", "/")) or not code.islower():
            continue
        assert any(metric_glossary.find_entry(code, glossary) for glossary in glossaries), code


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_files_that_a_page_names_exist(page):
    """Paths in code type that begin with a folder of the repository."""
    text, _ = read_page(page)
    folders = "cooper_jax|kernels|configs|launch|examples|tests|docs"
    paths = re.findall(rf"`((?:{folders})/[\w./-]+)(?:::\w+)?`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


@functools.cache
def list_options(script: str) -> set[str]:
    """The flags of a script of ours, without its config's fields."""
    text = (ROOT / script).read_text(encoding="utf-8")
    if script.endswith((".sh", "run")):
        return set(re.findall(r"(--[a-z][a-z_-]*)", text))
    options = {f"--{name}" for name in re.findall(r"flags\.DEFINE_\w+\(\s*\"(\w+)\"", text)}
    options |= set(re.findall(r"add_argument\((?:\"-\w\", )?\"(--[\w-]+)\"", text))
    options |= set(re.findall(r"\"(--[a-z_]+)\"", text))  # of scripts that read sys.argv themselves
    if "common" in text:
        options |= {"--config", "--traceback"}
    return options | {"--help"}


def find_scripts(words: list[str]) -> list[tuple[str, list[str]]]:
    """Our scripts in a command, each with the words that follow it."""
    found = []
    for at, word in enumerate(words):
        path = word.removeprefix("./")
        before = words[at - 1] if at else ""
        called = path.startswith(("launch/", "tests/", "examples/", ".ci/")) and (
            before.endswith(("python", "python3", "bash", "nohup")) or at == 0 or before == "--"
        )
        if before == "cooper-jax" and not path.startswith("-") and path != "SUBCOMMAND":
            called, path = True, f"launch/{path}.py"
        if called:
            rest = words[at + 1 :]
            found.append((path, rest[: rest.index("--")] if "--" in rest else rest))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_commands_of_a_page_name_scripts_flags_and_files_that_exist(page):
    text, commands = read_page(page)
    # Commands within a sentence count, too.
    lines = commands.splitlines() + re.findall(r"`((?:python|launch/|cooper-jax|\.ci/)[^`\n]*)`", text)
    for line in lines:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quotation over several lines: a program of its own
            continue
        for word in words:
            if re.fullmatch(r"requirements[\w-]*\.txt", word):
                assert (ROOT / word).is_file(), line
        for script, rest in find_scripts(words):
            assert (ROOT / script).is_file(), line
            assert [word for word in rest if not is_known_flag(script, word)] == [], line


def is_known_flag(script: str, word: str) -> bool:
    """True if a word of a script's command is one of its flags, or none; fields of the config are tested above."""
    flag = re.match(r"--(?:no)?[\w.-]+", word)
    if not flag or flag[0].startswith(("--config.", "--noconfig.")):
        return True
    config = word.removeprefix("--config=")
    if config != word and re.fullmatch(r"(configs/)?[a-z_0-9]+(\.py)?", config):
        name = config.removeprefix("configs/").removesuffix(".py")
        return (ROOT / "configs" / f"{name}.py").is_file()
    return flag[0] in list_options(script)


# --- messages ------------------------------------------------------------------------------------------


@functools.cache
def list_texts() -> list[str]:
    """All texts in the code, with a NUL for each value that is put in."""
    texts = []
    for folder in ("cooper_jax", "launch"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                    texts.append("".join(map(str, parts)))
    return texts


def find_message(quoted: str) -> bool:
    """True if a text in the code has the words of a message in their order; ... stands for anything."""
    parts = [part.strip() for part in quoted.split("...")]
    # Each part is of the code's own words, so that a quotation of values alone is none.
    assert max(map(len, parts)) >= 8, quoted
    return any(has_in_order(text, parts) for text in list_texts())


def has_in_order(text: str, parts: list[str]) -> bool:
    """True if the parts follow each other in a text."""
    at = 0
    for part in parts:
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `(.+?)` \|", page, flags=re.MULTILINE)
    assert len(quoted) > 30
    assert [text for text in quoted if not find_message(text)] == []
    assert not find_message("this is no message ... of the code")


# --- other trainers --------------------------------------------------------------------------------------


def test_trl_options_are_those_of_trl():
    """The left column of TRL's table: fields of GRPOConfig, or arguments of GRPOTrainer."""
    spec = importlib.util.find_spec("trl")
    if spec is None:
        pytest.skip("trl is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "trainer"
    config = (folder / "grpo_config.py").read_text()
    trainer = ast.parse((folder / "grpo_trainer.py").read_text())
    (made,) = [
        f
        for c in trainer.body
        if isinstance(c, ast.ClassDef) and c.name == "GRPOTrainer"
        for f in c.body
        if isinstance(f, ast.FunctionDef) and f.name == "__init__"
    ]
    known = {a.arg for a in [*made.args.args, *made.args.kwonlyargs]}
    known |= set(re.findall(r"^    (\w+): .* = field", config, flags=re.MULTILINE))
    # GRPOConfig is one of transformers' TrainingArguments.
    arguments = importlib.util.find_spec("transformers.training_args")
    known |= set(re.findall(r"^    (\w+): ", Path(arguments.origin).read_text(), flags=re.MULTILINE))

    page = (ROOT / "docs/migrating.md").read_text()
    table = page[page.index("\n## TRL") : page.index("\n## verl")]
    named = [n for row in re.findall(r"^\| (.*?) \|", table, re.M) for n in re.findall(r"`(\w+)[^`]*`", row)]
    assert len(named) > 40
    assert [name for name in named if name not in known] == []
