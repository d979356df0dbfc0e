"""Published formats: a small file of each shape is read, and malformed rows are named by file, row and column."""

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from cooper_jax.data import answers, formats, problems
from cooper_jax.data.formats import FORMATS
from cooper_jax.types import Problem

COLUMNS = dict(question_key="question", reference_key="answer", solution_key="", tfds_dir="", split="train")
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nAdd 1 and $x=2$.\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
STEPS = 'Tom has 3. Let\'s think step by step and output the final answer after "####".'
SOLUTION = "First we add.\nThe result is $\\boxed{\\frac{1}{2}}$."


def verl_row(content, truth, **extra):
    return {
        "data_source": "math",
        "prompt": [{"role": "user", "content": content}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"index": 0, **extra},
    }


def user(content):
    return (("user", content),)


# Format -> (a row as it is published, question, reference, solution, messages).
PUBLISHED = {
    "gsm8k": (
        {"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
        "Two and two?", "4", "2+2=4\nThe final answer is \\boxed{4}.", (),
    ),
    "svamp": (
        {"ID": "chal-1", "Body": "Bo has 2 nuts.", "Question": "How many?", "Equation": "2.0", "Answer": 2.0},
        "Bo has 2 nuts. How many?", "2", "", (),
    ),
    "math500": ({"prompt": "Why?\nPut your answer within \\boxed{}.", "answer": "$2$"}, "Why?", "2", "", ()),
    "olympiadbench": (
        {"question": "Speed?", "final_answer": ["$2$", "3"], "unit": "km", "context": None},
        "Speed?", "2 \\text{ km}, 3 \\text{ km}", "", (),
    ),
    "odyssey": ({"Problem_3": {"question": "Odd?", "answer": "16\\\\"}}, "Odd?", "16", "", ()),
    "math": (
        {"problem": "Half?", "level": "Level 2", "type": "Algebra", "solution": SOLUTION},
        "Half?", "\\frac{1}{2}", SOLUTION, (),
    ),
    "numina_cot": (
        {"source": "aops_forum", "problem": "Half?", "solution": SOLUTION, "messages": [{"role": "user"}]},
        "Half?", "\\frac{1}{2}", SOLUTION, (),
    ),
    "numina": (
        {"problem": "Half?", "solution": "Add.", "answer": "0.5", "problem_type": "Algebra",
         "question_type": "math-word-problem", "source": "olympiads"},
        "Half?", "0.5", "Add.", (),
    ),
    "openr1": (
        {"problem": "Half?", "solution": "Add.", "answer": "0.5", "problem_type": "Algebra",
         "question_type": "MCQ", "generations": ["<think>"], "messages": []},
        "Half?", "0.5", "Add.", (),
    ),
    "big_math": (
        {"problem": "Half?", "answer": "0.5", "source": "gsm8k", "domain": ["Algebra"], "llama8b_solve_rate": 0.5},
        "Half?", "0.5", "", (),
    ),
    "deepscaler": ({"problem": "Half?", "answer": "0.5", "solution": "Add."}, "Half?", "0.5", "Add.", ()),
    "problem_answer": (
        {"problem": "Half?", "solution": "Add.", "answer": "0.5", "subject": "Algebra", "level": 2,
         "unique_id": "test/1.json"},
        "Half?", "0.5", "Add.", (),
    ),
    "prompt_solution": (
        {"prompt": "Half?", "solution": "0.5", "source_prompt": [], "reward_model": {"ground_truth": "0.5"}},
        "Half?", "0.5", "", (),
    ),
    "verl": (verl_row(STEPS, "3", question="Tom has 3."), "Tom has 3.", "3", "", user(STEPS)),
    "open_instruct": (
        {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
         "ground_truth": "4", "dataset": "gsm8k"},
        "2+2?", "4", "", user("2+2?"),
    ),
    "orz": (
        [{"from": "human", "value": "Half?"}, {"from": "assistant", "ground_truth": {"value": "0.5"}}],
        "Half?", "0.5", "", (),
    ),
    "chat": (
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}], "answer": 4},
        "2+2?", "4", "", (("system", "Be brief."), ("user", "2+2?")),
    ),
}  # fmt: skip
# Further rows of published data sets: format -> (row, question, reference).
VARIANTS = (
    ("verl", verl_row(DAPO, "34"), "Add 1 and $x=2$.", "34"),  # DAPO-Math-17k
    ("verl", verl_row(STEPS, ["3"]), "Tom has 3.", "3"),
    ("verl", verl_row("Area?", '["x^2"]'), "Area?", "x^2"),  # Skywork-OR1
    ("verl", verl_row("Interval?", "[1, 2]"), "Interval?", "[1, 2]"),
    ("svamp", {"Body": "2 nuts.", "Question": "Sum?", "Answer": "5.0", "question_concat": ""}, "2 nuts. Sum?", "5"),
    ("problem_answer", {"problem": "AIME?", "answer": 204}, "AIME?", "204"),
    ("prompt_solution", {"prompt": "Half?", "solution": SOLUTION}, "Half?", "\\frac{1}{2}"),
    ("open_instruct",
     {"messages": [{"role": "user", "content": "2?"}], "ground_truth": ["2"], "dataset": ["math"]}, "2?", "2"),
)  # fmt: skip
# Rows that their data sets mark as having no final answer.
UNANSWERED = {
    "numina_cot": {"problem": "Show it.", "solution": "Clear.", "messages": []},
    "numina": PUBLISHED["numina"][0] | {"answer": "proof"},
    "openr1": PUBLISHED["openr1"][0] | {"answer": "notfound"},
    "deepscaler": PUBLISHED["deepscaler"][0] | {"answer": ""},
}


