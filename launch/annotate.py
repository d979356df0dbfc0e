"""Labels completions where a rule and a language model agree, for training a reward model.

    python launch/annotate.py --config=configs/smollm2_135m.py --problems=gsm8k_train.jsonl --out=runs/annotated
    python launch/annotate.py --config=... --completions=there_already.jsonl --out=runs/annotated

--problems are sets of problems, for which the model of the config's section `source` writes completions;
--completions are files of completions that exist already.  Both may be given several times.  The model of the
section `judge` judges beside the rule.  docs/annotation.md says what is kept.

The same command goes on after a kill.  Exit codes: 0 done; 2 an error in the settings, the files or a server that
cannot be reached; 75 stopped by SIGTERM.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: the checkout it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags

from cooper_jax.launch import common

PROBLEMS = flags.DEFINE_multi_string("problems", [], "A problem set to write completions for; repeatable.")
COMPLETIONS = flags.DEFINE_multi_string("completions", [], "A file of completions; repeatable.")
OUT = flags.DEFINE_string("out", "", "The folder for the outcome and the ledger.")


def main(argv: list[str]) -> None:
    common.begin_job(argv)
    from cooper_jax.annotation import pipeline

    with common.run_job():
        pipeline.annotate_completions(common.read_config(), PROBLEMS.value, COMPLETIONS.value, OUT.value)


if __name__ == "__main__":
    app.run(main, flags_parser=common.make_flags_parser(__doc__))
