r"""A parser of one formula, in LaTeX or as typed, into an expression.

It reads all of its text or raises `Unreadable`: nothing is skipped, since a part that is left out may be
what makes an answer wrong.  Letters side by side are a product.  Relations, lists and brackets of
collections are not formulas; answer_parser.py takes them apart.  Sums, products, integrals and limits are
read by math-verify.
"""

from __future__ import annotations

import re
from fractions import Fraction

from cooper_jax.rule.expressions import (
    LOG_BASE,
    Call,
    Constant,
    Expression,
    Foreign,
    Number,
    Symbol,
    find_symbols,
)

MAX_LENGTH = 2000  # characters of one formula
MAX_DEPTH = 40  # of brackets and braces
MAX_DIGITS = 5000  # of one number
MAX_FOREIGN = 200  # characters of a formula for math-verify

_GREEK = frozenset(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi "
    "omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar".split()
)
_FUNCTIONS = frozenset("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp".split())
_INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
# As typed, without a backslash.  Long names first.
_TYPED = ("arcsin", "arccos", "arctan", "sqrt", "sinh", "cosh", "tanh", "sin", "cos", "tan", "cot", "sec", "csc",
          "log", "exp", "ln", "pi")  # fmt: skip
_FOREIGN = re.compile(r"\\(?:sum|prod|int|iint|lim|det)(?![A-Za-z])|\\begin\{vmatrix\}")
_TOKEN = re.compile(
    r" *(?:(?P<number>\d[\d,]*(?:\.\d+|\.(?=\\overline|\\dot))?|\.\d+)"
    r"(?:(?P<repeat>\\overline ?\{\d+\}|\\dot ?\{?\d\}?))?"
    r"|(?P<command>\\(?:[A-Za-z]+|[{}|]))|(?P<word>[A-Za-z]+)|(?P<mark>.))",
    re.DOTALL,
)
_RANGE = re.compile(r"\\(?:sum|prod) ?_ ?\{[^{}]*\} ?\^ ?(?:\{([^{}]*)\}?|(\\?\w+))")
_TOWER = re.compile(r"\^ ?\{[^{}]*\^ ?\{[^{}]*\^|\d ?\^ ?\{? ?\d+ ?\^|\d ?\^ ?\{? ?\d{3}|!")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_CLOSING = {"(": ")", "[": "]", "{": "}"}


class Unreadable(ValueError):
    """A formula that the parser cannot read as a whole."""


def needs_math_verify(text: str) -> bool:
    """True for sums, products, integrals, limits and determinants."""
    return _FOREIGN.search(text) is not None


def parse_formula(text: str) -> Expression:
    """The expression of a normalised formula (answer_text.py).  Raises Unreadable."""
    if len(text) > MAX_LENGTH or not text.strip():
        raise Unreadable("the formula is empty or too long")
    if needs_math_verify(text):
        return _parse_foreign(text)
    parser = _Parser(_split_tokens(text))
    node = parser.parse_sum()
    if parser.kind != "end":
        raise Unreadable(f"unexpected {parser.text!r}")
    return node


def _split_tokens(text: str) -> list[tuple[str, str]]:
    """(kind, text) of each token, ended by ("end", "").  Raises Unreadable for brackets nested too deeply."""
    tokens: list[tuple[str, str]] = []
    depth = 0
    position, text = 0, text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise Unreadable(text[position:])
        position = match.end()
        kind = match.lastgroup or "mark"
        if match["number"] is not None:
            tokens.append(("number", match["number"] + (match["repeat"] or "")))
        elif kind == "word":
            tokens += _split_word(match["word"])
        else:
            tokens.append((kind, match[kind]))
        depth += tokens[-1][1] in ("(", "[", "{")
        depth -= tokens[-1][1] in (")", "]", "}")
        if depth > MAX_DEPTH:
            raise Unreadable("brackets are nested too deeply")
    return [*tokens, ("end", "")]


def _split_word(word: str) -> list[tuple[str, str]]:
    """Typed names of functions and constants, and single letters."""
    tokens = []
    while word:
        name = next((name for name in _TYPED if word.startswith(name)), "")
        tokens.append(("command", "\\" + name) if name else ("letter", word[0]))
        word = word[len(name) or 1 :]
    # A run of letters is a product up to three; beyond that it is a word.
    if sum(kind == "letter" for kind, _ in tokens) > 3:
        raise Unreadable("a word")
    return tokens


