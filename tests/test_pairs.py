"""Pairs: which positive, which gates, the same whatever arrives first; nothing but the text tells members apart."""

import collections
import queue
import re
import threading
import time

import numpy as np
import pytest
from all_pairs import build_all

from cooper_jax.configs import base
from cooper_jax.data import synthetic
from cooper_jax.llm.chat import ChatConfig
from cooper_jax.reward import assistants
from cooper_jax.reward.assistants import Failure
from cooper_jax.reward.pairs.build_pairs import PairResult, build_pairs
from cooper_jax.reward.pairs.concurrent_rewrites import ConcurrentRewrites
from cooper_jax.reward.pairs.pair_task import PairsConfig, PairTask
from cooper_jax.rule.verifier import RuleConfig, RuleVerifier
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.types import Completion, Problem, Verdict

C, W, N, U = Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER, Verdict.UNRECOGNISED


@pytest.fixture(scope="module")
def rule():
    with RuleVerifier(RuleConfig(workers=2, timeout=20.0, step_budget=60.0, memory_mb=2048)) as verifier:
        yield verifier


class Scripted:
    """Replies with `answer(request)`; remembers what it was asked, call by call."""

    def __init__(self, answer, overlaps=True, concurrency=None):
        self.answer, self.calls, self.overlaps, self.concurrency = answer, [], overlaps, concurrency
        self.reports = 0

    def rewrite(self, requests):
        self.calls.append(list(requests))
        return [self.answer(request) for request in requests]

    def report_failures(self):
        self.reports += 1

    def close(self):
        pass


def config(**fields):
    cfg = base.get_config().pairs
    cfg.update(fields)
    return PairsConfig.from_config(cfg)


def problem(b):
    return Problem(f"question {b}", str(20 + b))


def group(b, verdicts):
    """One prompt's rows, whose texts name them."""
    return [Completion(f"row {b}.{i} makes \\boxed{{{20 + b}}}") for i, _ in enumerate(verdicts)]


def build(groups, assistant, rule, **options):
    size = len(groups[0])
    cfg = options.pop("cfg", config())
    completions = options.pop("completions", [c for b, v in enumerate(groups) for c in group(b, v)])
    options = {"seed": 3, "step": 5, "reference_fits": lambda answer: True, **options}
    return build_all(
        [problem(b) for b in range(len(groups))],
        completions,
        [v for g in groups for v in g],
        size,
        assistant,
        rule,
        cfg,
        **options,
    )


def wrong(request):
    return Completion(request.positive.replace("boxed{2", "boxed{3"))


def test_pairs_of_verified_rows_with_wrong_rewrites(rule):
    assistant = Scripted(wrong)
    result = build([[C, W, C, N], [W, N, U, Verdict.TIMEOUT], [W, W, W, C]], assistant, rule)
    assert result.refused == {"no_positive": 1} and result.requests == 2
    first, none, last = result.pairs
    assert none is None and first.row in (0, 2) and last.row == 11
    assert last.positive == "row 2.3 makes \\boxed{22}" and last.negative == "row 2.3 makes \\boxed{32}"
    assert first.problem == problem(0)
    asked = [request.problem.question for call in assistant.calls for request in call]
    assert asked == ["question 0", "question 2"]  # never about the prompt without a positive


def test_truncated_positives_do_not_count(rule):
    completions = [Completion("it is \\boxed{20}", truncated=True), Completion("so \\boxed{20}")]
    result = build([[C, C]], Scripted(wrong), rule, completions=completions)
    assert result.pairs[0].row == 1
    result = build([[C, W]], Scripted(wrong), rule, completions=completions)
    assert result.pairs == [None] and result.refused == {"no_positive": 1}


def test_positives_are_drawn_by_seed_step_and_position_alone(rule):
    groups = [[C] * 8 for _ in range(6)]
    rows = [pair.row % 8 for pair in build(groups, Scripted(wrong), rule).pairs]
    assert rows == [pair.row % 8 for pair in build(groups, Scripted(wrong), rule).pairs]
    assert len(set(rows)) > 1  # not always the first
    # The same positions in another place of another batch give the same rows.
    there = build(groups[:3], Scripted(wrong), rule, positions=[4, 2, 5]).pairs
    assert [pair.row % 8 for pair in there] == [rows[4], rows[2], rows[5]]
    for other in ({"seed": 4}, {"step": 6}):
        assert rows != [pair.row % 8 for pair in build(groups, Scripted(wrong), rule, **other).pairs]


