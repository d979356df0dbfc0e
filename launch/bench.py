"""Measures the speed of a config's programs on this machine, and compares it with their rooflines.

    python launch/bench.py rollout --config=configs/tiny.py
    python launch/bench.py score --config=configs/tiny.py --ragged --reps=5 --out=score.json
    python launch/bench.py train --config=configs/qwen_1p5b.py --config.policy.weights=DIR \\
        --config.reward.arm=rule

`cooper_jax/perf/bench_programs.py` describes the programs of the three kinds.  They need no problems, no
tokenizer and, with --config.policy.weights=random (of the shape in --config.policy.arch), no weights.

1. The first call compiles and is reported by itself; with JAX_COMPILATION_CACHE_DIR it may load compiled
   programs.  Then --reps calls are timed; the result is their median.
2. The prefill is timed as a rollout of one token per row, which includes the cast of the weights and the
   first sampled token.  The rest of the rollout's time is that of decoding.
3. The roofline (`cooper_jax/perf/roofline.py`) uses the machine's rates, which are measured before and after
   the program; the better measurement is used.
"""

import json
import sys
from pathlib import Path
from typing import Any

# As a file (not as a module of the package), the script imports the package of its own checkout.
if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags, logging

from cooper_jax.launch import command_line, common
from cooper_jax.launch.common import exit_with_error, print_setup_error

OUT = flags.DEFINE_string("out", "", "A JSON file to write.")
REPS = flags.DEFINE_integer("reps", 3, "Timed calls.")
RAGGED = flags.DEFINE_bool(
    "ragged", False, "Responses of Pareto-distributed lengths, truncated at max_new_tokens."
)
PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 0, "Tokens of each prompt; 0: data.max_prompt_tokens.")
# --help is answered before the imports below, because importing JAX takes seconds.
if __name__ == "__main__":
    command_line.answer_help(sys.argv, __doc__, flags.FLAGS)

import jax
from ml_collections import ConfigDict

from cooper_jax.perf import bench_measurement, bench_programs
from cooper_jax.runtime import device_layouts
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.trainer.run_settings import RunSettings


def drop_problems(cfg: ConfigDict, kind: str) -> ConfigDict:
    """Remove from a config what the programs of a kind do not use, so that it need not exist."""
    # The prompts are random tokens.
    cfg = cfg.copy_and_resolve_references()
    cfg.data.update(format="synthetic", train="", train_weights="", eval="", eval_weights="")
    # Only a training step scores its rollouts.
    if kind != "train":
        cfg.reward.arm = "rule"
    return cfg


def run_bench(
    kind: str, cfg: ConfigDict, *, reps: int = 3, prompt_tokens: int = 0, ragged: bool = False, out: str = ""
) -> dict[str, Any]:
    """Measure the programs of a kind, print the results and write them.  The arguments are the flags' values.

    Returns the report that --out writes.  Raises SetupError, before anything is measured, for flags or
    settings with which no program can run.
    """
    # Measurements take minutes, so every flag is checked first.
    if kind not in bench_programs.KINDS:
        raise SetupError(f"{kind!r} is none of {', '.join(bench_programs.KINDS)}")
    for flag, value, least in (("reps", reps, 1), ("prompt_tokens", prompt_tokens, 0)):
        if value < least:
            raise SetupError(f"--{flag}={value}: it must be at least {least}")
    if out and not Path(out).parent.is_dir():
        raise SetupError(f"--out={out}: there is no directory {Path(out).parent}")

    # This call is for its checks; the programs read the config itself.
    cfg = drop_problems(cfg, kind)
    RunSettings.from_config(cfg, with_assistant=False)
    layout = device_layouts.make_policy_layout(cfg)
    prompt_tokens = prompt_tokens or cfg.data.max_prompt_tokens

    # Everything that the figures depend on is recorded beside them.
    results: list[dict[str, Any]] = []
    report = {
        "kind": kind,
        "config": cfg.name,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "mesh": dict(layout.mesh.shape),
        "jax": jax.__version__,
        "prompts": cfg.data.prompts_per_step,
        "group_size": cfg.rollout.group_size,
        "prompt_tokens": prompt_tokens,
        "max_new_tokens": cfg.rollout.max_new_tokens,
        "ragged": ragged,
        "results": results,
    }
    print(
        "{config}: {prompts} prompts x {group_size}, {prompt_tokens} + {max_new_tokens} tokens, "
        "{devices} x {device}, jax {jax}".format(**report),
        flush=True,
    )

    programs = bench_programs.list_bench_programs(
        kind, cfg, layout, prompt_tokens=prompt_tokens, ragged=ragged
    )
    for program in programs:
        results.append(bench_measurement.measure_program(program, reps))
        print(bench_measurement.format_result(results[-1]), flush=True)

    if out:
        with setup_errors(f"--out={out}"):
            Path(out).write_text(json.dumps(report, indent=1) + "\n")
    return report


def main(argv: list[str]) -> None:
    """Measure the programs that the command line names."""
    if len(argv) != 2:
        exit_with_error(f"name one of {', '.join(bench_programs.KINDS)}; got {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    try:
        run_bench(
            argv[1],
            common.read_config(),
            reps=REPS.value,
            prompt_tokens=PROMPT_TOKENS.value,
            ragged=RAGGED.value,
            out=OUT.value,
        )
    except SetupError as error:
        print_setup_error(error)


if __name__ == "__main__":
    app.run(main, flags_parser=common.make_flags_parser(__doc__))