class _Parser:
    """Recursive descent: sums of products of powers."""

    def __init__(self, tokens: list[tuple[str, str]]):
        self._tokens, self._position, self._depth = tokens, 0, 0
        self._bars = 0  # open bars |..

    @property
    def kind(self) -> str:
        return self._tokens[self._position][0]

    @property
    def text(self) -> str:
        return self._tokens[self._position][1]

    def _next(self) -> tuple[str, str]:
        token = self._tokens[self._position]
        self._position += token[0] != "end"
        return token

    def _take(self, text: str) -> bool:
        if self.text == text and self.kind != "end":
            self._position += 1
            return True
        return False

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise Unreadable(f"{text!r} is missing")

    def parse_sum(self) -> Expression:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        terms = [self._parse_signed()]
        while self.text in ("+", "-"):
            terms.append(self._parse_signed())
        self._depth -= 1
        return terms[0] if len(terms) == 1 else Call("add", tuple(terms))

    def _parse_signed(self) -> Expression:
        negative = False
        signs = 0
        while self.text in ("+", "-"):
            negative ^= self._next()[1] == "-"
            signs += 1
        if signs > 2:
            raise Unreadable("a row of signs")
        product = self._parse_product()
        return Call("negate", (product,)) if negative else product

    def _parse_product(self) -> Expression:
        product = self._parse_power()
        after_slash = False
        while True:
            if self.text in ("*", "\\cdot", "\\times"):
                self._next()
                product = Call("multiply", (product, self._parse_factor()))
                after_slash = False
            elif self.text in ("/", "\\div"):
                self._next()
                product = Call("divide", (product, self._parse_factor()))
                after_slash = True
            elif self._starts_factor():
                # 1/2x is (1/2)x to some and 1/(2x) to others; 1/2 ln x is not.
                if after_slash and self.text[1:] not in _FUNCTIONS:
                    raise Unreadable("a product behind a slash")
                product = self._parse_implicit(product)
            else:
                return product

    def _parse_factor(self) -> Expression:
        """A factor behind an operator, which may have a sign."""
        if self.text == "-":
            self._next()
            return Call("negate", (self._parse_power(),))
        return self._parse_power()

    def _parse_implicit(self, left: Expression) -> Expression:
        """A factor without an operator: a product, or the fraction of a mixed number."""
        is_fraction = self.text == "\\frac"
        if self.kind == "number" and self._tokens[self._position - 1][0] == "number":
            raise Unreadable("two numbers side by side")
        right = self._parse_power()
        if isinstance(left, Number) and is_fraction and not left.step and not find_symbols(right):
            top, bottom = _find_fraction(right)
            if top is not None and bottom is not None and left.value.denominator == 1:
                if not 0 < top < bottom:
                    raise Unreadable("a whole number beside an improper fraction")
                return Number(left.value + Fraction(top, bottom))
        return Call("multiply", (left, right))

    def _starts_factor(self) -> bool:
        if self.kind in ("number", "letter"):
            return True
        if self.kind == "command":
            return self.text not in ("\\cdot", "\\times", "\\div", "\\rfloor", "\\rceil", "\\}")
        return self.text in ("(", "[", "{") or (self.text == "|" and not self._bars)

    def _parse_power(self) -> Expression:
        base = self._parse_atom()
        while True:
            if self.text == "!":
                self._next()
                base = Call("factorial", (base,))
            elif self.text == "^":
                self._next()
                base = self._raise(base)
            else:
                return base

    def _raise(self, base: Expression) -> Expression:
        """The power whose sign ^ has just been read."""
        # 90^\circ: degrees are a unit, which is split off before; within a formula they are a factor.
        if self.text == "\\circ" or (self.text == "{" and self._tokens[self._position + 1][1] == "\\circ"):
            self._take("{")
            self._next()
            if self._tokens[self._position][1] == "}":
                self._take("}")
            return Call("multiply", (base, Call("divide", (Constant("pi"), Number(Fraction(180))))))
        exponent = self._parse_argument(signed=True)
        return Call("power", (base, exponent))

    def _parse_argument(self, signed: bool = False) -> Expression:
        r"""The argument of ^, \frac or \sqrt: a group in braces, one digit, one symbol or one command."""
        if self._take("{"):
            node = self.parse_sum()
            self._expect("}")
            return node
        if signed and self._take("-"):
            return Call("negate", (self._parse_argument(),))
        if self.kind == "number" and not signed and len(self.text) > 1 and self.text.isdigit():
            # \frac12: only the first digit is the argument.
            digits = self.text
            self._tokens[self._position] = ("number", digits[1:])
            return Number(Fraction(int(digits[0])))
        return self._parse_atom()

    def _parse_atom(self) -> Expression:
        kind, text = self._next()
        if kind == "number":
            return parse_number(text)
        if kind == "letter":
            return self._parse_symbol(text)
        if kind == "command":
            return self._parse_command(text[1:])
        if text in _CLOSING:
            node = self.parse_sum()
            self._expect(_CLOSING[text])
            return node
        if text == "|":
            self._bars += 1
            node = self.parse_sum()
            self._bars -= 1
            self._expect("|")
            return Call("abs", (node,))
        raise Unreadable(f"unexpected {text!r}")

    def _parse_symbol(self, name: str) -> Expression:
        """A letter with its subscript; e and i are constants."""
        if self._take("_"):
            return Symbol(f"{name}_{self._parse_subscript()}")
        if self.text == "'":
            raise Unreadable("a prime")
        # f(x) is the value of a function, which cannot be computed.
        if name in "fFgG" and self.text == "(":
            raise Unreadable("an unknown function")
        return Constant(name) if name in ("e", "i") else Symbol(name)

    def _parse_subscript(self) -> str:
        if not self._take("{"):
            return self._next()[1]
        pieces = []
        while not self._take("}"):
            kind, text = self._next()
            if kind == "end" or text == "{":
                raise Unreadable("a subscript")
            pieces.append(text)
        return "".join(pieces)

    def _parse_command(self, name: str) -> Expression:
        if name == "frac":
            return Call("divide", (self._parse_argument(), self._parse_argument()))
        if name == "binom":
            return Call("binomial", (self._parse_argument(), self._parse_argument()))
        if name == "sqrt":
            return self._parse_root()
        if name in ("pi", "infty"):
            return Constant("pi" if name == "pi" else "infinity")
        if name in _FUNCTIONS:
            return self._parse_function(name)
        if name in _GREEK:
            return self._parse_symbol("\\" + name)
        if name in ("lfloor", "lceil"):
            node = self.parse_sum()
            self._expect("\\r" + name[1:])
            return Call("floor" if name == "lfloor" else "ceil", (node,))
        raise Unreadable(f"the command {name}")

    def _parse_root(self) -> Expression:
        degree: Expression = Number(Fraction(2))
        if self._take("["):
            degree = self.parse_sum()
            self._expect("]")
        # A number may have been typed without any brackets.
        radicand = parse_number(self._next()[1]) if self.kind == "number" else self._parse_argument()
        return Call("power", (radicand, Call("divide", (Number(Fraction(1)), degree))))

    def _parse_function(self, name: str) -> Expression:
        """A function with its base or power, and its argument, with or without brackets."""
        base: Expression = Constant("e") if name == "ln" else Symbol(LOG_BASE)
        exponent: Expression | None = None
        while self.text in ("^", "_"):
            if self._next()[1] == "_":
                base = self._parse_argument()
            else:
                exponent = self._parse_argument(signed=True)
        argument = self._parse_function_argument()

        # sin^{-1} is the inverse function, not the reciprocal.
        if isinstance(exponent, Call) and exponent == Call("negate", (Number(Fraction(1)),)):
            if name not in _INVERSE:
                raise Unreadable("an inverse function")
            name, exponent = _INVERSE[name], None
        node = Call("log", (base, argument)) if name == "log" else Call(name, (argument,))
        return node if exponent is None else Call("power", (node, exponent))

    def _parse_function_argument(self) -> Expression:
        """Brackets, or a product up to the next sign, operator or function: sin 2x cos x."""
        if self.text in ("(", "{", "|", "["):
            return self._parse_power()
        argument = self._parse_power()
        while self._starts_factor() and self.text[1:] not in _FUNCTIONS:
            argument = self._parse_implicit(argument)
        # \sin x/2 is ambiguous.
        if self.text == "/":
            raise Unreadable("a slash behind a function")
        return argument