def test_every_row_can_be_drawn(rule):
    drawn = {build([[C] * 4], Scripted(wrong), rule, step=step).pairs[0].row for step in range(40)}
    assert drawn == {0, 1, 2, 3}


def test_several_positives_a_prompt_are_distinct(rule):
    assistant = Scripted(wrong)
    result = build([[C, C, C, W], [C, W, W, W]], assistant, rule, cfg=config(per_prompt=3))
    assert sorted(pair.row for pair in result.pairs[:3]) == [0, 1, 2]
    assert result.pairs[3].row == 4 and result.pairs[4:] == [None, None]
    assert result.refused == {"no_positive": 2}
    assert len({request.ids for request in assistant.calls[0]}) == 4


LONG = " and so on" * 10
GATES = [
    ("truncated", Completion("row 0.0 makes \\boxed{30}", truncated=True)),
    ("not_wrong", Completion("other words, still \\boxed{20}")),
    ("not_wrong", Completion("other words, and \\boxed{\\frac{40}{2}}")),
    ("unparseable", Completion("there is nothing that I know")),
    ("unparseable", Completion("  \n")),
    ("unrecognised", Completion("row 0.0 makes \\boxed{many}")),
    ("unchanged", Completion(" row 0.0 makes \\boxed{20}\n")),
    ("length", Completion(f"{LONG}row 0.0 makes \\boxed{{30}}")),
    ("giveaway_postscript", Completion(f"row 0.0 makes \\boxed{{30}}{LONG}")),
    ("length", Completion("\\boxed{30}")),
    ("refusal", Completion("I'm sorry, it is \\boxed{30}")),
    ("refusal", Completion("I cannot do that. \\boxed{30}")),
    ("refusal", Completion("A wrong solution: \\boxed{30}")),
    ("assistant_http_500", Failure("http_500")),
    ("assistant_nothing_to_change", Failure("nothing to change")),
]


@pytest.mark.parametrize(("reason", "reply"), GATES)
def test_each_gate(rule, reason, reply):
    assistant = Scripted(lambda request: reply)
    result = build([[C]], assistant, rule)
    assert result.pairs == [None] and result.refused == {reason: 1} and result.requests == 3


def test_a_negative_that_equals_the_reference_is_not_wrong_whatever_the_positive_says(rule):
    # The verdicts come from outside: this positive's own text reads 25.  Against it, 20 would be "wrong".
    result = build(
        [[C]],
        Scripted(lambda r: Completion("so \\boxed{20}")),
        rule,
        completions=[Completion("so \\boxed{25}")],
    )
    assert result.refused == {"not_wrong": 1}  # fmt: skip


def test_what_the_positive_says_too_is_no_refusal(rule):
    text = "I cannot see more than \\boxed{20}"
    result = build([[C]], Scripted(wrong), rule, completions=[Completion(text)])
    assert result.pairs[0].negative == text.replace("20", "30")


def test_only_failed_slots_are_asked_again(rule):
    def answer(request):
        b, attempt = int(request.problem.question.split()[1]), request.ids[3]
        return wrong(request) if attempt >= b else Failure("connection")

    assistant = Scripted(answer)
    result = build([[C, W]] * 4, assistant, rule, positions=[10, 11, 12, 13])
    assert [[r.ids for r in call] for call in assistant.calls] == [
        [(3, 5, 20, 0), (3, 5, 22, 0), (3, 5, 24, 0), (3, 5, 26, 0)],
        [(3, 5, 22, 1), (3, 5, 24, 1), (3, 5, 26, 1)],
        [(3, 5, 24, 2), (3, 5, 26, 2)],
    ]
    assert [pair is not None for pair in result.pairs] == [True, True, True, False]
    assert result.refused == {"assistant_connection": 1} and result.requests == 9


def test_outer_whitespace_is_the_positives(rule):
    completions = [Completion("\n so \\boxed{20} \n")]
    for text in ("so \\boxed{30}", "so \\boxed{30}\n\n", "  so \\boxed{30}"):
        result = build([[C]], Scripted(lambda r, text=text: Completion(text)), rule, completions=completions)
        assert result.pairs[0].negative == "\n so \\boxed{30} \n"


