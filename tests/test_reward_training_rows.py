"""The rows that a reward model is trained on: files, cuts, held-out parts, and the rows that are added to them."""

import json
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_models
from tiny_reward_training import load_examples, run_config, write_place, write_task

from cooper_jax.configs import base
from cooper_jax.data import labelled_completions, prompts, seen_questions
from cooper_jax.reward import multihost, reward_hacks
from cooper_jax.reward_training import added_rows, best_model, examples, rm_report, rm_setup
from cooper_jax.rule.verifier import RuleConfig, RuleVerifier
from cooper_jax.runtime import hosts
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.types import Triple, Verdict


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return write_place(tmp_path_factory.mktemp("rm"))


def test_long_texts_are_dropped_and_counted(place, tmp_path):
    data = write_task(tmp_path / "train.jsonl", range(1, 5))
    long = json.loads(data.read_text().splitlines()[0])
    text = prompts.render_verifier_text(long["question"], long["reference_answer"], "")
    for extra in (0, 1):  # as long as may be, and one more
        fields = long | {"id": f"long{extra}", "completion": "x" * (300 - len(text) + extra)}
        data.write_text(data.read_text() + json.dumps(fields) + "\n")
    kept = load_examples(place, train_rm__data=str(data), train_rm__max_characters=300)
    assert kept.too_long == 1 and len(kept.train) == 33 and kept.train.triples[-1].id == "long0"
    assert load_examples(place, train_rm__data=str(data), train_rm__max_characters=0).too_long == 0
    assert all(len(x) <= 96 for x in kept.train.tokens)
    held_out = load_examples(
        place, train_rm__eval_data=str(data), train_rm__max_characters=300, train_rm__exclude_overlap=False
    )
    assert len(held_out.held_out) == 34, "what is measured is not dropped"


def test_rows_that_are_cut_are_counted(place, tmp_path):
    """One that just fits is not cut."""
    data = write_task(tmp_path / "train.jsonl", range(1, 9))
    row = json.loads(data.read_text().splitlines()[0])
    long = row | {"id": "long", "completion": "What is final. " * 20}
    data.write_text(data.read_text() + json.dumps(long) + "\n")
    flags = dict(train_rm__data=str(data))
    most = int(load_examples(place, reward__max_tokens=1000, **flags).train.lengths.max())
    for limit, cut in ((most, 0), (most - 1, 1)):
        flags |= dict(reward__max_tokens=limit)
        cfg, data = run_config(place, tmp_path, **flags), load_examples(place, **flags)
        assert data.train.truncated == cut and data.train.lengths.max() <= limit
        layout, config = tiny_models.one_device(), types.SimpleNamespace(family="llama", layers=1, width=8)
        model = types.SimpleNamespace(config=config)
        settings = rm_setup.RmSettings.from_config(cfg)
        job = types.SimpleNamespace(
            cfg=cfg, settings=settings, data=data, model=model, shapes=(), steps=8, layout=layout
        )
        assert f"{cut} cut to {limit} tokens" in rm_setup.describe_rm_job(job)


def test_completions_of_both_classes_are_shown_under_attack_too(place):
    """A share of the rows once more, made from both classes alike; the other rows stay as they are."""
    plain, hacked = load_examples(place), load_examples(place, train_rm__attacked=0.25)
    rows = len(plain.train)
    right = int(plain.train.labels.sum())
    assert hacked.train.triples[:rows] == plain.train.triples and hacked.held_out == plain.held_out
    added = hacked.train.triples[rows:]
    half = round(rows * 0.25 / 2)
    assert dict(hacked.added) == {
        "attacked": half + min(half, right), "other_references": 0, "own_references": 0
    }  # fmt: skip
    assert len(added) == hacked.added["attacked"] and not any(plain.added.values())
    originals = {t.id: t for t in plain.train.triples}
    classes = []
    for t in added:
        id, name = t.id.rsplit(" under ", 1)
        attack = reward_hacks.ATTACKS[name]
        assert attack.trained and t.label == (0 if attack.replaces else originals[id].label)
        classes.append(originals[id].label)
    assert classes.count(0) == half and classes.count(1) == min(half, right)
    assert len({t.id.rsplit(" under ", 1)[0] for t in added}) == len(added), "each row once at most"
    assert len({t.id.rsplit(" under ", 1)[1] for t in added}) > 1
    assert load_examples(place, train_rm__attacked=0.25).digest == hacked.digest != plain.digest
    assert load_examples(place, train_rm__attacked=0.25, seed=1).digest != hacked.digest


