"""Questions that a reward model saw, found again in evaluation sets."""

import collections
import json
import re

import pytest

from cooper_jax.configs import base
from cooper_jax.data import contamination, labelled_completions, problems, seen_questions
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer.run_problems import load_problems
from cooper_jax.trainer.run_settings import RunSettings
from cooper_jax.types import Problem

COLUMNS = dict(question_key="question", reference_key="answer", solution_key="", tfds_dir="", split="train")
BENCHMARKS = ("gsm8k_test", "svamp_test", "math500_test", "olympiadbench_en_test", "odyssey_test")

ALIKE = [
    ("What is $1+1$?", "what is  1 + 1"),
    ("Find $x$.\n\t\n\\end{problem}\t\n\\noindent", "Find $x$"),
    (
        "Why?\nPlease reason step by step, and put your final answer within \\boxed{}.",
        "Why?",
    ),
    ("Why? Put your final answer in \\boxed{}.", "Why?"),
    ("Compute $\\displaystyle\\frac{1}{2}\\left(3\\right)$.", "Compute \\( \\dfrac12 (3) \\)"),
    ("She has $1,000 and 20\\%", "She has \\$1000, and 20%"),
    ("$10{,}000$ of them; $x^{2}$", "10,\\!000 of them: x²"),
    ("a two-digit number — “odd”", 'a two digit number - "odd"'),
    ("Is $a \\leq b$, \\text{say}?", "Is $a\\le b$ say?"),
    ("ﬁnd the sum\u200b", "Find the sum"),
    ("Let’s see", "let's see"),
]
DIFFERENT = [
    ("What is $1+1$?", "What is $1-1$?"),
    ("\\frac{1}{23}", "\\frac{12}{3}"),
    ("the numbers 1 23", "the numbers 12 3"),
    ("3.5 miles", "35 miles"),
    ("a ratio of 3:2", "a ratio of 32"),
    ("the points (1,2)", "the points (12)"),
    ("$5!$", "$5$"),
    ("$f'(x)$", "$f(x)$"),
    ("x²", "x2"),
    ("Fill in $4 + \\boxed{} = 7$", "Fill in $3 + \\boxed{} = 8$"),
    ("divisor of 50", "multiple of 50"),
    ("?", "!"),
]


@pytest.mark.parametrize("a, b", ALIKE)
def test_one_question_in_two_spellings(a, b):
    assert seen_questions.normalise_question(a) == seen_questions.normalise_question(b)
    assert seen_questions.fingerprint_question(a) == seen_questions.fingerprint_question(b)


@pytest.mark.parametrize("a, b", DIFFERENT)
def test_what_makes_another_question_stays(a, b):
    assert seen_questions.normalise_question(a) != seen_questions.normalise_question(b)
    assert seen_questions.fingerprint_question(a) != seen_questions.fingerprint_question(b)


def test_fingerprints_are_those_of_version_1():
    """They lie beside published weights: another value here needs another VERSION."""
    assert seen_questions.VERSION == 1
    assert (
        seen_questions.normalise_question("A 3-digit number, $x^{2}\\le 1{,}000$?")
        == "a3-digitnumberx^2\\le1000"
    )
    assert seen_questions.fingerprint_question("What is $1+1$?") == "03818c96606d308e5166b6c44a88b16a"


def test_split_keeps_the_order_and_asks_for_the_question():
    items = [Problem(q, "1") for q in ("Two?", "One?", "Three?", "one")]
    seen = frozenset({seen_questions.fingerprint_question("ONE")})
    kept, dropped = seen_questions.split_by_seen(items, seen)
    assert [p.question for p in kept] == ["Two?", "Three?"] and [p.question for p in dropped] == [
        "One?",
        "one",
    ]
    assert seen_questions.split_by_seen(["one.", "two"], seen, question=str) == (["two"], ["one."])
    assert seen_questions.split_by_seen(items, frozenset()) == (items, [])


# --- the record beside weights --------------------------------------------------------------------------------


def test_a_record_is_found_beside_the_weights(tmp_path):
    assert seen_questions.read_record(tmp_path) is None
    assert (
        seen_questions.read_record("random") is None
        and seen_questions.read_record(tmp_path / "absent") is None
    )
    seen_questions.write_record(tmp_path, seen_questions.Record())
    assert seen_questions.read_record(tmp_path) == seen_questions.Record()  # recorded: none
    both = seen_questions.record_questions(
        ["One?", "two", "one"], "b.jsonl"
    ) | seen_questions.record_questions(["two"], "a.jsonl")
    seen_questions.write_record(tmp_path, both)
    seen = seen_questions.read_record(str(tmp_path))
    assert seen.fingerprints == {
        seen_questions.fingerprint_question("One"),
        seen_questions.fingerprint_question("Two"),
    }
    assert seen == both and seen.complete
    written = json.loads((tmp_path / seen_questions.SEEN).read_text())
    assert written["fingerprints"] == sorted(written["fingerprints"]) and written["questions"] == 2
    assert list(written["sources"].items()) == [("a.jsonl", 1), ("b.jsonl", 2)]


