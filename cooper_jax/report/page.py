"""The HTML file of a report: one page with its data, styles and scripts, which loads nothing.

1. The sources of styles and scripts are the files in `static/`.  The scripts share one function's scope.
2. The data are a JSON block.  `<`, `>` and `&` are written as escapes in it, so no text can end the block.  The
   scripts put texts into the page as text nodes only, never as HTML.
3. The Content-Security-Policy allows the hashes of this style and this script, and nothing else: no request of any
   kind, no other script, even if some text got into the page as HTML.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

STATIC = Path(__file__).resolve().parent / "static"
TEMPLATE, STYLE = "report.html", "report.css"
# Characters that no title needs: HTML does not allow them, or they reorder the text behind them.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# In the order in which they are joined: a file uses what the files before it define.
SCRIPTS = (
    "elements.js",
    "series.js",
    "line_chart.js",
    "bar_charts.js",
    "text_difference.js",
    "overview.js",
    "training_sections.js",
    "sample_browser.js",
    "other_sections.js",
    "main.js",
)


def write_page(data: dict[str, Any]) -> bytes:
    """Make the page.  data: the result of `report_data.encode_report`."""
    style = (STATIC / STYLE).read_text(encoding="utf-8")
    parts = [(STATIC / name).read_text(encoding="utf-8") for name in SCRIPTS]
    script = "(() => {\n" + "\n".join(['"use strict";', *parts]) + "\n})();\n"
    values = {
        "title": html.escape(CONTROL.sub("\ufffd", data["title"])),
        "policy": make_policy(style, script),
        "style": style,
        "data": encode_data(data),
        "script": script,
    }

    # Each placeholder occurs once, and is looked for in the template alone: a text may contain one.
    page = []
    for piece in (STATIC / TEMPLATE).read_text(encoding="utf-8").split("{{"):
        name, closing, rest = piece.partition("}}")
        page.append(values[name] + rest if closing else piece)
    # A lone surrogate is no UTF-8; its escape means the same in JSON.
    return "".join(page).encode("utf-8", "backslashreplace")


def make_policy(style: str, script: str) -> str:
    """The Content-Security-Policy that allows one style and one script."""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def encode_data(data: dict[str, Any]) -> str:
    """Encode the data as JSON that HTML cannot misread inside a script element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # These characters occur in JSON's strings only, where an escape means the same.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
