"""Published formats, malformed rows, the order of problems, prepared data sets."""

import collections
import gzip
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cooper_jax.data import answers, labelled_completions, problems
from cooper_jax.types import Problem, Triple

ROOT = Path(__file__).parents[1]
COLUMNS = dict(question_key="question", reference_key="answer", solution_key="", tfds_dir="", split="train")


def load(source, format="auto", **changed):
    return problems.load_problems(str(source), format, **{**COLUMNS, **changed})


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "published, cleaned",
    [
        ("18", "18"),
        ("70,000", "70000"),
        ("-1,250.50", "-1250.50"),
        ("10,\\!080", "10080"),
        ("11,\\! 111,\\! 111,\\! 100", "11111111100"),
        ("1{,}000", "1000"),
        ("\\$32,\\!348", "32348"),
        ("$18", "18"),
        ("16\\\\\n\\noindent", "16"),
        ("$\\frac{8}{3}$\\\\\n\\noindent", "\\frac{8}{3}"),
        ("1.25 \\\\ \n\n\\noindent", "1.25"),
        ("$-1.$ \\\\\n\\noindent", "-1"),
        ("\\frac{\\sqrt{30}}{12} $.\n\n\\noindent", "\\frac{\\sqrt{30}}{12}"),
        ("No.\\\\\n\\noindent", "No"),
        ("251,7", "251, 7"),
        ("1,-2", "1, -2"),
        ("$69$,$84$", "69, 84"),
        ("$\\alpha=1$ and $\\beta=4$.", "\\alpha=1, \\beta=4"),
        ("$x$, where $y$ is odd", "x\\text{, where }y\\text{ is odd}"),
        ("(1,2),(3,4)", "(1,2), (3,4)"),
        ("(3,4]", "(3,4]"),
        ("]0,1[", "]0,1["),
        ("\\{1\\pm\\sqrt{5},-2\\}", "\\{1\\pm\\sqrt{5},-2\\}"),
        ("\\begin{pmatrix} -2 \\\\ 7 \\end{pmatrix}", "\\begin{pmatrix} -2 \\\\ 7 \\end{pmatrix}"),
        ("a\\,b", "a\\,b"),
        ("62.5%", "62.5\\%"),
        ("8 \\%", "8 \\%"),
        ("6xy", "6xy"),
        ("$\\quad(2, 1)$", "(2, 1)"),
        ("\\noindentation", "\\noindentation"),
    ],
)
def test_reference_is_the_body_of_one_formula(published, cleaned):
    assert answers.clean_reference(published) == cleaned
    assert answers.clean_reference(cleaned) == cleaned  # nothing is left to clean


def test_more_than_one_answer_is_never_a_thousands_separator():
    assert answers.clean_reference("221,800") == "221800"
    assert answers.clean_reference("221,800", several=True) == "221, 800"
    assert answers.join_answers(["221", "800"]) == "221, 800"


@pytest.mark.parametrize(
    "unit, with_unit",
    [
        ("", "2, 3"),
        ("km/h", "2 \\text{ km/h}, 3 \\text{ km/h}"),
        ("$cm^2$", "2 \\text{ cm}^2, 3 \\text{ cm}^2"),
        ("%", "2\\%, 3\\%"),
        ("^{\\circ}", "2^{\\circ}, 3^{\\circ}"),
    ],
)
def test_a_unit_goes_to_each_answer(unit, with_unit):
    assert answers.join_answers(["$2,3$"], unit) == with_unit


def test_words_outside_formulas_are_units_in_prose_alone():
    assert answers.clean_reference("4ft \\\\\n\\noindent", prose=True) == "4 \\text{ ft}"
    assert answers.clean_reference("13.45 years", prose=True) == "13.45 \\text{ years}"
    assert answers.clean_reference("4xy") == "4xy"


@pytest.mark.parametrize(
    "value, text",
    [(145.0, "145"), (-0.0, "0"), (0.5, "0.5"), (7, "7"), ("1,200.0", "1200"), (1e21, "1" + "0" * 21)],
)
def test_numbers_have_no_exponent_and_no_idle_zeros(value, text):
    assert answers.format_number(value) == text


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), "seven", "1e999999999", None])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="is not a finite number"):
        answers.format_number(value)


