"""Writes a model of a run as a Hugging Face directory, which `transformers` loads unchanged.

    python launch/export.py --run_dir=runs/tiny --model=policy --out=exported/policy
    python launch/export.py --run_dir=runs/tiny --model=reward --out=exported/verifyrm --step=100

The policy loads as AutoModelForCausalLM, the reward model as AutoModelForSequenceClassification with one label.
Either can be the `weights` of a later run.
"""

import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a file: the checkout it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags, logging

from cooper_jax.launch import command_line

RUN_DIR = flags.DEFINE_string("run_dir", None, "A run directory.", required=True)
OUT = flags.DEFINE_string("out", None, "The directory to write.", required=True)
MODEL = flags.DEFINE_enum("model", "policy", ["policy", "reward"], "Which model.")
STEP = flags.DEFINE_integer("step", -1, "The checkpoint's step; -1 is the newest.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the written weights.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        command_line.exit_with_errors([f"unexpected arguments {argv[1:]}; flags look like --model=policy"])
    logging.set_verbosity(logging.WARNING)

    from cooper_jax import placement, runs
    from cooper_jax.data import overlap
    from cooper_jax.model import weights
    from cooper_jax.runtime import files
    from cooper_jax.settings import setup_errors

    try:
        if files.is_remote(OUT.value):
            raise setup_errors.SetupError(
                f"--out={OUT.value}: a model is written to a local path, to be copied from there"
            )
        with setup_errors.boundary("--run_dir"):
            run_dir = files.path(RUN_DIR.value)
        with setup_errors.boundary(f"--run_dir={run_dir}"):
            cfg = runs.on_any_mesh(runs.read_config(run_dir))
            layout = placement.make_layout(cfg)
            asked = None if STEP.value < 0 else STEP.value
            model, params, step = runs.load(run_dir, cfg, MODEL.value, layout, asked)
            seen = overlap.read_record(run_dir) if MODEL.value == "reward" else None
    except setup_errors.SetupError as error:
        command_line.exit_with_errors(error.problems)
    with tempfile.TemporaryDirectory() as folder:
        model.tokenizer.save(folder)
        weights.save(
            OUT.value,
            model.config,
            params,
            runs.HEADS[MODEL.value],
            tokenizer_dir=folder,
            generation_config={"eos_token_id": list(model.tokenizer.eos_ids)},
            pad_token_id=model.tokenizer.pad_id,
            dtype=DTYPE.value,
        )
    if seen is not None:  # the questions that it was trained on, for whoever evaluates with it
        overlap.write_record(OUT.value, seen)
    print(f"{OUT.value}: the {MODEL.value} model of step {step}")


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the flags; this script takes no config."""
    return command_line.parse_own_flags(argv, __doc__, flags.FLAGS)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