def parse_number(text: str) -> Number:
    """An unsigned number with thousands separators or repeating digits.  Raises Unreadable."""
    digits, mark, repeating = text.partition("\\")
    if "," in digits:
        if not _THOUSANDS.fullmatch(digits):
            raise Unreadable("commas that do not separate thousands")
        digits = digits.replace(",", "")
    if len(digits) > MAX_DIGITS:
        raise Unreadable("a number with too many digits")

    whole, _, decimals = digits.partition(".")
    value = Fraction(int((whole + decimals) or "0"), 10 ** len(decimals))
    if not mark:
        return Number(value, Fraction(1, 10 ** len(decimals)) if decimals else Fraction(0))
    period = "".join(re.findall(r"\d", repeating))
    return Number(value + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(decimals)))


def _find_fraction(node: Expression) -> tuple[int | None, int | None]:
    """Numerator and denominator of a fraction of two whole numbers, as written."""
    if isinstance(node, Call) and node.name == "divide":
        top, bottom = node.arguments
        if isinstance(top, Number) and isinstance(bottom, Number) and not top.step and not bottom.step:
            return int(top.value), int(bottom.value)
    return None, None


def _parse_foreign(text: str) -> Expression:
    """An expression that math-verify parses.  Raises Unreadable."""
    # Refused by their looks: long formulas, sums of many terms, towers of exponents and large numbers.
    ranges = [(a or b).strip() for a, b in _RANGE.findall(text)]
    if len(text) > MAX_FOREIGN or any(len(end) > 3 and end != "\\infty" for end in ranges):
        raise Unreadable("a sum or integral of unusual size")
    if _TOWER.search(text) or any(len(digits) > 4 for digits in re.findall(r"\d+", text)):
        raise Unreadable("a sum or integral of large numbers")

    # Imported here because it takes long; the worker imports it before its first item.
    import sympy
    from math_verify import parse as parse_text

    try:
        values = parse_text(f"\\boxed{{{text}}}", parsing_timeout=None, fallback_mode="no_fallback")
    except Exception as error:  # of many kinds, on what it cannot handle
        raise Unreadable("math-verify cannot parse it") from error
    if not values or not isinstance(values[0], sympy.Expr):
        raise Unreadable("math-verify finds no expression")
    return Foreign(values[0])
