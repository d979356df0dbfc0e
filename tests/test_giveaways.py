"""Giveaways: each kind is refused and counted; ordinary mathematics and what the positive says too pass."""

import time

import pytest

from cooper_jax.llm.chat import Failure
from cooper_jax.reward.pairs import pair_checks
from cooper_jax.reward.pairs.giveaways import find_giveaway
from cooper_jax.types import Completion

POSITIVE = "Each box holds 6 pens, so 3 boxes hold 3 * 6 = 18 pens.\nThe answer is \\boxed{18}."
NEGATIVE = "Each box holds 6 pens, so 3 boxes hold 3 * 6 = 16 pens.\nThe answer is \\boxed{16}."

GIVEAWAYS = [
    # Comments on the change.
    ("note", NEGATIVE + " (Note: I swapped a digit to bring in an error.)"),
    ("note", NEGATIVE + "\nNote: this contains a deliberate slip in the product."),
    ("note", NEGATIVE + "\n\n**Explanation of the mistake:** 3 * 6 was taken for 16."),
    ("note", NEGATIVE + "\n*N.B. the multiplication was altered.*"),
    ("note", NEGATIVE + "\nI changed the product in the first line."),
    ("note", NEGATIVE + "\nHere I have deliberately made a small mistake."),
    ("note", "The student forgot the last carry. " + NEGATIVE),
    ("note", NEGATIVE + " The mistake is in the first line."),
    ("note", NEGATIVE + " This introduces an error into the count."),
    ("note", NEGATIVE + " The original solution has another product."),
    ("note", NEGATIVE + "\nChanges made: 18 became 16, which is wrong."),
    # A mistake that the text says it has.
    ("note", NEGATIVE + " There is an error in the addition."),
    ("note", "The above contains an error. " + NEGATIVE),
    ("note", NEGATIVE + " This solution has a flaw."),
    ("note", "Solution with a small slip: " + NEGATIVE),
    ("note", NEGATIVE + " An oversight was made in the product."),
    ("note", "Arithmetic error:\n" + NEGATIVE),
    ("note", NEGATIVE + " Multiplication error: see above."),
    ("note", NEGATIVE + " Error in the product."),
    ("note", "Here, the student adds incorrectly. " + NEGATIVE),
    ("note", NEGATIVE + " This step contains a bug."),
    ("note", "By error, 3 * 6 = 16. " + NEGATIVE),
    ("note", "Error introduced in step 1. " + NEGATIVE),
    ("note", "Now a subtle mistake:\n" + NEGATIVE),
    ("note", NEGATIVE + " (Note: the product above is off by two.)"),
    ("note", NEGATIVE + " I injected an error."),
    ("note", NEGATIVE + " I have slipped in a small mistake."),
    ("note", NEGATIVE + " I got the multiplication wrong."),
    # A change, by whom or in the passive.
    ("note", NEGATIVE + " The addition above was tampered with."),
    ("note", NEGATIVE + " The product has been adjusted."),
    ("note", NEGATIVE + " It follows the original version."),
    ("note", NEGATIVE + " Changed 18 to 16."),
    ("note", NEGATIVE + "\nReplaced the 18 with a 16."),
    ("note", NEGATIVE + " (I swapped the sum.)"),
    ("note", "I have replaced 4 by 5. " + NEGATIVE),
    ("note", "The solution has been modified. " + NEGATIVE),
    ("note", NEGATIVE + " It was written to be wrong."),
    ("note", NEGATIVE + " Two digits have been swapped."),
    ("note", NEGATIVE + " 18 was replaced by 16."),
    ("note", NEGATIVE + " Step one was done this way on purpose."),
    ("note", "Altered solution: " + NEGATIVE),
    ("note", NEGATIVE + "\nThe incorrect version:"),
    # A note in the middle of a line.
    ("note", NEGATIVE.replace(" pens.", " pens. Note: 18 should be here.")),
    ("note", NEGATIVE.replace(" pens.", " pens. N.B. a careless product.")),
    # A step that went wrong.
    ("note", NEGATIVE + " The multiplication 3 * 6 was done wrong."),
    ("note", NEGATIVE + "\n*Here, 3 * 6 was miscalculated.*"),
    ("note", NEGATIVE + " One factor was misread."),
    # In other languages.
    ("note", NEGATIVE + " (\u6ce8\uff1a\u4e58\u6cd5\u7b97\u9519\u4e86)"),
    ("note", NEGATIVE + " \u8fd9\u91cc\u6709\u4e00\u4e2a\u9519\u8bef\u3002"),
    ("note", NEGATIVE + " Hinweis: Das Produkt ist falsch."),
    ("note", NEGATIVE + " Nota: introduje un cambio en el producto."),
    ("note", NEGATIVE + " Il y a une erreur dans le produit."),
    ("note", NEGATIVE + " \uacc4\uc0b0\uc5d0 \uc2e4\uc218\uac00 \uc788\ub2e4."),
    ("note", NEGATIVE + " \u0417\u0434\u0435\u0441\u044c \u043e\u0448\u0438\u0431\u043a\u0430."),
    ("note", NEGATIVE + " \u3053\u3053\u306f\u9593\u9055\u3044\u3067\u3059\u3002"),
    # Marks at the place.
    ("remark", NEGATIVE.replace(" pens.", " pens (should've been 18).")),
    ("remark", NEGATIVE.replace(" pens.", " pens (should\u2019ve read 18).")),
    ("remark", NEGATIVE.replace(" pens.", " pens [Multiplication error].")),
    ("remark", NEGATIVE.replace(" pens.", " pens. [Here the carry gets lost]")),
    ("remark", NEGATIVE.replace(" pens.", " pens (should be 18).")),
    ("remark", NEGATIVE.replace(" pens.", " pens (wrong product).")),
    ("remark", NEGATIVE.replace(" pens.", " pens \\text{(mistake)}.")),
    ("remark", NEGATIVE.replace(" pens.", " pens <- wrong")),
    ("remark", NEGATIVE.replace(" pens.", " pens  # careless multiplication")),
    ("remark", "### A wrong addition\n" + NEGATIVE),
    ("note", "### Flawed reasoning\n" + NEGATIVE),
    ("remark", "**Incorrect** " + NEGATIVE),
    ("remark", NEGATIVE.replace(" pens.", " pens \u274c")),
    ("remark", "{Arithmetic error} " + NEGATIVE),
    ("remark", NEGATIVE + " \u3010Arithmetic error\u3011"),
    ("remark", NEGATIVE + " \u00abwrong product\u00bb"),
    ("remark", NEGATIVE.replace(" pens.", " pens (was 18).")),
    ("remark", NEGATIVE.replace(" pens.", " pens [originally 18].")),
    ("remark", NEGATIVE.replace(" pens.", " pens (correct: 18).")),
    ("remark", NEGATIVE.replace(" pens.", " pens [sic].")),
    ("remark", NEGATIVE.replace(" pens.", " pens {sic}.")),
    ("remark", NEGATIVE.replace(" pens.", " pens (typo).")),
    ("remark", NEGATIVE.replace(" pens.", " pens (swapped here).")),
    ("remark", NEGATIVE.replace(" pens.", " pens (not the right sum).")),
    ("remark", "4 * 6 = 26 **Arithmetic error** " + NEGATIVE),
    ("remark", "a_1 = 26 _wrong_ " + NEGATIVE),
    # The truth beside the mistake.
    ("admission", NEGATIVE + " However, the correct answer is 18."),
    ("admission", NEGATIVE + " But the right total would be 18."),
    ("admission", NEGATIVE + " The correct answer is 18."),
    ("admission", NEGATIVE + "\nCorrect answer: 18"),
    ("admission", NEGATIVE + " In fact the actual answer is eighteen."),
    ("admission", NEGATIVE + " This answer is incorrect."),
    ("admission", NEGATIVE + " That is not right, which is an arithmetic error."),
    ("admission", NEGATIVE + " It should have been 18."),
    ("admission", NEGATIVE + " Oops, 3 * 6 is something else."),
    ("admission", NEGATIVE + " The reference answer is 18."),
    ("admission", NEGATIVE + " The answer should be 18."),
    ("admission", NEGATIVE + " The answer is not 16 but 18."),
    ("admission", NEGATIVE + " Wait, 3 * 6 = 18, not 16."),
    ("admission", NEGATIVE.replace("= 16 pens", "is 16 instead of 18 pens")),
    ("admission", NEGATIVE.replace("16 pens", "16 (not 18) pens")),
    ("admission", NEGATIVE + " The product is wrong."),
    ("admission", NEGATIVE + "\nCorrection. It is 18."),
    ("admission", NEGATIVE + " But actually it's 18."),
    ("admission", NEGATIVE + " Actually, that makes 18."),
    ("admission", NEGATIVE + " The real result is 18."),
    ("admission", NEGATIVE + " Wait, that is 18."),
    ("admission", NEGATIVE + " 3 * 6 is actually 18."),
    ("admission", NEGATIVE + " No, it was 18."),
    ("admission", NEGATIVE + " It should\u2019ve been 18."),
    ("admission", NEGATIVE + " However, it should be 18."),
    ("admission", NEGATIVE + " However, the correct answer is eighteen."),
    ("admission", NEGATIVE + " However, the answer is 18."),
    ("admission", NEGATIVE + " In reality it is 18."),
    ("admission", NEGATIVE + " The correct answer, however, is 18."),
    ("admission", NEGATIVE + " The proper answer must be 18."),
    ("admission", NEGATIVE + " The right count equals 18."),
    ("admission", NEGATIVE + " 16 is not correct."),
    ("admission", NEGATIVE + " Let me correct that."),
    ("admission", NEGATIVE + " However, 3 * 6 = 18."),
    ("admission", NEGATIVE + " (Note: 3 * 6 equals 18.)"),
    ("admission", NEGATIVE + " The correct product is 18."),
    ("admission", NEGATIVE + " The answer ought to be 18."),
    ("admission", NEGATIVE + " 18 is the correct answer."),
    ("admission", NEGATIVE + " 18 pens would have been right."),
    ("admission", NEGATIVE + "\nCorrect: 18"),
    ("admission", NEGATIVE + "\n**Expected**: 18"),
    ("admission", NEGATIVE.replace("16 pens", "16 rather than the correct 18 pens")),
    ("admission", NEGATIVE + " Disclaimer: the result above isn't right."),
    ("admission", NEGATIVE + " Note that this isn't the right answer."),
    # Markup.
    ("markup", "< thinking >Which step do I break?</ thinking >\n" + NEGATIVE),
    ("markup", "<thinking>Which step do I break?</thinking>\n" + NEGATIVE),
    ("markup", "<scratchpad>\n" + NEGATIVE),
    ("markup", NEGATIVE.replace("16 pens", "<b>16</b> pens")),
    ("markup", NEGATIVE.replace("16 pens", '<span style="color: red">16</span> pens')),
    ("markup", NEGATIVE.replace("16 pens", "<br/>16 pens")),
    ("markup", "<!-- slip in the product -->" + NEGATIVE),
    ("markup", NEGATIVE.replace("= 16", "= ~~18~~ 16")),
    ("markup", NEGATIVE.replace("= 16", "= \\textcolor{red}{16}")),
    ("markup", "```text\n" + NEGATIVE + "\n``` "),
    ("markup", NEGATIVE.replace("16 pens", "[b]16[/b] pens")),
    # Control tokens, in the forms in which tokenizers write them.
    ("special_token", NEGATIVE + "<|im_end|>"),
    ("special_token", NEGATIVE + "<|eot_id|>"),
    ("special_token", NEGATIVE + "</s>"),
    ("special_token", "[INST] " + NEGATIVE),
    ("special_token", "<<SYS>>" + NEGATIVE),
    ("special_token", NEGATIVE + "<end_of_turn>"),
    ("special_token", NEGATIVE + "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    ("special_token", NEGATIVE + "<pad>"),
    ("special_token", NEGATIVE + "\nUser: and now?"),
    ("special_token", NEGATIVE + "< |im_end| >"),
    ("special_token", NEGATIVE + "\\<|im_end|\\>"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), GIVEAWAYS)
def test_each_kind_is_refused(kind, text):
    assert find_giveaway(text, POSITIVE) == kind
    reason = pair_checks.find_text_refusal(POSITIVE, Completion(text), 3.0)
    assert reason in (f"giveaway_{kind}", "refusal")


@pytest.mark.parametrize(("kind", "text"), GIVEAWAYS)
def test_what_the_positive_or_the_question_says_too_is_none(kind, text):
    assert find_giveaway("Done. " + text, text) == "" and find_giveaway(text, POSITIVE, text) == ""


def test_phrases_are_compared_without_their_numbers():
    """A rewrite has other numbers than its positive."""
    text = "We get 12 (should be 14), so we add 2. \\boxed{14}"
    assert find_giveaway(text.replace("14", "15"), text) == ""


ORDINARY = [
    "Therefore, the correct answer is \\boxed{16}.",
    "The real result is 16. \\boxed{16}",
    "The calculation is done in two steps, so that it is 16. \\boxed{16}",
    "There is no 7 in it, and actually we need 16. \\boxed{16}",
    "El resultado es 16. \\boxed{16}",
    "Das Ergebnis ist 16. \\boxed{16}",
    "So the correct answer is (B) 16.\n\\boxed{16}",
    "The right answer is 16.\n#### 16",
    "The answer is 16, but first we check the actual value of x: x = 4, and 4 * 4 = 16.",
    "However, the total is 12 + 4 = 16. \\boxed{16}",
    "Note that x > 0, so x = 16. \\boxed{16}",
    "Note: all lengths are in metres. \\boxed{16}",
    "The margin of error is 3 percent, so 16. \\boxed{16}",
    "The relative error is 0.04 and the standard error is 2. \\boxed{16}",
    "We check for x in [0, 16] and in [a, b]. \\boxed{16}",
    "\\sqrt[3]{4096} = \\left[ 16 \\right] and [ABC] = 16. \\boxed{16}",
    "[asy] draw((0,0)--(1,1)); [/asy] \\boxed{16}",
    "If a<b and c>d, then 3 <x> 2 never holds; 0<x<16 gives n<k>m. \\boxed{16}",
    "She has <<4*4=16>>16 apples.\n#### 16",
    "We change the order of summation and replace x by 4 (instead of y). \\boxed{16}",
    "He made 4 errors per page. \\boxed{16}",
    "We introduce a variable x and modify the equation to x = 16. \\boxed{16}",
    "### Step 1: Find the sum\n**Sum:** 12 + 4 = 16.\n- so \\boxed{16}",
    "The student has 4 boxes of 4, so the student has 16 pens. \\boxed{16}",
    "The solution is x = 16 (since x > 0). \\boxed{16}",
    "The original solution of acid is 20% strong, and the result should be positive. \\boxed{16}",
    "40% of 40 is 16. |x| <= 16, f(x) -> 16, 20 - 4 = 16 -- done. \\boxed{16}",
    "Using \\text{area} = \\text{base} \\cdot \\text{height}, A = 16. \\boxed{16}",
    "Let us look at the original price, 20, and the actual price, 16. \\boxed{16}",
    "There is no error in this, and we make no mistake. \\boxed{16}",
    "Step 5: **Error Checking and Assumptions**\nPossible errors: none. \\boxed{16}",
    "The estimate has an error of at most 0.5, an error less than one percent. \\boxed{16}",
    "2. **Change of Limits**: when x = 0, u = 16. \\boxed{16}",
    "We replaced x by 4, and I swap the sides. \\boxed{16}",
    "E_{error} = 4, so the set \\{1, 2\\} has a slip of paper for each. \\boxed{16}",
    "12 liters of the solution were replaced with water; the sign was positive. \\boxed{16}",
    "It is not defined at 0, but 16 is its limit. \\boxed{16}",
    "f(x) = 4, and not g(x), is 16. So x is not 0, but positive. \\boxed{16}",
    "The base (4 by 4) was given (since 4 > 0). \\boxed{16}",
    "The modified equation is x = 16: we altered nothing else. \\boxed{16}",
    "A right triangle: but angle C isn't right-angled, and |a| < |b| > |c|. \\boxed{16}",
    "So 16 is the correct answer. \\boxed{16}",
    "We check that 16 is correct. \\boxed{16}",
    "However, the angles should be positive, and their sum should be 180. \\boxed{16}",
    "3 * 4 = 12 and 13 * 4 = 52; 2 + 3 * 4 = 2 + 12 = 14, and 2 + 12 = 14 again. \\boxed{16}",
    "7 - 3 = 4 and 2 * 7 - 3 = 11, so 1.5 * 4 = 6 and 5 * 4 = 20. \\boxed{16}",
    "By trial and error with small numbers, and by trial-and-error here, x = 16. \\boxed{16}",
    "17 / 5 = 3 remainder 2, and 17 / 5 = 3.4. \\boxed{16}",
    "22 / 7 = 3.14, that is 22 / 7 = 3.142857. \\boxed{16}",
    "In base 8 we have 5 + 4 = 11, beside 5 + 4 = 9. \\boxed{16}",
    "The error rate is 2 %; 31 errors were found. \\boxed{16}",
    "If 3 < x > 2 and the jar contains a bug, x = 16. \\boxed{16}",
]  # fmt: skip


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_mathematics_passes(text):
    assert find_giveaway(text, POSITIVE) == ""
    assert find_giveaway(text, "") == ""


# A positive with prose behind its answer, so that prose there is no giveaway by itself.
EXPLAINED = POSITIVE + " That is the number of pens."


def test_the_correct_answer_is_an_admission_only_beside_another_one():
    assert find_giveaway("It is \\boxed{1,600}. The correct answer is 1600.", EXPLAINED) == ""
    assert find_giveaway("It is \\boxed{1,600}. The correct answer is 1800.", EXPLAINED) == "admission"
    # Without numbers there is nothing to compare.
    assert find_giveaway("It is \\boxed{x}. The correct answer is y.", EXPLAINED) == ""


def test_the_correct_answer_is_the_first_number_named():
    """The rest of the line may repeat the final answer."""
    for rest in (", but I got 16.", " (I wrote 16).", " and 16 is what I got.", "; we found 16."):
        assert find_giveaway(NEGATIVE + " The correct answer is 18" + rest, EXPLAINED) == "admission"
    for rest in ("2 \\cdot 8 = 16.", "16, and 18 is none.", "(B) 16", "$\\frac{32}{2} = 16$."):
        assert find_giveaway(NEGATIVE + " The correct answer is " + rest, EXPLAINED) == ""


def test_prose_behind_the_answer_is_a_giveaway_only_if_the_positive_has_none():
    said = " Nobody would notice that the sum went astray."
    assert find_giveaway(NEGATIVE + said, POSITIVE) == "postscript"
    assert find_giveaway(NEGATIVE + said, EXPLAINED) == ""
    assert find_giveaway(NEGATIVE + said, POSITIVE, "Why is it so?" + said) == ""
    assert find_giveaway(NEGATIVE + " 16 pens in all.", POSITIVE) == ""
    # A positive without a marked answer has no place behind it.
    assert find_giveaway(NEGATIVE + said, "Each box holds 6 pens.") == ""
    assert find_giveaway("Nobody would notice. " + NEGATIVE, POSITIVE) == ""


def test_control_tokens_of_the_tokenizers_in_use_are_special():
    text = NEGATIVE + " \u00a7end\u00a7"
    assert find_giveaway(text, POSITIVE) == ""
    assert find_giveaway(text, POSITIVE, special_tokens={"\u00a7end\u00a7"}) == "special_token"
    assert find_giveaway(text, POSITIVE + "\u00a7end\u00a7", special_tokens={"\u00a7end\u00a7"}) == ""


def test_a_failure_keeps_its_own_reason():
    assert pair_checks.find_text_refusal(POSITIVE, Failure("timeout"), 2.0) == "assistant_timeout"
    assert pair_checks.find_text_refusal(POSITIVE, Completion(NEGATIVE), 2.0) == ""


def test_long_texts_take_no_time():
    """Every pattern is bounded, so that a text made to slow it down does not."""
    pieces = ["(", "[a", "<a ", "*", "the ", "however ", "student ", "# ", "note: ", "a(b["]
    pieces += [
        "\n",
        "\n ",
        "1",
        "1,",
        "1 (",
        "not 1",
        "= 1, ",
        ". the ",
        "has an ",
        "{a",
        "\u3010a",
        ". note in ",
        "1 + ",
        "1+",
        "1 plus ",
        "1 is ",
        "but ",
        ". a ",
        "step above ",
        "</ ",
    ]
    for piece in pieces:
        start = time.process_time()
        assert find_giveaway(piece * 4000, POSITIVE) in ("", "remark", "note", "markup", "admission")
        assert time.process_time() - start < 5, piece  # some tenths of a second
