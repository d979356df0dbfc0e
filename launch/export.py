"""Writes a model of a run as a Hugging Face directory, which `transformers` loads unchanged.

    python launch/export.py --run_dir=runs/tiny --model=policy --out=exported/policy
    python launch/export.py --run_dir=runs/tiny --model=reward --out=exported/verifyrm --step=100

The policy loads as AutoModelForCausalLM, the reward model as AutoModelForSequenceClassification with one
label.  Both directories can be the `weights` of a later run.  Of a run with adapters (policy.lora) the model is
written with the adapters added to its weights, or with --adapter the adapters alone, which `peft` loads.  With
the reward model of a run whose rewards were calibrated (reward.calibrated), calibration.json is written too.

README.md in the directory is a model card: data, settings, held-out figures with intervals, limits.  --license
names the licence that it states.  --push=NAMESPACE/NAME uploads the directory to the Hugging Face hub, with the
token in HF_TOKEN; a repository that does not exist is created, with --private as a private one.  Nothing is
uploaded without --push.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

# As a file (not as a module of the package), the script imports the package of its own checkout.
if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags, logging

from cooper_jax.launch import command_line

RUN_DIR = flags.DEFINE_string("run_dir", None, "A run directory.", required=True)
OUT = flags.DEFINE_string("out", None, "The directory to write.", required=True)
MODEL = flags.DEFINE_enum("model", "policy", ["policy", "reward"], "Which model.")
STEP = flags.DEFINE_integer("step", -1, "The checkpoint's step; -1 is the newest.")
ADAPTER = flags.DEFINE_boolean("adapter", False, "Write the adapters alone, for peft.")
LICENSE = flags.DEFINE_string(
    "license", "", "The licence in the model card, as in apache-2.0; empty: unknown."
)
PUSH = flags.DEFINE_string("push", "", "A repository of the hub, NAMESPACE/NAME, to upload the directory to.")
PRIVATE = flags.DEFINE_boolean("private", False, "Create the repository of --push as a private one.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the written weights.")


def main(argv: list[str]) -> None:
    """Write the model that the flags name, with its card, and upload it if the flags say so."""
    if len(argv) > 1:
        command_line.exit_with_errors([f"unexpected arguments {argv[1:]}; flags look like --model=policy"])
    logging.set_verbosity(logging.WARNING)

    # Imported after the flags are parsed, because importing JAX takes seconds.
    from cooper_jax.export import hub_upload, model_card
    from cooper_jax.settings import setup_errors

    try:
        check_flags()
        exported = load_model()
        written = write_model(exported)
        model_card.write_card(OUT.value, model_card.format_card(exported.facts, LICENSE.value, PUSH.value))
        print(f"{OUT.value}: {written}, with a model card (README.md)")
        if PUSH.value:
            message = f"The {MODEL.value} model of step {exported.facts.step} of {exported.facts.config.name}"
            address = hub_upload.push_directory(OUT.value, PUSH.value, message, PRIVATE.value)
            print(f"pushed to {address}")
    except setup_errors.SetupError as error:
        command_line.exit_with_errors(error.messages)


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model of a run, and what is written beside it."""

    model: Any  # model.loading.Model; jax is not imported yet
    params: Any
    facts: Any  # export.run_facts.RunFacts
    fitted: Any  # reward.calibration.Calibration | None


def check_flags() -> None:
    """Check the flags, before a model is loaded.  Raises SetupError."""
    from cooper_jax.export import hub_upload
    from cooper_jax.runtime import remote_files
    from cooper_jax.settings import setup_errors

    errors = hub_upload.find_push_errors(PUSH.value) if PUSH.value else []
    if remote_files.is_remote(OUT.value):
        errors.append(f"--out={OUT.value}: a model is written to a local path, to be copied from there")
    if PRIVATE.value and not PUSH.value:
        errors.append("--private does nothing without --push: leave it out")
    if errors:
        raise setup_errors.SetupError(*errors)


def load_model() -> Exported:
    """Load the model from the run's checkpoint.  Raises SetupError for what cannot be read."""
    from cooper_jax.data import seen_questions
    from cooper_jax.export import run_facts
    from cooper_jax.reward import calibration
    from cooper_jax.runtime import device_layouts, remote_files
    from cooper_jax.settings import setup_errors
    from cooper_jax.trainer import run_checkpoint

    with setup_errors.setup_errors("--run_dir"):
        run_dir = remote_files.to_path(RUN_DIR.value)
    with setup_errors.setup_errors(f"--run_dir={run_dir}"):
        # The mesh of the run may not exist on this machine, so the model is loaded on any devices.
        cfg = run_checkpoint.use_any_mesh(run_checkpoint.read_run_config(run_dir))
        layout = device_layouts.make_policy_layout(cfg)
        step_to_load = None if STEP.value < 0 else STEP.value
        model, params, step = run_checkpoint.load_run_model(run_dir, cfg, MODEL.value, layout, step_to_load)
        if ADAPTER.value and model.config.lora is None:
            raise setup_errors.SetupError(
                f"--adapter: the run trained all weights of its {MODEL.value} model; leave the flag out"
            )

        # Evaluations with the exported reward model leave out the questions that it was trained on.
        seen = seen_questions.read_record(run_dir) if MODEL.value == "reward" else None
        # A calibrated run's rewards are those of its reward model and the calibration together.
        # The stored config of an earlier version lacks the field.
        calibrated = MODEL.value == "reward" and cfg.reward.get("calibrated", False)
        fitted = calibration.read_calibration(run_dir) if calibrated else None
        facts = run_facts.read_facts(run_dir, cfg, MODEL.value, step, seen, ADAPTER.value)
    return Exported(model, params, facts, fitted)


def write_model(exported: Exported) -> str:
    """Write the directory without its card; returns what was written, for the terminal."""
    from cooper_jax.data import seen_questions
    from cooper_jax.model import adapter_export, weight_export
    from cooper_jax.reward import calibration
    from cooper_jax.trainer import run_checkpoint

    model, params, facts = exported.model, exported.params, exported.facts
    head = run_checkpoint.HEADS[MODEL.value]
    if ADAPTER.value:
        source = facts.config[MODEL.value].weights
        adapter_export.save_adapters(OUT.value, model.config, params, head, source, DTYPE.value)
        return f"the adapters of the {MODEL.value} model of step {facts.step}, beside {source}"

    # The tokenizer is part of the exported directory, which is complete without the run.
    with tempfile.TemporaryDirectory() as folder:
        model.tokenizer.save(folder)
        weight_export.save_pretrained(
            OUT.value,
            model.config,
            params,
            head,
            tokenizer_dir=folder,
            generation_config={"eos_token_id": list(model.tokenizer.eos_ids)},
            pad_token_id=model.tokenizer.pad_id,
            dtype=DTYPE.value,
        )
    if facts.seen is not None:
        seen_questions.write_record(OUT.value, facts.seen)
    if exported.fitted is not None:
        calibration.write_calibration(OUT.value, exported.fitted)
    return f"the {MODEL.value} model of step {facts.step}"


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the flags; this script takes no config."""
    return command_line.parse_own_flags(argv, __doc__, flags.FLAGS)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
