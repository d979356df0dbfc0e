"""VerifyBench, VerifyBench-Hard and VerifierBench: files in their published form, and the published figures."""

import gzip
import json

import numpy as np
import pytest
from test_evaluation import config, read_rows, write_rows

from cooper_jax import statistics
from cooper_jax.data.labelled_completions import VERIFIERBENCH, VERIFYBENCH, load_labelled_file
from cooper_jax.evaluation import judge_jobs, published_benchmarks
from cooper_jax.evaluation.evaluated_models import ChosenModels
from cooper_jax.evaluation.evaluation_ledger import ITEMS, RESULTS
from cooper_jax.resampling import Resamples
from cooper_jax.types import Triple


def verifybench_row(**changes):
    """A row of VerifyBench with all its columns."""
    return {
        "question_id": "q7", "completion_id": "c2", "source": "gsm8k", "question": "Two and two?", "answer": "$4$",
        "completion": "It is \\boxed{4}", "completion_model": "org/model-7b", "gold_correct": True,
        "answer_type": "Numeric Values", "answer_subtype": "Integer", "annotator": ["a", "b"],
    } | changes  # fmt: skip


def verifierbench_row(**changes):
    """A row of VerifierBench with all its columns."""
    return {
        "question": "Two and two?", "gold_answer": "4", "llm_response": "It is \\boxed{4}", "gold_judgment": "A",
        "data_source": "GSM8K", "domain": "Math", "answer_type": "Numerical",
    } | changes  # fmt: skip


# --- files ----------------------------------------------------------------------------------------------------


def test_a_row_of_verifybench_keeps_its_ids_source_and_model(tmp_path):
    wrong = verifybench_row(completion_id="c3", completion="5", gold_correct=False)
    loaded = load_labelled_file(str(write_rows(tmp_path / "verify_bench.jsonl", verifybench_row(), wrong)))
    assert loaded.benchmark == VERIFYBENCH
    same = dict(source="gsm8k", model="org/model-7b", kind="Numeric Values/Integer")
    assert loaded.triples == [
        Triple("Two and two?", "4", "It is \\boxed{4}", 1.0, id="q7/c2", **same),
        Triple("Two and two?", "4", "5", 0.0, id="q7/c3", **same),
    ]


@pytest.mark.parametrize("name", ["bench.json", "bench.json.gz", "bench.jsonl"])
def test_each_class_of_verifierbench_is_read_from_a_list_and_from_lines(name, tmp_path):
    rows = [verifierbench_row(gold_judgment=letter) for letter in ("A", "B", "C", "c ")]
    lines = "\n".join(map(json.dumps, rows))
    text = (lines if name.endswith("l") else json.dumps(rows, indent=4)).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)

    triples, benchmark = load_labelled_file(str(tmp_path / name))
    assert benchmark == VERIFIERBENCH
    assert [(t.label, t.label_class) for t in triples] == [
        (1.0, "correct"), (0.0, "incorrect"), (0.0, "invalid"), (0.0, "invalid"),
    ]  # fmt: skip
    same = dict(source="GSM8K", kind="Math/Numerical")
    assert triples[1] == Triple(
        "Two and two?", "4", "It is \\boxed{4}", 0.0, id="bench:2", label_class="incorrect", **same
    )


def test_a_file_of_two_formats_is_no_published_benchmark(tmp_path):
    rows = write_rows(tmp_path / "mixed.jsonl", verifybench_row(), verifierbench_row())
    assert load_labelled_file(str(rows)).benchmark == ""
    own = {"question": "Q", "reference_answer": "4", "completion": "4", "label": 1, "gold_correct": False}
    loaded = load_labelled_file(str(write_rows(tmp_path / "own.jsonl", own)))
    assert loaded.benchmark == "" and loaded.triples[0].label == 1


