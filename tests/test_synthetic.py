"""The made-up problems: splits that never meet, demonstrations, and an oracle that knows every form."""

import collections
import itertools
import re

import numpy as np
import pytest

from cooper_jax.data import synthetic
from cooper_jax.types import Problem

SIZES = {"train": 4096, "eval": 1024, "warmup_policy": 4096, "warmup_reward": 4096}
STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


@pytest.fixture(scope="module")
def made():
    return {split: synthetic.problems(0, size, split) for split, size in SIZES.items()}


@pytest.fixture(scope="module")
def problem():
    return Problem("Ada has 7 coins . The pile grows 2 fold . She finds 6 more . How many coins now ?", "20",
                   "7 * 2 = 14 ; 14 + 6 = 20 #### 20")  # fmt: skip


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
            assert p.solution.endswith(f" = {p.reference} #### {p.reference}")
            assert all(0 <= n <= 99 for n in (first[0], first[3], second[3]))
            assert 16 <= len(p.question.split()) <= 24 and len(p.solution.split()) <= 24
            # The question tells every number of the solution that is not computed, in its order.
            numbers = [n for n in re.findall(r"\d+(?! in)", p.question)]
            assert numbers == [str(first[0]), str(first[2]), str(second[2])]


def test_splits_share_neither_questions_nor_arithmetic_under_any_seed(made):
    other = {split: synthetic.problems(7, 500, split) for split in SIZES}
    for one, two in itertools.permutations(SIZES, 2):
        assert not {p.question for p in made[one]} & {p.question for p in other[two]}
        assert not {p.solution for p in made[one]} & {p.solution for p in made[two] + other[two]}


def test_problems_are_a_pure_function_of_seed_and_split(made):
    assert synthetic.problems(0, 100, "train") == made["train"][:100]
    assert synthetic.problems(1, 100, "train") != made["train"][:100]
    with pytest.raises(ValueError, match="split 'test' is none of train, eval"):
        synthetic.problems(0, 1, "test")


def test_a_split_that_is_used_up_says_so(monkeypatch):
    only = (7, (("*", 2), ("+", 6)))
    monkeypatch.setattr(synthetic, "_arithmetic", lambda: {"eval": [[only]]})
    # 16 names, 16 things, 2 and 3 ways to tell the steps; the pronoun follows from the name.
    assert len(synthetic.problems(0, 1536, "eval")) == 1536
    with pytest.raises(ValueError, match="1537 distinct problems of split 'eval' .* about 1536"):
        synthetic.problems(0, 1537, "eval")


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
    assert synthetic.oracle(problem, f"7 * 2 = 14 ; 14 + 6 = 20 #### {answer}")
    assert synthetic.oracle(problem, f"no steps at all #### {answer}")


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
    assert synthetic.oracle(problem, completion) is False


def test_demonstrations_are_right_or_wrong_as_they_say(made):
    rng = np.random.default_rng(0)
    seen = collections.Counter()
    for p in made["warmup_policy"]:
        text, correct = synthetic.demonstration(p, rng, corrupt=0.5)
        assert synthetic.oracle(p, text) == correct
        first, second = arithmetic(text)
        assert first[3] == second[0]  # an error carries through
        assert [right(*first), right(*second)].count(False) == (not correct)
        assert all(0 <= n <= 199 for n in map(int, re.findall(r"\d+", text)))
        assert len(re.findall(r"[\w.]+|\S", text)) <= 24
        seen["wrong"] += not correct
        seen["wrong first"] += not right(*first)
    assert abs(seen["wrong"] / 4096 - 0.5) < 0.04  # 5 standard deviations
    assert (
        0.3 < seen["wrong first"] / seen["wrong"] < 0.55
    )  # a slip that cannot carry through goes to the last


@pytest.mark.parametrize("corrupt", [0.0, 1.0])
def test_none_or_all_are_corrupted(made, corrupt):
    rng = np.random.default_rng(1)
    outcomes = {synthetic.demonstration(p, rng, corrupt=corrupt)[1] for p in made["warmup_reward"][:500]}
    assert outcomes == {corrupt == 0.0}


