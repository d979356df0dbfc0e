"""Mixtures: the order of weighted sources, the parts of an evaluation, and their checks."""

import collections

import pytest

from cooper_jax.configs import base
from cooper_jax.data import mixtures
from cooper_jax.data.data_config import DataConfig
from cooper_jax.data.mixtures import DataOrder
from cooper_jax.data.problems import problem_at
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer.run_problems import choose_held_out
from cooper_jax.types import Problem


def test_without_weights_all_sources_are_one():
    order = DataOrder((7, 5))
    assert [order.problem_at(p, 3) for p in range(30)] == [problem_at(p, 12, 3) for p in range(30)]
    assert order.problem_at(4, 3, "reward_warmup") == problem_at(4, 12, 3, "reward_warmup")


def test_every_block_has_the_shares_and_every_source_its_epochs():
    """Weights 3 and 1 of sources of 6 and 4 problems: blocks of 4; source 0 has an epoch every 2 blocks."""
    order = DataOrder((6, 4), (3, 1))
    visited = [order.problem_at(p, 5) for p in range(64)]
    for block in range(16):
        assert sum(i < 6 for i in visited[4 * block : 4 * block + 4]) == 3
    first, second = ([i for i in visited if (i < 6) == (s == 0)] for s in (0, 1))
    assert all(sorted(first[6 * e : 6 * e + 6]) == list(range(6)) for e in range(8))
    assert all(sorted(second[4 * e : 4 * e + 4]) == [6, 7, 8, 9] for e in range(4))
    # Within an epoch a source has the order that it would have alone.
    assert first == [problem_at(p, 6, 5) for p in range(48)]
    patterns = {tuple(i < 6 for i in visited[4 * b : 4 * b + 4]) for b in range(16)}
    assert len(patterns) > 1  # blocks are ordered at random


def test_the_order_is_a_function_of_seed_position_and_stream():
    order = DataOrder((50, 50), (1, 1))
    whole = [order.problem_at(p, 1) for p in range(100)]
    assert [order.problem_at(p, 1) for p in reversed(range(100))] == whole[
        ::-1
    ]  # a resumed run asks in any order
    assert [order.problem_at(p, 2) for p in range(100)] != whole
    assert [order.problem_at(p, 1, "reward_warmup") for p in range(100)] != whole


def test_the_recorded_order():
    """The first problems of a mixture; a change of these numbers changes every run on one."""
    order = DataOrder((10, 10), (2, 1))
    assert [order.problem_at(p, 0) for p in range(12)] == RECORDED


RECORDED = [11, 1, 3, 13, 0, 6, 9, 10, 7, 5, 8, 16]


@pytest.mark.parametrize(
    "text, shares", [("", ()), ("3,1", (3, 1)), ("0.7, 0.3", (7, 3)), ("2,2", (1, 1)), ("1/3,1", (1, 3))]
)
def test_weights_are_ratios_of_integers(text, shares):
    assert mixtures.parse_weights(text, 2) == shares


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("3", "has 1 weights, and there are 2 sources"),
        ("3,x", "not a list of numbers"),
        ("3,1/0", "not a list of numbers"),
        ("3,nan", "not a list of numbers"),
        ("3,0", "every weight must be above 0"),
        ("1,0.000001", "whose sum is above 10000"),
    ],
)
def test_weights_that_mean_nothing_are_refused(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        mixtures.parse_weights(text, 2)


def test_a_count_is_divided_by_the_largest_remainders():
    assert mixtures.apportion(10, (3, 1)) == [8, 2]  # 7.5 and 2.5: the earlier one
    assert mixtures.apportion(256, (1, 1, 1)) == [86, 85, 85]
    assert mixtures.apportion(2, (5, 5, 1)) == [1, 1, 0]


def test_an_evaluation_takes_its_share_of_each_source():
    problems = [Problem(f"{s}{i}?", "1", source=s) for s in "ab" for i in range(20)]
    found = choose_held_out(problems, problems, 12, (3, 1))
    assert collections.Counter(p.source for p in found) == {"a": 9, "b": 3}
    assert [p for p in found if p.source == "b"] == choose_held_out(problems[20:], problems[20:], 3)
    # A source that has too few is used whole.
    assert len(choose_held_out(problems[:25], problems[:25], 40, (1, 1))) == 25


def test_the_config_checks_sources_and_weights():
    def read(**changes):
        section = base.get_config().data
        section.update(changes)
        return DataConfig.from_config(section)

    data = read(train="a.jsonl, b=b.jsonl", train_weights="0.5,1.5", eval="c.jsonl")
    assert data.train_sources == ["a.jsonl", "b=b.jsonl"] and data.train_shares == (1, 3)
    assert data.eval_shares == ()
    with pytest.raises(SetupError) as error:
        read(train="a.jsonl", train_weights="1,2", eval="b,,c", thinking="yes", chat=False)
    assert error.value.messages == (
        "data.train_weights='1,2': '1,2' has 2 weights, and there are 1 sources",
        "data.eval: 'b,,c': there is an empty source between the commas",
        "data.thinking='yes': it must be on, off or empty",
        "data.thinking='yes' is a variable of the chat template, and data.chat=False uses none: set one of them "
        "back",
    )
    assert read(train="text/gsm8k", format="tfds").train_sources == ["text/gsm8k"]
