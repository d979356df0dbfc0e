"""The references of the five benchmarks: each verified as an answer to itself, others rejected, and every cleaning
rule of `answers` on a row that needs it."""

import json

import pytest

from cooper_jax.data import answers, problems
from cooper_jax.rule import answer_parser
from cooper_jax.rule.verifier import RuleConfig, RuleVerifier
from cooper_jax.types import Verdict

COLUMNS = dict(question_key="question", reference_key="answer", solution_key="", tfds_dir="", split="train")
# Of each: the least share of rows whose reference is verified, and the references that are not.  docs/references.md
# says what stands behind them.
FLOORS = {
    "gsm8k_test": 0.99,
    "svamp_test": 0.99,
    "math500_test": 0.97,
    "olympiadbench_en_test": 0.99,
    "odyssey_test": 0.99,
}
NOT_VERIFIED: dict[str, list[str]] = {name: [] for name in FLOORS}
# Of each: the least share of other rows' references that is decided wrong; on the rest the rule abstains.
LEAST_WRONG = {
    "gsm8k_test": 1.0,
    "svamp_test": 1.0,
    "math500_test": 0.90,
    "olympiadbench_en_test": 0.96,
    "odyssey_test": 0.92,
}
# Two spellings of one value, as (reference, another row's): they are not to be rejected.
EQUAL = {("5", "x=5")}
# References that are equal to themselves as text alone: any other spelling of them abstains.
TEXT_ALONE = {
    "math500_test": ["\\text{Evelyn}", "\\text{east}", "\\text{even}", "\\text{ellipse}", "\\text{Navin}"],
    "olympiadbench_en_test": [
        "f(x)=a x+b\\text{, where }b\\text{ is an arbitrary integer, and }a\\text{ is an arbitrary positive "
        "integer with }\\mho(a)=0",
        "t(0,4]",
    ],
    "odyssey_test": ["No", "Yes", "a. 3, b. 4"],
}


@pytest.fixture(scope="module")
def published(shared_data):
    return {
        name: problems.load_problems(str(shared_data / f"{name}.jsonl"), "auto", **COLUMNS) for name in FLOORS
    }


@pytest.fixture(scope="module")
def rule():
    with RuleVerifier(RuleConfig(workers=2, timeout=20.0, step_budget=60.0, memory_mb=2048)) as verifier:
        yield verifier


def said(reference):
    return f"The final answer is \\boxed{{{reference}}}."


def distinct(found):
    return list(dict.fromkeys(p.reference for p in found))


@pytest.mark.parametrize("name", FLOORS)
def test_every_reference_is_verified_as_its_own_answer(name, published, rule):
    found = published[name]
    verdicts = rule.check(
        [(p.reference, said(p.reference)) for p in found]
    )  # each distinct one is judged once
    failing = [p.id for p, v in zip(found, verdicts, strict=True) if v is not Verdict.CORRECT]
    assert failing == NOT_VERIFIED[name]
    assert 1 - len(failing) / len(found) >= FLOORS[name]


@pytest.mark.parametrize("name", FLOORS)
def test_references_that_are_text_alone(name, published):
    found = [r for r in distinct(published[name]) if not r.replace(".", "").isdigit()]
    alone = [r for r in found if not answer_parser.parse_answer(r).comparable]
    assert sorted(alone) == sorted(TEXT_ALONE.get(name, []))


def check_another(name, found, shift, rule):
    """Beside each distinct reference another one is decided wrong, or the rule abstains."""
    references = distinct(found)
    others = references[shift:] + references[:shift]
    verdicts = rule.check([(a, said(b)) for a, b in zip(references, others, strict=True)])
    assert set(verdicts) <= {Verdict.WRONG, Verdict.UNRECOGNISED}
    assert verdicts.count(Verdict.WRONG) / len(verdicts) >= LEAST_WRONG[name]


@pytest.mark.parametrize("name", FLOORS)
def test_another_rows_reference_is_rejected(name, published, rule):
    check_another(name, published[name], 1, rule)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [7, 41, 113])
@pytest.mark.parametrize("name", FLOORS)
def test_further_references_are_rejected(name, shift, published, rule):
    check_another(name, published[name], shift, rule)


def test_pairs_that_are_one_value(published, rule):
    references = {p.reference for found in published.values() for p in found}
    assert all({a, b} <= references for a, b in EQUAL)
    assert set(rule.check([(a, said(b)) for a, b in EQUAL])) == {Verdict.CORRECT}


# --- every cleaning rule on a real row ------------------------------------------------------------------------