def test_gsm8k_solution_ends_in_a_box_and_has_no_marks():
    worked = "He has 5*4=$<<5*4=20>>20.\nTwice that is 2*20,000=<<2*20000=40000>>40,000\n#### 40,000"
    assert answers.split_gsm8k_answer(worked) == (
        "40000",
        "He has 5*4=$20.\nTwice that is 2*20,000=40,000\nThe final answer is \\boxed{40000}.",
    )
    for bad in ("no mark", "1 #### 2 #### 3"):
        with pytest.raises(ValueError, match="'####' marks, not 1"):
            answers.split_gsm8k_answer(bad)


def test_question_loses_layout_and_instruction_but_not_its_own_box():
    assert answers.clean_question("Find $x$.\n\t\n\\end{problem}\t\n\\noindent") == "Find $x$."
    assert (
        answers.clean_question("Add.\n\n\\noindent Options:\\\\\nA) 1\\\\\nB) 2\n")
        == "Add.\n\nOptions:\\\\\nA) 1\\\\\nB) 2"
    )
    asked = "Why?\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert answers.strip_instruction(asked) == "Why?"
    kept = "Fill \\[4 + \\boxed{\\phantom{2}} = 5\\]"
    assert answers.strip_instruction(kept) == kept


# --- formats -------------------------------------------------------------------------------------------

ROWS = {
    "gsm8k": {"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
    "svamp": {"Body": "Bo has 2 nuts and 3 figs", "Question": "How many?", "Answer": 5.0, "Type": "Addition"},
    "math500": {
        "prompt": "What is $1+1$?\nPlease reason step by step, and put your final answer within \\boxed{}.",
        "answer": "2",
    },
    "olympiadbench": {
        "question": "Speed?", "final_answer": ["$\\frac{1}{2}$"], "unit": "km", "context": None,
        "is_multiple_answer": False,
    },
    "odyssey": {"Problem_3": {"question": "Odd?\n\\end{problem}\n\\noindent", "answer": "16\\\\\n\\noindent"}},
    "jsonl": {"question": "Half of one?", "answer": 0.5},
}  # fmt: skip
EXPECTED = {
    "gsm8k": ("Two and two?", "4", "2+2=4\nThe final answer is \\boxed{4}."),
    "svamp": ("Bo has 2 nuts and 3 figs, How many?", "5", ""),
    "math500": ("What is $1+1$?", "2", ""),
    "olympiadbench": ("Speed?", "\\frac{1}{2} \\text{ km}", ""),
    "odyssey": ("Odd?", "16", ""),
    "jsonl": ("Half of one?", "0.5", ""),
}


@pytest.mark.parametrize("format", ROWS)
def test_auto_recognises_each_published_format(format, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS[format], ROWS[format])
    subject = "Addition" if format == "svamp" else ""
    expected = [Problem(*EXPECTED[format], f"rows:{n}", subject) for n in (1, 2)]
    assert load(path) == expected
    assert load(path, format) == expected


@pytest.mark.parametrize(
    "format, added, expected",
    [
        ("odyssey", {"label": "Algebra", "level": "college math"}, ("Algebra", "college math")),
        ("olympiadbench", {"subfield": "Geometry", "answer_type": "Tuple"}, ("Geometry", "")),
        ("math500", {"subject": "Precalculus", "level": 5}, ("Precalculus", "5")),
        ("gsm8k", {"level": None, "subject": " "}, ("", "")),
    ],
)
def test_a_problem_has_the_subject_and_level_of_its_row(format, added, expected, tmp_path):
    row = dict(ROWS[format])
    if format == "odyssey":
        row["Problem_3"] = row["Problem_3"] | added
    else:
        row |= added
    (found,) = load(write_rows(tmp_path / "rows.jsonl", row))
    assert (found.subject, found.level) == expected


def test_a_problem_keeps_the_columns_of_its_row(tmp_path):
    row = {**ROWS["gsm8k"], "target": 24, "numbers": [1, 2], "extra": {"split": "train"}}
    path = write_rows(tmp_path / "rows.jsonl", row, ROWS["gsm8k"])
    first, second = load(path)
    assert first.columns == row and second.columns == ROWS["gsm8k"]
    assert len({first, second}) == 2 and "numbers" not in repr(first)  # hashable, and short in messages


def test_auto_says_what_it_saw_and_how_to_go_on(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", {"q": "Two?", "a": "2", "rationale": "One and one."})
    with pytest.raises(
        ValueError, match=r"rows.jsonl:1: .*'a', 'q', 'rationale'.*no known format.*question_key"
    ):
        load(path)
    named = load(path, question_key="q", reference_key="a", solution_key="rationale")
    assert named == [Problem("Two?", "2", "One and one.", "rows:1")]
    path = write_rows(tmp_path / "two.jsonl", {**ROWS["gsm8k"], "final_answer": ["4"]})
    with pytest.raises(ValueError, match="gsm8k and olympiadbench.*config.data.format"):
        load(path)
    assert load(path, "gsm8k")[0].reference == "4"
    with pytest.raises(ValueError, match="format 'gsm' is none of auto, gsm8k"):
        load(path, "gsm")


def test_gzip_and_parquet_hold_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    plain = write_rows(tmp_path / "rows.jsonl", ROWS["gsm8k"], ROWS["gsm8k"])
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    columns = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROWS["gsm8k"]] * 2), columns)
    assert load(packed) == load(columns) == load(columns, "parquet") == load(plain)
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(ValueError, match="rows.jsonl.gz:.*damaged"):
        load(packed)
    columns.write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(ValueError, match="rows.parquet.*not readable as parquet"):
        load(columns)


