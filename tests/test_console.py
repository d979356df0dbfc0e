"""What a process shows: lines, stages, the live line, the pace of steps and tables that grow."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console as RichConsole

from cooper_jax.runtime import compilations
from cooper_jax.runtime.console import CONSOLE, Console, escape_controls, format_seconds
from cooper_jax.runtime.console_table import GrowingTable
from cooper_jax.runtime.progress import Pace, Progress, format_duration


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    """A stream that looks like a terminal of 120 columns."""

    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def plain(clock):
    """A console that writes to a file."""
    return Console(io.StringIO(), clock)


@pytest.fixture
def live(clock, monkeypatch):
    """A console on a terminal."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    console = Console(Terminal(), clock)
    yield console
    console.close()


def said(console) -> list[str]:
    return console._out.getvalue().splitlines()


def live_line(console) -> str:
    """What the live line would show now, on 120 columns."""
    out = io.StringIO()
    RichConsole(file=out, width=120).print(console._render())
    return out.getvalue().strip()


# --- lines ---


def test_a_file_gets_a_line_when_a_stage_begins(plain, clock):
    plain.begin_stage("reading the problems")
    plain.show_detail("never in a file")
    plain.set_status("nor this")
    plain.begin_stage("loading the policy")
    plain.print_line("32 problems")
    plain.end_stage("with this result")
    with plain.open_activity("step 1: rollout", named=True):
        clock.now += 60
    with plain.open_activity("step 2: rollout"):
        plain.print_unless_live("step 2/4")
    assert said(plain) == [
        "reading the problems ...",
        "loading the policy ...",
        "32 problems",
        "step 1: rollout ...",
        "step 2/4",
    ]


def test_quiet_leaves_warnings_and_results(plain):
    plain.set_quiet(True)
    plain.begin_stage("reading the problems")
    plain.print_line("32 problems")
    plain.print_line("warning: no end", always=True)
    GrowingTable((("step", 4),), plain).print_row(["0"])
    assert said(plain) == ["warning: no end", "step", "   0"]


def test_a_silenced_process_says_nothing(plain, live):
    for console in (plain, live):
        console.silence()
        console.begin_stage("reading the problems")
        console.print_line("warning: no end", always=True)
        assert said(console) == []


def test_a_terminal_keeps_a_line_with_seconds_when_a_stage_has_ended(live, clock):
    live.begin_stage("loading the policy")
    clock.now = 1.25
    live.end_stage("loss 0.5")
    live.print_line("[bold] is no markup here, and this line is longer than the terminal: " + "x" * 120)
    with live.open_activity("step 1: rollout", named=True):
        live.begin_compilation("compiling decode_segment")
        live.end_compilation(is_program=True)
    with live.open_activity("step 2: rollout"):
        pass
    with pytest.raises(ZeroDivisionError), live.open_activity("step 3: rollout", named=True):
        raise ZeroDivisionError
    live.print_unless_live("step 2/4")
    live.close()
    text = live._out.getvalue()
    assert "loading the policy  1.2 s, loss 0.5" in text
    assert "[bold] is no markup here" in text and "x" * 120 in text
    assert "step 1: rollout  0.0 s, 1 program compiled" in text
    assert "step 2/4" not in text and "step 3: rollout  0.0 s" not in text, "it has not ended well"


def test_the_live_line_says_what_is_done_for_how_long_and_what_is_compiled(live, clock):
    live.set_status("reward 0.500  ETA 0:01:00", done=1, total=4)
    with live.open_activity("training"):
        with live.open_activity("step 2: rollout (1 of 5)"):
            clock.now = 3.0
            live.show_detail("3 of 16 groups")
            live.begin_compilation("compiling decode_segment")
            clock.now = 5.5
            line = live_line(live)
            assert line.startswith(
                "step 2: rollout (1 of 5) 5.5 s, 3 of 16 groups, compiling decode_segment 2.5 s  "
            )
            assert "reward" in line, "figures fill the room that is left"
            live.end_compilation(is_program=True)
        clock.now = 7.0
        line = live_line(live)
        assert line.startswith("training 7.0 s  ") and line.endswith("reward 0.500  ETA 0:01:00")
    live.set_status("x" * 200)
    assert len(live_line(live)) <= 120


def test_threads_that_compile_at_the_same_time_take_their_time_together(plain, clock):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        plain.begin_compilation("compiling a")
        clock.now = 1.0
        pool.submit(plain.begin_compilation, "compiling b").result()
        clock.now = 3.0
        plain.end_compilation(is_program=True)
        clock.now = 4.0
        assert plain.compile_seconds == 0.0
        pool.submit(plain.end_compilation, True).result()
    clock.now = 9.0
    assert plain.compile_seconds == 4.0


