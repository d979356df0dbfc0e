r"""Giveaways: text that tells a rewrite from its positive without reading the mathematics.

An assistant that is asked for a wrong solution often says what it did, or leaves traces of its own format.  A
reward model would learn the phrase, so such a rewrite is refused:

    note            a comment on the change         (Note: I changed the addition.)   The student forgot the 5.
    remark          an editor's mark at a step      [Arithmetic error]   = 12 (should be 14)   <- wrong   ❌
    admission       the truth beside the mistake    However, the correct answer is 4.   This is incorrect.
    markup          tags, comments, struck text     <thinking>..</thinking>   <!-- slip -->   ~~12~~
    special_token   a tokenizer's control token     <|im_end|>   [/INST]   </s>

What the positive or the question contains too is no giveaway: a question may itself ask for a mistake.  A
phrase that names the correct answer is a giveaway if it contrasts with what precedes it, or if it names
another number than the text's final answer: "The correct answer is \boxed{5}." at the end of a solution is
ordinary.

Differences in style that no pattern finds are left to giveaway_probe.py, which measures them.  Headings, bold
type, lists and code are among them, since ordinary solutions have them too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator

from cooper_jax.rule import answer_finder

# An error that is a quantity, or one that a solution looks for, is ordinary: a margin of error, error checking.
_ERROR = (
    r"(?<!margin of )(?<!standard )(?<!relative )(?<!absolute )(?<!percent )(?<!percentage )(?<!rounding )"
    r"(?<!approximation )(?<!potential )(?<!squared )(?<!square )errors?"
    r"(?! (?:check|bound|term|margin|analysis|rate|estimat|tolerance|function|propagat|handling|of \$?\\?\d))"
)
# Words by which a text calls something a mistake.
_WRONG = (
    rf"(?:{_ERROR}|mistake(?:s|nly)?|erroneous(?:ly)?|incorrect(?:ly)?|wrong(?:ly)?|flaw(?:s|ed)?|faulty"
    r"|inaccura(?:te|tely|cy)|miscalculat\w*|miscount\w*|misread\w*|misappl\w*)"
)
_CHANGED = (
    r"(?:chang(?:e|ed|es|ing)|alter(?:ed|ing)?|modif(?:y|ied|ying)|tweak(?:ed|ing)?|introduc(?:ed|ing))"
)
_CORRECT = r"(?:correct|right|true|actual|real|proper|intended|original)"
_RESULT = r"(?:final )?(?:answer|result|solution|value|total|sum|product|number|calculation)"


def _compile(*alternatives: str) -> re.Pattern[str]:
    return re.compile("|".join(alternatives), re.IGNORECASE)


# --- note: about the change ------------------------------------------------------------------------------

_NOTE = _compile(
    # "I changed ..."; "I (have deliberately) made a small mistake"; "introduced an error".
    r"\bi(?:'ve| have| had)? (?:\w+ly |just |only |also )?(?:chang|alter|modif|tweak)\w+\b",
    rf"\b(?:i|we)(?:'ve| have| had)? (?:\w+ly |just |only |also )?(?:made|make|inserted?|added?|committed|used) "
    rf"(?:an?|one|the|some|this) (?:\w+ ){{0,2}}(?:{_WRONG}|slip|change)\b",
    rf"\b(?:introduc|insert|creat|caus|mak)(?:e|es|ed|ing) (?:an?|the|this) (?:\w+ ){{0,2}}(?:{_WRONG}|slip)\b",
    # The person who made it.
    r"\b(?:student|solver|author|writer)(?:s|'s)?(?: has| had| may have| might have)?(?: \w+ly)? "
    rf"(?:forgot|forget|overlook|confus|made an? (?:\w+ )?(?:mistake|error|slip)|mis\w{{4,}}|{_WRONG})",
    # The place of it: "The mistake is in the second step", "the error here".
    rf"\b(?:the|this|my|our|their|his|her) (?:\w+ ){{0,2}}(?:{_ERROR}|mistakes?|slips?|flaws?) "
    r"(?:is|was|lies|here|occurs|occurred|happens|happened|comes|came|made|in (?:this|the) \w+)\b",
    # The text as a version of another one.
    r"\b(?:this|the|above) (?:\w+ )?(?:rewritten|altered|changed|corrupted|erroneous) "
    r"(?:solution|version|answer|response|step)\b",
    r"\b(?:original|reference) (?:response|version|text)\b",
    r"\b(?:original|reference|given|correct) solution (?:above|provided|given|says|states|has|had|used|uses)\b",
)

# A remark that a heading introduces, up to the end of its line: "Note: ...", "**Reason for the error:** ...".
_HEADED = re.compile(
    r"^[\s>*_#(\[]*(?:please )?(?:note|disclaimer|comment|caution|warning|explanation|reason|changes?|edit"
    r"|correction|editor's note|mistake|error)s?(?: (?:of|for|in|about|to|on|made)(?: [^\n:]{1,40})?)?"
    r"[*_]*\s*[:\u2013\u2014-][^\n]*"
    r"|^[\s>*_#(\[]*(?:n\.b\.|p\.s\.)[^\n]*",
    re.IGNORECASE | re.MULTILINE,
)
_HEADED_INLINE = re.compile(r"[(\[]\s*[*_]*(?:note|n\.?b\.?|comment|edit|correction)\b[^\n]*", re.IGNORECASE)

# Words that make such a remark one about the change; "Note: x must be positive" is ordinary.
_OF_CHANGE = _compile(
    rf"\b{_WRONG}\b",
    rf"\b{_CHANGED}\b",
    rf"\b{_CORRECT} {_RESULT}\b",
    r"\b(?:should(?: have)? be(?:en)?|instead of|rewr\w+|on purpose|plausible|careless|slip)\b",
)

# --- remark: at the place ----------------------------------------------------------------------------------

# Square brackets around words.  An optional argument in LaTeX (\sqrt[n]), an interval and [asy] are none.
_BRACKET = re.compile(r"(?<![\\\w\]}])\[(?!asy\])([A-Za-z][^\[\]\n$\\=]{3,120})\](?!\()")
_BRACKET_WORD = re.compile(r"\b[A-Za-z][a-z']{3,}\b")
_PARENTHESIS = re.compile(r"\(([^()\n]{3,160})\)|\\text(?:bf|it|rm)?\{([^{}\n]{3,160})\}")
_EDITORIAL = _compile(
    rf"\b{_WRONG}\b",
    r"\bshould (?:be|have been|read|equal)\b",
    r"\b(?:not|instead of|rather than) the (?:correct|right)\b",
    r"\b(?:forg[oe]t(?:s|ten|ting)?|overlooked|careless|plausible|oops|sic|slip)\b",
    r"^\s*(?:changed|altered|modified|introduced)\b",
)
# The rest of a line behind an arrow, a comment sign or a dash; the marks of a grader.
_MARGIN = re.compile(
    r"(?:<-+|<=+|\u2190|\u27f5|//|#+|(?<![\d\\])%|--+|[\u2013\u2014])\s*([^\n]{3,120})$", re.MULTILINE
)
_EMPHASIS = re.compile(
    r"(?:\*{1,3}|_{1,3})([^*_\n]{3,60})(?:\*{1,3}|_{1,3})|^#+\s*([^\n]{3,60})$", re.MULTILINE
)
_CROSS = re.compile("[\u2717\u2718\u2715\u2716\u274c\u274e\u26a0\U0001f6ab]")

# --- admission: the truth beside the mistake -----------------------------------------------------------------

_CONTRAST = (
    r"(?:however|but|although|though|while|whereas|actually|in fact|in reality|in truth|instead|nevertheless|yet"
    r"|unfortunately)"
)
_ADMISSION = _compile(
    rf"\b{_CONTRAST}\b[^.\n]{{0,60}}?\b(?:the|its|a) (?:correct|right|true) {_RESULT}"
    r"(?: is| was| should| would|[,:(])",
    rf"\b{_CONTRAST}\b[^.\n]{{0,60}}?\bthe (?:actual|real|original|proper) (?:final )?(?:answer|result)\b",
    r"\b(?:ground[ -]truth|(?:reference|expected|gold|official) (?:final )?(?:answer|result|solution))\b",
    rf"\b(?:the|its) {_CORRECT} {_RESULT} (?:should|would|ought to|is actually|is really|was)\b",
    r"\b(?:answer|result|solution|step|calculation|value|conclusion|reasoning|this|that|it|which)"
    r"(?: is| was| are| were|'s)(?: \w+ly)? (?:wrong|incorrect|erroneous|mistaken|flawed|not correct|not right"
    r"|an? (?:\w+ )?(?:mistake|error))\b",
    rf"\bnot the {_CORRECT} {_RESULT}\b",
    r"\b(?:answer|result|total|it|this|that|which|we|i)(?: \w+)? should (?:actually |really |in fact )?have "
    r"(?:been|\w+ed)\b",
    r"\b(?:oops|whoops|my mistake|my bad|apolog(?:y|ies|i[sz]e)|i made an? (?:\w+ )?(?:mistake|error))\b",
    r"\b(?:let me|let's|i will|i'll) (?:correct|fix) (?:this|that|it|the|my)\b",
    r"^[\s*_]*correction\b",
)
# A phrase that names the correct answer, and the rest of its line.
_NAMED = re.compile(
    r"\b(?:(?:correct|right) (?:final )?(?:answer|result|solution|value|total)"
    r"|(?:true|actual|real) (?:final )?answer|(?:answer|result|total) should)[*_]*"
    r"(?: is| was| be|:| actually| really)([^\n]{1,200})",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")

# --- markup and special tokens ---------------------------------------------------------------------------------

_MARKUP = (
    # A tag with attributes, a closing tag, and an opening one; a<b>c without a closing tag is an inequality.
    re.compile(
        r"</[A-Za-z][\w:-]*\s*>|<[A-Za-z][\w:-]*\s*/>|<[A-Za-z][\w:-]*\s+[\w:-]+\s*=\s*[\"'][^<>\n]*>"
    ),
    re.compile(r"(?<![\w)}\]])<[A-Za-z][\w:-]{2,}>"),
    re.compile(
        r"<!--|-->|```(?:text|txt|plaintext|markdown|md|diff)\b|~~|\\(?:x|b)?cancel(?:to)?\b|\\(?:text)?color\b|\\st\{|\\sout\b"
    ),
    re.compile(r"\[(?:b|i|u|s|code|quote|color|spoiler|hide)(?:=[^\]\n]*)?\](?=[^\n]*\[/)", re.IGNORECASE),
    re.compile(r"&(?:nbsp|lt|gt|amp|quot|#\d+);"),
)
# The forms in which published tokenizers write control tokens.
_SPECIAL = re.compile(
    r"<[|\uff5c][^|\uff5c<>\n]{1,60}[|\uff5c]>|<<?/?SYS>?>|\[/?INST\]|\[/?(?:AVAILABLE_TOOLS|TOOL_CALLS)\]"
    r"|</?s>|<(?:bos|eos|pad|unk|mask|sep|cls|eod|eot|eom)>|<(?:start|end)_of_(?:turn|text|image)>"
    r"|\[(?:CLS|SEP|PAD|MASK|UNK|BOS|EOS)\]|<(?:unused|extra_id_|reserved_\w*)\d+>|<0x[0-9A-Fa-f]{2}>"
    r"|^(?:<\|)?(?:im_start|im_end)(?:\|>)?|^(?:### )?(?:Human|Assistant|User|System)\s*:",
    re.MULTILINE,
)


def find_giveaway(
    negative: str, positive: str, question: str = "", special_tokens: Collection[str] = ()
) -> str:
    """The kind of a giveaway that a rewrite contains and its positive does not; "" if there is none.

    Arguments as in `find_giveaway_phrases`.
    """
    return find_giveaway_phrases(negative, positive, question, special_tokens)[0]


def find_giveaway_phrases(
    negative: str, positive: str, question: str = "", special_tokens: Collection[str] = ()
) -> tuple[str, set[str]]:
    """The first kind of giveaway that a rewrite contains and its positive does not, and its phrases.

    The phrases are in lower case with 0 for every digit.  Without a giveaway the result is ("", set()).

    Args:
      negative: the rewrite.
      positive: the solution that was rewritten.
      question: the problem's question.
      special_tokens: texts of the control tokens of the tokenizers in use, besides the known forms.
    """
    detectors: dict[str, Callable[[str], Iterator[str]]] = {
        "special_token": lambda text: _find_special_tokens(text, special_tokens),
        "markup": _find_markup,
        "note": _find_notes,
        "remark": _find_remarks,
        "admission": _find_admissions,
    }
    for kind, find in detectors.items():
        # The positive and the question are searched only if there is something to look for.
        found = _normalise(find(negative))
        if found:
            found -= _normalise(find(positive)) | _normalise(find(question))
        if found:
            return kind, found
    return "", set()


def _normalise(phrases: Iterable[str]) -> set[str]:
    """The phrases in lower case, with 0 for every digit: a rewrite has other numbers than its positive."""
    return {re.sub(r"\s+", " ", re.sub(r"\d", "0", phrase.lower())).strip() for phrase in phrases}


def _find_special_tokens(text: str, special_tokens: Collection[str]) -> Iterator[str]:
    yield from (match[0] for match in _SPECIAL.finditer(text))
    yield from (token for token in special_tokens if token in text)


def _find_markup(text: str) -> Iterator[str]:
    for pattern in _MARKUP:
        yield from (match[0] for match in pattern.finditer(text))


def _find_notes(text: str) -> Iterator[str]:
    yield from (match[0] for match in _NOTE.finditer(text))

    # "Note: x is positive" is ordinary, and a note about the change is not.
    for pattern in (_HEADED, _HEADED_INLINE):
        yield from _find_inside(pattern, _OF_CHANGE, text)


def _find_remarks(text: str) -> Iterator[str]:
    yield from (match[0] for match in _CROSS.finditer(text))

    # Square brackets around prose are an editor's, whatever they say.
    yield from (match[0] for match in _BRACKET.finditer(text) if _BRACKET_WORD.search(match[1]))

    # Other places of a remark are ordinary ones for other text.
    for pattern in (_PARENTHESIS, _MARGIN, _EMPHASIS):
        yield from _find_inside(pattern, _EDITORIAL, text)


def _find_admissions(text: str) -> Iterator[str]:
    yield from (match[0] for match in _ADMISSION.finditer(text))

    # "The correct answer is 4" contradicts a final answer of 5; next to a final answer of 4 it is ordinary.
    span = answer_finder.find_answer(text)
    if span is None:
        return
    final = _read_numbers(text[slice(*span)])
    for match in _NAMED.finditer(text):
        if final and _read_numbers(match[1]) and not final & _read_numbers(match[1]):
            yield match[0][: match.start(1) - match.start()]


def _find_inside(places: re.Pattern[str], words: re.Pattern[str], text: str) -> Iterator[str]:
    """The words that occur in the places, which are a pattern's groups or else its whole matches."""
    for place in places.finditer(text):
        yield from (match[0] for match in words.finditer(place[place.lastindex or 0]))


def _read_numbers(text: str) -> set[str]:
    """The numbers in a text, without separators of thousands."""
    return {number.replace(",", "") for number in _NUMBER.findall(text)}