def write(path, *rows):
    """Write rows as JSON lines or, for .json, as one list."""
    lines = [json.dumps(row) for row in rows]
    path.write_text("[" + ",\n".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines))
    return str(path)


def load(source, format="auto", **changed):
    return problems.load_problems(str(source), format, **{**COLUMNS, **changed})


def test_every_format_has_a_row_here():
    assert PUBLISHED.keys() == FORMATS.keys()


@pytest.mark.parametrize("format", PUBLISHED)
def test_each_format_is_recognised_and_read(format, tmp_path):
    row, *expected = PUBLISHED[format]
    path = write(tmp_path / "rows.json", row, row)
    problem = load(path)[1]
    assert [problem.question, problem.reference, problem.solution, problem.messages] == expected
    assert load(path) == load(path, format)
    assert problem.id == "rows:2" and problem.source == "rows"
    if format != "orz":  # its rows are lists, which are no rows of a table
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), tmp_path / "rows.parquet")
        problem = load(tmp_path / "rows.parquet")[1]
        assert [problem.question, problem.reference, problem.solution, problem.messages] == expected


@pytest.mark.parametrize("format, row, question, reference", VARIANTS)
def test_variants_of_published_rows(format, row, question, reference, tmp_path):
    assert formats.recognise_format(row) == [format]
    (problem,) = load(write(tmp_path / "rows.jsonl", row))
    assert (problem.question, problem.reference) == (question, reference)


def test_a_whole_file_keeps_its_labels_and_short_columns(tmp_path):
    (problem,) = load(write(tmp_path / "rows.json", PUBLISHED["openr1"][0]))
    assert problem.columns.keys() == PUBLISHED["openr1"][0].keys() - {"generations", "messages"}
    (problem,) = load(write(tmp_path / "rows.json", PUBLISHED["problem_answer"][0]))
    assert (problem.subject, problem.level) == ("Algebra", "2")
    (problem,) = load(write(tmp_path / "rows.json", PUBLISHED["verl"][0]))
    assert problem.columns["extra_info"]["index"] == 0


@pytest.mark.parametrize("format", UNANSWERED)
def test_rows_without_a_final_answer_are_counted(format, tmp_path):
    path = write(tmp_path / "rows.jsonl", UNANSWERED[format], PUBLISHED[format][0])
    found = problems.load_problem_set(path, "auto", ("question", "answer", ""), tfds_dir="", split="train")
    assert (len(found.problems), found.unanswered) == (1, 1)
    with pytest.raises(ValueError, match="all 1 rows have no final answer"):
        load(write(tmp_path / "none.jsonl", UNANSWERED[format]))


def test_the_documentation_has_the_table_of_formats():
    from pathlib import Path

    assert formats.describe_formats() in (Path(__file__).parents[1] / "docs" / "data.md").read_text()


