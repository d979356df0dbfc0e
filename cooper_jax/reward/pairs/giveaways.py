r"""Giveaways: text that tells a rewrite from its positive without reading the mathematics.

An assistant that is asked for a wrong solution often says what it did, or leaves traces of its own format.  A
reward model would learn the phrase, so such a rewrite is refused:

    note            a comment on the change         (Note: I changed the addition.)   The student forgot the 5.
    remark          an editor's mark at a step      [Arithmetic error]   = 12 (should be 14)   <- wrong   ❌
    admission       the truth beside the mistake    However, the correct answer is 4.   This is incorrect.
    markup          tags, comments, struck text     <thinking>..</thinking>   <!-- slip -->   ~~12~~
    special_token   a tokenizer's control token     <|im_end|>   [/INST]   </s>
    postscript      prose behind the final answer, where the positive has none

What the positive or the question contains too is no giveaway: a question may itself ask for a mistake.  A
phrase that names the correct answer is a giveaway if it contrasts with what precedes it, or if it names
another number than the text's final answer: "The correct answer is \boxed{5}." at the end of a solution is
ordinary.

All kinds but the last are lists of phrases, which other words can pass.  Most comments stand behind the answer,
where the last kind finds them in any words.

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
    r"(?<!approximation )(?<!trial and )(?<!trial-and-)(?<!potential )(?<!possible )(?<!squared )(?<!square )"
    r"errors?"
    r"(?! (?:check|bound|term|margin|analysis|rate|estimat|tolerance|function|propagat|handling|of \$?\\?\d"
    r"|of at|less|smaller|below|at most|within|up to))"
)
# Nouns by which a text calls something in it a mistake; a slip of paper is none.
_FAULT = (
    rf"(?:{_ERROR}|mistakes?|flaws?|slips?(?! of)|miscalculations?|miscounts?|inaccurac(?:y|ies)|blunders?"
    r"|oversights?|missteps?|fallac(?:y|ies)|typos?)"
)
# Words by which a text calls something a mistake.
_WRONG = (
    rf"(?:{_ERROR}|mistake(?:s|nly)?|erroneous(?:ly)?|incorrect(?:ly)?|wrong(?:ly)?|flaw(?:s|ed)?|faulty"
    r"|inaccura(?:te|tely|cy)|miscalculat\w*|miscount\w*|misread\w*|misappl\w*)"
)
_CHANGED = (
    r"(?:chang(?:e|ed|es|ing)|alter(?:ed|ing)?|modif(?:y|ied|ying)|tweak(?:ed|ing)?|introduc(?:ed|ing)"
    r"|swapp(?:ed|ing)|switch(?:ed|ing)|edited|corrupted|falsified|replac(?:ed|ing) \$?\d)"
)
# Participles for what was done to a text.  Equations are rewritten too, and a liquid solution is replaced.
_ALTERED = (
    r"(?:changed|altered|modified|tweaked|edited|corrupted|falsified|manipulated|tampered with|perturbed|swapped"
    r"|adjusted|rigged|broken)"
)
# "should've" is also written with a typographic apostrophe, "should of" is a common misspelling.
_SHOULD = r"should(?:(?:['\u2019]| ?ha)ve| of)?"
_CORRECT = r"(?:correct|right|true|actual|real|proper|intended|original)"
_RESULT = r"(?:final )?(?:answer|result|solution|value|total|sum|product|number|calculation)"
# A text or a part of it; "value" or "equation" is none, since solutions do change those.
_TEXT = r"(?:solution|answer|response|version|reasoning|derivation|calculation|computation|explanation|step)"
# The start of a sentence or of a line, before which there are marks of layout only.
_START = r"(?:^|(?<=[.!?:;)\]}$*] ))[ \t>*_#-]{0,20}"
# A number in digits, with its sign, its currency or the start of a formula.
_FIGURE = r"(?:\\[(\[] ?)?\\?[$\u20ac\u00a3]?[-\u2212]?\d[\d,.]{0,20}(?<!,)(?<!\.)%?\$?"


def _compile(*alternatives: str) -> re.Pattern[str]:
    return re.compile("|".join(alternatives), re.IGNORECASE | re.MULTILINE)


# --- note: about the change ------------------------------------------------------------------------------

_NOTE = _compile(
    # "I changed ..."; "I (have deliberately) made a small mistake"; "introduced an error".
    r"\bi(?:'ve| have| had)? (?:\w+ly |just |only |also )?(?:chang|alter|modif|tweak)\w+\b",
    r"\bi(?:'ve| have| had)? (?:\w+ly |just |only |also )?(?:swapped|switched|replaced|flipped|edited|corrupted"
    r"|falsified|revised|adjusted|broke|broken)\b",
    rf"\b(?:i|we)(?:'ve| have| had)? (?:\w+ly |just |only |also )?(?:made|make|inserted?|added?|committed|used) "
    rf"(?:an?|one|the|some|this) (?:\w+ ){{0,2}}(?:{_WRONG}|{_FAULT}|change)\b",
    rf"\b(?:introduc|insert|creat|caus|mak|inject|plant|sneak|slip)(?:e|es|s|ed|ped|ing|ping)?(?: in)? "
    rf"(?:an?|the|this) (?:\w+ ){{0,2}}(?:{_WRONG}|{_FAULT})\b",
    # A change in the passive: "The solution has been modified", "4 was replaced by 5"; and its purpose.
    rf"\b{_TEXT}s?(?: \w+){{0,3}}? (?:is|was|are|were|been)(?: \w+ly)? {_ALTERED}\b",
    r"\b(?:numbers?|digits?|signs?|figures?|factors?|terms?|carry|product|sum|addition|subtraction|multiplication"
    r"|division|difference|quotient|total)(?: above| here)? (?:was|were|has been|have been)"
    rf"(?: \w+ly)? {_ALTERED}\b",
    rf"{_FIGURE} (?:is|was|has been)(?: \w+ly)? (?:{_ALTERED}|replaced|switched|turned) "
    rf"(?:to|with|by|for|into) {_FIGURE}",
    rf"{_START}(?:{_ALTERED}|replaced|switched|turned) (?:the )?{_FIGURE} "
    rf"(?:to|with|by|for|into) (?:an? )?{_FIGURE}",
    r"\b(?:on purpose|purposely|purposefully|deliberate(?:ly)?|intentional(?:ly)?)\b",
    r"\b(?:by|in) (?:error|mistake)\b",
    r"\bto be (?:wrong|incorrect|flawed|erroneous|plausible)\b",
    # A mistake that the text has: "There is an error in the addition", "The above contains a flaw".
    rf"\bthere(?:'s| is| are| was| were| has been) (?:an?|one|some|the|this|several|two) (?:\w+ ){{0,2}}{_FAULT}\b",
    rf"\b(?:contain(?:s|ed|ing)?|has|had|have|having|includ(?:es|ed|ing)|involv(?:es|ed|ing)|with) "
    rf"(?:an?|one|some|the|this|several|two) (?:\w+ ){{0,2}}{_FAULT}\b",
    # A jar may contain a bug, a text may not.
    rf"\b{_TEXT}(?: above| below)? (?:contains?|contained|has|had) (?:an?|one|some) (?:\w+ )?(?:bugs?|glitch)\b",
    # An adverb for how a step is done; "mistakenly" and the like have no other use in a solution.
    r"\b(?:incorrectly|wrongly|mistakenly|erroneously|inaccurately)\b",
    # The person who made it.
    r"\b(?:student|solver|author|writer)(?:s|'s)?(?: has| had| may have| might have)?(?: \w+ly)? "
    rf"(?:forgot|forget|overlook|confus|made an? (?:\w+ )?(?:mistake|error|slip)|mis\w{{4,}}|{_WRONG})",
    # A step that went wrong: "The multiplication was done wrong", "Here, 3 * 6 was miscalculated".
    rf"\b(?:got|did) (?:the|this|that) (?:\w+ )?{_RESULT} (?:wrong|incorrectly)\b",
    r"\b(?:got|did) (?:the|this|that) (?:addition|subtraction|multiplication|division) (?:wrong|incorrectly)\b",
    r"\b(?:done|made|carried out|performed|worked out|computed|calculated|copied) "
    r"(?:wrong|badly|carelessly|sloppily|in error)\b",
    r"\b(?:is|are|was|were|been|being|got) (?:\w+ly )?mis-?(?:add|subtract|multipli|divid|calculat|comput|count|cop"
    r"|read|interpret|appl)\w*",
    # The place of it: "The mistake is in the second step", "the error here".
    rf"\b(?:the|this|my|our|their|his|her|an?|one) (?:\w+ ){{0,2}}{_FAULT} "
    r"(?:is|was|has been|lies|here|occurs|occurred|happens|happened|comes|came|made|in (?:this|the) \w+)\b",
    # The start of a sentence or a line that names a mistake: "Arithmetic error:", "Error in the product".
    rf"{_START}(?:(?!no |any |common |possible )\w+ ){{0,3}}{_FAULT}"
    r"[*_]*(?:\s*:| (?:in|with|at|when|while|here|introduced|inserted|injected|added|planted)\b|$)",
    # The same for a version of the text: "Altered solution:".
    rf"{_START}(?:\w+ ){{0,4}}?(?:rewritten|{_ALTERED}|{_WRONG}|mistaken|false|fake|negative) (?:\w+ )?{_TEXT}"
    r"[*_]*(?:\s*:|$)",
    # The text as a version of another one.
    r"\b(?:this|the|above) (?:\w+ )?(?:rewritten|altered|changed|corrupted|erroneous) "
    r"(?:solution|version|answer|response|step)\b",
    r"\b(?:original|reference) (?:response|version|text)\b",
    r"\b(?:original|reference|given|correct) solution (?:above|provided|given|says|states|has|had|used|uses)\b",
)

# A remark that a heading introduces, up to the end of its line: "Note: ...", "**Reason for the error:** ...".
# In the middle of a line it has a colon.
_HEAD = (
    r"(?:please )?(?:note|disclaimer|comment|caution|warning|explanation|reason|edit|changes?(?! of)|correction"
    r"|editor's note|mistake|error)s?(?: (?:of|for|in|about|to|on|made)(?: [^\n:]{1,40})?)?[*_]*\s*"
)
_POSTSCRIPT = r"(?:n\.b\.|p\.s\.)[^\n]*"
_HEADED = re.compile(
    rf"^[ \t>*_#(\[]{{0,20}}(?:{_HEAD}[:\u2013\u2014-][^\n]*|{_POSTSCRIPT})"
    rf"|(?<=[.!?;)\]}}$*\d] )[*_(]{{0,4}}(?:{_HEAD}:[^\n]*|{_POSTSCRIPT})",
    re.IGNORECASE | re.MULTILINE,
)
_HEADED_INLINE = re.compile(r"[(\[]\s*[*_]*(?:note|n\.?b\.?|comment|edit|correction)\b[^\n]*", re.IGNORECASE)

# Words that make such a remark one about the change; "Note: x must be positive" is ordinary.
_OF_CHANGE = _compile(
    rf"\b{_WRONG}\b",
    rf"\b{_CHANGED}\b",
    rf"\b{_CORRECT} {_RESULT}\b",
    rf"\b(?:{_SHOULD} be(?:en)?|instead of|rewr\w+|on purpose|plausible|careless|slip|off by)\b",
)

# --- remark: at the place ----------------------------------------------------------------------------------

# Square brackets around words.  An optional argument in LaTeX (\sqrt[n]), an interval and [asy] are none.
_BRACKET = re.compile(r"(?<![\\\w\]}])\[(?!asy\])([A-Za-z][^\[\]\n$\\=]{3,120})\](?!\()")
_BRACKET_WORD = re.compile(r"\b[A-Za-z][a-z']{3,}\b")
_PARENTHESIS = re.compile(r"\(([^()\n]{3,160})\)|\\text(?:bf|it|rm)?\{([^{}\n]{3,160})\}")
# Other brackets: square ones, braces that belong to no command, and those of East Asian type.
_OTHER_BRACKET = re.compile(
    r"(?<![\\\w\]}])\[([^\[\]\n]{3,160})\]|(?<![\\\w\]}^_])\{([^{}\n\"]{3,160})\}"
    "|[\u3010\u3014\uff3b\uff08\u300c\u300e\u300a\u3008\u27e8\u00ab]"
    "([^\n\u3011\u3015\uff3d\uff09\u300d\u300f\u300b\u3009\u27e9\u00bb]{3,160})"
    "[\u3011\u3015\uff3d\uff09\u300d\u300f\u300b\u3009\u27e9\u00bb]"
)
_EDITORIAL = _compile(
    rf"\b{_WRONG}\b",
    rf"\b{_SHOULD} (?:be|been|read|equal)\b",
    r"\b(?:not|instead of|rather than) the (?:correct|right)\b",
    rf"\b(?:forg[oe]t(?:s|ten|ting)?|overlooked|careless|plausible|oops|sic|{_FAULT})\b",
    r"^\s*(?:changed|altered|modified|introduced|swapped|switched|replaced|edited|corrupted|corrected)\b",
    # Another number for the one before the bracket: "(was 4)", "(originally 4)", "(not 4)".
    rf"^\W*(?:it )?(?:was|were|originally|formerly|previously|actually|really"
    rf"|{_CORRECT}(?: {_RESULT})?)(?: is| was| be)?:?\s*=?\s*{_FIGURE}",
)
# The rest of a line behind an arrow, a comment sign or a dash; the marks of a grader.
_MARGIN = re.compile(
    r"(?:<-+|<=+|\u2190|\u27f5|//|#+|(?<![\d\\])(?<!\d )%|--+|[\u2013\u2014])\s*([^\n]{3,120})$", re.MULTILINE
)
# A mark of emphasis touches its text; a sign of multiplication and an index do not enclose any.
_EMPHASIS = re.compile(
    r"(?<![\w*])(?:\*{1,3}|_{1,3})(?=\S)([^*_\n]{3,60}?)(?<=\S)(?:\*{1,3}|_{1,3})(?!\w)|^#+\s*([^\n]{3,60})$",
    re.MULTILINE,
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
    r"\b(?:answer|result|solution|step|calculation|computation|value|conclusion|reasoning|total|sum|product"
    r"|difference|quotient|addition|subtraction|multiplication|division|this|that|it|which)"
    r"(?: above| here)?(?: is| was| are| were|'s)(?: \w+ly)? (?:wrong|incorrect|erroneous|mistaken|flawed"
    r"|off by|an? (?:\w+ )?(?:mistake|error))\b",
    # Not "it is not right-angled", nor "the triangle isn't right".
    r"\b(?:answer|result|solution|step|calculation|computation|value|conclusion|reasoning|total|sum|product|this"
    r"|that|it|which)(?: above| here)?(?: is not|['\u2019]s not| was not| isn['\u2019]t| wasn['\u2019]t)(?: quite)?"
    r" (?:correct|right(?![- ](?:angle|triangle))|accurate)\b",
    rf"(?:\bnot|n['\u2019]t) the {_CORRECT} {_RESULT}\b",
    rf"\b(?:not|instead of|rather than) the (?:{_CORRECT}|expected) {_FIGURE}",
    rf"{_FIGURE} (?:(?:is not|was not|isn['\u2019]t|wasn['\u2019]t) correct"
    r"|(?:is|was) (?:wrong|incorrect|erroneous))\b",
    rf"\b{_CONTRAST},? (?:\w+ ){{0,3}}?(?:should|ought to)(?: \w+ly)? (?:be|equal) {_FIGURE}",
    r"\b(?:answer|result|total|it|this|that|which|we|i)(?: \w+)? should(?: actually| really| in fact)?"
    r"(?: have|['\u2019]ve| of) (?:been|\w+ed)\b",
    # A number that is "actually" another one: "3 * 6 is actually 18", "But in fact it's 18", "Wait, that is 18".
    rf"(?:\bis|\bwas|\bequals|\bmakes|\bgives|\bare|'s|\u2019s) (?:actually|really|in fact|in truth) {_FIGURE}",
    rf"\b(?:actually|really|in fact|in truth|wait|hold on|no)[,.!:]? (?:\w+,? ){{0,2}}?"
    rf"(?:it|that|this|which|there)(?:['\u2019]s| is| was| are| were| makes| equals) {_FIGURE}",
    r"\b(?:oops|whoops|my mistake|my bad|apolog(?:y|ies|i[sz]e)|i made an? (?:\w+ )?(?:mistake|error))\b",
    r"\b(?:let me|let's|i will|i'll) (?:correct|fix) (?:this|that|it|the|my)\b",
    r"^[ \t*_]{0,20}correction\b",
    # One number in place of another: "is not 5 but 4", "= 4, not 5", "is 5 instead of 4".
    rf"\bnot {_FIGURE},? but (?:\w+ )?{_FIGURE}",
    rf"{_FIGURE} \((?:and )?(?:not|instead of|rather than) {_FIGURE}",
    rf"(?:=|\b(?:is|was|be|equals|gives|makes|get|got)) ?(?:\w+ly )?{_FIGURE},? (?:and |but )?"
    rf"(?:not|instead of|rather than) {_FIGURE}",
)
# A phrase that names the correct answer, and the rest of its line.
_NAMED = re.compile(
    r"(?:\b(?:(?:correct|right|proper|intended) (?:final )?"
    r"(?:answer|result|solution|value|total|sum|product|difference|number|count|amount)"
    r"|(?:true|actual|real) (?:final )?(?:answer|result|total|sum|product)"
    rf"|(?:answer|result|total) (?:should|ought to)"
    rf"|{_CONTRAST},? (?:the|its) (?:final )?(?:answer|result|total))[*_]*(?:, \w+,)?"
    r"(?: is| was| be|:| actually| really| must be| has to be| equals| remains| =)"
    rf"|{_START}(?:correct|expected|truth|true|actual)[*_]*:"
    rf"|\b{_CONTRAST},? (?:it|this|that)(?: is|['\u2019]s| was| ought to be))([^\n]{{1,200}})",
    re.IGNORECASE | re.MULTILINE,
)
# The same with the number first: "4 is the correct answer".
_NAMED_AFTER = re.compile(
    rf"({_FIGURE})(?: \w+)? (?:is|was|would be|would have been) (?:the )?(?:correct|right|true|actual)"
    rf"(?: {_RESULT})?(?= here\b|[.!,;)]|$)",
    re.IGNORECASE | re.MULTILINE,
)
# An equation of numbers and its result, such as "2 + 2 = 4" or "3 times 6 equals 18".
_EQUATION = re.compile(
    r"(?<![\w.+*/^=\u00d7\u00f7-])(?<![+*/=\u00d7\u00f7-] )"
    r"(\d[\d,.]{0,20}(?:\s{0,2}(?:[-+*/\u00d7\u00f7\u2212]|\\times|\\cdot|\\div|plus|minus|times)\s{0,2}"
    r"\d[\d,.]{0,20}){1,8})\s{0,2}(?:=|is|equals|makes|gives)\s{0,2}(\d[\d,]*(?:\.\d+)?)"
    r"(?!\s*[-+*/^\u00d7\u00f7\u2212\\%]|\w|\.\d|,? (?:r(?:emainder)?|with|mod|and \d+/)\b|_)",
    re.IGNORECASE,
)
# In another base or modulo a number an expression has other results.
_OTHER_ARITHMETIC = re.compile(
    r"\b(?:base|mod(?:ulo)?|binary|octal|hexadecimal)\b|\\p?mod\b|remainder", re.IGNORECASE
)
_WORD = re.compile(r"[^\W\d_]{2,}")
# Words behind the final answer that make a postscript.
MIN_POSTSCRIPT = 4
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
# The first number of such a line and what belongs to it; a word, a bracket or a comma ends it.
_FIRST_FORMULA = re.compile(r"\d(?:(?![,;.]\s| \(|(?<![\\A-Za-z])[A-Za-z]{2}).)*")

# Words for mistakes in other languages.  An assistant that is addressed in English seldom writes another one,
# except in a note; a positive in that language has its own words, which are allowed.
_FOREIGN = _compile(
    "\u9519\u8bef|\u932f\u8aa4|\u7b97\u9519|\u6539\u9519|\u6709\u8bef|\u9519\u4e86|\u6545\u610f|\u4fee\u6539|\u6b63\u786e\u7b54\u6848|\u9593\u9055|\u8aa4\u308a|\u30df\u30b9",
    "\uc624\ub958|\ud2c0\ub9b0|\ud2c0\ub838|\uc2e4\uc218|\u062e\u0637\u0623|\u0917\u0932\u0924",
    r"\b(?:\u043e\u0448\u0438\u0431\w+|\u043d\u0435\u0432\u0435\u0440\u043d\w+|\u043d\u0435\u043f\u0440\u0430\u0432\u0438\u043b\u044c\u043d\w+)",
    r"\b(?:err?eur|faute|fehler(?:haft)?\w*|falsch\w*|fout(?:en|ief)?|errore|errado|err\u00f3ne[oa]|err\u00f4ne[oa]|incorrect[oa]s?"
    r"|equivocad[oa]s?|equivocaci\u00f3n|sbagliat[oa]|sbaglio|erreurs|b\u0142\u0105d|hatal\u0131|yanl\u0131\u015f)\b",
    r"\b(?:introduje|cambi\u00e9|comet\u00ed|ge\u00e4ndert|absichtlich|volontairement|propositalmente|intencionalmente)\b",
)

# --- markup and special tokens ---------------------------------------------------------------------------------

_MARKUP = (
    # A tag with attributes, a closing tag, and an opening one; a<b>c without a closing tag is an inequality.
    re.compile(
        r"</\s*[A-Za-z][\w:-]*\s*>|<[A-Za-z][\w:-]*\s*/>|<[A-Za-z][\w:-]*\s+[\w:-]+\s*=\s*[\"'][^<>\n]*>"
    ),
    re.compile(r"(?<![\w)}\]])<[A-Za-z][\w:-]{2,}>"),
    re.compile(r"<\s*(?:think|thinking|thought|scratchpad|reasoning|answer|solution|response|output)\s*>"),
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
    r"|\b(?:im_start|im_end|endoftext|eot_id|eom_id|start_header_id|end_header_id|end_of_(?:text|turn|sentence)"
    r"|begin_of_(?:text|sentence))\b"
    r"|^(?:### )?(?:Human|Assistant|User|System)\s*:",
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
    # A style of ending is no giveaway if the positive has it too.
    found = _normalise(_find_postscripts(negative))
    if found and answer_finder.find_answer(positive) is not None and not any(_find_postscripts(positive)):
        asked = "".join(_normalise([question]))
        if not any(phrase in asked for phrase in found):
            return "postscript", found
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
    for pattern in (_NOTE, _FOREIGN):
        yield from (match[0] for match in pattern.finditer(text))

    # "Note: x is positive" is ordinary, and a note about the change is not.
    for pattern in (_HEADED, _HEADED_INLINE):
        yield from _find_inside(pattern, _OF_CHANGE, text)


def _find_remarks(text: str) -> Iterator[str]:
    yield from (match[0] for match in _CROSS.finditer(text))

    # Square brackets around prose are an editor's, whatever they say.
    yield from (match[0] for match in _BRACKET.finditer(text) if _BRACKET_WORD.search(match[1]))

    # Other places of a remark are ordinary ones for other text.
    for pattern in (_PARENTHESIS, _OTHER_BRACKET, _MARGIN, _EMPHASIS):
        yield from _find_inside(pattern, _EDITORIAL, text)


def _find_admissions(text: str) -> Iterator[str]:
    yield from (match[0] for match in _ADMISSION.finditer(text))

    # "2 + 2 = 5 ... However, 2 + 2 = 4": one expression with two results, of which none is the other one rounded.
    results: dict[str, float] = {}
    equations = () if _OTHER_ARITHMETIC.search(text) else _EQUATION.finditer(text)
    for match in equations:
        terms, result = re.sub(r"\s", "", match[1]), float(match[2].replace(",", ""))
        if abs(results.setdefault(terms, result) - result) > 0.01 * abs(result):
            yield match[0]

    # "The correct answer is 4" contradicts a final answer of 5; next to a final answer of 4 it is ordinary.
    span = answer_finder.find_answer(text)
    if span is None:
        return
    final = _read_numbers(text[slice(*span)])
    for match in _NAMED.finditer(text):
        # The rest of the line may repeat the final answer: "The correct answer is 4, but I got 5".
        named = _FIRST_FORMULA.search(match[1])
        if final and named and not final & _read_numbers(named[0]):
            yield match[0][: match.start(1) - match.start()]
    for match in _NAMED_AFTER.finditer(text):
        if final and not final & _read_numbers(match[1]):
            yield match[0]


def _find_postscripts(text: str) -> Iterator[str]:
    """The prose behind the final answer that a text marks; a few words, as in `18 pens in all`, are none."""
    span = answer_finder.find_answer(text)
    words = list(_WORD.finditer(text, span[1])) if span is not None else []
    if len(words) >= MIN_POSTSCRIPT:
        yield text[words[0].start() :]


def _find_inside(places: re.Pattern[str], words: re.Pattern[str], text: str) -> Iterator[str]:
    """The words that occur in the places, which are a pattern's groups or else its whole matches."""
    for place in places.finditer(text):
        yield from (match[0] for match in words.finditer(place[place.lastindex or 0]))


def _read_numbers(text: str) -> set[str]:
    """The numbers in a text, without separators of thousands."""
    return {number.replace(",", "") for number in _NUMBER.findall(text)}
