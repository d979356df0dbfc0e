"""The rule verifier's verdicts by kind of answer: what is correct, what is wrong, and what is never correct."""

import re
import signal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cooper_jax.rule import rule_worker, words
from cooper_jax.rule.reference_checks import describe_references
from cooper_jax.rule.rule_verdict import CORRECT, NO_ANSWER, UNRECOGNISED, WRONG, judge_answer
from cooper_jax.types import Problem

# kind -> (reference, answer) pairs that are correct, wrong, and without a verdict, since another reading is right.
KINDS: dict[str, tuple[list, list, list]] = {
    "equal text": (
        [("\\langle 4,5\\rangle", "\\langle 4, 5 \\rangle"), ("t(0,4]", "t(0, 4]"), ("\\ne 5", "\\neq 5")],
        [("2 1/2", "21/2")],
        [("2, 500", "2,500")],
    ),
    "exact numbers": (
        [("3^{90}", str(3**90)), ("0.125", "1/8"), ("\\frac{355}{113}", "3\\frac{16}{113}"), ("17", "017"),
         ("0.1\\overline{6}", "\\frac{1}{6}"), ("\\frac{1}{7}", "0.142857142857"), ("\\sqrt{12}", "2\\sqrt3")],
        [("1/3^{70}", "1/3^{69}"), ("9.9\\times10^{-20}", "2.0\\times 10^{-31}"), ("0.00000003", "0.00000004"),
         (str(10**30 + 1), str(10**30)), ("\\frac{1}{900!}", "\\frac{1}{901!}"), ("0", "10^{-12}")],
        [("\\frac{1}{7}", "0.143"), ("3.14", "\\pi")],
    ),
    "equations": (
        [("8", "x = 8"), ("8", "8 = t"), ("y=3x-2", "-2+3x"), ("y=3x-2", "y = 3x - 2"), ("2x+4y=6", "x+2y-3=0"),
         ("x^2+1=0", "2x^2+2=0"), ("7", "3 + 4 = 7")],
        [("8", "x = 9"), ("f(x)=1", "f(x)=x-1"), ("a=3, b=4", "a=4, b=3")],
        [("8", "x^2+y^2=8"), ("8", "x+y=8"), ("8", "2x=8"), ("8", "3=8"), ("x^2+1=0", "x^2+3=0"), ("8", "8=9")],
    ),
    "vectors, sequences, congruences, families": (
        [("(4,5,6)", "\\langle 4,5,6\\rangle"), ("x \\equiv 2 \\pmod{9}", "x\\equiv 11 \\pmod 9"),
         ("x=3k\\pi, k\\in\\mathbb{Z}", "3n\\pi, n \\in \\mathbb{Z}"), ("1,4,9,\\ldots", "1, 4, 9, \\dots")],
        [("\\langle 4,5,6\\rangle", "\\langle 4,5,7\\rangle"), ("x \\equiv 2 \\pmod 9", "x \\equiv 3 \\pmod{9}"),
         ("x=3k\\pi, k\\in\\mathbb{Z}", "3"), ("\\frac{\\pi}{3}+k\\pi", "\\frac{\\pi}{3}+3k\\pi"),
         ("\\langle 4,5,6\\rangle", "6")],
        [("1,4,9,\\ldots", "1,4,8,\\ldots"), ("2", "2 \\pmod 9")],
    ),
    "units": (
        [("30 \\text{ cm}", "30"), ("3 \\text{ m}", "300 \\text{ cm}"), ("90 \\text{ km/h}", "25 \\text{ m/s}"),
         ("7", "7\\,\\mathrm{cm}^2"), ("14\\pi", "14\\pi~\\text{m}^2"),
         ("5 \\mathrm{~m}/\\mathrm{s}", "5 \\text{ m/s}"),
         ("2", "2 \\text{ apples}"), ("45^\\circ", "45"), ("60^\\circ", "\\frac{\\pi}{3}"), ("9", "9 AM"),
         ("1.5 \\text{ hours}", "90 \\text{ minutes}"), ("3pqr", "3rqp"), ("8", "\\$8"), ("8", "€8")],
        [("30 \\text{ cm}", "30 \\text{ m}"), ("8 \\text{ cm}^2", "8 \\text{ cm}^3"),
         ("4 \\text{ h}", "4 \\text{ min}"),
         ("3", "4 \\text{ cm}"), ("3", "3pq"), ("4kx", "4"), ("5ax^2", "5bx^3")],
        [("0.25", "25 \\text{ cents}"), ("3pq", "3uv"), ("7200", "2 \\text{ hours}"),
         ("4 \\text{ apples}", "4 \\text{ pears}")],
    ),
    "percent": (
        [("35\\%", "35 percent"), ("35\\%", "0.35"), ("35", "35\\%"), ("0.35", "35 \\text{ percent}"),
         ("250\\%", "\\frac{5}{2}")],
        [("35\\%", "53\\%"), ("35\\%", "3.5\\%")],
        [],
    ),
    "hedges and relations": (
        [("B", "(B)"), ("B", "B) 20"), ("yes", "Yes, it does."), ("no", "No, it is not.")],
        [("8", "8 \\text{ or } 9"), ("8", "8, 9"), ("B", "C"), ("yes", "no"), ("8", "\\{8,9\\}"),
         ("8", "Not 8"), ("8", "8 or so"), ("8", "8th"), ("8", "8 (or 9)")],
        [("8", a) for a in ("\\ne 8", "< 8", "\\ge 8", "8_9", "8 squared", "8 more than y", "8'", "~8",
                            "about 8", "at least 8", "8 at most", "maybe 8", "8 \\text{ or more}",
                            "\\approx 8", "8 ish", "8 halves", "between 8 and 9", "minus 8")]
        + [("12", "12_3"), ("B", "(B) or (C)"), ("yes", "Yes, but no"), ("\\{1,3\\}", "(1,3)"), ("B", "not B")],
    ),
    "words and constants": (
        [("48", "4 dozen"), ("6000000", "6 \\text{ million}"), ("2500", "2.5 thousand"), ("300", "3 hundred"),
         ("3-2i", "3-2\\mathrm{i}"), ("\\mathrm{e}^{3}", "e^3"),
         ("\\ln 5", "\\mathrm{ln}\\,5"),
         ("\\text{odd}", "Odd"), ("\\emptyset", "\\text{no solution}"), ("\\text{Friday}", "friday")],
        [("6", "6 \\text{ million}"), ("3-2\\mathrm{i}", "1"), ("2-\\mathrm{i}", "2+i"), ("Friday", "Monday"),
         ("\\varnothing", "0"), ("even", "odd")],
        [("8", "8 \\text{ factorial}"), ("east", "\\text{eastern}"), ("21", "twenty-one"), ("10 = ten", "10")],
    ),
    "characters": (
        [("-7", "−7"), ("-7", "–7"), ("34", "３４"), ("34", "٣٤"), ("x^3+2", "x³+2"), ("\\frac{3}{4}", "¾"),
         ("2.5", "2½"), ("\\frac{5}{6}", "5⁄6"), ("3\\sqrt{7}", "3√7"), ("(2,3)", "（2，3）"), ("80^\\circ", "80°"),
         ("x \\ge 4", "x ≥ 4"), ("9", "9\u200b"), ("2", "2厘米"), ("10000", "10\\,000"), ("4", "\\displaystyle 4")],
        [("-7", "7"), ("34", "３５"), ("8", "8²"), ("8", "8½")],
        [],
    ),
    "collections": (
        [("(0,7)", "0<x<7"), ("(-\\infty,4)", "x<4"), ("x\\in[1,5)", "1 \\le x < 5"), ("[3,\\infty)", "x \\geq 3"),
         ("(-\\infty,1)\\cup(6,\\infty)", "x<1 \\text{ or } x>6"), ("\\{x \\mid x>8\\}", "x > 8"),
         ("1,2", "x=2, x=1"), ("(x,y)=(7,8)", "(7,8)"), ("(7,8)", "x=7, y=8"), ("\\pm 6", "-6, 6"),
         ("1\\pm\\sqrt2", "1-\\sqrt{2}, 1+\\sqrt{2}"), ("\\begin{pmatrix}1\\\\2\\end{pmatrix}",
          "\\begin{bmatrix} 1 \\\\ 2.0 \\end{bmatrix}"), ("3:5", "3 : 5"), ("71_8", "71_{\\text{eight}}"),
         ("\\infty", "+\\infty"), ("-\\infty", "-\\infty")],
        [("[0,7)", "[0,7]"), ("[2,3]", "(2,3)"), ("x<4", "x \\le 4"), ("\\pm 6", "6"), ("4", "4,5,6"),
         ("(2,3),(4,5)", "(2,3),(5,4)"), ("110_2", "111_2"), ("\\begin{pmatrix}3\\\\7\\end{pmatrix}",
          "\\begin{pmatrix}3&7\\end{pmatrix}"), ("\\infty", "-\\infty"), ("\\infty", "7"), ("9:30", "9:00")],
        [("x > 5", "y > 6"), ("100, 200", "100,200")],
    ),
    "expressions": (
        [("\\sin^2 x", "1-\\cos^2 x"), ("a^2-b^2", "(a-b)(a+b)"), ("3\\ln 2", "\\ln 8"), ("84", "\\binom{9}{3}"),
         ("\\frac{1}{2}gt^2", "\\frac{gt^2}{2}"), ("n(n-1)/2", "\\frac{n^2-n}{2}"), ("\\sum_{k=1}^{4} k", "10")],
        [("a^2-b^2", "(a-b)^2"), ("2^n", "2^{n+1}"), ("6", "6\\sqrt{2}")],
        [("3n", "3m"), ("\\sqrt{x^2}", "x"), ("\\ln 5", "\\log 5"), ("5", "5 + C"), ("3m", "3"),
         ("10", "\\sum_{k=1}^{4} k")],
    ),
}  # fmt: skip
ROWS = [
    (kind, reference, answer, verdict)
    for kind, parts in KINDS.items()
    for verdict, rows in zip((CORRECT, WRONG, UNRECOGNISED), parts, strict=True)
    for reference, answer in rows
]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_answers(kind):
    mistaken = []
    for _, reference, answer, expected in (row for row in ROWS if row[0] == kind):
        verdict = judge_answer(reference, f"So the final answer is \\boxed{{{answer}}}.")
        if verdict != expected:
            mistaken.append((reference, answer, expected, verdict))
    assert not mistaken