def test_blank_lines_count_and_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(ROWS["gsm8k"]) + "\n\n")
    assert [p.id for p in load(path)] == ["rows:2"]
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="rows.jsonl: the file has no rows"):
        load(path)
    with pytest.raises(FileNotFoundError, match="absent.jsonl.*format=tfds"):
        load(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    "line, complaint",
    [
        (b'{"question": "Q", "answer": "#### 1"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"question": "Q", "answer": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b'["Q", "A"]', "a list, not an object"),
        (b'{"question": "\xff", "answer": "#### 1"}', "byte 14 is not UTF-8"),
        (b'{"question": "\\ud800", "answer": "#### 1"}', "surrogate"),
        (b'{"answer": "#### 1"}', "'question' is missing; the row has \\['answer'\\]"),
        (b'{"question": 7, "answer": "#### 1"}', "'question' is int 7: it must be text"),
        (b'{"question": " ", "answer": "#### 1"}', "the question is empty"),
        (b'{"question": "Q", "answer": "so #### "}', "the reference answer is empty"),
        (b'{"question": "Q", "answer": "1"}', "0 '####' marks"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(line, complaint, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROWS["gsm8k"]).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=f"rows.jsonl:2: .*{complaint}"):
        load(path)


@pytest.mark.parametrize(
    "format, row, complaint",
    [
        ("svamp", {**ROWS["svamp"], "Answer": True}, "True is not a finite number"),
        ("svamp", {**ROWS["svamp"], "Answer": None}, "None is not a finite number"),
        ("olympiadbench", {**ROWS["olympiadbench"], "final_answer": "2"}, "must be a list"),
        ("olympiadbench", {**ROWS["olympiadbench"], "final_answer": []}, "reference answer is empty"),
        ("odyssey", {"Problem_1": "Odd?"}, "holds an object"),
        ("odyssey", {"Problem_1": {"question": "Odd?"}}, "'answer' is missing"),
        ("jsonl", {"question": "Q", "answer": None}, "'answer' is NoneType"),
        ("jsonl", {"question": "Q", "answer": float("nan")}, "nan is not a finite number"),
    ],
)
def test_a_wrong_field_is_named(format, row, complaint, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS[format], row)
    with pytest.raises(ValueError, match=f"rows.jsonl:2: .*{complaint}"):
        load(path)


# --- the real files ------------------------------------------------------------------------------------

COUNTS = {
    "gsm8k_train": 7473, "gsm8k_test": 1319, "svamp_test": 1000, "math500_test": 500,
    "olympiadbench_en_test": 675, "odyssey_test": 387,
}  # fmt: skip
LEFTOVER = re.compile(
    r"\\noindent|\\end\{problem\}|<<|>>|####|\\boxed|(?<!\\)\$|\\\\$|^\s|\s$|(?<!\.)\.$|(?<!\\)%"
)


@pytest.fixture(scope="module")
def published(shared_data):
    return {name: load(shared_data / f"{name}.jsonl") for name in COUNTS}


@pytest.mark.parametrize("name", COUNTS)
def test_every_published_row_is_read_and_clean(published, name):
    found = published[name]
    assert len(found) == COUNTS[name]
    assert len({p.id for p in found}) == len(found)
    assert [p for p in found if not p.reference or LEFTOVER.search(p.reference)] == []
    for p in found:
        assert p.question == p.question.strip() and "\\noindent" not in p.question
        assert "\\end{problem}" not in p.question and "\\boxed{}" not in p.question
    if name.startswith("gsm8k"):
        for p in found:
            assert re.fullmatch(r"-?\d+(\.\d+)?", p.reference)
            assert "<<" not in p.solution and "####" not in p.solution
            assert p.solution.endswith(f"\nThe final answer is \\boxed{{{p.reference}}}.")
    if name.startswith("svamp"):
        assert all(re.fullmatch(r"\d+", p.reference) for p in found)


def test_known_rows_of_the_published_files(published):
    assert published["gsm8k_test"][2].reference == "70000"
    assert published["svamp_test"][0].reference == "145"
    assert published["svamp_test"][0].question.endswith("93 groups, How big is each group of bananas?")
    references = {name: [p.reference for p in found] for name, found in published.items()}
    assert "32348" in references["math500_test"] and "10080" in references["math500_test"]
    assert references["odyssey_test"][0] == "16" and references["odyssey_test"][20] == "251, 7"
    assert "13.45 \\text{ years}" in references["odyssey_test"]
    for expected in ("2n-2", "69, 84", "\\frac{41}{12} \\text{ km}", "4.2\\%", "(2,2,2), (3,4,3)", "221, 8"):
        assert expected in references["olympiadbench_en_test"]


@pytest.mark.parametrize(
    "name, share, every",
    [
        ("gsm8k_test", 1, 1),
        ("svamp_test", 1, 1),
        ("math500_test", 0.99, 1),
        ("olympiadbench_en_test", 0.98, 4),  # every fourth: sympy is slow on these
        ("odyssey_test", 0.98, 4),
    ],
)
def test_math_verify_reads_the_references(published, name, share, every):
    math_verify = pytest.importorskip("math_verify")
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it remarks on every call without its timeout
    counts = collections.Counter(p.reference for p in published[name][::every])
    read = 0
    for reference, times in counts.items():
        parsed = math_verify.parse(f"\\boxed{{{reference}}}", parsing_timeout=None)
        read += times * bool(parsed and not isinstance(parsed[0], str))
    assert read / counts.total() >= share


def test_triples_of_the_published_files(shared_data):
    for name, count in (("verify_train", 4595), ("verify_dev", 1391)):
        triples = labelled_completions.load_labelled_completions(str(shared_data / f"{name}.jsonl"))
        assert len(triples) == count and {t.label for t in triples} == {0.0, 1.0}
        assert [t.reference for t in triples if LEFTOVER.search(t.reference)] == []


# --- triples, long prompts -----------------------------------------------------------------------------


def test_triples_take_any_spelling_of_a_label(tmp_path):
    row = {"question": "Q\n", "reference_answer": "$-5$.", "completion": "so \\boxed{-5} ", "source": "x"}
    path = write_rows(tmp_path / "t.jsonl", *({**row, "label": label} for label in (1, 0.0, True)))
    triples = labelled_completions.load_labelled_completions(str(path))
    assert triples == [
        Triple("Q", "-5", "so \\boxed{-5} ", label, id=f"t:{line}", source="x")
        for line, label in enumerate((1.0, 0.0, 1.0), 1)
    ]


def test_triples_of_verifybench(tmp_path):
    row = {"question": "Q", "answer": "$5$", "completion": "5", "answer_type": "Numeric Values"}
    rows = ({**row, "gold_correct": True, "answer_subtype": "Integer"}, {**row, "gold_correct": False})
    assert labelled_completions.load_labelled_completions(str(write_rows(tmp_path / "v.jsonl", *rows))) == [
        Triple("Q", "5", "5", 1.0, id="v:1", kind="Numeric Values/Integer"),
        Triple("Q", "5", "5", 0.0, id="v:2", kind="Numeric Values"),
    ]


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"label": 0.5}, "'label' is 0.5: it must be 0 or 1"),
        ({"label": "1"}, "'label' is '1'"),
        ({"label": None}, "'label' is None"),
        ({"completion": None}, "'completion' is NoneType"),
        ({"question": ""}, "the question is empty"),
        ({"reference_answer": "$$"}, "the reference_answer is empty"),
    ],
)
def test_a_malformed_triple_is_named(change, complaint, tmp_path):
    row = {"question": "Q", "reference_answer": "5", "completion": "5", "label": 1}
    path = write_rows(tmp_path / "t.jsonl", row, {**row, **change})
    with pytest.raises(ValueError, match=f"t.jsonl:2: .*{complaint}"):
        labelled_completions.load_labelled_completions(str(path))
    path = write_rows(tmp_path / "t.jsonl", {k: v for k, v in row.items() if k != "label"})
    with pytest.raises(ValueError, match="t.jsonl:1: field 'label' is missing"):
        labelled_completions.load_labelled_completions(str(path))


