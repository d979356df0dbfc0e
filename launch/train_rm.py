"""Trains a reward model on labelled completions, with evaluations on held-out ones.

    python launch/train_rm.py --config=configs/verifyrm_smollm2.py \\
        --config.train_rm.data=verify_train.jsonl --config.train_rm.eval_data=verify_dev.jsonl

The config's `reward` section names the model; its score head may be new.  <run_dir>/best/ is the best model
by `train_rm.keep_best` on the held-out rows: a Hugging Face *ForSequenceClassification directory, which can
be the --config.reward.weights of `launch/train.py`.  docs/verifyrm.md lists the other files of the run
directory.

The same command resumes from the newest checkpoint.  On several hosts, run it on each.  Exit codes are those
of launch/common.py.
"""

import sys
from pathlib import Path

# As a file (not as a module of the package), the script imports the package of its own checkout.
if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app

from cooper_jax.launch import common


def main(argv: list[str]) -> None:
    """Train the reward model of the config that the flags name."""
    common.begin_job(argv)
    # Imported after the flags are parsed, because importing JAX takes seconds.
    from cooper_jax.reward_training import rm_loop

    with common.run_job("training"):
        rm_loop.train_reward_model(common.read_config())


if __name__ == "__main__":
    app.run(main, flags_parser=common.make_flags_parser(__doc__))
