"""Writes docs/one_step.md: one Cooper step of the miniature, with its tensors and texts.

    python tests/step_page.py --write

The two models of configs/tiny.py are trained to step 0, and one step of few prompts follows.  Both updates are
replaced by functions that call them and note what they get (step_noting.py); nothing else is changed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
from step_noting import note_step  # noqa: E402
from step_text import render_page  # noqa: E402

from cooper_jax.api.training import make_config  # noqa: E402
from cooper_jax.runtime.checkpoint import Checkpoints  # noqa: E402
from cooper_jax.runtime.run_directory import RunDirectory  # noqa: E402
from cooper_jax.trainer.resume import start_or_resume  # noqa: E402
from cooper_jax.trainer.setup import build_components  # noqa: E402
from cooper_jax.trainer.state import Components, State  # noqa: E402

PAGE = ROOT / "docs" / "one_step.md"
# Few prompts, and rows of one response each, so that the shapes are easy to read.
CHANGES = {"data.prompts_per_step": 4, "rollout.group_size": 4, "policy.packing": "off", "steps": 1}


@contextlib.contextmanager
def begin_run(path: Path) -> Iterator[tuple[Components, State]]:
    """The miniature at step 0, its supervised phases and the reward model's warm-up done."""
    config = make_config("tiny", CHANGES | {"eval.every": 0, "run_dir": str(path)})
    with (
        RunDirectory(path, config, resume=True) as run,
        build_components(config, path) as (components, state),
        Checkpoints(path, keep=1) as checkpoints,
    ):
        yield components, start_or_resume(components, state, run, checkpoints)


def main() -> None:
    """Write the page, or print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write docs/one_step.md; otherwise print it")
    parser.add_argument("--run_dir", help="a run directory to keep step 0 in, so that a second call is fast")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    with contextlib.ExitStack() as stack:
        path = options.run_dir or stack.enter_context(tempfile.TemporaryDirectory())
        components, state = stack.enter_context(begin_run(Path(path)))
        page = render_page(note_step(components, state))
    if options.write:
        PAGE.write_text(page, encoding="utf-8")
    else:
        print(page, end="")


if __name__ == "__main__":
    main()