def test_long_prompts_are_dropped_and_counted():
    found = [Problem("a" * n, "1") for n in (3, 9, 5, 6)]

    def encode(problem):
        return [0] + [1] * len(problem.question)

    kept, prompts, dropped = problems.drop_long_prompts(found, encode, 6)
    assert kept == [found[0], found[2]] and dropped == 2
    assert prompts == [[0, 1, 1, 1], [0, 1, 1, 1, 1, 1]]
    with pytest.raises(
        ValueError, match="none of 4 prompts fits 3 tokens .the shortest has 4.*max_prompt_tokens"
    ):
        problems.drop_long_prompts(found, encode, 3)


# --- the order -----------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 200), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000))
def test_an_epoch_visits_every_problem_once(size, seed, epoch):
    visited = [problems.problem_at(epoch * size + i, size, seed) for i in range(size)]
    assert sorted(visited) == list(range(size))


def test_orders_differ_by_epoch_and_seed_and_never_change():
    def order(seed, epoch):
        return [problems.problem_at(epoch * 100 + i, 100, seed) for i in range(100)]

    assert order(0, 0) != order(0, 1) != order(1, 1) != order(1, 0) and order(0, 1) != order(1, 0)
    assert [problems.problem_at(p, 100, 0, "supervised_reward") for p in range(100)] != order(0, 0)
    # Recorded: another order under the same seed would break every run that is resumed.
    assert [problems.problem_at(p, 10, 0) for p in range(20)] == RECORDED


