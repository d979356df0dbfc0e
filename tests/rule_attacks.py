"""Generated attacks on the rule verifier: texts that are costly, malformed or written to run as code.

`generate_attacks` draws them with Hypothesis, the same ones for the same count.  None of them has the value of
REFERENCE, so none may be called correct.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

REFERENCE = "1234577"
MEGABYTE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Attack:
    """A completion, and what it tries."""

    kind: str
    text: str


def _repeat(unit: str, largest: int) -> st.SearchStrategy[str]:
    """A text repeated, most often few times and at times up to `largest` bytes."""
    counts = st.integers(0, 20).map(lambda bits: min(1 << bits, max(1, largest // len(unit))))
    return counts.map(lambda count: unit * count)


def _nest(opening: str, inner: str, closing: str, deepest: int) -> st.SearchStrategy[str]:
    """An expression within many others, or with its end missing."""
    depths = st.integers(0, 17).map(lambda bits: min(1 << bits, deepest))
    return st.builds(
        lambda depth, ends: opening * depth + inner + closing * (depth * ends), depths, st.booleans()
    )


def _tower() -> st.SearchStrategy[str]:
    return st.lists(
        st.sampled_from(["9", "99", "10^{9}", "9!", "(-2)", "0.5", "x", "e", "i"]), min_size=2, max_size=40
    ).map(lambda parts: "^{".join(parts) + "}" * (len(parts) - 1))


def _factorial() -> st.SearchStrategy[str]:
    return st.builds(
        lambda base, depth: "(" * depth + str(base) + "!)" * depth, st.integers(3, 10**9), st.integers(1, 300)
    )


def _large_operator() -> st.SearchStrategy[str]:
    forms = st.sampled_from([
        "\\sum_{{n=1}}^{{{0}}} n^{{n}}",
        "\\prod_{{k=1}}^{{{0}}} (k^{{k}}+1)",
        "\\binom{{{0}}}{{{1}}}",
        "\\int_0^{{{0}}} x^{{x^{{x}}}} \\sin(x^{{{1}}}) dx",
        "\\lim_{{x \\to \\infty}} \\left(1+\\frac{{1}}{{x}}\\right)^{{x^{{{0}}}}}",
        "\\gcd({0}, {1}) \\cdot \\text{{lcm}}({0}, {1})",
        "{0} \\bmod {1}^{{{0}}}",
        "\\sqrt[{0}]{{{1}^{{{0}}}}}",
        "\\frac{{{0}!}}{{({0}-1)!}}",
        "\\log_{{{0}}} {1}^{{{0}}}",
        "1e{0}",
        "0.{1}e-{0}",
        "{0}:{1}:{0}",
    ])  # fmt: skip
    numbers = st.one_of(st.integers(2, 10**6), st.integers(10**8, 10**40))
    return st.builds(lambda form, a, b: form.format(a, b), forms, numbers, numbers)


def _matrix() -> st.SearchStrategy[str]:
    def build(rows: int, columns: int, entry: str, kind: str) -> str:
        body = " \\\\ ".join([" & ".join([entry] * columns)] * rows)
        return f"\\det\\begin{{{kind}matrix}} {body} \\end{{{kind}matrix}}^{{99}}"

    entries = st.sampled_from(["x", "9^{9^9}", "\\frac{1}{x}", "0", "\\sqrt{2}"])
    return st.builds(
        build, st.integers(1, 200), st.integers(1, 200), entries, st.sampled_from(["", "p", "b"])
    )


def _collection() -> st.SearchStrategy[str]:
    return st.builds(
        lambda count, left, right, step: left + ", ".join(str(i * step) for i in range(count)) + right,
        st.integers(1, 20_000), st.sampled_from(["\\{", "(", "["]), st.sampled_from(["\\}", ")", "]"]),
        st.integers(2, 10**12),
    )  # fmt: skip


def _injection(canary: Path) -> st.SearchStrategy[str]:
    """Texts that would make the file `canary` if anything evaluated them."""
    return st.sampled_from([
        f"__import__('os').system('touch {canary}')",
        f"open('{canary}', 'w').write('x')",
        f"exec(\"open('{canary}','w')\")",
        f"eval('__import__(\"pathlib\").Path(\"{canary}\").touch()')",
        f"(lambda: open('{canary}','w'))()",
        f"[c for c in ().__class__.__base__.__subclasses__() if open('{canary}','w')]",
        f"Symbol('x').__init__.__globals__['__builtins__']['open']('{canary}','w')",
        f"\\immediate\\write18{{touch {canary}}}",
        f"\\input{{|touch {canary}}}",
        f"\\openout1={canary}\\write1{{x}}",
        f"$(touch {canary})",
        f"`touch {canary}`",
        f"1; import os; os.system('touch {canary}')",
        f"x'); open('{canary}', 'w'); ('",
        f"\\text{{{{0.__class__.__init__.__globals__}}}} {canary}",
        f"cos\nposix\nsystem\n(S'touch {canary}'\ntR.",
        f"!!python/object/apply:os.system ['touch {canary}']",
        f"\\include{{{canary}}}", "%s%s%s%n", "{0.__class__.__mro__}", "${jndi:ldap://127.0.0.1/a}",
    ])  # fmt: skip


def _odd_characters() -> st.SearchStrategy[str]:
    """Control characters, halves of surrogate pairs, right-to-left marks, digits of other scripts."""
    pieces = st.sampled_from([
        "\x00", "\x07", "\x1b[2J", "\r", "\x0b", "\x85", "\u2028", "\ud800", "\udfff", "\u202e", "\u2066", "\u200b",
        "\ufeff", "\u0301", "\uff11", "\u0663", "\u0967", "\u2460", "\u00bd", "\u4e94", "\U0001d7d9",
        "\u2212", "\u221e", "1", "7",
        "\\", "{", "}", "$", "^", "_", "%", "&", "#", "~",
    ])  # fmt: skip
    return st.lists(pieces, min_size=1, max_size=400).map("".join)


def _bodies(canary: Path) -> dict[str, st.SearchStrategy[str]]:
    """Kind of attack -> its expressions."""
    return {
        "tower": _tower(),
        "factorial": _factorial(),
        "operator": _large_operator(),
        "matrix": _matrix(),
        "collection": _collection(),
        "nesting": st.one_of(
            _nest("{", "1", "}", 1 << 17),
            _nest("(", "1", ")", 1 << 17),
            _nest("\\frac{1}{", "x", "}", 1 << 14),
            _nest("\\sqrt{", "2", "}", 1 << 14),
            _nest("\\left(", "x", "\\right)", 1 << 14),
            _nest("x^{", "2", "}", 1 << 14),
            _nest("\\text{", "7", "}", 1 << 14),
            _nest("\\begin{cases}", "1", "\\end{cases}", 1 << 12),
            _nest("-", "1", "", 1 << 17),
        ),
        "length": st.one_of(
            *(_repeat(unit, MEGABYTE) for unit in (
                "9", "1,", "1+", "x*", "\\frac12", "\\boxed{1}", "the answer is 1. ", "\\boxed{", "$", "$1$ ",
                "\\\\",
                "####1\n", "1 or ", " ", "\n", "-", ".1", "%", "1/", "\\text{a}", "a=", "<", "\u0661",
            ))
        ),
        "injection": _injection(canary),
        "characters": _odd_characters(),
        "anything": st.text(max_size=2000),
    }  # fmt: skip


# How a completion states its answer.
_FRAMES = (
    "\\boxed{%s}", "%s", "$%s$", "\\[%s\\]", "The answer is %s.", "#### %s", "So x = %s", "**Final answer**: %s",
    "\\boxed{%s",
    "\\boxed{x = %s}", "Answer: $\\frac{%s}{%s}$", "\\boxed{%s} or \\boxed{%s}", "\\boxed{\\text{%s}}",
    "<answer>%s</answer>",
)  # fmt: skip


def generate_attacks(count: int, canary: Path) -> list[Attack]:
    """Generate about `count` different attacks, of all kinds alike.

    canary: a file that does not exist, which an attack that is run as code would make.
    """
    bodies = _bodies(canary)
    wanted = -(-count // len(bodies))
    return [attack for kind, body in bodies.items() for attack in _draw_attacks(kind, body, wanted)]


def _draw_attacks(kind: str, body: st.SearchStrategy[str], wanted: int) -> list[Attack]:
    """Draw different attacks of a kind; fewer than wanted if there are not so many."""
    distinct: dict[Attack, None] = {}

    # Without a database and with derandomize, the same examples are drawn each time.
    @settings(
        max_examples=10 * wanted,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(_FRAMES), body)
    def collect(frame: str, text: str) -> None:
        if len(distinct) < wanted:
            distinct[Attack(kind, frame.replace("%s", text))] = None

    collect()
    return list(distinct)
