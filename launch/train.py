"""Trains a policy and its reward model together.

    python launch/train.py --config=configs/tiny.py
    python launch/train.py --config=configs/qwen_1p5b.py --config.policy.weights=DIR ...

Any field of configs/base.py is a flag: --config.steps=20 --config.reward.arm=rule.  If the run directory
contains a checkpoint, the run resumes from it.  A resumed run may not change settings that affect results.

On several hosts, run the same command on each (cooper_jax/runtime/hosts.py explains how they find each
other).  Exit codes:

      0   all steps are complete
      2   an error in the settings or files
     70   a fault that no restart mends (cooper_jax/trainer/fault_watch.py), or an alarm with hacking_guard=stop;
          the newest checkpoint is good
     69   another host was lost; the same command resumes from the newest checkpoint
    134   the first host was lost; the same command resumes likewise
     75   stopped by SIGTERM or Ctrl-C, after saving a checkpoint; the same command resumes from it, or starts from
          the beginning if step 0 was not complete
    130   ended at once by a second Ctrl-C, or by one before the run had begun; the same command resumes from the
          newest checkpoint
"""

import sys
from pathlib import Path

# When Python runs this file directly, the checkout's root is not on the path yet.
if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app

from cooper_jax.launch import common


def main(argv: list[str]) -> None:
    """Train with the config that the flags name."""
    common.begin_job(argv)
    # Imported after the flags are parsed, because importing JAX takes seconds.
    from cooper_jax.runtime import hosts
    from cooper_jax.trainer import recipes
    from cooper_jax.trainer.train_loop import train

    with common.run_job("training"):
        cfg = common.read_config()
        # By default the reward model is updated as in the authors' released code, and can be hacked.
        if warning := recipes.warn_about_released_update(cfg):
            hosts.print_once(warning, always=True)
        train(cfg)


if __name__ == "__main__":
    app.run(main, flags_parser=common.make_flags_parser(__doc__))