RECORDED = [1, 3, 0, 6, 9, 7, 5, 8, 4, 2, 2, 1, 0, 6, 8, 4, 7, 9, 5, 3]


def test_the_first_place_is_uniform():
    counts = collections.Counter(problems.problem_at(0, 5, seed) for seed in range(1000))
    assert all(abs(counts[i] - 200) < 60 for i in range(5))  # 4.7 standard deviations


def test_the_order_refuses_what_it_cannot_mean():
    with pytest.raises(ValueError, match="position -1"):
        problems.problem_at(-1, 5, 0)
    with pytest.raises(ValueError, match="of 0 problems"):
        problems.problem_at(0, 0, 0)
    with pytest.raises(ValueError, match="seed"):
        problems.problem_at(0, 5, -1)


# --- tensorflow-datasets -------------------------------------------------------------------------------

TFDS = str(Path(__file__).parent / "fixtures" / "tfds")


@pytest.fixture
def array_record():
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record.python.array_record_module", exc_type=ImportError)


def test_tfds_reads_prepared_problems(array_record):
    found = load("gsm8k", "tfds", tfds_dir=TFDS, split="train")
    assert sorted(p.reference for p in found) == ["-3", "15", "4.5", "6000"]
    (scones,) = [p for p in found if p.reference == "15"]
    assert scones.solution.splitlines()[0] == "Nora bakes 6*4 = 24 scones."
    assert any("café" in p.question for p in found)
    assert [p.id for p in found] == [f"gsm8k/train:{i}" for i in range(4)]
    assert len(load("gsm8k", "tfds", tfds_dir=TFDS, split="test[:1]")) == 1
    short = load("gsm8k", "tfds", tfds_dir=TFDS, split="train", reference_key="short_answer")
    assert [(p.reference, p.solution) for p in short] == [(p.reference, "") for p in found]


def test_tfds_needs_no_tensorflow(array_record):
    script = (
        "import sys\n"
        "from cooper_jax.data import problems\n"
        f"found = problems.load_problems('gsm8k', 'tfds', **{dict(COLUMNS, tfds_dir=TFDS)!r})\n"
        "print(len(found), 'tensorflow' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "4 False\n", done.stderr


@pytest.mark.parametrize(
    "changed, complaint",
    [
        (dict(split="nope"), "Unknown split 'nope'"),
        (dict(tfds_dir="/nowhere"), "/nowhere.*prepare it there.*tfds_dir"),
        (dict(question_key="prompt"), r"gsm8k\[train\] in .*: example 0: field 'prompt' is missing"),
    ],
)
def test_tfds_complaints_say_what_to_do(array_record, changed, complaint):
    with pytest.raises(ValueError, match=complaint):
        load("gsm8k", "tfds", **{**dict(tfds_dir=TFDS, split="train"), **changed})
