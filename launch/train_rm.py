"""Trains a reward model on labelled completions, and measures it while it learns.

    python launch/train_rm.py --config=configs/verifyrm_smollm2.py \\
        --config.train_rm.data=verify_train.jsonl --config.train_rm.eval_data=verify_dev.jsonl

The model is that of the config's `reward` section: a trunk whose score head may be new.  <run_dir>/best/ is the
best model by `train_rm.keep_best` on the held-out rows, a Hugging Face *ForSequenceClassification directory, and
goes straight into `launch/train.py --config.reward.weights`.  docs/verifyrm.md says what else the run directory
holds.

The same command goes on from the newest checkpoint.  On several hosts it runs on each, and exit codes are those of
launch/common.py.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: the checkout it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app

from cooper_jax.launch import common


def main(argv: list[str]) -> None:
    common.begin_job(argv)
    from cooper_jax.reward_training import rm_loop

    with common.run_job():
        rm_loop.train_reward_model(common.read_config())


if __name__ == "__main__":
    app.run(main, flags_parser=common.make_flags_parser(__doc__))