@pytest.fixture(scope="module")
def rule():
    with RuleVerifier(RuleConfig.from_config(base.get_config().rule)) as verifier:
        yield verifier


def row(question: str, reference: str, completion: str, label: float, source: str = "s") -> Triple:
    return Triple(question, reference, completion, label, id=completion, source=source)


def beside_others(rows, rule, share=1.0, seed=0) -> list[Triple]:
    own_answers = added_rows.find_own_answers(rows, rule)
    return added_rows.make_copies_with_other_references(rows, own_answers, share, seed, rule)


def beside_own(rows, rule) -> dict[str, str]:
    """Completion -> the answer that its copy has as reference."""
    copies = added_rows.make_copies_with_own_references(rows, added_rows.find_own_answers(rows, rule), 1.0, 0)
    assert all(t.label == 1.0 and t.id == f"{t.completion} beside its own answer" for t in copies)
    return {t.completion: t.reference for t in copies}


def test_right_completions_beside_another_reference_are_wrong(rule):
    """The reference is a wrong answer to the same question where there is one, else that of another question."""
    rows = [
        row("q1", "1", "So \\boxed{1}.", 1.0),
        row("q2", "2", "So \\boxed{2}.", 1.0),
        row("q1", "1", "So \\boxed{7}.", 0.0),
        row("q1", "1", "So \\boxed{1.0}.", 0.0),  # the reference after all
        row("q2", "2", "I do not know.", 0.0),
    ]
    for seed in range(5):
        copies = beside_others(rows, rule, seed=seed)
        assert [(t.question, t.reference, t.label) for t in copies] == [("q1", "7", 0.0), ("q2", "1", 0.0)]
        assert [t.completion for t in copies] == ["So \\boxed{1}.", "So \\boxed{2}."]
    assert beside_others(rows, rule, share=0.0) == []
    assert len(beside_others(rows, rule, share=0.2)) == 1
    assert beside_others(rows[1:2], rule) == [], "no other answer is known"


def test_other_references_are_those_of_the_source_and_of_its_right_form_first(rule):
    questions = [
        ("q1", "5", "a"), ("q2", "6", "a"), ("q3", "x+1", "a"), ("q4", "B", "a"), ("q5", "D", "a"),
        ("q6", "8", "b"), ("q7", "y+3", "c"), ("q8", "9", "c"),
    ]  # fmt: skip
    rows = [
        row(q, reference, f"So \\boxed{{{reference}}}.", 1.0, source) for q, reference, source in questions
    ]
    for seed in range(5):
        copies = {t.question: t.reference for t in beside_others(rows, rule, seed=seed)}
        # A number beside a number, a letter beside a letter; a formula beside numbers, since there is no other.
        # The source b has one question.
        assert copies.pop("q3") in ("5", "6")
        assert copies == {"q1": "6", "q2": "5", "q4": "D", "q5": "B", "q7": "9", "q8": "y+3"}


def test_a_value_is_no_other_reference_for_a_letter(rule):
    """It may be the value of the option."""
    rows = [row("q1", "B", "So \\boxed{B}.", 1.0), row("q2", "4", "So \\boxed{4}.", 1.0)]
    assert beside_others(rows, rule) == []


def test_answers_of_right_completions_are_no_wrong_answers(rule):
    """One of two labels is an error where two right completions differ."""
    rows = [
        row("q1", "1", "So \\boxed{1}.", 1.0),
        row("q1", "1", "So \\boxed{9}.", 1.0),
        row("q2", "5", "So \\boxed{5}.", 0.0),
    ]
    copies = {t.completion: t.reference for t in beside_others(rows, rule)}
    assert copies["So \\boxed{1}."] == "5"


