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

import dataclasses
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
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cooper_jax.perf import bench_programs, machine, roofline
from cooper_jax.runtime import device_layouts
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.trainer.run_settings import RunSettings


def measure_program(program: bench_programs.BenchProgram, reps: int) -> dict[str, Any]:
    """Time a program and compute its roofline; returns the result as --out writes it."""
    # The rates are measured on matrix products of the program's own shapes and type.
    config, dtype = program.config, program.dtype
    weight_bytes = sum(roofline.count_weights(config)) * jnp.dtype(dtype).itemsize
    product_shapes = dtype, program.rows, config.width, config.ffn, weight_bytes
    rates_before = machine.measure_rates(*product_shapes)

    # The first call compiles.  Errors of the setup, such as a lack of memory, arise in it.
    with setup_errors(program.name):
        first = bench_programs.time_call(program.call, 0)
    seconds = [bench_programs.time_call(program.call, i) for i in range(1, reps + 1)]
    median = float(np.median(seconds))

    # Decoding cannot be timed by itself: it continues from the prefill's caches.
    phases = {}
    if program.prefill is not None:
        bench_programs.time_call(program.prefill, 0)  # compiles
        prefill = float(np.median([bench_programs.time_call(program.prefill, i) for i in range(1, reps + 1)]))
        phases = {"prefill": prefill, "decode": median - prefill}

    # Clock rates change with temperature and load, so the rates are measured again.
    device_rates = rates_before.best(machine.measure_rates(*product_shapes))
    # The virtual devices of a CPU share its cores, and the rates were measured with all cores.
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    rates = device_rates.times(devices)
    bound = roofline.roofline_seconds(program.work, rates)
    parts = {
        name: dataclasses.asdict(work) | {"seconds": work.seconds(rates)}
        for name, work in program.work.items()
    }

    return {
        "program": program.name,
        "dtype": dtype,
        "tokens": program.tokens,
        "tokens_are": program.counted,
        "tokens_per_second": program.tokens / median,
        "first_call_seconds": first,
        "seconds": seconds,
        "median_seconds": median,
        "phase_seconds": phases,
        "roofline": {
            "seconds": bound,
            "share": bound / median,
            "parts": parts,
            "flops_per_second": rates.flops,
            "bytes_per_second": rates.bandwidth,
            "devices": devices,
            "measured": device_rates.measured,
        },
        "memory": machine.peak_memory(),
    }


def format_result(result: dict[str, Any]) -> str:
    """Format a result of `measure_program` as a table."""
    bound = result["roofline"]
    repetitions = f"median of {len(result['seconds'])}"
    lines = [
        f"{result['program']}: {result['tokens_per_second']:,.0f} tokens/s "
        f"({result['tokens']:,} {result['tokens_are']}, {result['dtype']})",
        f"{'':20}{'seconds':>10}{'roofline':>10}{'share':>8}",
        f"{'first call':20}{result['first_call_seconds']:10.3f}",
        f"{repetitions:20}{result['median_seconds']:10.4f}{bound['seconds']:10.4f}{bound['share']:8.0%}",
    ]

    # Parts are listed if there are several; only those of a rollout have times of their own.
    parts = bound["parts"] if len(bound["parts"]) > 1 else {}
    for name, part in parts.items():
        measured, share = "", ""
        if name in result["phase_seconds"]:
            seconds = result["phase_seconds"][name]
            measured, share = f"{seconds:.4f}", f"{part['seconds'] / seconds:.0%}"
        lines.append(f"{'  ' + name:20}{measured:>10}{part['seconds']:10.4f}{share:>8}")

    rates = f"{bound['flops_per_second'] / 1e9:,.0f} GFLOP/s, {bound['bytes_per_second'] / 1e9:,.0f} GB/s"
    if bound["devices"] > 1:
        rates += f": {bound['devices']} devices at the measured rates of one"
    memory = ", ".join(
        f"{name.removesuffix('_bytes')} {size / 2**20:,.0f} MiB" for name, size in result["memory"].items()
    )
    return "\n".join([*lines, f"rates: {rates}", f"memory: {memory.replace('_', ' ')}"])


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
        results.append(measure_program(program, reps))
        print(format_result(results[-1]), flush=True)

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