@pytest.mark.parametrize(
    ("reference", "completion", "verdict"),
    [
        ("8", "<think>perhaps \\boxed{9}</think> It is \\boxed{8}.", CORRECT),
        ("8", "<think>\\boxed{8}", NO_ANSWER),
        ("8", "<answer>8</answer> and 9 more", CORRECT),
        ("8", "<answer>The answer is \\boxed{9}</answer> 8", WRONG),
        ("3, 4", "They are \\boxed{3} and \\boxed{4}.", CORRECT),
        ("8", "It is \\fbox{8}, and not 9.", CORRECT),
        ("8", "It is \\fbox{9}, and not 8.", WRONG),
        ("\\frac{3}{\\sqrt{7}}", "\\boxed{\\dfrac{3}{\\sqrt{7}}}", CORRECT),
        ("4", "They are \\boxed{3} and \\boxed{4}.", WRONG),
        ("4", "\\boxed{3} was a slip, so \\boxed{4}.", CORRECT),
        ("4", "\\boxed{4}\n\n\\boxed{4}", CORRECT),
        ("8", "所以答案是 8。", CORRECT),
        ("8", "答案：\\boxed{8元}", CORRECT),
        ("B", "故选 C", WRONG),
        ("8", "La respuesta es 8.", CORRECT),
        ("8", "La réponse est 9.", WRONG),
        ("8", "Die Antwort ist 8.", CORRECT),
        ("8", "Ответ: 8", CORRECT),
        ("8", "答えは8です", CORRECT),
        ("8", "정답은 8입니다.", CORRECT),
        ("8", "### Answer\n8", CORRECT),
        ("8", "So it takes 8 minutes.", CORRECT),
        ("8", "So it takes 9 minutes.", WRONG),
        ("8", "It is not 8.", UNRECOGNISED),
        ("8", "dolor 8 sit amet", UNRECOGNISED),
        ("8", "Chapter 8", UNRECOGNISED),
        ("8", "8 8 8 8", UNRECOGNISED),
        ("8", "1 2 3 4 5 6 7 8 9", UNRECOGNISED),
        ("8", "I have no idea.", NO_ANSWER),
        ("proof", "\\boxed{proof}", UNRECOGNISED),
    ],
)
def test_reading_of_completions(reference, completion, verdict):
    assert judge_answer(reference, completion) == verdict