def test_jax_says_what_it_compiles(monkeypatch):
    class Log(Console):
        begun, programs = [], 0

        def begin_compilation(self, what):
            self.begun.append(what)

        def end_compilation(self, is_program):
            self.programs += is_program

    compilations.watch_compilations(CONSOLE)
    console = Log(io.StringIO())
    monkeypatch.setattr(compilations, "_watched", [console])

    @jax.jit
    def part_of_the_other(x):
        return x * 2

    @jax.jit
    def a_program_of_this_test(x):
        return part_of_the_other(x) + 1

    x = jax.block_until_ready(jnp.zeros(3))
    Log.begun.clear()
    console.programs = 0
    a_program_of_this_test(x)
    assert Log.begun == ["tracing a_program_of_this_test"] * 2 + ["compiling a_program_of_this_test"]
    assert console.programs == 1
    a_program_of_this_test(x)
    assert console.programs == 1, "nothing is compiled at the second call"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\nb", "a\nb"),
        ("red \x1b[31m, bell \a, back \r", r"red \x1b[31m, bell \x07, back \r"),
        ("turned \u202e round, half \ud83d", r"turned \u202e round, half \ud83d"),
        ("ö \u4e2d 🙂", "ö \u4e2d 🙂"),
    ],
)
def test_what_a_terminal_would_act_on_is_escaped(text, shown):
    assert escape_controls(text) == shown


@pytest.mark.parametrize(
    "seconds, text",
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")],
)
def test_durations_for_readers(seconds, text):
    assert format_seconds(seconds) == text


# --- tables ---


def test_a_header_comes_again_when_it_has_left_the_page(plain):
    table = GrowingTable((("step", 4), ("accuracy", 8)), plain)
    table.print_row(["0", "25.0%"])
    table.print_row(["1", "26.0%"])
    for _ in range(plain.page_lines):
        plain.print_line("something else")
    table.print_row(["20", "-"])
    lines = said(plain)
    assert lines[:3] == ["step  accuracy", "   0     25.0%", "   1     26.0%"]
    assert lines[-2:] == ["step  accuracy", "  20         -"]


# --- pace ---


def test_what_compiled_does_not_raise_the_estimate(clock):
    compiled = Clock()
    pace = Pace(100, clock=clock, compile_seconds=compiled)
    assert pace.seconds_per_step is None and pace.seconds_left is None
    clock.now, compiled.now = 32.0, 30.0  # the first step: 2 s, and 30 s of compilation
    pace.update(1)
    assert pace.seconds_left == 2.0 * 99
    lefts = []
    for step in range(2, 12):
        clock.now += 2.0
        if step == 5:  # something compiled that nobody measured
            clock.now += 60.0
        pace.update(step)
        lefts.append(pace.seconds_left)
    assert lefts == sorted(lefts, reverse=True) and lefts[-1] == 2.0 * 89


def test_evaluations_are_counted_by_themselves(clock):
    pace = Pace(6, eval_every=2, clock=clock)
    pace.take_first_evaluation(20.0)
    clock.now = 1.0
    pace.update(1)
    assert pace.seconds_left == 5 * 1.0 + 3 * 20.0
    clock.now = 12.0
    pace.update(2, eval_seconds=10.0)
    assert pace.seconds_per_step == 1.0
    # What was measured in this process replaces the first.
    assert pace.seconds_left == 4 * 1.0 + 2 * 10.0
    clock.now = 50.0
    pace.update(6)
    assert pace.seconds_left == 0.0


def test_a_line_of_progress_for_each_step(plain, clock):
    progress = Progress(40, 3, plain, Pace(40, 3, clock=clock))
    clock.now = 100.0
    progress.update(4, {"reward/mean": 0.5, "rule/accuracy": 0.25, "policy/kl": 0.00125})
    for step in range(5, 16):
        clock.now += 2.0
        progress.update(step, {"reward/mean": 0.5})
    lines = said(plain)
    assert lines[0] == "step 4/40  reward 0.500  rule 25.0%  kl 1.25e-03  100.0 s/step  ETA 1:00:00"
    assert lines[1].endswith("51.0 s/step  ETA 0:29:45")
    assert lines[-1] == "step 15/40  reward 0.500  2.0 s/step  ETA 0:00:50"


def test_a_terminal_has_the_figures_on_the_live_line(live, clock):
    progress = Progress(40, 3, live, Pace(40, 3, clock=clock))
    clock.now = 2.0
    progress.update(4, {"reward/mean": 0.5})
    with live.open_activity("step 5"):
        assert live_line(live).endswith("reward 0.500  2.0 s/step  ETA 0:01:12")
    live.close()
    assert "step 4/40" not in live._out.getvalue(), "it has no line of its own"


def test_format_duration():
    assert [format_duration(s) for s in (0, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]