# --- malformed rows ------------------------------------------------------------------------------------------

CHAT = PUBLISHED["chat"][0]


@pytest.mark.parametrize(
    "format, row, complaint",
    [
        ("math", {"problem": "Half?", "solution": "One half."}, "field 'solution' marks no answer"),
        ("math", {"problem": 5, "solution": SOLUTION}, "field 'problem' is int 5"),
        ("numina_cot", {"problem": "Half?", "solution": None}, "field 'solution' is NoneType"),
        ("big_math", {"problem": "Half?", "answer": None}, "field 'answer' is NoneType"),
        ("deepscaler", {"problem": "", "answer": "1", "solution": ""}, "field 'problem': the question is empty"),
        ("gsm8k", {"question": "Q", "answer": "5"}, "field 'answer': it has 0 '####' marks, not 1"),
        ("gsm8k", {"question": "Q", "answer": "Half. #### "}, "field 'answer': the reference answer is empty"),
        ("svamp", {**PUBLISHED["svamp"][0], "Answer": "abc"}, "field 'Answer': 'abc' is not a finite number"),
        ("math500", {"prompt": " ", "answer": "1"}, "field 'prompt': the question is empty"),
        ("olympiadbench", {**PUBLISHED["olympiadbench"][0], "final_answer": []}, "field 'final_answer': the"),
        ("numina", {**PUBLISHED["numina"][0], "problem": " "}, "field 'problem': the question is empty"),
        ("openr1", {**PUBLISHED["openr1"][0], "answer": float("nan")}, "field 'answer': nan is not a finite"),
        ("problem_answer", {"problem": "Q", "answer": True}, "field 'answer': True is not a finite number"),
        ("chat", {"prompt": CHAT["prompt"], "answer": ""}, "field 'answer': the reference answer is empty"),
        ("verl", {**verl_row("Q", "3"), "reward_model": {"style": "rule"}},
         r"field 'reward_model.ground_truth' is missing; 'reward_model' has \['style'\]"),
        ("verl", verl_row("Q", {"a": 1}), "field 'reward_model.ground_truth' is dict"),
        ("verl", verl_row("Q", [["3"]]), "field 'reward_model.ground_truth' is list"),
        ("verl", verl_row(7, "3"), "field 'prompt.0.content' is int: it must be text"),
        ("verl", verl_row("half \ud800 pair", "3"), "field 'prompt.0.content' contains half a surrogate"),
        ("open_instruct", {"messages": [], "ground_truth": "4", "dataset": "x"}, "field 'messages' is a list of 0"),
        ("orz", [{"from": "human", "value": "Half?"}, {"from": "gpt"}], "field '1.ground_truth.value' is missing"),
        ("chat", {"prompt": [{"role": "robot", "content": "Q"}], "answer": 4}, "field 'prompt.0.role' is 'robot'"),
        ("chat", {"prompt": ["Q"], "answer": 4}, "field 'prompt.0' is a str"),
        ("chat", {"prompt": CHAT["prompt"][:1], "answer": 4}, "the last of which is not the user's"),
        ("prompt_solution", {"prompt": "Q", "solution": "We add the two. Then we halve it all."},
         "field 'solution': a worked solution.*reference_key.*reduce_solutions=False"),
    ],
)  # fmt: skip
def test_a_malformed_row_is_named_by_file_row_and_column(format, row, complaint, tmp_path):
    path = write(tmp_path / "rows.json", PUBLISHED[format][0], row)
    with pytest.raises(ValueError, match=f"rows.json: row 2: .*{complaint}"):
        load(path, format)


def test_a_malformed_row_of_a_parquet_file_is_named(tmp_path):
    row = PUBLISHED["prompt_solution"][0]
    table = pyarrow.Table.from_pylist([row, row | {"solution": "We add the two. Then we halve it all."}])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="rows.parquet: row 2: .*field 'solution': a worked solution"):
        load(tmp_path / "rows.parquet")


# --- named columns -------------------------------------------------------------------------------------------