BOMBS = [
    "7^{7^{7^{7^{7}}}}", "200000!", "((2^{99999})^{99999})!",
    "{" * 3000 + "8" + "}" * 3000, "(" * 500 + "8" + ")" * 500,
    "9" * 200_000, "\\binom{10^{9}}{10^{8}}", "e^{e^{e^{e^{e}}}}", "\\sqrt[3]{" * 100 + "8" + "}" * 100, "8!!!!!!",
    "\\frac{8}{10^{10^{10}}}", ",".join(map(str, range(3000))), "8" + "^{8}" * 900, "\\sin(10^{10^{10}})",
    "\\boxed{" * 2000 + "9" + "}" * 2000, "x^{" * 200 + "2" + "}" * 200, "\\sum_{k=1}^{3} 9^{9^{9^{k}}}",
    "\\sum_{k=1}^{10^9} \\frac{1}{k}", "1e999999999", "0." + "1" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
def test_large_answers_are_refused_within_a_fraction_of_a_second(bomb, monkeypatch):
    before = signal.signal(signal.SIGPROF, rule_worker._interrupt)
    monkeypatch.setattr(rule_worker, "KERNEL_GRACE", 60.0)
    try:
        assert rule_worker.judge_within("8", f"\\boxed{{{bomb}}}", 1.0) in (UNRECOGNISED, WRONG)
    finally:
        signal.signal(signal.SIGPROF, before)


# --- no perturbation of a reference is that reference --------------------------------------------------------

# None of them is 1, whose square is no other answer.
REFERENCES = st.one_of(
    st.integers(2, 10**6).map(str),
    st.decimals("0.01", "999", places=2).filter(lambda d: d != 1).map(str),
    st.tuples(st.integers(1, 99), st.integers(2, 99))
    .filter(lambda t: t[0] != t[1])
    .map(lambda t: f"\\frac{{{t[0]}}}{{{t[1]}}}"),
    st.integers(2, 60).map(lambda n: f"{n}\\sqrt{{7}}"),
    st.integers(2, 60).map(lambda n: f"\\frac{{\\pi}}{{{n}}}"),
    st.integers(2, 60).map(lambda n: f"{n}x+1"),
)
PERTURBATIONS = [
    "-({r})", "\\neq {r}", "< {r}", "\\ge {r}", "\\approx {r}", "not {r}", "about {r}", "{r} or more",
    "at least {r}",
    "{r} \\text{{ or }} -1", "{r}, -1", "({r}, -1)", "[{r}, 10^9]", "{r} + 1", "{r} - 1", "2 \\cdot ({r})",
    "({r})^2", "{r} squared",
    "{r} more than y", "{r} million", "{r} \\text{{ million}}", "{r} q", "{r} \\text{{ or less}}",
    "-1 < {r}", "-2={r}",
    "x^2+y^2={r}", "x+y={r}", "{r} + z", "|{r}| + i", "{r} \\pmod{{5}}", "between 0 and {r}", "\\pm ({r})",
    "maybe {r}",
    "{r} factorial", "{r}, \\ldots", "unless {r}", "{r} is wrong", "{r} \\text{{ times }} 2",
    "{r} \\text{{ halves}}",
]  # fmt: skip
UNITS = ["\\text{ cm}", "\\text{ cm}^2", "\\text{ kg}", "\\text{ hours}", "\\text{ m/s}", "^\\circ"]


@settings(deadline=None, max_examples=150, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    REFERENCES,
    st.sampled_from(PERTURBATIONS),
    st.sampled_from(["\\boxed{{{}}}", "The answer is {}.", "#### {}"]),
)
def test_no_perturbation_is_correct(reference, perturbation, template):
    answer = perturbation.format(r=reference)
    assert judge_answer(reference, template.format(answer)) != CORRECT


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(2, 10**4), st.permutations(UNITS))
def test_no_other_unit_is_correct(number, pair):
    assert judge_answer(f"{number}{pair[0]}", f"\\boxed{{{number}{pair[1]}}}") != CORRECT
    assert judge_answer(f"{number}{pair[0]}", f"\\boxed{{{number}{pair[0]}}}") == CORRECT


@settings(deadline=None, max_examples=80, derandomize=True)
@given(REFERENCES)
def test_a_reference_is_correct_in_other_words(reference):
    for said in (f"\\boxed{{{reference}}}", f"\\boxed{{ ({reference}) }}", f"The answer is ${reference}$."):
        assert judge_answer(reference, said) == CORRECT


def test_words_that_change_a_number_are_no_unit():
    assert words.changes_number("or so") and not words.changes_number("apples per day")


def test_references_that_are_of_no_use_are_counted():
    made = [Problem(f"q{i}", r) for i, r in enumerate(["8", "proof", "9 (apples)", "yes", "\\frac{1}{2}"])]
    said = describe_references("data.train", [*made, made[0]])
    assert re.search("data.train: of 6 problems.* of 2 .*'proof', '9 .apples.'.*; 1 are duplicates", said)
    assert describe_references("data.train", made[3:]) == ""
