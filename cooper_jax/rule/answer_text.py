r"""Normalisation of an answer's text: one spelling for each character, command and number.

`normalise_text` maps typographic and full-width characters to ASCII and LaTeX, removes commands that only
change the layout (`\left`, `\,`, `\displaystyle`), and turns every roman or bold command into `\text{..}`,
except for constants and functions (`\mathrm{i}`, `\mathrm{ln}`), which become the symbol.  `make_key` is
the form in which two texts are compared character by character.

This module imports nothing from this project.
"""

from __future__ import annotations

import re
import unicodedata

_CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "－": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
    "÷": "/", "⁄": "/", "∕": "/", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "≡": r"\equiv ", "±": r"\pm ", "∞": r"\infty ", "∅": r"\emptyset ", "∪": r"\cup ",
    "∩": r"\cap ", "∈": r"\in ", "°": r"^\circ ", "º": r"^\circ ", "℃": r"\text{celsius}", "′": "'", "’": "'",
    "‘": "'", "“": '"', "”": '"', "「": '"', "」": '"', "…": r"\ldots ", "⋯": r"\ldots ", "⟨": r"\langle ",
    "⟩": r"\rangle ", "〈": r"\langle ", "〉": r"\rangle ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "。": ".", "、": ",", "∶": ":", "％": "%", "√": r"\sqrt ",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "ε": r"\epsilon ", "θ": r"\theta ",
    "λ": r"\lambda ", "μ": r"\mu ", "ν": r"\nu ", "π": r"\pi ", "ρ": r"\rho ", "σ": r"\sigma ", "τ": r"\tau ",
    "φ": r"\phi ", "ϕ": r"\phi ", "χ": r"\chi ", "ψ": r"\psi ", "ω": r"\omega ", "Δ": r"\Delta ",
    "Ω": r"\Omega ", "\u200b": "", "\u200c": "", "\u200d": "", "\ufeff": "", "\u2060": "",
}  # fmt: skip
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))

# Commands of layout alone, and spaces.
_LAYOUT = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|mathstrut|phantom\{\}|hfill)(?![A-Za-z])\.?"
    r"|\\!"
)
_SPACE = re.compile(
    r"(?<!\\)\\[,;:> ]|(?<!\\)\\(?:quad|qquad|thinspace|enspace|nobreakspace|space)(?![A-Za-z])|~|[\s\xa0]+"
)
# Commands with another spelling.
_SYNONYMS = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "leq": "le", "leqslant": "le", "leqq": "le", "geq": "ge",
    "geqslant": "ge", "geqq": "ge", "neq": "ne", "lt": "<", "gt": ">", "lbrace": r"\{", "rbrace": r"\}",
    "lbrack": "[", "rbrack": "]", "varnothing": "emptyset", "dots": "ldots", "cdots": "ldots", "dotsc": "ldots",
    "bmod": "pmod", "mod": "pmod", "degree": r"^\circ ", "varphi": "phi", "varepsilon": "epsilon",
    "dbinom": "binom", "tbinom": "binom", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "colon": ":",
    "arctg": "arctan",
    "tg": "tan", "ctg": "cot", "lg": "log", "land": "and", "wedge": "and", "lor": "or", "vee": "or", "ast": "*",
    "to": "rightarrow", "setminus": "backslash", "fbox": "boxed", "iff": "Leftrightarrow", "thickapprox": "approx",
}  # fmt: skip
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_ROMAN = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|mathrm|mathbf|mathit|mathsf|mathtt|mbox|hbox|operatorname\*?|bm|"
    r"boldsymbol|rm|bf|textnormal|unit|emph)\s*\{([^{}]*)\}"
)
_TYPED_GREEK = re.compile(r"(?<![A-Za-z\\])(theta|alpha|beta|gamma|lambda|sigma|delta|omega)(?![A-Za-z])")
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp max min gcd lcm".split()
)
# Groups of three digits with separators other than a comma: 10\,000, 10{,}000, 10 000.
_GROUP = re.compile(r"(?<![\d.])(\d{1,3}(?:,\d{3})*)(?:\{,\}|,?\\[,! ]|~| |,\\!\s?)+(?=\d{3}(?!\d))")