def test_what_was_seen_before_is_carried_on(tmp_path):
    before = seen_questions.Record(
        frozenset({seen_questions.fingerprint_question("Zero")}), {"old.jsonl": 1}, complete=False
    )
    seen_questions.write_record(
        tmp_path, before | seen_questions.record_questions(["One", "one?"], "new.jsonl")
    )
    zero, one = map(seen_questions.fingerprint_question, ("Zero", "One"))
    assert seen_questions.read_record(tmp_path).fingerprints == {zero, one}
    assert seen_questions.read_record(tmp_path).sources == {"old.jsonl": 1, "new.jsonl": 1}
    assert not seen_questions.read_record(tmp_path).complete
    assert seen_questions.record_questions([], "none") == seen_questions.Record()


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda c: b"{", "Expecting property name"),
        (lambda c: b"[]", "it contains a list, not an object"),
        (lambda c: c.pop("sources"), "field 'sources' is missing"),
        (lambda c: c.update(version=2), "version is 2, and this code reads version 1"),
        (lambda c: c.update(complete=1), "field 'complete' is a int, not a bool"),
        (lambda c: c.update(sources={"a": "many"}), "source 'a' has the count 'many'"),
        (lambda c: c["fingerprints"].append("xyz"), "fingerprint 1 is 'xyz', not 32 hex digits"),
        (lambda c: c["fingerprints"].pop(), "contains 0 fingerprints, but its field 'questions' is 1"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, change, complaint):
    seen_questions.write_record(tmp_path, seen_questions.record_questions(["One"], "a.jsonl"))
    path = tmp_path / seen_questions.SEEN
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_bytes(changed if isinstance(changed, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError, match=f"{seen_questions.SEEN}: .*{complaint}.*copy it again"):
        seen_questions.read_record(tmp_path)


# --- the real overlap -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions(shared_data):
    """Of every file, and of each source of the labelled ones."""
    found = {
        name: [
            p.question for p in problems.load_problems(str(shared_data / f"{name}.jsonl"), "auto", **COLUMNS)
        ]
        for name in ("gsm8k_train", *BENCHMARKS)
    }
    triples = [
        t
        for n in ("verify_train", "verify_dev")
        for t in labelled_completions.load_labelled_completions(str(shared_data / f"{n}.jsonl"))
    ]
    for source in ("gsm8k", "odyssey", "math"):
        found[f"verify {source}"] = list(dict.fromkeys(t.question for t in triples if t.source == source))
    return found


@pytest.mark.slow
def test_the_real_overlap(questions):
    """All 847 gsm8k and 252 odyssey questions of verify_*, 4 of its 74 math questions; nothing else."""
    prints = {
        name: {seen_questions.fingerprint_question(q) for q in found} for name, found in questions.items()
    }
    assert {name: len(found) for name, found in prints.items()} == {n: len(q) for n, q in questions.items()}
    common = {
        (a, b): len(prints[a] & prints[b])
        for a in prints
        for b in BENCHMARKS
        if a != b and prints[a] & prints[b]
    }
    assert common == {
        ("verify gsm8k", "gsm8k_test"): 847,
        ("verify odyssey", "odyssey_test"): 252,
        ("verify math", "math500_test"): 4,
    }
    assert len(questions["verify gsm8k"]) == 847 and len(questions["verify odyssey"]) == 252
    # A fifth shares its first sentence with one of MATH500, and asks something else.
    opening = "A number is selected at random from 1 through 100, inclusive."
    (asked,) = [q for q in questions["verify math"] if q.startswith(opening)]
    (other,) = [q for q in questions["math500_test"] if q.startswith(opening)]
    assert "divisor of 50" in asked and "multiple of 3" in other


def test_rows_as_published_have_the_same_fingerprints(questions, shared_data):
    """Layout, instructions and joined fields are the loader's to remove, and do not matter here."""

    def raw(name):
        return [json.loads(x) for x in (shared_data / f"{name}.jsonl").read_bytes().splitlines()]

    published = {
        "gsm8k_test": [row["question"] for row in raw("gsm8k_test")],
        "svamp_test": [f"{row['Body']} {row['Question']}" for row in raw("svamp_test")],
        "math500_test": [row["prompt"] for row in raw("math500_test")],
        "olympiadbench_en_test": [row["question"] for row in raw("olympiadbench_en_test")],
        "odyssey_test": [next(iter(row.values()))["question"] for row in raw("odyssey_test")],
    }
    for name, found in published.items():
        assert [seen_questions.fingerprint_question(q) for q in found] == [
            seen_questions.fingerprint_question(q) for q in questions[name]
        ], name


@pytest.mark.slow
def test_no_near_duplicate_is_missed(questions):
    """Of all pairs that share 0.7 of their word triples (Jaccard), those that are not equal are none."""

    def shingles(question):
        words = re.findall(r"\w+|[^\w\s]", question.casefold())
        return frozenset(zip(words, words[1:], words[2:], strict=False))

    missed = []
    for benchmark in BENCHMARKS:
        there = [(q, shingles(q)) for q in questions[benchmark]]
        index = collections.defaultdict(list)
        for i, (_, found) in enumerate(there):
            for shingle in found:
                index[shingle].append(i)
        for name in ("verify gsm8k", "verify odyssey", "verify math", "gsm8k_train"):
            for question in questions[name]:
                own = shingles(question)
                shared = collections.Counter(i for shingle in own for i in index.get(shingle, ()))
                for i, count in shared.items():
                    other, theirs = there[i]
                    if count < 0.7 * (len(own) + len(theirs) - count):
                        continue
                    if seen_questions.fingerprint_question(question) != seen_questions.fingerprint_question(
                        other
                    ):
                        missed.append((name, benchmark, question, other))
    assert missed == []


# --- a run's held-out problems --------------------------------------------------------------------------------


def config(**changes):
    """A run's knobs; dots in names are written as double underscores."""
    cfg = base.get_config()
    for name, value in {"data__train": "train.jsonl", **changes}.items():
        *sections, field = name.split("__")
        section = cfg
        for part in sections:
            section = section[part]
        section[field] = value
    return cfg


def weights_directory(path, architecture="LlamaForSequenceClassification", record=None):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    if record is not None:
        seen_questions.write_record(path, record)
    return str(path)


TRAIN = [Problem(q, "1") for q in ("One?", "Two?", "Three?")]
HELD_OUT = [Problem(q, "1") for q in ("two", "Four?", "Five?", "Six?")]
KNOWN = seen_questions.record_questions(["four", "THREE"], "rows.jsonl")


def apart(capsys, run_dir, cfg, train=TRAIN, held_out=HELD_OUT):
    """What is kept, and what was said."""
    run_dir.mkdir(exist_ok=True)
    kept = contamination.exclude_contaminated(cfg, run_dir, train, held_out)
    return [p.question for p in kept], capsys.readouterr().out


def test_held_out_problems_that_the_reward_model_saw_are_left_out(tmp_path, capsys):
    weights = weights_directory(tmp_path / "rm", record=KNOWN)
    changed = dict(reward__weights=weights, reward__arm="model")
    kept, said = apart(capsys, tmp_path / "run", config(**changed))
    assert kept == ["two", "Five?", "Six?"]
    assert said == (
        "the reward model is trained on 2 questions of rows.jsonl; among them 1 of 4 held-out questions (left "
        "out), before this run 1 of 3 training questions\n"
    )
    kept, said = apart(capsys, tmp_path / "run", config(**changed, data__exclude_seen=False))
    assert kept == [p.question for p in HELD_OUT] and "1 of 4 held-out questions (kept, as data.exc" in said
    assert seen_questions.read_record(tmp_path / "run") == KNOWN
    # In the cooper arm it is trained on the training problems too.
    kept, said = apart(capsys, tmp_path / "cooper", config(reward__weights=weights))
    assert kept == ["Five?", "Six?"]
    assert "2 questions of rows.jsonl, 3 questions of train.jsonl; among them 2 of 4 held-out" in said
    whole = KNOWN | seen_questions.record_questions(["one", "two", "three"], "train.jsonl")
    assert seen_questions.read_record(tmp_path / "cooper") == whole and len(whole.fingerprints) == 4


def test_the_rule_arm_has_nothing_to_leave_out(tmp_path, capsys):
    cfg = config(reward__weights=weights_directory(tmp_path / "rm", record=KNOWN), reward__arm="rule")
    assert apart(capsys, tmp_path / "run", cfg) == ([p.question for p in HELD_OUT], "")
    assert not (tmp_path / "run" / seen_questions.SEEN).exists()


def test_weights_without_a_record_are_unknown(tmp_path, capsys):
    weights = weights_directory(tmp_path / "rm")
    kept, said = apart(capsys, tmp_path / "run", config(reward__weights=weights, reward__arm="model"))
    assert len(kept) == 4 and "trained on no known question; among them 0 of 4 held-out questions, " in said
    assert f"what else reward.weights={weights} saw is unknown" in said
    assert not seen_questions.read_record(tmp_path / "run").complete
    # A language model is no reward model yet, and weights made at random saw nothing.
    trunk = weights_directory(tmp_path / "lm", "LlamaForCausalLM")
    for weights in (trunk, "random"):
        kept, said = apart(capsys, tmp_path / "run", config(reward__weights=weights, reward__arm="model"))
        assert len(kept) == 4 and "unknown" not in said
        assert seen_questions.read_record(tmp_path / "run") == seen_questions.Record()


def test_warm_up_data_are_seen(tmp_path, capsys):
    row = {"question": "Five?", "reference_answer": "1", "completion": "1", "label": 1}
    (tmp_path / "warm.jsonl").write_text(json.dumps(row) + "\n")
    changed = dict(reward__arm="model", supervised__reward_data=str(tmp_path / "warm.jsonl"))
    kept, said = apart(capsys, tmp_path / "run", config(**changed, supervised__reward_steps=5))
    assert kept == ["two", "Four?", "Six?"] and "1 questions of warm.jsonl; among them 1 of 4" in said
    kept, _ = apart(capsys, tmp_path / "run", config(**changed))  # no step of it
    assert len(kept) == 4
    kept, _ = apart(capsys, tmp_path / "run", config(reward__arm="model", supervised__reward_steps=5))
    assert kept == ["Four?", "Five?", "Six?"]  # worked solutions of the training problems


def test_a_run_that_goes_on_keeps_what_it_began_with(tmp_path, capsys):
    weights = weights_directory(tmp_path / "rm", record=KNOWN)
    changed = config(reward__weights=weights, reward__arm="model")
    first, _ = apart(capsys, tmp_path / "run", changed)
    seen_questions.write_record(weights, seen_questions.record_questions(["six"], "others.jsonl"))
    (tmp_path / "run" / "checkpoints" / "0").mkdir(parents=True)
    again, said = apart(capsys, tmp_path / "run", changed)
    assert again == first and "before this run" not in said
    assert seen_questions.read_record(tmp_path / "run") == KNOWN


def test_nothing_left_to_evaluate_on_is_refused(tmp_path, capsys):
    weights = weights_directory(tmp_path / "rm", record=KNOWN)
    cfg = config(reward__weights=weights, reward__arm="model", data__eval="held.jsonl")
    with pytest.raises(
        SetupError, match="held.jsonl: .* on all 1 questions.*rows.jsonl.*data.exclude_seen=False"
    ):
        apart(capsys, tmp_path / "run", cfg, held_out=[Problem("Four", "1")])
    assert apart(capsys, tmp_path / "run", cfg, held_out=[])[0] == []
    (tmp_path / "rm" / seen_questions.SEEN).write_text("{}")
    with pytest.raises(SetupError, match="reward.weights=.*seen_questions.json: field 'version' is missing"):
        apart(capsys, tmp_path / "run", cfg)


@pytest.mark.slow
def test_the_real_overlap_is_left_out_of_a_run(tmp_path, capsys, shared_data):
    """Warmed up on verify_train, held out: MATH500.  The limit applies to what is left."""
    cfg = config(
        data__train=str(shared_data / "gsm8k_train.jsonl"),
        data__eval=str(shared_data / "math500_test.jsonl"),
        supervised__reward_data=str(shared_data / "verify_train.jsonl"),
        supervised__reward_steps=1,
        reward__arm="model",
    )
    loaded = load_problems(RunSettings.from_config(cfg))
    train, held_out = loaded.train, loaded.held_out
    found = {
        seen_questions.fingerprint_question(t.question)
        for t in labelled_completions.load_labelled_completions(cfg.supervised.reward_data)
        if t.source == "math"
    }
    overlapping = [p.question for p in held_out if seen_questions.fingerprint_question(p.question) in found]
    kept, said = apart(capsys, tmp_path / "run", cfg, train, held_out)
    assert len(held_out) == 500 and 1 <= len(overlapping) <= 4
    assert kept == [p.question for p in held_out if p.question not in overlapping]
    assert (
        f"questions of verify_train.jsonl; among them {len(overlapping)} of 500 held-out questions (left"
        in said
    )
    assert "before this run 0 of 7473 training questions" in said
    cfg.data.eval = str(shared_data / "odyssey_test.jsonl")
    held_out = load_problems(RunSettings.from_config(cfg)).held_out
    kept, said = apart(capsys, tmp_path / "run", cfg, train, held_out)
    assert f"among them {387 - len(kept)} of 387 held-out questions (left out)" in said
    assert 387 - 252 < len(kept) < 387