def test_an_assistant_that_is_down_masks_everything(rule):
    cfg = base.get_config().assistant
    cfg.kind, cfg.url, cfg.model, cfg.retries, cfg.timeout = "openai", "http://127.0.0.1:9/v1", "m", 0, 2.0
    assistant = assistants.make_assistant(ChatConfig.from_config(cfg, "assistant"))
    result = build([[C, C]] * 3, assistant, rule)
    assistant.close()
    assert result.pairs == [None] * 3 and sum(result.refused.values()) == 3
    assert set(result.refused) <= {
        "assistant_connection",
        "assistant_timeout",
        "assistant_unavailable",
        "assistant_http_502",
        "assistant_http_503",
    }


def test_no_assistant_no_pairs(rule):
    result = build([[C, C]], None, rule)
    assert result == PairResult([], collections.Counter(), 0)


def answer_by_attempt(request):
    """Refused replies first, as many as the prompt's number; other texts in each attempt."""
    b, attempt = int(request.problem.question.split()[1]), request.ids[3]
    return wrong(request) if attempt >= b else Failure("connection")


@pytest.mark.parametrize("overlaps, concurrency", [(False, None), (True, None), (True, 1), (True, 5)])
def test_pairs_are_the_same_whoever_asks_in_which_order(rule, overlaps, concurrency):
    groups, threads = [[C, W], [C, C], [W, C], [C, C], [W, W]], set()

    def noted(request):
        threads.add(threading.current_thread())
        time.sleep(0.02 * (7 - request.ids[2] % 7))  # later requests are answered earlier
        return answer_by_attempt(request)

    assistant = Scripted(noted, overlaps, concurrency)
    result = build(groups, assistant, rule)
    assert result.pairs == build(groups, Scripted(answer_by_attempt), rule).pairs
    assert [pair is not None for pair in result.pairs] == [True, True, True, False, False]
    assert result.refused == {"assistant_connection": 1, "no_positive": 1}
    assert (threading.current_thread() in threads) is not overlaps
    assert len(threads) <= (concurrency or 1)

    # One request a call, or one call a round; a local assistant gets two attempts of four slots at once.
    sizes = [len(call) for call in assistant.calls]
    assert sizes == ([1] * 9 if concurrency else [4, 3, 2] if overlaps else [8, 2])
    assert result.requests == sum(sizes)


