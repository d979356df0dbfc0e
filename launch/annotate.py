"""Labels completions on which a rule and a language model agree, to train a reward model on them.

    python launch/annotate.py --config=configs/smollm2_135m.py --problems=gsm8k_train.jsonl --out=runs/labels
    python launch/annotate.py --config=... --completions=completions.jsonl --out=runs/labels

--problems names problem sets, for which the model of the config's section `source` writes completions;
--completions names files of existing completions.  Both are repeatable.  The rule and the model of the
section `judge` decide on each completion.  docs/annotation.md explains which completions are kept.

The same command resumes after SIGTERM and SIGKILL.  Exit codes: 0 done; 2 an error in the settings or files,
or a server that cannot be reached; 75 stopped by SIGTERM.
"""

import sys
from pathlib import Path

# As a file (not as a module of the package), the script imports the package of its own checkout.
if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags

from cooper_jax.launch import common

# Inputs and output.
PROBLEMS = flags.DEFINE_multi_string("problems", [], "A problem set to write completions for; repeatable.")
COMPLETIONS = flags.DEFINE_multi_string("completions", [], "A file of completions; repeatable.")
OUT = flags.DEFINE_string("out", "", "The output folder.")


def main(argv: list[str]) -> None:
    """Annotate the completions that the flags name."""
    common.begin_job(argv)
    # Imported after the flags are parsed, because importing JAX takes seconds.
    from cooper_jax.annotation import pipeline

    with common.run_job("annotating"):
        pipeline.annotate_completions(common.read_config(), PROBLEMS.value, COMPLETIONS.value, OUT.value)


if __name__ == "__main__":
    app.run(main, flags_parser=common.make_flags_parser(__doc__))