def normalise_text(text: str) -> str:
    r"""Write an answer in ASCII and LaTeX with one spelling, without surrounding delimiters and punctuation."""
    if not text.isascii():
        text = _map_characters(text)
    s = re.sub(r"^[\s$*]*~\s*(?=[-\d])", r"\\approx ", text.strip())  # about; elsewhere ~ is a space
    if "\\\\" in s and "\\begin" not in s:
        s = s.replace("\\\\", "\\")  # LaTeX escaped for JSON
    s = strip_delimiters(s)
    if re.fullmatch(r"\[ *\"[^\[\]]*\" *\]", s):
        s = s[1:-1].replace('"', "")  # a JSON list of strings

    # Numbers with thousands separators, before their spaces are removed.
    s = s.replace(r"\$", "$").replace(r"\%", "%").replace(r"\#", "#").replace(r"\&", "&")
    before = None
    while s != before:  # each pass joins one group
        before, s = s, _GROUP.sub(r"\1,", s)

    # Commands, from the outside inwards where one depends on the other.
    s = _LAYOUT.sub(" ", s) if "\\" in s else s
    s = _SPACE.sub(" ", s)
    if "\\" in s:
        s = _COMMAND.sub(_name_command, s)
        s = _ROMAN.sub(_name_roman, s)
        s = re.sub(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}", s)
        s = re.sub(r"\\pmod ?(?:\{([^{}]*)\}|(\w+))", r"\\pmod{\1\2}", s)
        s = re.sub(r"\( ?\\pmod\{([^{}]*)\} ?\)", r"\\pmod{\1}", s)
        s = re.sub(r"_ ?\{?\\(max|min) ?(?:\}|(?![A-Za-z]))", r"_{\1}", s)
    else:
        s = _TYPED_GREEK.sub(r"\\\1 ", s)
    return strip_delimiters(_strip_wrapper(s.replace("**", "^").strip()))


def strip_delimiters(s: str) -> str:
    """Remove quotation marks, emphasis, formula delimiters and final punctuation around an answer."""
    before = None
    while s != before:
        before = s
        s = s.strip('"`').removesuffix("**").removeprefix("**").strip()
        if len(s) > 1 and s[0] == "*" == s[-1]:
            s = s[1:-1].strip()
        # A prime belongs to the answer; a pair of quotation marks does not.
        if len(s) > 1 and s[0] == "'" == s[-1]:
            s = s[1:-1].strip()
        s = s.rstrip(" ,;:\n\t" + ("}" if s.count("}") > s.count("{") else ""))
        if s.endswith(".") and not s.endswith(".."):
            s = s[:-1].rstrip()
        for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            inner = s[len(left) : -len(right)]
            if s.startswith(left) and s.endswith(right) and len(s) > len(left) and left not in inner:
                s = inner.strip()
    return s


def make_key(text: str) -> str:
    """The form of a normalised text in which equal answers have equal characters."""
    # A space between two letters or digits separates them: `2 1/2` is not `21/2`, and `2, 500` is not `2,500`.
    s = re.sub(r"(?<![A-Za-z0-9,]) | (?![A-Za-z0-9])|(?<=,) (?!\d{3}(?!\d))", "", " ".join(text.split()))
    s = re.sub(r"\\text\{([^{}]*)\}", lambda m: m[1].strip().lower(), s)
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", s)


def _map_characters(text: str) -> str:
    """Map full-width, typographic and mathematical characters to ASCII and LaTeX."""
    pieces: list[str] = []
    for char in text:
        if char in _CHARACTERS:
            pieces.append(_CHARACTERS[char])
        elif char in _SUPERSCRIPTS:
            pieces.append("^{" + _SUPERSCRIPTS[char] + "}")
        elif char in _SUBSCRIPTS:
            pieces.append("_{" + _SUBSCRIPTS[char] + "}")
        elif "⁄" in (folded := unicodedata.normalize("NFKC", char)) and len(folded) > 2:
            top, bottom = folded.split("⁄")  # ½, also in 2½
            pieces.append(rf"\frac{{{top}}}{{{bottom}}}")
        elif unicodedata.category(char) == "Nd":
            pieces.append(str(unicodedata.digit(char)))  # digits of other scripts
        else:
            pieces.append("".join(_CHARACTERS.get(c, c) for c in folded))
    return re.sub(r"\}\^\{|\}_\{(?=\d\})", "", "".join(pieces)) if "^{" in pieces else "".join(pieces)


def _name_command(match: re.Match[str]) -> str:
    name = _SYNONYMS.get(match[1], match[1])
    if name in ("and", "or"):
        return rf"\text{{ {name} }}"
    return "\\" + name if name.isalpha() else name


def _name_roman(match: re.Match[str]) -> str:
    r"""The constant, function or \text that a roman or bold command stands for."""
    command, inner = match[0], match[1].strip()
    if command.startswith("\\text{") or not inner:
        return rf"\text{{{match[1]}}}"
    is_roman = command.startswith(("\\mathrm", "\\operatorname", "\\rm"))
    if is_roman and inner.lower() in _FUNCTIONS:
        return f"\\{inner.lower()} "
    # Roman i, e and pi are constants; a single bold letter is a symbol.  Other roman letters may be units.
    if inner in ("i", "e") or (len(inner) == 1 and not is_roman and not command.startswith("\\text")):
        return f" {inner} " if inner.isalpha() else inner
    if re.fullmatch(r"[-+]?[\d.,]+", inner):
        return inner
    return rf"\text{{{match[1]}}}"


def _strip_wrapper(s: str) -> str:
    r"""Remove `\text{..}`, `\boxed{..}` or `{..}` around the whole answer."""
    while match := re.match(r"(?:\\(?:text|boxed) ?)?\{", s):
        depth = 1
        for i in range(match.end(), len(s)):
            depth += (s[i] == "{") - (s[i] == "}") if s[i - 1] != "\\" else 0
            if depth == 0:
                break
        if depth or i < len(s) - 1:
            return s
        s = s[match.end() : -1].strip()
    return s