def test_other_references_that_the_rule_does_not_refute_are_not_taken(rule):
    """A completion without an answer is replaced by another one; a reference of equal value by the next."""
    rows = [
        *(row(f"q{i}", "1/2", "Thus we are done.", 1.0) for i in range(6)),
        row("q7", "3/2", "So \\boxed{3/2}.", 1.0),
        row("q8", "1 + 1/2", "So \\boxed{8}.", 0.0),
    ]
    for seed in range(5):
        (copy,) = beside_others(rows, rule, share=1 / 8, seed=seed)
        assert (copy.completion, copy.reference) == ("So \\boxed{3/2}.", "1/2")


def test_wrong_completions_beside_their_own_answer_are_right(rule):
    """Not where the answer equals the reference (label noise), is missing, or is too long for a reference."""
    rows = [
        row("q1", "1", "So \\boxed{7}.", 0.0),
        row("q1", "1", "So \\boxed{1.0}.", 0.0),
        row("q1", "x+1", "So \\boxed{1+x}.", 0.0),  # equal for the rule alone
        row("q2", "2", "I do not know.", 0.0),
        row("q2", "2", f"So \\boxed{{{'9' * 300}}}.", 0.0),
        row("q2", "2", "So \\boxed{2}.", 1.0),
        row("q2", "3", "So \\boxed{4}.", 1.0),  # labelled right
    ]
    assert beside_own(rows, rule) == {"So \\boxed{7}.": "7"}


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("6 * 8 = 48\nA: 48", "48"),
        ("So \\boxed{\\$1,234.}", "1234"),  # as references are written
        ('{\n "answer": "4\\\\sqrt{3}",\n}', "4\\sqrt{3}"),  # JSON, with a doubled backslash
        ("The answer is\n```json\n{}\n```", None),
        ("Answer: For Vendor B:", None),
        ("Answer: Analysis required", None),
        ("Answer: No", "No"),
        ("Answer: 5 cm", "5 cm"),
        ("Answer: Step 4: Sum the Values of n", None),
        ('"answer": "The number of points is not determined in this solution."', None),
    ],
)
def test_own_answers_are_answers(completion, answer, rule):
    assert beside_own([row("q", "2", completion, 0.0)], rule).get(completion) == answer


def test_own_answers_to_a_choice_are_letters(rule):
    completion = "The answer is D) horizontal asymptote"
    assert beside_own([row("q", "C", completion, 0.0)], rule) == {completion: "D"}
    # The same completion is right beside its letter, with or without the words.
    rows = [row("q", "D", completion, 1.0), row("q", "D", "The answer is D)", 0.0)]
    assert beside_others(rows, rule) == []


def test_the_rule_runs_only_where_it_is_needed(place, monkeypatch):
    opened = []

    class Counted(RuleVerifier):
        def __init__(self, *args):
            opened.append(self)
            super().__init__(*args)

    monkeypatch.setattr(multihost, "RuleVerifier", Counted)
    load_examples(place, train_rm__attacked=0.2)
    assert not opened
    load_examples(place, train_rm__own_references=0.2)
    with pytest.raises(RuntimeError, match="closed"):
        opened[0].check([("1", "1")])
    with pytest.raises(SetupError, match=r"rule\.workers=0"):
        load_examples(place, train_rm__other_references=0.2, rule__workers=0)


def test_the_verdicts_that_hosts_exchange_decide(place, monkeypatch):
    """So that all hosts get the same rows: verdicts depend on limits of CPU time."""
    shares = dict(train_rm__other_references=0.2, train_rm__own_references=0.2)
    alone = load_examples(place, **shares)
    assert alone.added["other_references"] and alone.added["own_references"]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "is_assigned", lambda _: True)
    monkeypatch.setattr(hosts, "exchange_json", lambda _, own: [json.loads(json.dumps(own))])
    assert load_examples(place, **shares).digest == alone.digest
    monkeypatch.setattr(hosts, "exchange_json", lambda _, own: [{str(i): Verdict.TIMEOUT for i in own}])
    assert not any(load_examples(place, **shares).added.values())


