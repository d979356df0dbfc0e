"""The probe on rewrites: chance where nothing tells, high where a phrase, a length or a layout does."""

import json
import math
import re

import numpy as np
import pytest

from cooper_jax.configs import base
from cooper_jax.data import synthetic
from cooper_jax.reward import corruption
from cooper_jax.reward.pairs import giveaway_probe as probe
from cooper_jax.reward.pairs.giveaway_probe import RecentRewrites, Rewrite
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer.loop_config import LogConfig
from cooper_jax.types import Pair, Problem


@pytest.fixture(scope="module")
def corrupted():
    """Rewrites of the corrupting assistant, of 500 questions."""
    rng, rewrites = np.random.default_rng(0), []
    for problem in synthetic.make_problems(0, 700, "train"):
        positive = synthetic.make_demonstration(problem, rng, corrupt=0.0)[0]
        negative = corruption.corrupt_answer(positive, rng)
        if negative is not None:
            rewrites.append(Rewrite(problem.question, positive, negative))
    return rewrites[:500]


def changed(rewrites, change, share=1.0):
    """The same rewrites with `change` applied to the negatives of a share of them."""
    chosen = np.random.default_rng(1).random(len(rewrites)) < share
    return [
        Rewrite(r.question, r.positive, change(r.negative) if hit else r.negative)
        for r, hit in zip(rewrites, chosen, strict=True)
    ]


@pytest.mark.parametrize("digits_visible", [False, True])
def test_corrupted_numbers_are_told_apart_by_an_added_phrase_alone(corrupted, digits_visible):
    """Members are equal once digits are hidden, so it is the phrase that shows that the probe can tell."""
    assert len(corrupted) == 500 and all(r.positive != r.negative for r in corrupted)
    marked = changed(corrupted, lambda text: text.replace(" #### ", " in all #### "))
    assert 0.4 < probe.compute_probe_auroc(corrupted, digits_visible) < 0.6
    assert probe.compute_probe_auroc(marked, digits_visible) > 0.9


def test_values_of_numbers_are_read_only_if_visible(corrupted):
    """Negatives whose numbers all end in 7."""
    sevens = changed(corrupted, lambda text: re.sub(r"\d\b", "7", text))
    assert probe.compute_probe_auroc(sevens) == probe.compute_probe_auroc(corrupted)
    assert probe.compute_probe_auroc(sevens, digits_visible=True) > 0.9


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + " as shown",  # a phrase
        lambda text: text.replace("=", " equals "),  # a habit
        lambda text: text + " " + text.partition(" #### ")[0],  # length
        lambda text: text.replace(" #### ", "\n#### "),  # layout
        lambda text: text.replace(" ", "  "),
    ],
)
def test_style_is_found(corrupted, change):
    assert probe.compute_probe_auroc(changed(corrupted, change)) > 0.9


def test_a_rarer_phrase_is_found_in_proportion(corrupted):
    """A phrase in a share s of the negatives, and in no positive, has an AUROC of 0.5 + s / 2."""
    for share in (0.3, 0.6):
        auroc = probe.compute_probe_auroc(changed(corrupted, lambda text: text + " as shown", share))
        assert abs(auroc - (0.5 + share / 2)) < 0.06


def test_a_question_is_on_one_side_of_a_split():
    """Words that belong to one question, and not to negatives in general, are no giveaway."""
    rng = np.random.default_rng(0)
    rewrites = []
    for question in range(10):
        # Each question has a word of its own in all its positives, and another in all its negatives.
        right, wrong = (f"word{chr(97 + k)}" for k in rng.permutation(26)[:2])
        for copy in range(20):
            rewrites.append(Rewrite(f"q {question}", f"x {right * 2} {copy}", f"x {wrong * 2} {copy}"))
    assert probe.compute_probe_auroc(rewrites) < 0.7
    apart = [Rewrite(f"{r.question} {i}", r.positive, r.negative) for i, r in enumerate(rewrites)]
    assert probe.compute_probe_auroc(apart) > 0.9


def test_few_rewrites_or_questions_have_no_value(corrupted):
    assert math.isnan(probe.compute_probe_auroc(corrupted[: probe.MIN_MEASURED - 1]))
    assert math.isnan(probe.compute_probe_auroc([corrupted[0]] * 100))
    metrics = probe.measure_giveaways(RecentRewrites())
    assert math.isnan(metrics["pairs/giveaway_auroc"]) and metrics["pairs/giveaway_pairs"] == 0
    assert probe.describe_giveaways(metrics) == ""


def test_the_warning_needs_a_high_value_and_enough_rewrites():
    def text(auroc, count):
        return probe.describe_giveaways({"pairs/giveaway_auroc": auroc, "pairs/giveaway_pairs": count})

    warning = text(0.61, 200.0)
    assert "pairs/giveaway_auroc=0.61: n-grams" in warning
    assert "separate 200 rewrites from their positives with AUROC 0.61 (0.5: not at all)" in warning
    assert text(0.6, 200.0) == text(0.9, 199.0) == ""


def test_the_memory_keeps_the_last_rewrites_and_survives_json():
    problem = Problem("q", "1")
    pairs = [Pair(problem, f"yes {i}", f"no {i}", i) for i in range(4)]
    swap = Pair(problem, "same", "same", 0, negative_reference="2")
    recent = RecentRewrites().append([pairs[0], None, swap, pairs[1]], 3)
    assert [r.negative for r in recent.rewrites] == ["no 0", "no 1"]
    later = recent.append(pairs[2:], 3)
    assert [r.negative for r in later.rewrites] == ["no 1", "no 2", "no 3"] and len(recent.rewrites) == 2
    assert RecentRewrites.from_json(json.loads(json.dumps(later.to_json()))) == later
    assert later.append(pairs, 0) == RecentRewrites()


def test_settings():
    section = base.get_config().log
    assert LogConfig.from_config(section).rewrites_kept == section.giveaway_pairs
    section.giveaway_every = 0
    assert LogConfig.from_config(section).rewrites_kept == 0
    section.giveaway_pairs = 49
    with pytest.raises(SetupError, match="log.giveaway_pairs=49: it must be at least 50"):
        LogConfig.from_config(section)
