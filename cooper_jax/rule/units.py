r"""Units of measurement: a table of spellings, and the parsing of products and powers such as `km/h` and `cm^2`.

A unit is a factor times powers of base units, so two units of one dimension convert: `2 m` is `200 cm`.  A
noun that is not in the table (apples) has no dimension; it says what is counted.

This module imports nothing from this project.
"""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction

# Dimension: lines of "factor spellings"; the factor is relative to the dimension's base unit.
_TABLE = {
    "length": "1 m meter metre 米|1/1000 mm millimeter millimetre 毫米|1/100 cm centimeter centimetre 厘米|"
    "1000 km kilometer kilometre 公里 千米|127/5000 inch inches in|381/1250 foot feet ft|1143/1250 yard yd|"
    "201168/125 mile mi|1/1000000 micrometer micron|1/1000000000 nm nanometer",
    "mass": "1 g gram gramme 克|1/1000 mg milligram|1000 kg kilogram kilo 千克 公斤|1000000 tonne|"
    "45359237/100000 pound lb|45359237/1600000 ounce oz",
    "time": "1 s sec second 秒|60 min minute 分钟|3600 h hr hour 小时|86400 day 天|604800 week wk|"
    "1/1000 ms millisecond",
    "months": "1 month|12 year yr 年",
    "volume": "1 l liter litre 升|1/1000 ml milliliter millilitre 毫升|1/100 cl|1/10 dl",
    "gallons": "1 gallon gal|1/4 quart qt|1/8 pint pt|1/16 cup",
    "dollars": "1 dollar usd $|1/100 cent ¢",
    "euros": "1 euro eur €",
    "sterling": "1 sterling gbp £ quid",
    "yen": "1 yen jpy ¥ yuan rmb 元",
    "rupees": "1 rupee inr",
    "angle": "1 degree deg 度|1/60 arcminute|1/3600 arcsecond",
    "radians": "1 radian rad",
    "percent": "1 % percent pct",
    "celsius": "1 celsius °c",
    "fahrenheit": "1 fahrenheit °f",
    "am": "1 am a.m.",
    "pm": "1 pm p.m.",
    "bytes": "1 byte|1/8 bit",
    "force": "1 n newton",
    "energy": "1 j joule|1000 kj kilojoule|4184 kcal",
    "power": "1 w watt|1000 kw kilowatt",
    "frequency": "1 hz hertz|1000 khz",
    "electric potential": "1 v volt",
    "current": "1 ampere amp",
    "resistance": "1 ohm",
    "temperature": "1 kelvin",
    "amount": "1 mol mole",
}
_COMPOUND = {
    "mph": "mile/hour",
    "kph": "km/hour",
    "kmh": "km/hour",
    "fps": "foot/second",
    "cc": "cm^3",
    "sq": "",
}
# A single letter without \text may be a symbol as well.
_AMBIGUOUS = frozenset(["in", "pt", "qt", "am", "rad", "mol", "deg", "cl", "dl"])


def _index_units() -> dict[str, tuple[str, Fraction]]:
    """Spelling -> (dimension, factor)."""
    index = {}
    for dimension, lines in _TABLE.items():
        for line in lines.split("|"):
            factor, *spellings = line.split()
            index.update(dict.fromkeys(spellings, (dimension, Fraction(factor))))
    return index


_UNITS = _index_units()
LETTERS = frozenset(spelling for spelling in _UNITS if len(spelling) == 1 and spelling.isalpha())
_FACTOR = re.compile(
    r"(?P<prefix>(?:square|sq\.?|cubic) ?)?(?P<name>[a-z]+(?:\.m\.)?|[$€£¥¢%]|[\u4e00-\u9fff]+)\.?"
    r"(?: ?(?:\^ ?\{? ?(?P<power>-?\d) ?\}?|(?P<word>squared|cubed)))?"
)


@dataclasses.dataclass(frozen=True)
class Unit:
    """A unit: its dimension as powers of base units, and its factor; or a noun, with no dimension."""

    dimension: tuple[tuple[str, int], ...] = ()
    factor: Fraction = Fraction(1)
    noun: str = ""

    @property
    def is_percent(self) -> bool:
        return self.dimension == (("percent", 1),)

    @property
    def is_angle(self) -> bool:
        return self.dimension == (("angle", 1),)


PERCENT = Unit((("percent", 1),))
DEGREE = Unit((("angle", 1),))


def find_base_unit(word: str) -> tuple[str, Fraction] | None:
    """(dimension, factor) of one word, in singular or plural; None if it is no unit."""
    return _UNITS.get(word) or _UNITS.get(word.removesuffix("s"))


def parse_unit(text: str) -> Unit | None:
    """The unit that a text spells, with products, quotients and powers; None if a part of it is no unit."""
    text = " ".join(text.lower().replace("\\cdot", "*").replace("\\times", "*").split())
    text = re.sub(r"^(?:u\.?s\.? )(?=dollars?)", "", text)
    dimension: dict[str, int] = {}
    factor, sign, position = Fraction(1), 1, 0
    while position < len(text):
        # Between factors: a slash or "per" divides, anything else multiplies.
        if separator := re.compile(r" ?(/|\*|per |-per-|a |an |) ?").match(text, position):
            divides = separator[1].strip("- ") in ("/", "per", "a", "an")
            if position == 0 and divides:
                return None
            sign, position = (-1 if divides else sign), separator.end()
        match = _FACTOR.match(text, position)
        if match is None:
            return None
        position = match.end()

        base = find_base_unit(match["name"])
        if base is None and match["name"] in _COMPOUND:
            compound = parse_unit(_COMPOUND[match["name"]])
            if compound is None or len(text) > len(match["name"]):
                return None
            return compound
        if base is None:
            return None
        power = sign * _find_power(match)
        dimension[base[0]] = dimension.get(base[0], 0) + power
        factor *= base[1] ** power
    powers = tuple(sorted((name, power) for name, power in dimension.items() if power))
    return Unit(powers, factor) if powers else None


def is_ambiguous(text: str) -> bool:
    r"""True for a unit that could be a product of symbols unless it stands in \text."""
    return (len(text) == 1 and text.isascii()) or text in _AMBIGUOUS


def may_convert(unit: Unit, ratio: Fraction) -> bool:
    """True if a number with `unit` and one without a unit, `ratio` times as large, may be the same quantity."""
    if len(unit.dimension) != 1:
        return bool(unit.dimension)
    ((name, power),) = unit.dimension
    factors = {factor**power for dimension, factor in _UNITS.values() if dimension == name}
    return unit.factor / ratio in factors if ratio else False


def _find_power(match: re.Match[str]) -> int:
    if match["power"]:
        return int(match["power"])
    words = (match["prefix"] or "") + (match["word"] or "")
    if words.startswith(("sq", "squared")):
        return 2
    return 3 if words.startswith(("cubic", "cubed")) else 1
