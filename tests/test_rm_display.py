"""What the training of a reward model shows: figures of updates, and a table of evaluations."""

from __future__ import annotations

import io
import math

from cooper_jax.reward_training.rm_display import RmDisplay
from cooper_jax.runtime.console import Console


def make_row(loss: float, accuracy: float, auroc: float = 0.75) -> dict[str, float]:
    """The metrics of an update with an evaluation."""
    return {
        "train_rm/loss": 0.5,
        "train_rm/accuracy": 0.25,
        "time/eval": 2.0,
        "eval/loss": loss,
        "eval/accuracy": accuracy,
        "eval/auroc": auroc,
        "eval/ece": 0.0625,
    }


def read_lines(console: Console) -> list[str]:
    return console._out.getvalue().splitlines()


def test_evaluations_are_rows_under_one_header():
    console = Console(io.StringIO())
    display = RmDisplay(updates=4, eval_every=2, console=console)
    display.show_update(1, {"train_rm/loss": 0.75, "time/tokens_per_second": 1234.0}, None)
    display.show_update(2, make_row(0.5, 0.625), 2)
    display.show_update(3, {"train_rm/loss": 0.25}, 2)
    display.show_update(4, make_row(0.7, 0.5, math.nan), 2)
    update_1, update_2, header, row_2, _, _, row_4 = read_lines(console)
    assert update_1.startswith("step 1/4  loss 0.7500  tokens/s 1,234  ")
    assert update_2.startswith("step 2/4  loss 0.5000  accuracy 25.0%  ")
    assert header.split() == "update held-out loss AUROC ECE best s/update ETA".split()
    assert row_2.split()[:6] == ["2", "62.5%", "0.5000", "0.7500", "0.0625", "this"]
    # The best model is still that of update 2; rows of one label have no AUROC; nothing is left to do.
    assert row_4.split()[:6] == ["4", "50.0%", "0.7000", "-", "0.0625", "2"]
    assert row_4.split()[-1] == "0:00:00"
    assert len({len(line) for line in (header, row_2, row_4)}) == 1, "columns are aligned"


def test_a_resumed_training_shows_its_last_evaluation_again():
    console = Console(io.StringIO())
    rows = [{"step": 1.0}, {"step": 2.0} | make_row(0.5, 0.625), {"step": 3.0}]
    RmDisplay(updates=8, eval_every=2, rows=rows, best=1, done=3, console=console)
    _, row = read_lines(console)
    assert row.split() == ["2", "62.5%", "0.5000", "0.7500", "0.0625", "1", "-", "-"]


def test_quiet_leaves_the_table():
    console = Console(io.StringIO())
    console.set_quiet(True)
    display = RmDisplay(updates=2, eval_every=2, console=console)
    display.show_update(1, {"train_rm/loss": 0.75}, None)
    display.show_update(2, make_row(0.5, 0.625), 2)
    header, row = read_lines(console)
    assert header.split()[0] == "update" and row.split()[0] == "2"