def test_a_published_reference_that_cleaning_would_empty_is_kept(tmp_path):
    path = write_rows(tmp_path / "v.jsonl", verifybench_row(answer=" . "), verifybench_row(answer="  "))
    with pytest.raises(ValueError, match="v.jsonl:2: the answer is empty"):
        load_labelled_file(str(path))
    path = write_rows(tmp_path / "v.jsonl", verifybench_row(answer=" . "))
    assert load_labelled_file(str(path)).triples[0].reference == "."


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (
            {"gold_judgment": "D"},
            r"'gold_judgment' is 'D': it must be one of A \(correct\), B \(incorrect\), C",
        ),
        ({"gold_judgment": None}, "'gold_judgment' is NoneType"),
        ({"gold_answer": ""}, "the gold_answer is empty"),
        ({"llm_response": 4}, "'llm_response' is int 4: it must be text"),
        ({"question": " "}, "the question is empty"),
    ],
)
def test_a_malformed_row_of_a_list_is_named(changes, complaint, tmp_path):
    path = tmp_path / "verifierbench.json"
    path.write_text(json.dumps([verifierbench_row(), verifierbench_row(**changes)]))
    with pytest.raises(ValueError, match=f"verifierbench.json: row 2: .*{complaint}"):
        load_labelled_file(str(path))


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b'[{"question": "Q"}, 7]', "row 1: field 'reference_answer' is missing"),
        (b"[7]", "row 1: a int, not an object"),
        (b'[{"question": "Q"}', "not JSON .*one list of objects is expected"),
        (b"[" * 100_000, "not JSON .*one list of objects is expected"),
        (b'["\xff"]', "byte 2 is not UTF-8"),
        (b"[]", "the file has no rows"),
    ],
)
def test_a_malformed_list_is_named(content, complaint, tmp_path):
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"rows.json: {complaint}"):
        load_labelled_file(str(tmp_path / "rows.json"))


@pytest.mark.parametrize("kept", [20, -20])
def test_a_damaged_gzip_file_with_a_list_is_named(kept, tmp_path):
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(json.dumps([verifierbench_row()] * 9).encode())[:kept])
    with pytest.raises(ValueError, match="rows.json.gz:.* the gzip file is damaged"):
        load_labelled_file(str(path))


# --- figures --------------------------------------------------------------------------------------------------


def judged_rows(*rows):
    """Ledger rows of one judge from (kind, label, decision); the decision None is an abstention."""
    return [
        {
            "question": str(i),
            "kind": kind,
            "label": label,
            "judges": {"judge": {"yes": bool(decision), "abstained": decision is None}},
        }
        for i, (kind, label, decision) in enumerate(rows)
    ]


def values_of(judged, *names):
    return [judged[name].value for name in names]


def test_verifybench_averages_over_rows_and_an_abstention_is_a_mistake():
    rows = judged_rows(
        ("Numeric/Integer", 1, True), ("Numeric/Integer", 0, False), ("Numeric/Float", 0, None), ("String", 1, None)
    )  # fmt: skip
    measured = published_benchmarks.measure_judges(VERIFYBENCH, rows, 0, 50)
    judged = measured["judges"]["judge"]
    # 1 true positive among 1 accepted and 2 correct completions: F1 = 2 / 3.
    assert values_of(judged, "average", "accuracy", "f1") == pytest.approx([2 / 4, 2 / 4, 2 / 3])
    by_type = judged["by"]["answer_type"]
    assert {value: (x["rows"], x["accuracy"].value) for value, x in by_type.items()} == {
        "Numeric": (3, pytest.approx(2 / 3)), "String": (1, 0.0),
    }  # fmt: skip
    by_subtype = judged["by"]["answer_subtype"]
    assert {value: x["accuracy"].value for value, x in by_subtype.items()} == {
        "": 0,
        "Float": 0,
        "Integer": 1,
    }
    table = published_benchmarks.format_figures(measured)
    assert "VerifyBench by its authors' rules, 4 rows: accuracy by answer_type and over all rows" in table
    assert table.splitlines()[2].split("  ")[0] == "judge" and "66.67" in table and "F1 of all rows" in table