def test_named_columns_may_be_nested_and_take_precedence(tmp_path):
    row = {"problem": "published", "answer": "1", "task": {"ask": "2+2?", "gold": {"value": [4, "5"]}}}
    path = write(tmp_path / "rows.jsonl", row)
    assert load(path)[0].question == "published"
    (problem,) = load(path, question_key="task.ask", reference_key="task.gold.value")
    assert (problem.question, problem.reference) == ("2+2?", "4, 5")
    with pytest.raises(ValueError, match="rows.jsonl:1: field 'task.ask.x' is missing; 'task.ask' has a str"):
        load(path, "jsonl", question_key="task.ask.x")


def test_a_named_prompt_may_be_a_list_of_messages(tmp_path):
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    row = {"turns": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hi"},
                     {"role": "user", "content": parts}], "gold": 4}  # fmt: skip
    (problem,) = load(write(tmp_path / "rows.jsonl", row), question_key="turns", reference_key="gold")
    assert problem.question == "2+2?"
    assert problem.messages == (("user", "Hi"), ("assistant", "Hi"), ("user", "2+2?"))


@pytest.mark.parametrize(
    "text, reference, is_worked",
    [
        (SOLUTION, "\\frac{1}{2}", True),
        ("$\\boxed{5}$", "5", False),
        ("so \\fbox{7}", "7", False),
        ("We get \\boxed 9.", "9", False),
        ("A box \\boxed{3}, then \\boxed{", "3", False),
        ("Tom buys 4 more apples for himself. The answer is 7.", "7", True),
        ("13.45 years", "13.45 years", False),
        ("(1,2), (3,4)", "(1,2), (3,4)", False),
    ],
)
def test_a_solution_is_reduced_to_the_answer_that_it_marks(text, reference, is_worked):
    assert answers.split_solution(text) == (reference, text if is_worked else "")


def test_references_can_be_kept_whole(tmp_path):
    text = "The bird flew away. It was scared of the cat."
    path = write(tmp_path / "rows.jsonl", {"question": "Why?", "answer": text})
    with pytest.raises(ValueError, match="rows.jsonl:1: field 'answer': a worked solution"):
        load(path)
    found = problems.load_problem_set(
        path, "auto", ("question", "answer", ""), tfds_dir="", split="", reduce_solutions=False
    )
    assert found.problems[0].reference == text.rstrip(".")


# --- CSV -----------------------------------------------------------------------------------------------------


def write_csv(path, *rows, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def test_csv_and_tsv_hold_the_same_rows(tmp_path):
    gsm8k = PUBLISHED["gsm8k"][0]
    rows = [["question", "answer"], ['Who, "café"\nor else?', "3"], [], list(gsm8k.values())]
    path = write_csv(tmp_path / "rows.csv", *rows)
    expected = [
        Problem('Who, "café"\nor else?', "3", "", "rows:1"),
        Problem(*PUBLISHED["gsm8k"][1:4], "rows:2"),
    ]
    assert load(path) == load(write_csv(tmp_path / "rows.tsv", *rows, delimiter="\t")) == expected
    packed = tmp_path / "rows.csv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert load(packed) == expected
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"rows.csv.gz: the gzip file is damaged"):
        load(packed)


BOM = b"\xef\xbb\xbf"
OBJECT = b'{"question": "Q", "answer": "1"}'


@pytest.mark.parametrize(
    "name, text",
    [
        ("rows.csv", b"question,answer\rQ,1\r"),  # lines of an old spreadsheet
        ("rows.csv", BOM + b",question,answer\r\n0,Q,1\r\n"),  # pandas' index
        ("rows.CSV", b"question,answer\nQ,1\n"),
        ("rows.TSV", b"question\tanswer\nQ\t1\n"),
        ("rows.jsonl", BOM + OBJECT + b"\n"),
        ("rows.JSON", BOM + b"[\n  " + OBJECT + b"\n]"),
        ("rows.jsonl.GZ", gzip.compress(OBJECT, mtime=0)),
    ],
)
def test_files_are_read_as_other_programs_write_them(name, text, tmp_path):
    (tmp_path / name).write_bytes(text)
    (problem,) = load(tmp_path / name)
    assert (problem.question, problem.reference, problem.id) == ("Q", "1", "rows:1")
    assert problem.columns == {"question": "Q", "answer": "1"}


