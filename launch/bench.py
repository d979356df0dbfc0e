"""How fast a config's programs run on this machine, and how near that is to what the machine can do.

    python launch/bench.py rollout --config=configs/tiny.py
    python launch/bench.py score --config=configs/tiny.py --ragged --reps=5 --out=score.json
    python launch/bench.py train --config=configs/qwen_1p5b.py --config.policy.weights=DIR --config.reward.arm=rule

`cooper_jax/perf/bench_programs.py` says what each of the three runs.  It needs no problems, no tokenizer and, with
--config.policy.weights=random (of the shape in --config.policy.arch), no weights.

1. The first call compiles, and is reported apart; where JAX_COMPILATION_CACHE_DIR is set it may find its programs
   compiled.  Then --reps calls are timed, and their median counts.
2. The rollout's prefill is timed as a rollout of one token a row: it holds the cast of the weights and the first
   draw.  Decoding is the rest.
3. The floor (`cooper_jax/perf/roofline.py`) takes the machine's rates as measured before and after, the better ones.
"""

import dataclasses
import json
import sys
from pathlib import Path

if not __package__:  # run as a file: the checkout it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags, logging

from cooper_jax.launch import command_line, common
from cooper_jax.launch.common import exit_with_error, print_setup_error

OUT = flags.DEFINE_string("out", "", "A JSON file to write.")
REPS = flags.DEFINE_integer("reps", 3, "Timed calls.")
RAGGED = flags.DEFINE_bool("ragged", False, "Responses of Pareto-distributed lengths, cut at max_new_tokens.")
PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 0, "Of each prompt; 0: data.max_prompt_tokens.")
if __name__ == "__main__":
    command_line.answer_help(sys.argv, __doc__, flags.FLAGS)  # before the imports below, which take seconds

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cooper_jax.perf import bench_programs, machine, roofline
from cooper_jax.runtime import device_layouts
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.trainer.run_settings import RunSettings


def measure_program(program: bench_programs.Program, reps: int) -> dict:
    """A program's result, as --out writes it."""
    config, dtype = program.config, program.dtype
    size = sum(roofline.count_weights(config)) * jnp.dtype(dtype).itemsize
    shape = dtype, program.rows, config.width, config.ffn, size
    before = machine.measure_rates(*shape)
    with setup_errors(program.name):
        first = bench_programs.time_call(program.call, 0)
    seconds = [bench_programs.time_call(program.call, i) for i in range(1, reps + 1)]
    median = float(np.median(seconds))
    phases = {}
    if program.prefill is not None:
        bench_programs.time_call(program.prefill, 0)
        prefill = float(np.median([bench_programs.time_call(program.prefill, i) for i in range(1, reps + 1)]))
        phases = {"prefill": prefill, "decode": median - prefill}
    one = before.best(machine.measure_rates(*shape))
    # Virtual devices of a CPU share its cores, and one was measured with all of them.
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    rates = one.times(devices)
    least = roofline.roofline_seconds(program.work, rates)
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
        "floor": {
            "seconds": least,
            "share": least / median,
            "parts": {
                name: dataclasses.asdict(work) | {"seconds": work.seconds(rates)}
                for name, work in program.work.items()
            },
            "flops_per_second": rates.flops,
            "bytes_per_second": rates.bandwidth,
            "devices": devices,
            "measured": one.measured,
        },
        "memory": machine.peak_memory(),
    }


def format_result(result: dict) -> str:
    """A result for people."""
    least = result["floor"]
    lines = [
        f"{result['program']}: {result['tokens_per_second']:,.0f} tokens/s "
        f"({result['tokens']:,} {result['tokens_are']}, {result['dtype']})",
        f"{'':20}{'seconds':>10}{'floor':>10}{'share':>8}",
        f"{'first call':20}{result['first_call_seconds']:10.3f}",
        f"{'median of ' + str(len(result['seconds'])):20}{result['median_seconds']:10.4f}"
        f"{least['seconds']:10.4f}{least['share']:8.0%}",
    ]
    for name, part in least["parts"].items() if len(least["parts"]) > 1 else ():
        taken, share = "", ""
        if name in result["phase_seconds"]:
            seconds = result["phase_seconds"][name]
            taken, share = f"{seconds:.4f}", f"{part['seconds'] / seconds:.0%}"
        lines.append(f"{'  ' + name:20}{taken:>10}{part['seconds']:10.4f}{share:>8}")
    rates = f"{least['flops_per_second'] / 1e9:,.0f} GFLOP/s, {least['bytes_per_second'] / 1e9:,.0f} GB/s"
    many = f": {least['devices']} devices, each as one was measured" if least["devices"] > 1 else ""
    held = ", ".join(f"{n.removesuffix('_bytes')} {b / 2**20:,.0f} MiB" for n, b in result["memory"].items())
    return "\n".join([*lines, f"rates: {rates}{many}", f"memory: {held.replace('_', ' ')}"])


def drop_problems(cfg: ConfigDict, kind: str) -> ConfigDict:
    """The config without what `kind` does not touch: files of problems, and a reward model but in training."""
    cfg = cfg.copy_and_resolve_references()
    cfg.data.update(format="synthetic", train="", eval="")
    if kind != "train":
        cfg.reward.arm = "rule"
    return cfg


def run_bench(
    kind: str, cfg: ConfigDict, *, reps: int = 3, prompt_tokens: int = 0, ragged: bool = False, out: str = ""
) -> dict:
    """Measures, prints and writes; the arguments are the flags.  -> what --out writes.

    Raises SetupError for what cannot be run, before anything is.
    """
    if kind not in bench_programs.KINDS:
        raise SetupError(f"{kind!r} is none of {', '.join(bench_programs.KINDS)}")
    for flag, value, least in (("reps", reps, 1), ("prompt_tokens", prompt_tokens, 0)):
        if value < least:
            raise SetupError(f"--{flag}={value}: it must be at least {least}")
    if out and not Path(out).parent.is_dir():
        raise SetupError(f"--out={out}: there is no directory {Path(out).parent}")
    cfg = drop_problems(cfg, kind)
    RunSettings.from_config(cfg, with_assistant=False)
    layout = device_layouts.make_policy_layout(cfg)
    prompt_tokens = prompt_tokens or cfg.data.max_prompt_tokens
    written = {
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
        "results": [],
    }
    print(
        "{config}: {prompts} prompts x {group_size}, {prompt_tokens} + {max_new_tokens} tokens, "
        "{devices} x {device}, jax {jax}".format(**written),
        flush=True,
    )
    for program in bench_programs.list_bench_programs(
        kind, cfg, layout, prompt_tokens=prompt_tokens, ragged=ragged
    ):
        written["results"].append(measure_program(program, reps))
        print(format_result(written["results"][-1]), flush=True)
    if out:
        with setup_errors(f"--out={out}"):
            Path(out).write_text(json.dumps(written, indent=1) + "\n")
    return written


def main(argv: list[str]) -> None:
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
