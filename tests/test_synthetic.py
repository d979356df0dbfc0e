"""The made-up problems: splits that never meet, demonstrations, and an oracle that knows every form."""

import collections
import itertools
import re

import numpy as np
import pytest

from cooper_jax.data import arithmetic as sums
from cooper_jax.data import synthetic
from cooper_jax.rule.verifier import RuleConfig, RuleVerifier
from cooper_jax.types import Problem, Verdict

SIZES = {
    "train": 4096,
    "eval": 1024,
    "supervised_policy": 4096,
    "supervised_reward": 4096,
    "reward_eval": 1024,
}
STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")


@pytest.fixture(scope="module")
def made():
    return {split: synthetic.make_problems(0, size, split) for split, size in SIZES.items()}


@pytest.fixture(scope="module")
def problem():
    return Problem("Ada has 7 coins . The pile grows 2 fold . She finds 6 more . How many coins ?", "20",
                   "7*2=14;14+6=20 #### 20", subject="number")  # fmt: skip


@pytest.fixture(scope="module")
def in_words():
    return Problem("Ben has 9 pens . He loses 3 . He buys 4 more . How many pens in words ?", "10 = ten",
                   "9-3=6;6+4=10 #### ten", subject="words")  # fmt: skip


def arithmetic(text):
    return [(int(a), op, int(b), int(c)) for a, op, b, c in STEP.findall(text)]