def test_forms_come_in_their_shares(made):
    rng = np.random.default_rng(2)
    shapes = {
        "integer": r"\d+",
        "decimal": r"\d+\.0",
        "fraction": r"\d+ / \d+",
        "word": r"[a-z-]+",
        "unit": r"\d+ [a-z]+",
    }
    seen = collections.Counter()
    for p in made["train"]:
        text, _ = synthetic.demonstration(
            p, rng, corrupt=0.0, forms={"integer": 2.0, "decimal": 0, "word": 1, "unit": 1}
        )
        answer = text.partition(" #### ")[2]
        (form,) = [name for name, shape in shapes.items() if re.fullmatch(shape, answer)]
        seen[form] += 1
        if form == "unit":
            assert p.question.endswith(f"How many {answer.split()[1]} now ?")
    assert set(seen) == {"integer", "word", "unit"}
    assert abs(seen["integer"] / 4096 - 0.5) < 0.04 and abs(seen["word"] / 4096 - 0.25) < 0.034
    for form, shape in shapes.items():
        text, _ = synthetic.demonstration(made["train"][0], rng, corrupt=0.0, forms={form: 1})
        assert re.fullmatch(shape, text.partition(" #### ")[2])


def test_demonstrations_depend_on_their_generator_alone(made):
    p = made["train"][0]
    texts = [synthetic.demonstration(p, np.random.default_rng(s), corrupt=0.5)[0] for s in (3, 3, 4, 5, 6)]
    assert texts[0] == texts[1] and len(set(texts)) > 1


@pytest.mark.parametrize("forms", [{}, {"roman": 1.0}, {"word": -1.0, "unit": 2.0}, {"word": 0.0}])
def test_unusable_forms_are_refused(problem, forms):
    with pytest.raises(ValueError, match="forms .*integer, decimal"):
        synthetic.demonstration(problem, np.random.default_rng(0), corrupt=0.0, forms=forms)


def test_other_problems_have_no_demonstrations_and_no_oracle():
    other = Problem("How far is it?", "7", "It is near.\n#### 7", "file:3")
    with pytest.raises(ValueError, match="file:3: the solution .* has 0 steps"):
        synthetic.demonstration(other, np.random.default_rng(0), corrupt=0.0)
    with pytest.raises(ValueError, match="file:3: the question .* how many"):
        synthetic.oracle(other, "#### 7")


def test_the_corpus_covers_every_word_and_number(made):
    words = {w for sentence in synthetic.corpus() for w in sentence.split()}
    counts = collections.Counter(w for sentence in synthetic.corpus() for w in sentence.split())
    assert all(counts[str(n)] >= 5 for n in range(200))
    rng = np.random.default_rng(4)
    for found in made.values():
        for p in found[:1000]:
            said, _ = synthetic.demonstration(p, rng, corrupt=0.5)
            assert set(p.question.split()) <= words and set(said.split()) <= words
    assert synthetic.corpus() == synthetic.corpus()


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
        asked = Problem("Ada has 7 coins . How many coins now ?", str(n), "")
        assert synthetic.oracle(asked, f"#### {words}")
        assert not synthetic.oracle(Problem(asked.question, str(n + 1), ""), f"#### {words}")


def test_the_rule_reads_numbers_and_not_words():
    """What makes the rule brittle here: math-verify on what follows the mark."""
    math_verify = pytest.importorskip("math_verify")
    verdicts = {}
    for answer in ("20", "20.0", "40 / 2", "20 coins", "twenty", "21"):
        parsed = math_verify.parse(answer, parsing_timeout=None)
        verdicts[answer] = bool(parsed) and math_verify.verify(
            math_verify.parse("20"), parsed, timeout_seconds=None
        )
    assert verdicts == {
        "20": True,
        "20.0": True,
        "40 / 2": True,
        "20 coins": True,
        "twenty": False,
        "21": False,
    }
