"""Hooks of mkdocs: pages and a section from outside docs/, and links that leave docs/.

The pages are written for a reader of the repository, so they link to files such as ../kernels/README.md.  On the
site, a link to a file that is a page there goes to that page; if its text is the file's name, it becomes the title
in the navigation.  Of a link to any other file of the repository the text remains.  A link to a file that does not
exist is a warning, and `mkdocs build --strict` fails.
"""

from __future__ import annotations

import functools
import logging
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

# Tests import this file where mkdocs is not installed.
if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
LOG = logging.getLogger("mkdocs.hooks.links")  # warnings below `mkdocs` count in --strict

# Files of the repository that are pages of the site.
ADDED = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "kernels/README.md": "kernels.md",
}
# Sections of README.md, which is no page of the site -> the pages that say the same.
README = {
    "install": "install.md",
    "quick-start": "quick_start.md",
    "results": "results.md",
    "status": "index.md#status",
}
# Stands in a page for a section of README.md, which the site shows there.
SECTION = re.compile(r"<!-- README\.md: (.+) -->")

LINK = re.compile(r"(?P<text>!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<target>[^()\s]+)\)")
# Fenced blocks and inline code, in which nothing is a link.
CODE = re.compile(r"^ *(`{3,}).*?^ *\1 *$|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/."""
    from mkdocs.structure.files import File

    for source, page in ADDED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=rewrite_links(text, source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put sections of README.md into a page of docs/, and rewrite its links."""
    if page.file.src_uri in ADDED.values():
        return markdown
    markdown = rewrite_links(markdown, f"docs/{page.file.src_uri}")
    return SECTION.sub(lambda match: rewrite_links(read_section(match[1]), "README.md"), markdown)


def read_section(title: str) -> str:
    """A section of README.md, with its heading."""
    sections = re.split(r"^(?=## )", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = [section for section in sections if section.startswith(f"## {title}\n")]
    if not found:
        LOG.warning("README.md has no section %s", title)
    return "".join(found)


def rewrite_links(markdown: str, source: str) -> str:
    """Rewrite the links of a Markdown file, whose path in the repository is `source`."""
    parts, end = [], 0
    # A link's text may be code, so only a whole link inside code is left alone.
    code = [(match.start(), match.end()) for match in CODE.finditer(markdown)]
    for match in LINK.finditer(markdown):
        if any(start <= match.start() and match.end() <= stop for start, stop in code):
            continue
        parts += [markdown[end : match.start()], rewrite_link(match["text"], match["target"], source)]
        end = match.end()
    return "".join([*parts, markdown[end:]])


@functools.cache
def read_titles() -> dict[str, str]:
    """Each page of the navigation -> its title there."""
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    return {page: title for title, page in re.findall(r"^ *- (.+): (\w+\.md)$", site, re.MULTILINE)}


def rewrite_link(text: str, target: str, source: str) -> str:
    """One link as the site has it."""
    if re.match(r"[a-z]+:|#", target):
        return f"{text}({target})"
    path, _, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if path == "README.md" and anchor in README:
        return f"{text}({README[anchor]})"
    if path == "README.md":
        LOG.warning("%s: the link to %s is to a section that is no page of the site", source, target)
    if path in ADDED or path.startswith("docs/"):
        page = ADDED.get(path, path.removeprefix("docs/"))
        if text == f"[{posixpath.basename(path)}]":
            text = f"[{read_titles().get(page, page)}]"
        return f"{text}({page}{'#' if anchor else ''}{anchor})"
    if not (ROOT / path).exists():
        LOG.warning("%s: the link to %s leads nowhere", source, target)
    label = text.strip("![]")
    return label if "`" in label or label != path else f"`{path}`"