@pytest.mark.parametrize(
    "name, text, complaint",
    [
        (
            "rows.zip",
            b"PK",
            "rows.zip: files that end in .zip are not read: unpack it to .jsonl, .json, .csv, .tsv",
        ),
        ("rows.xlsx", b"PK", "rows.xlsx: files that end in .xlsx are not read: convert it to .jsonl"),
        ("rows.jsonl", b"[\n" + OBJECT + b"\n]", r"rows.jsonl:1: not JSON .* in a file that ends in .json\)"),
    ],
)
def test_other_files_are_refused_with_what_can_be_read(name, text, complaint, tmp_path):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=complaint):
        load(tmp_path / name)


def test_a_misspelt_column_and_semicolons_are_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\nQ,1\n")
    with pytest.raises(
        ValueError, match=r"no column 'quesiton' \(--config.data.question_key\); .*mean 'question'"
    ):
        load(path, question_key="quesiton")
    with pytest.raises(
        ValueError, match=r"no column 'gold' \(--config.data.reference_key\); the columns are question"
    ):
        load(path, reference_key="gold")
    assert [p.reference for p in load(path, format="csv")] == ["1"]
    path.write_text("question;answer\nQ;1\n")
    with pytest.raises(
        ValueError, match=r"rows.csv:1: the columns are separated by semicolons: save it with commas"
    ):
        load(path)


@pytest.mark.parametrize(
    ("name", "text", "location"),
    [
        ("rows.jsonl", OBJECT + b'\n{"question": "Q", "answer": "1", "answer": "2"}\n', "rows.jsonl:2"),
        ("rows.json", b'[{"question": "Q", "answer": "1", "answer": "2"}]', "rows.json"),
        ("rows.jsonl", b'{"question": "Q", "answer": {"a": 1, "a": 2}}\n', "rows.jsonl:1"),
    ],
)
def test_an_object_that_repeats_a_key_is_refused(name, text, location, tmp_path):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=rf"{location}: an object repeats \['a(nswer)?'\]: rename or remove"):
        load(tmp_path / name)


def test_parquet_decimals_are_numbers_and_repeated_columns_are_refused(tmp_path):
    import decimal

    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"question": ["Q"], "answer": [decimal.Decimal("1.50")]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert [p.reference for p in load(tmp_path / "rows.parquet")] == ["1.5"]
    columns = [pyarrow.array([text]) for text in ("Q", "1", "2")]
    twice = pyarrow.Table.from_arrays(columns, names=["question", "answer", "answer"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match=r"twice.parquet: the columns \['answer'\] occur twice"):
        load(tmp_path / "twice.parquet")


def test_messages_in_a_csv_file_are_messages(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Half of 6?"}]
    path = write_csv(tmp_path / "rows.csv", ["question", "answer"], [json.dumps(messages), "3"])
    (problem,) = load(path)
    assert problem.question == "Half of 6?" and problem.messages[0] == ("system", "Be brief.")
    # A question that only looks like it is text.
    path = write_csv(tmp_path / "texts.csv", ["question", "answer"], ['[{"a": 1}] has how many keys?', "1"])
    assert load(path)[0].question == '[{"a": 1}] has how many keys?'


@pytest.mark.parametrize(
    "text, complaint",
    [
        (b"question,answer\nQ,1\n\"a\nb\",2\nQ,3,4\n", "rows.csv:5: the row has 3 fields and the header 2"),
        (b"question,answer\nQ,1\nQ,\n", "rows.csv:3: field 'answer': the reference answer is empty"),
        (b'question,answer\nQ,1\n"Q,2\n', "rows.csv:3: not readable as .csv"),
        (b"question,answer\nQ,1\nQ\xff,2\n", "rows.csv:3: byte 1 is not UTF-8"),
        (b"question,question\nQ,1\n", r"rows.csv:1: the header repeats \['question'\]: rename or remove one"),
        (b"question,,answer\nQ,x,1\n", "rows.csv:1: a column of the header .* has no name: give it one"),
        (b"question,answer\n", "rows.csv: the file has no rows"),
        (b"q,answer\nQ,1\n", "rows.csv:2: the fields .'answer', 'q'. fit no known format"),
    ],
)  # fmt: skip
def test_a_malformed_csv_row_is_named(text, complaint, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=complaint):
        load(path)