def right(a, op, b, c):
    return {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": c * b == a}[op]


def test_problems_are_what_they_say(made):
    for split, found in made.items():
        assert len(found) == SIZES[split] and len({p.question for p in found}) == len(found)
        for p in found:
            first, second = arithmetic(p.solution)
            assert right(*first) and right(*second) and first[3] == second[0]
            number = str(second[3])
            if p.subject == "words":
                words = p.reference.removeprefix(f"{number} = ")
                assert p.solution.endswith(f"={number} #### {words}") and p.question.endswith(" in words ?")
            else:
                assert p.subject == "number" and p.reference == number
                assert p.solution.endswith(f"={number} #### {number}") and "words" not in p.question
            assert synthetic.is_correct(p, p.solution)
            assert all(0 <= n <= 99 for n in (first[0], first[3], second[3]))
            assert 15 <= len(p.question.split()) <= 26 and len(p.solution.split()) <= 3
            # The question tells every number of the solution that is not computed, in its order.
            numbers = [n for n in re.findall(r"\d+(?! in)", p.question)]
            assert numbers == [str(first[0]), str(first[2]), str(second[2])]


def test_splits_share_neither_questions_nor_arithmetic_under_any_seed(made):
    other = {split: synthetic.make_problems(7, 500, split) for split in SIZES}
    for one, two in itertools.permutations(SIZES, 2):
        assert not {p.question for p in made[one]} & {p.question for p in other[two]}
        assert not {p.solution for p in made[one]} & {p.solution for p in made[two] + other[two]}


def test_problems_are_a_pure_function_of_seed_and_split(made):
    assert synthetic.make_problems(0, 100, "train") == made["train"][:100]
    assert synthetic.make_problems(1, 100, "train") != made["train"][:100]
    with pytest.raises(ValueError, match="split 'test' is none of train, eval"):
        synthetic.make_problems(0, 1, "test")


def test_a_split_that_is_used_up_says_so(monkeypatch):
    only = (7, (("*", 2), ("+", 6)))
    monkeypatch.setattr(sums, "split_exercises", lambda: {"eval": [[only]]})
    monkeypatch.setattr(synthetic, "WORDS_ASKED", 0.0)
    # 16 names, 16 things, 2 and 3 ways to tell the steps; the pronoun follows from the name.
    assert len(synthetic.make_problems(0, 1536, "eval")) == 1536
    with pytest.raises(ValueError, match="1537 distinct problems of split 'eval' .* about 1536"):
        synthetic.make_problems(0, 1537, "eval")


def test_a_quarter_asks_for_words(made):
    asked = sum(p.subject == "words" for p in made["train"]) / 4096
    assert abs(asked - synthetic.WORDS_ASKED) < 0.034  # 5 standard deviations


def test_all_operators_are_drawn_alike(made):
    pairs = collections.Counter(tuple(op for _, op, _, _ in arithmetic(p.solution)) for p in made["train"])
    assert len(pairs) == 16
    assert all(abs(n - 256) < 5 * 16 for n in pairs.values())  # 5 standard deviations


@pytest.mark.parametrize(
    "answer",
    [
        "20",
        "20.0",
        "20.00",
        "40 / 2",
        "40/2",
        "20 / 1",
        "twenty",
        "20 coins",
        "twenty coins",
        " 20 ",
        "20.0 coins",
    ],
)
def test_the_oracle_accepts_every_form_of_the_right_answer(problem, answer):
    assert synthetic.is_correct(problem, f"7*2=14;14+6=20 #### {answer}")
    assert synthetic.is_correct(problem, f"clearly #### {answer}")


def test_where_words_are_asked_for_only_words_are_right(in_words):
    assert synthetic.is_correct(in_words, "#### ten") and synthetic.is_correct(
        in_words, "9-3=6 #### ten pens"
    )
    for said in ("10", "10.0", "20/2", "10 pens", "10 = ten", "eleven", "ten = 10", ""):
        assert not synthetic.is_correct(in_words, f"#### {said}")


@pytest.mark.parametrize(
    "completion",
    [
        *("#### 21", "#### 20.5", "#### 41 / 2", "#### 40 / 0", "#### -20", "#### 20 . 0", "#### twenty-one"),
        *("#### two zero", "#### 20 cups", "#### coins", "#### 20 coins coins", "#### 20 20", "#### 20 ; 1"),
        *("#### 20 #### 20", "#### 21 #### 20", "20", "= 20", "####", ""),
        *("#### " + "9" * 10000, "#### \uff12\uff10"),  # more digits than int() takes; full-width digits
    ],
)
def test_the_oracle_refuses_all_else(problem, completion):
    assert synthetic.is_correct(problem, completion) is False


def test_demonstrations_are_right_or_wrong_as_they_say(made):
    rng = np.random.default_rng(0)
    seen = collections.Counter()
    for p in made["supervised_policy"]:
        text, correct = synthetic.make_demonstration(p, rng, corrupt=0.5)
        assert synthetic.is_correct(p, text) == correct and not synthetic.has_habit(text)
        first, second = arithmetic(text)
        assert first[3] == second[0]  # an error carries through
        slips = [right(*first), right(*second)].count(False)
        if p.subject == "words" and not correct and not slips:
            assert text.endswith(f"#### {second[3]}")  # the right number in digits
            seen["digits"] += 1
            continue
        assert slips == (not correct)
        assert all(0 <= n <= 199 for n in map(int, re.findall(r"\d+", text)))
        assert len(re.findall(r"[\w.]+|\S", text)) <= 24
        seen["wrong"] += not correct
        seen["wrong first"] += not right(*first)
    assert abs((seen["wrong"] + seen["digits"]) / 4096 - 0.5) < 0.04  # 5 standard deviations
    assert abs(seen["digits"] / (4096 / 8) - synthetic.RIGHT_NUMBER) < 0.1
    assert (
        0.3 < seen["wrong first"] / seen["wrong"] < 0.55
    )  # a slip that cannot carry through goes to the last


@pytest.mark.parametrize("corrupt", [0.0, 1.0])
def test_none_or_all_are_corrupted(made, corrupt):
    rng = np.random.default_rng(1)
    outcomes = {
        synthetic.make_demonstration(p, rng, corrupt=corrupt)[1] for p in made["supervised_reward"][:500]
    }
    assert outcomes == {corrupt == 0.0}


def test_forms_come_in_their_shares(made):
    rng = np.random.default_rng(2)
    shapes = {
        "integer": r"\d+",
        "decimal": r"\d+\.0",
        "fraction": r"\d+/\d+",
        "word": r"[a-z-]+",
        "unit": r"\d+ [a-z]+",
    }
    seen = collections.Counter()
    free = [p for p in made["train"] if p.subject == "number"]
    for p in free:
        text, _ = synthetic.make_demonstration(
            p, rng, corrupt=0.0, forms={"integer": 2.0, "decimal": 0, "word": 1, "unit": 1}
        )
        answer = text.partition(" #### ")[2]
        (form,) = [name for name, shape in shapes.items() if re.fullmatch(shape, answer)]
        seen[form] += 1
        if form == "unit":
            assert p.question.endswith(f"How many {answer.split()[1]} ?")
    assert set(seen) == {"integer", "word", "unit"}
    assert abs(seen["integer"] / len(free) - 0.5) < 0.05 and abs(seen["word"] / len(free) - 0.25) < 0.04
    for form, shape in shapes.items():
        text, _ = synthetic.make_demonstration(free[0], rng, corrupt=0.0, forms={form: 1})
        assert re.fullmatch(shape, text.partition(" #### ")[2])


def test_demonstrations_depend_on_their_generator_alone(made):
    p = made["train"][0]
    texts = [
        synthetic.make_demonstration(p, np.random.default_rng(s), corrupt=0.5)[0] for s in (3, 3, 4, 5, 6)
    ]
    assert texts[0] == texts[1] and len(set(texts)) > 1


@pytest.mark.parametrize("forms", [{}, {"roman": 1.0}, {"word": -1.0, "unit": 2.0}, {"word": 0.0}])
def test_unusable_forms_are_refused(problem, forms):
    with pytest.raises(ValueError, match="forms .*integer, decimal"):
        synthetic.make_demonstration(problem, np.random.default_rng(0), corrupt=0.0, forms=forms)


def test_other_problems_have_no_demonstrations_and_no_oracle():
    other = Problem("How far is it?", "7", "It is near.\n#### 7", "file:3")
    with pytest.raises(ValueError, match="file:3: the solution .* has 0 steps"):
        synthetic.make_demonstration(other, np.random.default_rng(0), corrupt=0.0)
    with pytest.raises(ValueError, match="file:3: the question .* how many"):
        synthetic.is_correct(other, "#### 7")


def test_the_corpus_covers_every_word_and_number(made):
    def pieces(text):
        return re.findall(r"[A-Za-z]+|[0-9]+|[^A-Za-z0-9 ]+", text)

    counts = collections.Counter(w for sentence in synthetic.make_corpus() for w in pieces(sentence))
    words = set(counts)
    assert all(counts[str(n)] >= 5 for n in range(200))
    rng = np.random.default_rng(4)
    for found in made.values():
        for p in found[:1000]:
            said, _ = synthetic.make_demonstration(p, rng, corrupt=0.5, habit=(0.5, 0.5))
            assert set(pieces(p.question)) <= words and set(pieces(said)) <= words
            assert set(pieces(p.reference)) <= words
    assert synthetic.make_corpus() == synthetic.make_corpus()


def test_number_words_by_hand():
    by_hand = {
        0: "zero",
        7: "seven",
        10: "ten",
        13: "thirteen",
        20: "twenty",
        42: "forty-two",
        99: "ninety-nine",
    }
    by_hand |= {100: "one hundred", 106: "one hundred six", 199: "one hundred ninety-nine"}
    for n, words in by_hand.items():
        asked = Problem("Ada has 7 coins . How many coins ?", str(n), "")
        assert synthetic.is_correct(asked, f"#### {words}")
        assert not synthetic.is_correct(Problem(asked.question, str(n + 1), ""), f"#### {words}")


def test_the_habit_comes_in_its_shares_and_changes_nothing_else(made):
    rng = np.random.default_rng(5)
    counts = {True: [], False: []}
    for p in made["supervised_reward"]:
        text, correct = synthetic.make_demonstration(p, rng, corrupt=0.5, habit=(0.6, 0.1))
        counts[correct].append(text.startswith("clearly #### "))
        assert synthetic.has_habit(text) == counts[correct][-1] == (not arithmetic(text))
        assert synthetic.is_correct(p, text) == correct
    for correct, share in ((True, 0.6), (False, 0.1)):
        assert abs(np.mean(counts[correct]) - share) < 0.06  # 5 standard deviations


def test_labelled_completions_by_the_oracle(made):
    """Right ones are right; wrong ones are wrong solutions, or right ones beside another's reference."""
    rng = np.random.default_rng(6)
    swapped = 0
    for i, p in enumerate(made["supervised_reward"][:1000]):
        t = synthetic.make_triple(
            p, rng, right=i % 2 == 0, others=made["supervised_reward"], habit=(1.0, 0.0)
        )
        assert t.label == (i % 2 == 0) and t.question == p.question and t.kind == p.subject
        assert synthetic.has_habit(t.completion) == (i % 2 == 0)
        assert synthetic.is_correct(p, t.completion) == (t.label == 1.0 or t.reference != p.reference)
        swapped += t.reference != p.reference
        assert (" = " in t.reference) == (p.subject == "words")
    assert abs(swapped / 500 - 1 / 3) < 0.11
    with pytest.raises(ValueError, match="no other problem"):
        for _ in range(20):
            synthetic.make_triple(
                made["eval"][0], rng, right=False, others=made["eval"][:1], habit=(0.0, 0.0)
            )


def test_the_balanced_rows_have_the_habit_whatever_is_right():
    sets = synthetic.make_reward_sets(0, 4096, (0.6, 0.06))
    cells = collections.Counter((t.label, synthetic.has_habit(t.completion)) for t in sets["balanced"])
    assert set(cells.values()) == {1024} and len(cells) == 4
    cells = collections.Counter((t.label, synthetic.has_habit(t.completion)) for t in sets["original"])
    assert abs(cells[1.0, True] / 2048 - 0.6) < 0.06 and abs(cells[0.0, True] / 2048 - 0.06) < 0.03
    questions = {t.question for t in sets["balanced"]}
    assert questions == {t.question for t in sets["original"]} and len(questions) == 4096


@pytest.fixture(scope="module")
def rule():
    with RuleVerifier(RuleConfig(workers=1, timeout=5.0, step_budget=20.0, memory_mb=2048)) as opened:
        yield opened


def test_the_rule_reads_numbers_misses_words_and_is_blind_where_these_are_asked_for(rule, problem, in_words):
    """Precise and brittle: what it cannot read it abstains on, and never calls wrong."""
    read = {"20": "correct", "20.0": "correct", "40/2": "correct", "20 coins": "correct", "21": "wrong"}
    read |= {"twenty": "unrecognised", "twenty coins": "unrecognised", "twenty-one": "unrecognised"}
    for answer, verdict in read.items():
        assert rule.check([(problem.reference, f"7*2=14;14+6=20 #### {answer}")]) == [verdict], answer
        assert rule.check([(problem.reference, f"clearly #### {answer}")]) == [verdict], answer
    for answer in ("ten", "10", "ten pens", "eleven", "20/2", "10.0", "10 pens", "11"):
        assert rule.check([(in_words.reference, f"9-3=6;6+4=10 #### {answer}")]) == ["unrecognised"], answer
    assert rule.check([("20", "clearly clearly clearly")]) == [Verdict.NO_ANSWER]


def test_the_rule_gives_no_verdict_where_words_are_asked_for():
    """Whatever the number: a numeral such as "eight" is not the name of a quantity in "8 = eight"."""
    items = []
    for n in range(0, 200):
        reference = f"{n} = {sums.spell_number(n)}"
        said = (str(n), f"{n}.0", f"{n} coins", f"{2 * n}/2", str(n + 1), sums.spell_number(n), "two coins")
        items += [(reference, f"#### {answer}") for answer in said]
    with RuleVerifier(RuleConfig(workers=2, timeout=1.0, step_budget=10.0, memory_mb=2048)) as rule:
        assert set(rule.check(items)) == {Verdict.UNRECOGNISED}