# rule, file, line, what the published text holds, the reference
RULES = [
    ("layout at the end", "odyssey_test", 1, "16\\\\\n\\noindent", "16"),
    ("layout at the start", "olympiadbench_en_test", 519, "$\\quad(2", "(2+\\sqrt{2}, 1+\\sqrt{2})"),
    ("a full stop outside the formula", "odyssey_test", 127, "$.\\\\", "\\frac{40}{243}"),
    ("a full stop inside the formula", "verify_dev", 48, "1.$", "x^4-10x^2+1"),
    ("a full stop behind a word", "verify_train", 10, "No.", "No"),
    ("a layout command behind a matrix's rows", "math500_test", 100, "\\begin{pmatrix}",
     "\\begin{pmatrix} -1/3 \\\\ 2/3 \\\\ 5/3 \\end{pmatrix}"),
    ("dollar signs around a formula", "odyssey_test", 25, "$127$", "127"),
    ("a dollar sign too many", "odyssey_test", 104, "{12} $.", "\\frac{\\sqrt{30}}{12}"),
    ("several formulas", "olympiadbench_en_test", 14, "$69$,$84$", "69, 84"),
    ("and between formulas", "odyssey_test", 328, "$ and $", "\\alpha=1, \\beta=4"),
    ("or between formulas", "odyssey_test", 333, "$ or $",
     "\\frac{\\sqrt{2}\\pi}{4}, \\frac{\\pi}{2\\sqrt{2}}"),
    ("words between formulas", "olympiadbench_en_test", 74, "where $b$",
     "f(x)=a x+b\\text{, where }b\\text{ is an arbitrary integer, and }a\\text{ is an arbitrary positive "
     "integer with }\\mho(a)=0"),
    ("words alone stay bare", "odyssey_test", 8, "D\\\\", "D"),
    ("a currency sign", "math500_test", 460, "\\$18.90", "18.90"),
    ("a currency sign and a blank", "odyssey_test", 213, "\\$ 9681.72", "9681.72"),
    ("separators of thousands: ,\\!", "math500_test", 199, "10,\\!080", "10080"),
    ("separators of thousands: ,\\! and a blank", "math500_test", 218, "11,\\! 111", "11111111100"),
    ("separators of thousands: {,}", "verify_dev", 88, "10{,}000", "10000"),
    ("separators of thousands: ,", "gsm8k_test", 147, "#### 2,125", "2125"),
    ("a comma between answers is none", "olympiadbench_en_test", 88, "2500,7500", "2500, 7500"),
    ("several answers", "olympiadbench_en_test", 22, "1,3,5", "1, 3, 5"),
    ("tuples keep their commas", "math500_test", 61, "(6,31,-1)", "(6,31,-1)"),
    ("several tuples", "olympiadbench_en_test", 6, "(1,8,19), (2", "(1,8,19), (2,7,13), (4,5,7)"),
    ("a percent sign", "olympiadbench_en_test", 140, "62.5%", "62.5\\%"),
    ("a percent sign that has its backslash", "olympiadbench_en_test", 151, "8 \\%", "8 \\%"),
    ("a unit behind a number in prose", "odyssey_test", 180, "4ft", "4 \\text{ ft}"),
    ("a unit of its own column", "olympiadbench_en_test", 184, "{12}$", "\\frac{41}{12} \\text{ km}"),
    ("a unit with a slash", "olympiadbench_en_test", 231, "{7}$", "\\frac{600}{7} \\text{ km/h}"),
    ("a unit that is a percent sign", "olympiadbench_en_test", 317, "4.2", "4.2\\%"),
    ("a unit that is a formula, on each answer", "olympiadbench_en_test", 32, "=90$,$",
     "\\angle B E A_{1}=90^{\\circ}, \\angle A E B_{1}=90^{\\circ}"),
    ("a number with an idle zero", "svamp_test", 1, "145.0", "145"),
]  # fmt: skip
ANSWER_FIELDS = ("answer", "Answer", "final_answer", "reference_answer")


def row_of(shared_data, name, line):
    row = json.loads((shared_data / f"{name}.jsonl").read_bytes().splitlines()[line - 1])
    return next(iter(row.values())) if len(row) == 1 else row


@pytest.mark.parametrize("case", RULES, ids=[rule for rule, *_ in RULES])
def test_a_cleaning_rule_on_the_row_that_needs_it(case, shared_data, published):
    _, name, line, holds, cleaned = case
    value = next(row[f] for row in [row_of(shared_data, name, line)] for f in ANSWER_FIELDS if f in row)
    text = (
        value if isinstance(value, str) else " ".join(map(str, value if isinstance(value, list) else [value]))
    )
    assert holds in text
    found = (
        answers.clean_reference(text) if name.startswith("verify") else published[name][line - 1].reference
    )
    assert found == cleaned


def test_cleaning_questions_on_the_rows_that_need_it(shared_data, published):
    """Layout at the end and inside, the instruction, a body that its question ends, calculator marks."""
    text = row_of(shared_data, "odyssey_test", 1)["question"]
    assert text.endswith(".\n\t\n\n\\end{problem}\n\\noindent")
    assert published["odyssey_test"][0].question == text[: -len("\n\t\n\n\\end{problem}\n\\noindent")]
    text = row_of(shared_data, "odyssey_test", 151)["question"]
    assert "\\noindent Options:\\\\" in text and "\n\nOptions:\\\\" in published["odyssey_test"][150].question
    text = row_of(shared_data, "math500_test", 1)["prompt"]
    kept, asked = text.rsplit("\n", 1)
    assert "\\boxed{}" in asked and published["math500_test"][0].question == kept.strip()
    assert published["svamp_test"][0].question.endswith("into 93 groups, How big is each group of bananas?")
    assert "<<9*2=18>>" in row_of(shared_data, "gsm8k_test", 1)["answer"]
    assert "She makes 9 * 2 = $18 every day" in published["gsm8k_test"][0].solution
    assert published["gsm8k_test"][0].solution.endswith("\nThe final answer is \\boxed{18}.")