VERIFIERBENCH_DECISIONS = (
    # Math: 1 true positive, 2 accepted, 2 correct: F1 = 2 / 4.  Science: 1, 2 and 1: F1 = 2 / 3.
    ("Math/Formula", 1, True), ("Math/Formula", 1, False),
    ("Math/Numerical", 0, True), ("Math/Numerical", 0, False),
    ("Science/Sequence", 1, True), ("Science/Sequence", 0, True), ("Science/Sequence", 0, None),
)  # fmt: skip


def test_verifierbench_averages_f1_over_domains():
    measured = published_benchmarks.measure_judges(
        VERIFIERBENCH, judged_rows(*VERIFIERBENCH_DECISIONS), 0, 50
    )
    judged = measured["judges"]["judge"]
    expected = {"average": (1 / 2 + 2 / 3) / 2, "f1": 2 * 2 / (4 + 3), "accuracy": 3 / 7}
    assert {name: judged[name].value for name in expected} == pytest.approx(expected)
    domains = judged["by"]["domain"]
    assert values_of(domains["Math"], "f1", "accuracy") == pytest.approx([1 / 2, 2 / 4])
    assert values_of(domains["Science"], "f1", "accuracy") == pytest.approx([2 / 3, 1 / 3])
    assert list(judged["by"]["answer_type"]) == ["Formula", "Numerical", "Sequence"]
    assert 0 <= judged["average"].low <= judged["average"].value <= judged["average"].high <= 1
    table = published_benchmarks.format_figures(measured)
    assert "F1 by domain and their mean over the domains" in table and "58.33" in table


