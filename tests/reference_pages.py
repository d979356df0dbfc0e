"""The generated reference pages: docs/configuration.md and docs/metrics.md.

    python tests/reference_pages.py          print them
    python tests/reference_pages.py --write  write them

The first is made from configs/base.py, the second from cooper_jax/runtime/metric_glossary.py; tests/test_docs.py
compares the pages with them.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cooper_jax.configs import base  # noqa: E402
from cooper_jax.runtime import metric_glossary  # noqa: E402
from cooper_jax.settings.config_fields import Field, list_fields, read_comments  # noqa: E402

COMMAND = "python tests/reference_pages.py --write"
# Paths of pages in comments, such as "docs/lora.md": links on the page.
PAGES = re.compile(r"\bdocs/(\w+)\.md\b")


def escape_cell(text: str) -> str:
    """Text as a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


# --- configuration -----------------------------------------------------------------------------------


def render_configuration() -> str:
    """The page of all fields, with a heading for each section."""
    fields = list_fields(base.get_config())
    parts = [
        f"""<!-- written by: {COMMAND} -->
# Configuration reference

Every setting with its default in `configs/base.py`. Each is a flag of the launch scripts:
`--config.SECTION.FIELD=VALUE`. The files in `configs/` change some of the defaults; `python launch/train.py
--config=configs/tiny.py --help` shows the values of one of them. A misspelt or a renamed flag is an error that
names the right one. Sizes are in tokens unless the text gives another unit; an empty string means "none".

Two fields name a set of values of other fields, whose own flags take precedence: `reward.recipe`
([reward_updates.md](reward_updates.md#recipes)) and `policy.algorithm`
([algorithms.md](algorithms.md#from-paper-to-flags))."""
    ]
    for section, title in list_sections(fields):
        rows = [field for field in fields if get_parent(field.name) == section]
        heading = f"{'###' if '.' in section else '##'} `{section}`" if section else "## The run"
        parts += [part for part in (heading, title, render_fields(rows)) if part]
    return "\n\n".join(parts) + "\n"


def get_parent(name: str) -> str:
    """The section of a dotted name; "" outside all."""
    return name.rpartition(".")[0]


def list_sections(fields: list[Field]) -> list[tuple[str, str]]:
    """Each section that has fields, with what configs/base.py says about it; sections within one follow it."""
    comments, builders = read_comments(base), find_builders()
    heads = list(dict.fromkeys(field.section for field in fields))
    parents = dict.fromkeys(get_parent(field.name) for field in fields)
    sections = sorted(parents, key=lambda name: (heads.index(name.partition(".")[0]), name))
    return [(name, link_pages(comments.get(name, "") or builders.get(name, ""))) for name in sections]


def find_builders() -> dict[str, str]:
    """The first paragraph of the docstring of the function that builds a section, by the section's name."""
    tree = ast.parse(inspect.getsource(base))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    found: dict[str, str] = {}

    def visit(function: str, prefix: str) -> None:
        for node in functions[function].body:
            if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
                continue
            called = ast.unparse(node.value.func)
            if called not in functions:
                continue
            name = ast.unparse(node.targets[0]).partition(".")[2]
            section = f"{prefix}{name}" if name else prefix.rstrip(".")
            docstring = (ast.get_docstring(functions[called]) or "").split("\n\n")[0]
            found.setdefault(section, " ".join(docstring.split()))
            visit(called, f"{section}." if section else "")

    visit("get_config", "")
    return found


def render_fields(fields: list[Field]) -> str:
    """A table of fields, with their defaults and comments."""
    lines = ["| field | default | meaning |", "| --- | --- | --- |"]
    for field in fields:
        default = render_default(field.value)
        lines.append(f"| `{field.name}` | {default} | {link_pages(escape_cell(field.comment))} |")
    return "\n".join(lines)


def render_default(value: object) -> str:
    """A default as Python writes it; long ones are cut to their beginning."""
    text = repr(value)
    if len(text) > 60:
        return f"`{escape_cell(text[:40])} ...`"
    return f"`{escape_cell(text)}`"


def link_pages(text: str) -> str:
    """Paths of pages as links."""
    return PAGES.sub(r"[\1.md](\1.md)", text)


# --- metrics -----------------------------------------------------------------------------------------


def render_metrics() -> str:
    """The page of all metrics."""
    return f"""<!-- written by: {COMMAND} -->
# Metrics glossary

Every name that can occur in `metrics.jsonl`, one line of which is one step
([training.md](training.md#the-run-directory)). A part of a name in capitals stands for a name that the run decides.
Metrics that do not apply to a run are absent; a mean over nothing is `null`. Rates of the reward model compare its
decision (score above 1/2) with the rule verifier's verdict, on *decidable* responses: those found correct, wrong or
without an answer. For programs, `cooper_jax.runtime.metric_glossary.describe_metric(name)` has these texts.

What to look at first: `eval/rule/accuracy` (held-out accuracy by the rule), `reward/mean`,
`rm/false_positive_rate`, `policy/kl`, `pairs/valid_share`.

The evaluation measures held-out responses under the same names with a prefix: `eval/` (sampled), `eval/greedy/`
(greedy), `eval/by_source/SOURCE/` (the problems of one source, if there are several).

{render_glossary(metric_glossary.RUN_METRICS)}

## Reasons for refused pairs

The endings of `pairs/refused_REASON`; [no_pairs.md](no_pairs.md) says what to do about the frequent ones.

{render_rows("reason", metric_glossary.REFUSAL_REASONS)}

## Reward-model training

Names in the `metrics.jsonl` of `launch/train_rm.py`; one line is one update.

{render_glossary(metric_glossary.REWARD_TRAINING_METRICS, "###")}
"""


def render_glossary(glossary: metric_glossary.Glossary, level: str = "##") -> str:
    """A heading and a table for each group of metrics."""
    return "\n\n".join(
        f"{level} {title}\n\n{render_rows('metric', rows)}" for title, rows in glossary.items()
    )


def render_rows(kind: str, rows: Mapping[str, str]) -> str:
    """A table of names and descriptions."""
    lines = [f"| {kind} | meaning |", "| --- | --- |"]
    lines += [f"| `{name}` | {escape_cell(text)} |" for name, text in rows.items()]
    return "\n".join(lines)


RENDERERS = {"configuration.md": render_configuration, "metrics.md": render_metrics}


def main() -> None:
    """Write the pages with --write, or print them."""
    for name, render in RENDERERS.items():
        if "--write" in sys.argv[1:]:
            (ROOT / "docs" / name).write_text(render(), encoding="utf-8")
        else:
            print(render(), end="")


if __name__ == "__main__":
    main()