def test_added_rows_whose_reference_leaves_no_room_are_left_out(place, monkeypatch):
    """A reference of the user's own file is an error instead, which names its row."""
    shares = dict(train_rm__other_references=0.1, train_rm__own_references=0.1)
    plain, data = load_examples(place), load_examples(place, **shares)
    longest = max(len(t.reference) for t in data.train.triples)
    monkeypatch.setattr(prompts, "reference_fits", lambda tok, reference, limit: len(reference) < longest)
    fewer = load_examples(place, **shares)
    fitting = [t for t in data.train.triples[len(plain.train) :] if len(t.reference) < longest]
    assert list(fewer.train.triples) == [*plain.train.triples, *fitting]
    assert len(fitting) == sum(fewer.added.values()) < sum(data.added.values())


def test_added_rows_are_counted_by_kind_and_come_last(place):
    shares = dict(train_rm__attacked=0.1, train_rm__other_references=0.1, train_rm__own_references=0.1)
    plain, data = load_examples(place), load_examples(place, **shares)
    rows = len(plain.train)
    assert data.train.triples[:rows] == plain.train.triples
    added = data.train.triples[rows:]
    kinds = [t.id.split(" ", 1)[1].split(" ")[0] for t in added]
    assert kinds == sorted(kinds, key=["under", "beside"].index) and len(added) == sum(data.added.values())
    own = [t for t in added if t.id.endswith("own answer")]
    other = [t for t in added if t.id.endswith("another reference")]
    assert (len(other), len(own)) == (data.added["other_references"], data.added["own_references"])
    assert other and own
    # In this task a completion is right exactly where its answer is the reference.
    for t in other + own:
        assert t.label == float(t.completion.endswith(f"The answer is {t.reference}"))


def test_reward_hacks_are_no_questions_of_their_own(place, tmp_path):
    """Some alter the question: the record has those of the files, and the report says how many rows are hacks."""
    data = load_examples(place, train_rm__attacked=0.5)
    altered = {t.question for t in data.train.triples} - {f"What is the answer {q}?" for q in range(1, 9)}
    assert altered and data.added["attacked"]
    cfg = run_config(place, tmp_path)
    settings = rm_setup.RmSettings.from_config(cfg)
    job = types.SimpleNamespace(cfg=cfg, settings=settings, data=data, head_trained=False, path=tmp_path)
    seen = best_model.make_seen_record(job)
    assert seen.sources == {"even": 4, "odd": 4} and len(seen.fingerprints) == 8
    assert not seen.fingerprints & {seen_questions.fingerprint_question(q) for q in altered}
    rows = rm_report.list_predictions(data.held_out, np.linspace(-1, 1, len(data.held_out)))
    (tmp_path / best_model.PREDICTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    best_model.write_final_report(job, 8, best_model.BestEvaluation(3, 0.5))
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["training_rows"], report["added_rows"]) == (len(data.train), dict(data.added))


def test_held_out_rows_whose_question_was_trained_on_are_left_out(place, tmp_path):
    """Also where it is spelt otherwise."""
    dev = write_task(tmp_path / "dev.jsonl", range(8, 12))
    dev.write_text(dev.read_text().replace("What is the answer 8?", "what  is the ANSWER 8 ?"))
    found = load_examples(place, train_rm__eval_data=str(dev))
    assert found.overlapping == 8 and found.overlap_excluded and len(found.held_out) == 24
    assert {t.question for t in found.held_out.triples} == {f"What is the answer {q}?" for q in (9, 10, 11)}
    every = load_examples(place, train_rm__eval_data=str(dev), train_rm__exclude_overlap=False)
    assert every.overlapping == 8 and not every.overlap_excluded and len(every.held_out) == 32


def test_a_part_of_the_data_is_held_out_by_question(place):
    found = load_examples(place, train_rm__eval_data="", train_rm__eval_share=0.25)
    parts = [{t.question for t in part.triples} for part in (found.train, found.held_out)]
    assert [len(p) for p in parts] == [6, 2] and not parts[0] & parts[1]
    assert len(found.train) + len(found.held_out) == 64 and found.overlapping == 0
    again = examples.split_held_out(
        list(reversed(labelled_completions.load_labelled_completions(str(place / "train.jsonl")))), 0.25
    )
    assert {t.question for t in again[1]} == parts[1], "the order of the file does not matter"


def test_several_files_are_read(place):
    both = f"{place / 'train.jsonl'}, {place / 'dev.jsonl'}"
    assert len(load_examples(place, train_rm__data=both, train_rm__eval_data="").train) > 64