def test_published_figures_are_resampled_by_question():
    """Ten right decisions on one question and ten wrong ones on another: two draws, not twenty."""
    rows = judged_rows(*[("Numeric/Integer", 1, decision) for decision in (True, False) for _ in range(10)])
    rows = [row | {"question": "ab"[i // 10]} for i, row in enumerate(rows)]
    judged = published_benchmarks.measure_judges(VERIFYBENCH, rows, 0, 200)["judges"]["judge"]
    assert judged["average"] == judged["by"]["answer_type"]["Numeric"]["accuracy"]
    assert judged["average"] == statistics.Interval(0.5, 0.0, 1.0)


def test_the_average_over_domains_is_undefined_if_one_has_no_correct_completion():
    rows = judged_rows(*VERIFIERBENCH_DECISIONS, ("Knowledge/Boolean", 0, False))
    measured = published_benchmarks.measure_judges(VERIFIERBENCH, rows, 0, 50)
    judged = measured["judges"]["judge"]
    assert np.isnan(judged["average"].value) and np.isnan(judged["by"]["domain"]["Knowledge"]["f1"].value)
    assert judged["by"]["domain"]["Knowledge"]["accuracy"].value == 1


def test_f1_of_a_group_is_that_of_the_statistics_in_every_resampling():
    rng = np.random.default_rng(0)
    labels, yes, mask = rng.random(60) < 0.4, rng.random(60) < 0.5, rng.random(60) < 0.6
    drawn = Resamples(rng.integers(0, 12, 60), seed=1, resamples=30)
    found = drawn.f1(labels, yes, mask)
    expected = [
        statistics.classification_figures(labels[mask], yes[mask], w[mask])["f1"] for w in drawn.weights
    ]
    assert found == pytest.approx(expected, nan_ok=True) and len(found) == 31


@pytest.mark.parametrize(
    "benchmark, references, published",
    [
        (VERIFYBENCH, "own", True), (VERIFYBENCH, "none", True), (VERIFYBENCH, "shuffled", False),
        (VERIFIERBENCH, "own", True), (VERIFIERBENCH, "none", False), ("", "own", False),
    ],
)  # fmt: skip
def test_only_published_settings_have_published_figures(benchmark, references, published):
    assert published_benchmarks.has_published_figures(benchmark, references) == published


# --- all of it ------------------------------------------------------------------------------------------------


def compare(tmp_path, path, **options):
    """Compare three judges that need no model; returns (results, rows, the table's text)."""
    cfg, out = config(), tmp_path / "out"
    names = ["rule", "last_number", "yes"]
    judge_jobs.compare_judges(cfg, ChosenModels(cfg, tmp_path), str(path), out, names=names, **options)
    return json.loads((out / RESULTS).read_text()), read_rows(out / ITEMS), (out / "table.txt").read_text()


def test_verifybench_from_file_to_figures(tmp_path):
    choice = dict(answer="B", answer_type="Multi-choice", answer_subtype="Single")
    path = write_rows(
        tmp_path / "verify_bench.jsonl",
        verifybench_row(),
        verifybench_row(completion="It is \\boxed{5}", gold_correct=False),
        verifybench_row(completion="It is \\boxed{B}", **choice),
        verifybench_row(completion="", gold_correct=False, **choice),
    )
    results, rows, text = compare(tmp_path, path)
    judged = results["published_figures"]["judges"]
    assert {name: x["average"]["value"] for name, x in judged.items()} == {
        "rule": 1.0, "last_number": 0.75, "yes": 0.5,
    }  # fmt: skip
    assert judged["last_number"]["by"]["answer_type"]["Multi-choice"]["accuracy"]["value"] == 0.5
    assert judged["yes"]["f1"]["value"] == pytest.approx(2 / 3)
    assert results["all"]["judges"]["rule"]["accuracy"]["value"] == 1
    assert "VerifyBench by its authors' rules, 4 rows" in text and "label_class" not in text + json.dumps(
        rows
    )
    assert rows[0]["model"] == "org/model-7b" and rows[0]["id"] == "q7/c2"


def test_verifierbench_from_file_to_figures(tmp_path):
    science = dict(domain="Science", question="Three and three?", gold_answer="6")
    path = tmp_path / "verifierbench.json"
    rows = [
        verifierbench_row(),
        verifierbench_row(llm_response="It is \\boxed{5}", gold_judgment="B"),
        verifierbench_row(llm_response="It is \\boxed{4} \\boxed{4} It is", gold_judgment="C"),
        verifierbench_row(llm_response="It is \\boxed{6}", **science),
        verifierbench_row(llm_response="It is \\boxed{7}", **science, gold_judgment="C"),
    ]
    path.write_text(json.dumps(rows))
    results, rows, text = compare(tmp_path, path)
    # last_number accepts rows 1, 3 and 4: F1 is 2 / 3 in mathematics and 1 in science.
    judged = results["published_figures"]["judges"]
    assert judged["last_number"]["by"]["domain"]["Math"]["f1"]["value"] == pytest.approx(2 / 3)
    assert judged["last_number"]["average"]["value"] == pytest.approx(5 / 6)
    # yes accepts all: F1 is 1 / 2 and 2 / 3.
    assert judged["yes"]["average"]["value"] == pytest.approx(7 / 12)
    assert judged["yes"]["accuracy"]["value"] == pytest.approx(2 / 5)

    # The classes stay visible in rows and tables, and the domain is the first part of the kind.
    assert [row.get("label_class") for row in rows] == [
        "correct",
        "incorrect",
        "invalid",
        "correct",
        "invalid",
    ]
    invalid = results["by"]["label_class"]["invalid"]
    assert invalid["rows"] == 2 and invalid["judges"]["last_number"]["accuracy"]["value"] == 0.5
    assert list(results["by"]["type"]) == ["Math", "Science"]
    assert "VerifierBench by its authors' rules, 5 rows" in text and "58.33" in text and "invalid" in text


def test_shuffled_references_have_no_published_figures(tmp_path):
    rows = [verifybench_row(), verifybench_row(question="Three and three?", answer="6")]
    path = write_rows(tmp_path / "verify_bench.jsonl", *rows)
    results, _, text = compare(tmp_path, path, references="shuffled")
    assert "published_figures" not in results and "authors' rules" not in text