@pytest.mark.parametrize(("slots", "rounds"), [(1, [8, 2]), (2, [8, 2]), (5, [2] * 5), (9, [1] * 10)])
def test_a_local_assistant_is_asked_for_several_attempts_at_once(rule, slots, rounds):
    """In powers of two, of at most 16 rows; the result is that of one attempt after another."""

    def answer(request):
        attempt = request.ids[3]
        if attempt in (1, 5):
            return Completion(request.positive)  # unchanged
        if attempt < 6:
            return Failure(f"reason {attempt}")
        return Completion(f"{attempt}: {wrong(request).text}")

    def ask(overlaps, tries):
        assistant = Scripted(answer, overlaps)
        result = build([[C]] * slots, assistant, rule, cfg=config(tries=tries))
        return result, [
            [request.ids[3] for request in call[: len(call) // slots]] for call in assistant.calls
        ]

    for tries, reason in ((10, None), (6, "unchanged"), (5, "assistant_reason_4")):
        (local, asked), (server, _) = ask(False, tries), ask(True, tries)
        assert local.pairs == server.pairs and local.refused == server.refused
        assert local.refused == ({} if reason is None else {reason: slots})
        together = [attempt for call in asked for attempt in call]
        assert together == list(range(len(together)))
        if tries == 10:
            # The seventh attempt is the first that passes; later ones of its round are not taken.
            assert [len(call) for call in asked] == rounds[: len(asked)] and sum(map(len, asked)) in (7, 8)
            assert all(pair.negative.startswith("6: ") for pair in local.pairs)


def test_a_slot_does_not_wait_for_another(rule):
    """The slow prompt's first reply comes after all tries of the others."""
    finished = threading.Event()
    last_of_others = threading.Event()

    def answer(request):
        b, attempt = int(request.problem.question.split()[1]), request.ids[3]
        if b == 0:
            assert last_of_others.wait(20), "the others wait for the slow one"
            finished.set()
            return wrong(request)
        if attempt == 2:
            last_of_others.set()
            assert not finished.is_set()
        return Failure("connection") if attempt < 2 else wrong(request)

    result = build([[C], [C]], Scripted(answer, concurrency=2), rule)
    assert None not in result.pairs and result.requests == 4


def test_rewrites_begin_before_the_last_group_has_been_sampled(rule):
    """A group's requests are sent once it is verified; the verdicts are asked for, unless they are given."""
    asked = queue.Queue()

    def noted(request):
        asked.put(request.problem.question)
        return wrong(request)

    task = PairTask(
        [problem(0), problem(1)], 2, Scripted(noted, concurrency=2), rule, config(), seed=3, step=5
    )
    rewrites = ConcurrentRewrites(task)
    rewrites.add_group(1, group(1, [C, C]))
    assert asked.get(timeout=20) == "question 1"
    rewrites.add_group(0, group(0, [C, W]), [C, W])
    completions, verdicts = group(0, [C, W]) + group(1, [C, C]), [C, W, C, C]
    early = build_pairs(task, completions, verdicts, None, rewrites)
    assert asked.get(timeout=20) == "question 0"
    assert early == build([[C, W], [C, C]], Scripted(wrong), rule) and early.requests == 2


def test_cancelled_rewrites_ask_no_more(rule):
    """The requests that were sent are waited for by nobody; the others are not sent, and all threads end."""
    begun, released, asked = threading.Event(), threading.Event(), []

    def answer(request):
        asked.append(request)
        begun.set()
        assert released.wait(20)
        return wrong(request)

    task = PairTask(
        [problem(b) for b in range(4)], 1, Scripted(answer, concurrency=1), rule, config(), seed=3, step=5
    )
    rewrites = ConcurrentRewrites(task)
    for b in range(3):
        rewrites.add_group(b, group(b, [C]), [C])
    assert begun.wait(20)
    rewrites.cancel()
    released.set()
    for thread in rewrites._threads:
        thread.join(20)
        assert not thread.is_alive()
    assert len(asked) == 1


def test_a_positive_that_is_another_one_than_before_is_masked(rule):
    """A verdict that failed once and not the other time, so that the ranks of rows differ: no text is mixed."""
    task = PairTask(
        [problem(0), problem(1)], 2, Scripted(wrong, concurrency=1), rule, config(), seed=3, step=5
    )
    completions = group(0, [C, C]) + group(1, [C, C])
    rewrites = ConcurrentRewrites(task)
    rewrites.add_groups(completions, [C, W, C, C])
    made = build_pairs(task, completions, [W, C, C, C], None, rewrites)
    assert made.pairs[0] is None and made.pairs[1] is not None and made.refused == {"unstable_verdict": 1}
    rewrites = ConcurrentRewrites(task)
    rewrites.add_groups(completions, [W, W, C, C])
    assert build_pairs(task, completions, [W, C, C, C], None, rewrites).refused == {"unstable_verdict": 1}


@pytest.mark.parametrize("concurrency", [None, 2])
def test_an_assistants_exception_is_raised_where_pairs_are_collected(rule, concurrency):
    def broken(request):
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        build([[C, C]] * 3, Scripted(broken, concurrency=concurrency), rule)


def test_failures_are_reported_once_a_step(rule):
    assistant = Scripted(answer_by_attempt, concurrency=3)
    build([[C], [C], [C]], assistant, rule)
    assert assistant.reports == 1


@pytest.mark.parametrize(
    "fields",
    [{"tries": 0}, {"per_prompt": 0}, {"length_ratio": 0.5}, {"negatives": ()}, {"negatives": ("swop",)}],
)
def test_bad_settings_are_refused(fields):
    ((field, value),) = fields.items()
    with pytest.raises(SetupError, match=rf"pairs\.{field}={re.escape(str(value))}: it "):
        config(**fields)


def test_rows_must_match(rule):
    with pytest.raises(ValueError, match="2 problems of 2 samples need 4 rows; there are 2 completions"):
        build_all(
            [problem(0)] * 2,
            group(0, [C, C]),
            [C, C],
            2,
            None,
            rule,
            config(),
            lambda answer: True,
            seed=0,
            step=0,
        )


def test_length_and_whitespace_tell_nothing(rule):
    """On many corrupted pairs: the sign of the difference in length, and the text's edges, stay at chance."""
    # The rule abstains where numbers are asked for in words.
    problems = [p for p in synthetic.make_problems(0, 400, "train") if p.subject != "words"]
    edges = ["{}", "{}\n", " {}", "{} "]
    rng = np.random.default_rng(0)
    forms = {"integer": 0.5, "decimal": 0.2, "fraction": 0.15, "unit": 0.15}
    texts = [synthetic.make_demonstration(p, rng, corrupt=0.0, forms=forms)[0] for p in problems]
    completions = [Completion(edges[i % 4].format(text)) for i, text in enumerate(texts)]
    assistant = assistants.make_assistant(ChatConfig.from_config(base.get_config().assistant, "assistant"))
    result = build_all(
        problems,
        completions,
        [C] * len(problems),
        1,
        assistant,
        rule,
        config(),
        lambda answer: True,
        seed=0,
        step=0,
    )
    made = [pair for pair in result.pairs if pair is not None]
    assert len(made) >= 0.95 * len(problems), result.refused
    longer = np.mean([len(pair.negative) > len(pair.positive) for pair in made])
    shorter = np.mean([len(pair.negative) < len(pair.positive) for pair in made])
    assert abs(longer - shorter) < 0.05
    for pair in made:
        for text in (pair.positive, pair.negative):
            body = text.strip()
            margins = (text[: text.index(body)], text[text.index(body) + len(body) :])
            assert margins == edge_of(pair.positive)


def edge_of(text):
    return text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]


# --- other sources of negatives -----------------------------------------------------------------------


class Unasked:
    """An assistant that nobody may ask."""

    def rewrite(self, requests):
        raise AssertionError("asked")


def test_swapped_pairs_differ_in_their_reference_alone(rule):
    cfg = config(negatives=("swap",))
    groups = [[C, W] for _ in range(5)]
    result = build(groups, Unasked(), rule, cfg=cfg)
    assert all(p.negative == p.positive and not p.exchanged for p in result.pairs)
    others = [p.negative_reference for p in result.pairs]
    references = {problem(b).reference for b in range(5)}
    assert all(o in references - {p.problem.reference} for o, p in zip(others, result.pairs, strict=True))
    assert len(set(others)) > 1 and result.requests == 0
    assert others == [p.negative_reference for p in build(groups, None, rule, cfg=cfg).pairs]
    assert others != [p.negative_reference for p in build(groups, None, rule, cfg=cfg, step=6).pairs]


def test_a_swapped_reference_must_make_the_positive_wrong(rule):
    """Equal in value is not other; the rule says so, and the next reference is tried."""
    problems = [Problem("q", r) for r in ("20", "40/2", "20.0", "31")]
    rows, cfg = [Completion("it is \\boxed{20}")] * 4, config(negatives=("swap",))
    verdicts = [C, U, U, U]
    for step in range(6):
        made = build_all(problems, rows, verdicts, 1, None, rule, cfg, lambda answer: True, seed=0, step=step)
        assert made.pairs[0].negative_reference == "31"
    made = build_all(
        problems[:3], rows[:3], verdicts[:3], 1, None, rule, cfg, lambda answer: True, seed=0, step=0
    )
    assert made.pairs[0] is None and made.refused == {"not_wrong": 1, "no_positive": 2}
    made = build_all(problems[:1], rows[:1], [C], 1, None, rule, cfg, lambda answer: True, seed=0, step=0)
    assert made.refused == {"no_other": 1}


def test_a_reference_that_the_rule_cannot_read_makes_no_negative(rule):
    problems = [Problem("q", r) for r in ("20", "many", "a few")]
    rows, cfg = [Completion("it is \\boxed{20}")] * 3, config(negatives=("swap",))
    made = build_all(problems, rows, [C, U, U], 1, None, rule, cfg, lambda answer: True, seed=0, step=0)
    assert made.pairs == [None] * 3 and made.refused == {"unrecognised": 1, "no_positive": 2}


def test_an_own_answer_that_the_rule_cannot_read_makes_no_positive(rule):
    """However its verdict against the reference came about."""
    one, cfg, scores = [Problem("q", "20")], config(negatives=("own_answer",)), np.ones(1, np.float32)
    for text, refused in (("clearly #### ?", {"unrecognised": 1}), ("so #### 7", {})):
        made = build_all(
            one,
            [Completion(text)],
            [W],
            1,
            None,
            rule,
            cfg,
            lambda answer: True,
            seed=0,
            step=0,
            scores=scores,
        )
        assert made.refused == refused and (made.pairs[0] is None) == bool(refused)


def test_an_own_answer_too_long_for_a_reference_is_masked_and_counted():
    """A reference is never cut, and the policy writes this one: the rule is not asked about it."""

    class Noting:
        def check(self, items):
            asked.extend(items)
            return [C for _ in items]

    asked: list = []
    rows = [Completion(f"so #### {'7' * n}") for n in (300, 20)]
    cfg, scores = config(negatives=("own_answer",), per_prompt=2), np.array([0.9, 0.1], np.float32)
    made = build_all(
        [Problem("q", "20")], rows, [W, W], 2, None, Noting(), cfg,
        seed=0, step=0, scores=scores, reference_fits=lambda answer: len(answer) < 100,
    )  # fmt: skip
    assert made.refused == {"too_long": 1} and made.pairs[0] is None
    assert made.pairs[1].positive_reference == "7" * 20 and [tuple(item[:2]) for item in asked] == [
        ("7" * 20, rows[1].text)
    ]


def test_a_wrong_response_is_right_beside_its_own_answer(rule):
    """The most liked of the decidably wrong ones; there need be no correct one."""
    cfg = config(negatives=("own_answer",), per_prompt=2)
    texts = ["so #### 7", "it is 31", "clearly #### 30", "#### 20", "clearly \\boxed{ 40/2 }", "#### 9"]
    verdicts = [W, W, W, C, U, W]
    rows = [Completion(text) for text in texts[:-1]] + [Completion(texts[-1], truncated=True)]
    scores = np.array([0.2, 0.9, 0.6, 0.99, 0.95, 0.97], np.float32)
    one = Problem("q", "20")
    made = build_all(
        [one], rows, verdicts, 6, Unasked(), rule, cfg, lambda answer: True, seed=0, step=0, scores=scores
    )
    first, second = made.pairs
    assert (first.positive, first.positive_reference, first.row) == ("clearly #### 30", "30", 2)
    assert (second.positive, second.positive_reference, second.row) == ("so #### 7", "7", 0)
    for pair in made.pairs:
        assert pair.negative == pair.positive and not pair.negative_reference
        both = [(pair.positive_reference, pair.positive), (pair.problem.reference, pair.negative)]
        assert rule.check(both) == [C, W]
    made = build_all(
        [one],
        rows[3:5],
        [C, U],
        2,
        None,
        rule,
        cfg,
        lambda answer: True,
        seed=0,
        step=0,
        scores=scores[3:5],
    )
    assert made.pairs == [None, None] and made.refused == {"no_wrong": 2}
    with pytest.raises(ValueError, match="own_answer, which needs the reward model's scores"):
        build_all([one], rows, verdicts, 6, None, rule, cfg, lambda answer: True, seed=0, step=0)


def test_slots_take_their_negatives_in_turn(rule):
    cfg = config(negatives=("assistant", "swap", "own_answer"), per_prompt=4)
    assistant = Scripted(wrong)
    groups = [[C, C, W, C], [C, W, W, W]]
    result = build(groups, assistant, rule, cfg=cfg, scores=np.linspace(0, 1, 8, dtype=np.float32))
    first, swapped, own, second = result.pairs[:4]
    assert "boxed{30}" in first.negative and "boxed{30}" in second.negative and first.row != second.row
    assert swapped.row == first.row and swapped.negative_reference == "21"  # the first of its kind, too
    assert own.row == 2 and own.positive == own.negative and own.positive_reference == "20"
    assert result.pairs[7] is None and result.refused == {"no_positive": 1}
    # The rewrites are those of a run that has no other kind.
    alone = build(groups, Scripted(wrong), rule, cfg=config(per_prompt=2)).pairs
    assert [p and (p.row, p.negative) for p in alone] == [
        p and (p.row, p.negative) for p in (first, second, result.pairs[4], result.pairs[7])
    ]


def test_exchanged_pairs_are_drawn_by_a_keyed_coin(rule):
    groups = [[C, C] for _ in range(10)]
    options = dict(cfg=config(per_prompt=2))
    plain = build(groups, Scripted(wrong), rule, **options).pairs
    marked = build(groups, Scripted(wrong), rule, shuffle_labels=True, **options).pairs
    assert [(p.positive, p.negative) for p in plain] == [(p.positive, p.negative) for p in marked]
    coins = [p.exchanged for p in marked]
    assert 5 <= sum(coins) <= 15 and not any(p.exchanged for p in plain)
    there = build(groups[:2], Scripted(wrong), rule, shuffle_labels=True, positions=[5, 0], **options).pairs
    assert [p.exchanged for p in there] == coins[10:12] + coins[:2]


def test_a_slot_without_an_answer_in_time_is_not_asked_again(rule):
    """Each further try would cost the whole time limit again."""
    assistant = Scripted(lambda request: Failure("timeout"))
    result = build([[C, W]] * 2, assistant, rule)
    assert result.refused == {"assistant_timeout": 2} and result.requests == 2
