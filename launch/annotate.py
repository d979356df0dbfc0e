"""Labels completions on which a rule and a language model agree, to train a reward model on them.

    python launch/annotate.py --config=configs/smollm2_135m.py --problems=gsm8k_train.jsonl --out=runs/annotated
    python launch/annotate.py --config=... --completions=there_already.jsonl --out=runs/annotated

--problems names problem sets, for which the model of the config's section `source` writes completions;
--completions names files of completions that exist already.  Both are repeatable.  The model of the section `judge`
judges beside the rule.  docs/annotation.md says which completions are kept.

The same command resumes after SIGTERM and SIGKILL.  Exit codes: 0 done; 2 an error in the settings or files, or a
server that cannot be reached; 75 stopped by SIGTERM.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: put its checkout first on the import path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags

from cooper_jax.launch import common

PROBLEMS = flags.DEFINE_multi_string("problems", [], "A problem set to write completions for; repeatable.")
COMPLETIONS = flags.DEFINE_multi_string("completions", [], "A file of completions; repeatable.")
OUT = flags.DEFINE_string("out", "", "The output folder.")


def main(argv: list[str]) -> None:
    """Annotate the completions that the flags name."""
    common.begin_job(argv)
    from cooper_jax.annotation import pipeline

    with common.run_job():
        pipeline.annotate_completions(common.read_config(), PROBLEMS.value, COMPLETIONS.value, OUT.value)


if __name__ == "__main__":
    app.run(main, flags_parser=common.make_flags_parser(__doc__))
