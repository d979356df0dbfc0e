r"""The position of the answer in a completion or reference.

1. What stands between `<think>` and `</think>` is not part of the answer; a text that never ends its
   thoughts has none.
2. The last `<answer>..</answer>` is read, if there is one.
3. There, `find_answer` finds the last balanced `\boxed{..}`; else the last of `#### ..`, `.. # ..` within a line,
   "answer is ..", "answer: ..", a heading "Answer", lines "A: ..", and the same in several other languages.
   `read_answer` returns its text, and joins boxes side by side to a list.
4. `read_last_line` reads a text that marks no answer: the number or formula of its last line, if there is only one.

This module imports nothing from this project.
"""

from __future__ import annotations

import dataclasses
import re

from cooper_jax.rule import words

TAIL = 2000  # characters at the end that are searched for an unmarked answer

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_OPEN_BOX = re.compile(r"\\boxed\s*\{")
# Between boxes that form a list: "and", commas, formula delimiters.
_BETWEEN_BOXES = re.compile(r"(?:\s|[,;&$和与、，]|\\[,;()\[\]]|\\text\{\s*|\}|\\q?quad|and|or|\\\\)*")
# "#### 20", as in GSM8K, and "... # 20" within a line, but not a heading "# 20".
_HASH_MARK = re.compile(r"(?:####|(?<=\S[ \t])#(?=[ \t]))[ \t]*(\S[^\n]*)")
# "The answer is 20", "answer to the question: 20", a heading "Answer" above it, or a line "A: 20".
_ANSWER_PHRASE = re.compile(
    r"(?:\banswer\b[\"*]*(?:[ \t]+to[^.:\n]{0,60})?[ \t]*(?:\bis\b[ \t]*:?|[:=：])|^[ \t]*A:"
    r"|^\#+[ \t]*(?:final[ \t]+)?answer[ \t]*:?(?=[ \t]*\n))[*\s]*(\S[^\n]*)",
    re.IGNORECASE | re.MULTILINE,
)
_FOREIGN_PHRASE = re.compile(
    r"(?:(?:答案|答え|解答)\s*(?:应该?|就)?(?:[是为為は]|[:：])+|故选|(?:^|\n)\s*答[:：]|정답\s*[은:]|답\s*[은:]"
    r"|\b(?:la )?respuesta(?: final)?\s*(?:es|:)|\br[ée]ponse(?: finale)?\s*(?:est|:)"
    r"|\b(?:die )?antwort\s*(?:ist|lautet|:)|\bответ\s*[:—–-]|\brisposta(?: finale)?\s*(?:è|:)"
    r"|\bresposta(?: final)?\s*(?:é|:)|الإجابة\s*(?:هي|:)|उत्तर\s*(?:है|:))[*:\s：]*(\S[^\n]*)",
    re.IGNORECASE,
)
# End of the sentence, or a conjunction after which the answer is explained.
_SENTENCE_END = re.compile(
    r"[.!?](?=\s|$)|[。！？]|,?\s+(?:because|since|which|so|as|hence|therefore)\b|입니다|</"
)
_THINK_END, _THINK_START = "</think>", "<think>"
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)

_FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$(?!\s)([^$\n]+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
# A number with its sign, currency and percent sign, but not one within a word.
_NUMBER = re.compile(
    r"(?<![\w.,/^_:])(?:(?<![\w)] )[-−–] ?)?[$€£]?[-−–]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
    r"(?: ?/ ?\d+| \d+/\d+)?%?(?![\d:])"
)
# Words that state a result, in front of it; without one a number in a line of words is no answer.
_STATING = re.compile(
    r"=|:|\b(?:is|are|was|were|be|equals?|makes?|gets?|got|gives?|has|have|had|takes?|costs?|needs?|measures?|totals?|"
    r"altogether|therefore|thus|so|hence|there|answer|result|left|remains?|remaining|leaves?|find|obtain|will|can|earns?|"
    r"pays?|paid|spends?|spent|sold|saves?|weighs?|becomes?|contains?|yields?)\b",
    re.IGNORECASE,
)
_UNIT_BEHIND = re.compile(r"[ -]?[A-Za-z°²³/^]*")
_NAMED_NUMBER = re.compile(
    r"(?:step|chapter|problem|question|page|section|figure|table|case|part|line|version|no\.?|#|year|in|equation|"
    r"exercise|option|example|lemma|theorem|day|room|grade|level)\s*$",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class LastLine:
    """The last line of a text that marks no answer."""

    answer: str = ""  # its answer; "" if there is none, or if several may be
    candidates: tuple[str, ...] = ()  # all numbers and formulas in it
    is_empty: bool = False  # True if the end of the text has no number at all


def find_answer(text: str) -> tuple[int, int] | None:
    r"""The span [start, end) of the answer that `text` marks, or None if it marks none.

    A boxed answer has priority over all other marks, even later ones.  The span may be empty (`\boxed{}`).
    """
    region = _find_region(text)
    if boxes := _find_boxes(text, *region):
        return boxes[-1]
    if phrase := _find_phrase(text, *region):
        return phrase
    # An answer in its tag needs no other mark.
    is_tagged = text[: region[0]].endswith(">") and text[region[1] :].lower().startswith("</answer>")
    return _strip_span(text, *region) if is_tagged else None


def read_answer(text: str) -> str | None:
    """The answer that `text` marks, with boxes side by side as a list; None if it marks none."""
    region = _find_region(text)
    boxes = _find_boxes(text, *region)
    if not boxes:
        span = find_answer(text)
        return text[slice(*span)] if span else None

    # Walk back from the last box over those that only a conjunction separates from it.
    first = len(boxes) - 1
    while first and _BETWEEN_BOXES.fullmatch(_between(text, boxes[first - 1], boxes[first])):
        first -= 1
    contents = list(dict.fromkeys(text[slice(*box)].strip() for box in boxes[first:]))
    return contents[0] if len(contents) == 1 else " ; ".join(contents)


def has_open_box(text: str) -> bool:
    """True if a text without a balanced box opens one, so that it was cut off."""
    start, end = _find_region(text)
    return _OPEN_BOX.search(text, start, end) is not None and not _find_boxes(text, start, end)


def read_last_line(text: str) -> LastLine:
    """The answer in the last line of a text that marks none."""
    start, end = _find_region(text)
    lines = [line.strip() for line in text[max(start, end - TAIL) : end].splitlines()]
    lines = [line for line in lines if re.search(r"\w", line)]
    if not any(re.search(r"\d|\$|\\", line) or _find_number_words(line) for line in lines):
        return LastLine(is_empty=True)
    line = lines[-1]

    # "x = 2" at the end of a text; the whole line may be the answer.
    if (
        re.fullmatch(r"[-+\w\\{}^().,/*= $%€£]+", line)
        and not re.search(r"[A-Za-z]{3,} ", line)
        and re.search(r"\d", line)
    ):
        return LastLine(line.rstrip("."), (line.rstrip("."),))
    sentence = [part for part in re.split(r"(?<=[.!?])\s+", line) if re.search(r"\w", part)][-1]
    if words.read_number_words(number_words := _find_number_words(sentence)) is not None and not re.search(
        r"\d", line
    ):
        is_plain = not words.changes_number(sentence.lower().replace(number_words, ""))
        return LastLine(number_words if is_plain else "", (number_words,))

    spans = [match.span() for match in _FORMULA.finditer(sentence)]
    numbers = [match for match in _NUMBER.finditer(sentence) if not _is_inside(match.start(), spans)]
    candidates = (*(sentence[slice(*span)] for span in spans), *(match.group() for match in numbers))
    return LastLine(_choose(sentence, spans, numbers), candidates)


def _is_inside(position: int, spans: list[tuple[int, int]]) -> bool:
    """True if a position lies in one of the spans."""
    return any(start <= position < end for start, end in spans)


def _choose(sentence: str, spans: list[tuple[int, int]], numbers: list[re.Match[str]]) -> str:
    """The answer among the formulas and numbers of a sentence; "" if it is not clear, or if words change it."""
    # 14 + 6 = 20 apples: the result of a calculation.
    if (
        not spans
        and (result := re.search(r"=\s*([^=]*)$", sentence))
        and "$" not in sentence[result.start() + 3 :]
    ):
        found = [match for match in numbers if match.start() >= result.start(1)]
        if len(found) == 1 and not words.changes_number(sentence[found[0].end() :]):
            return _read_with_unit(sentence, found[0])
        return ""
    prose = "".join(c for i, c in enumerate(sentence) if not _is_inside(i, spans))
    if len(spans) + len(numbers) != 1 or words.changes_number(prose):
        return ""
    if spans:
        return sentence[slice(*spans[0])] if _states(sentence, *spans[0]) else ""
    if not _states(sentence, *numbers[0].span()) or _NAMED_NUMBER.search(sentence[: numbers[0].start()]):
        return ""
    return _read_with_unit(sentence, numbers[0])


def _states(sentence: str, start: int, end: int) -> bool:
    """True if the words in front of an answer state it, or if there are no other words."""
    return _STATING.search(sentence, 0, start) is not None or not re.search(
        r"\w+\s+\w", sentence[:start] + sentence[end:]
    )


def _read_with_unit(sentence: str, number: re.Match[str]) -> str:
    """A number with the word behind it, which may be a unit."""
    behind = _UNIT_BEHIND.match(sentence, number.end())
    return number.group() + (behind.group() if behind else "")


def _find_number_words(sentence: str) -> str:
    """The longest numeral in words within a sentence; "" if there is none."""
    found = ""
    run: list[str] = []
    for word in [*re.findall(r"[A-Za-z-]+", sentence), "."]:
        if word != "." and words.read_number_words(" ".join([*run, word])) is not None:
            run.append(word)
            continue
        found, run = max(found, " ".join(run), key=len), []
    return found


def _find_region(text: str) -> tuple[int, int]:
    """The part of a text that may contain its answer: behind its thoughts, within its last answer tag."""
    start = 0
    if (thought := text.rfind(_THINK_END)) >= 0:
        start = thought + len(_THINK_END)
    if text.find(_THINK_START, start) >= 0:
        return len(text), len(text)
    tags = list(_ANSWER_TAG.finditer(text, start))
    return tags[-1].span(1) if tags else (start, len(text))


def _find_boxes(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """The contents of all balanced boxes, in order.  Braces nest, which a regular expression cannot match."""
    boxes: list[tuple[int, int]] = []
    for box in _BOX.finditer(text, start, end):
        if boxes and box.start() < boxes[-1][1]:
            continue  # a box in a box
        depth = 1
        for i in range(box.end(), end):
            if text[i] in "{}" and text[i - 1] != "\\":
                depth += 1 if text[i] == "{" else -1
            if depth == 0:
                boxes.append((box.end(), i))
                break
        else:
            break  # never closed; nor are those inside it
    return boxes


def _between(text: str, first: tuple[int, int], second: tuple[int, int]) -> str:
    """The text between two boxes."""
    return text[first[1] + 1 : text.rfind("\\", first[1], second[0])]


def _find_phrase(text: str, start: int, end: int) -> tuple[int, int] | None:
    """The last answer that a mark or a phrase announces.  Earlier ones may be intermediate results."""
    marks = [*_HASH_MARK.finditer(text, start, end), *_ANSWER_PHRASE.finditer(text, start, end)]
    if not text.isascii() or "espuesta" in text or "ntwort" in text or "sposta" in text or "eponse" in text:
        marks += _FOREIGN_PHRASE.finditer(text, start, end)
    if not marks:
        return None
    last = max(marks, key=lambda m: m.start(1))
    first, stop = last.span(1)

    # "the answer is 5, because ...": the explanation is not part of the answer.
    if last.re is not _HASH_MARK and (sentence_end := _SENTENCE_END.search(text, first, stop)):
        stop = sentence_end.start()
    return _strip_span(text, first, stop)


def _strip_span(text: str, start: int, end: int) -> tuple[int, int]:
    stripped = text[start:end]
    start += len(stripped) - len(stripped.lstrip())
    return start, start + len(stripped.strip())
