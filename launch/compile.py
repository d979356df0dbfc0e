"""Compiles every program of a run for hardware that need not be there: does it fit, and what bounds it?

    python launch/compile.py --config=configs/qwen_1p5b.py --topology=v5e:4x4
    python launch/compile.py --config=configs/qwen_7b.py --topology=v5e:16x16 --config.mesh.tensor=4 --out=7b.json
    python launch/compile.py --config=configs/qwen_1p5b.py --topology=h100:1x1x8 --search

Any field of configs/base.py is a flag, as for launch/train.py.  It needs XLA's TPU or GPU compiler
(requirements-tpu.txt, requirements-cuda.txt; both run without the hardware), and neither problems nor weights:
shapes come from the weights' config.json where it is at hand, otherwise from the config's `arch`.

1. Each program is compiled (cooper_jax/perf/aot_programs.py).  The compiler says what memory it takes; its text says
   what it computes, moves and sends.
2. From public peaks of the chip (cooper_jax/perf/chips.py) follow the least time it can take, and what bounds
   it.  That is an estimate of ours, and so are the step's seconds: nothing was run.
3. The largest program, with all that a run holds meanwhile, must leave --reserve of the memory alone.

--search tries meshes, microbatches and slots, most of them on paper, --search_compiles of them by the compiler, and
prints the flags of the best.  What was compiled is kept in --keep; the same program is not compiled twice.

Exit codes: 0 it fits; 2 it does not, or an error in the settings.
"""

import json
import os
import sys
from pathlib import Path

if not __package__:  # run as a file: the checkout it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # programs are compiled for devices that no backend here has

from absl import app, flags, logging

from cooper_jax.launch import command_line, common
from cooper_jax.launch.common import exit_with_error, print_setup_error

TOPOLOGY = flags.DEFINE_string(
    "topology", "", "The machine: v5e:4x4, v5p:4x4x4, v5e:16x16*2, h100:1x2x8, ..."
)
OUT = flags.DEFINE_string("out", "", "A JSON file to write.", allow_override=True)
RESERVE = flags.DEFINE_float("reserve", 0.08, "Share of a device's memory that is left alone.")
SEARCH = flags.DEFINE_bool("search", False, "Look for a mesh, microbatches and slots.")
SEARCH_COMPILES = flags.DEFINE_integer("search_compiles", 3, "How many of them are compiled.")
KEEP = flags.DEFINE_string(
    "keep",
    str(Path.home() / ".cache" / "cooper_jax" / "ahead"),
    "Where what was compiled is kept; '': nowhere.",
)
if __name__ == "__main__":
    command_line.answer_help(sys.argv, __doc__, flags.FLAGS)  # before the imports below, which take seconds

from ml_collections import ConfigDict

from cooper_jax.perf import aot_estimate, aot_search, chips
from cooper_jax.perf import aot_job as jobs
from cooper_jax.perf.aot_compile import TooLarge
from cooper_jax.perf.aot_estimate import Figures, Step
from cooper_jax.perf.chips import GIB, Topology
from cooper_jax.runtime import device_layouts
from cooper_jax.settings.setup_errors import SetupError, setup_errors


def measure_config(cfg: ConfigDict, topology: Topology, reserve: float, keep: Path | None, said=None) -> Step:
    """Compiles a config's programs.  Raises TooLarge for one that the compiler refuses, SetupError for others."""
    layout = device_layouts.make_layouts(cfg, topology.devices)["policy"]
    job = jobs.describe_job(cfg, layout, topology.chip.memory)
    print(format_headline(job, topology), flush=True)
    return aot_estimate.estimate_step(job, topology, aot_estimate.compile_programs(job, keep, said), reserve)


def compile_and_report(
    cfg: ConfigDict, name: str, *, reserve: float = 0.08, look: bool = False, compiles: int = 3,
    keep: Path | None = None, out: str = "",
) -> Step:  # fmt: skip
    """Compiles, prints and writes; the arguments are the flags.

    Raises SetupError for what cannot be compiled, and for what does not fit (then with both numbers).
    """
    if not 0 <= reserve < 1:
        raise SetupError(f"--reserve={reserve}: it is a share, from 0 to below 1")
    if compiles < 1:
        raise SetupError(f"--search_compiles={compiles}: it must be at least 1")
    if out and not Path(out).parent.is_dir():
        raise SetupError(f"--out={out}: there is no directory {Path(out).parent}")
    cfg, topology = jobs.drop_data(cfg), chips.find_topology(name)
    written = {"config": cfg.name, "topology": name, "devices": len(topology.devices)}

    def progress(program, compiled):
        print(f"  {program.name}: compiled in {compiled.seconds:.1f} s", file=sys.stderr, flush=True)

    def attempt(cfg, candidate):
        try:
            return measure_config(cfg, topology, reserve, keep, progress)
        except TooLarge as error:
            print(f"  {candidate.flags}: {error}", flush=True)
            return None

    if look:
        limit = topology.chip.memory * (1 - reserve)
        chosen, step = aot_search.search_layouts(cfg, topology, limit, compiles, attempt, print)
        written["flags"] = chosen.flags
    else:
        step = measure_config(cfg, topology, reserve, keep, progress)
    print(format_step(step, topology))
    if look:
        print(f"best of those compiled: {chosen.flags}")
    if out:
        with setup_errors(f"--out={out}"):
            Path(out).write_text(json.dumps(written | aot_estimate.step_to_json(step), indent=1) + "\n")
    if not step.fits:
        raise SetupError(f"{name}: {step.refusal()}")
    return step


COLUMNS = (("", 15), ("compiled", 9), ("args", 8), ("temps", 8), ("outputs", 8), ("code", 7), ("else", 8),
           ("total", 8), ("of it", 7))  # fmt: skip


# --- for people ------------------------------------------------------------------------------------------


def format_headline(job: jobs.Job, topology: Topology) -> str:
    cfg, mesh = job.cfg, job.layout.mesh.shape
    lines = [
        f"{cfg.name} on {topology.name}: {len(topology.devices)} devices, mesh "
        + " x ".join(f"{axis} {size}" for axis, size in mesh.items())
        + f", {cfg.data.prompts_per_step} x {cfg.rollout.group_size} responses of {cfg.data.max_prompt_tokens} + "
        f"{cfg.rollout.max_new_tokens} tokens",
        f"  a device: {job.size} prompts, {job.slots} slots for {job.requests} responses, rollout weights "
        f"{'gathered' if job.gathered else 'as in training'}, microbatches {cfg.policy.microbatch} and "
        f"{cfg.reward.microbatch}, kernels {job.setting.implementation}",
    ]
    return "\n".join(lines + [f"  {note}" for note in job.notes])


def format_step(step: Step, topology: Topology) -> str:
    """GiB and seconds a device."""
    lines = [
        "memory, GiB a device: args, temps, outputs, code by the compiler; what else the run holds, total: ours",
        "".join(f"{name:>{n}}" for name, n in COLUMNS),
    ]
    for f in step.programs:
        sizes = (f.arguments, f.temporaries, f.outputs)
        lines.append(
            f"{f.name:15}{f.compile_seconds:7.1f} s"
            + "".join(f"{x / GIB:8.2f}" for x in sizes)
            + f"{f.code / GIB:7.2f}{f.others / GIB:8.2f}{f.total / GIB:8.2f}{f.total / step.memory:7.0%}"
        )
    peaks = topology.chip
    lines += [
        "",
        f"work a device, of one run: TFLOP, GB and GB sent by the compiled text; seconds at peaks of {peaks.name} "
        f"({peaks.flops / 1e12:,.0f} TFLOP/s, {peaks.bandwidth / 1e9:,.0f} GB/s)"
        + (": nominal figures" if peaks.nominal else ""),
        f"{'':15}{'runs':>6}{'TFLOP':>10}{'GB':>9}{'sent':>8}{'compute':>10}{'memory':>10}{'network':>10}  bound",
    ]
    for f in step.programs:
        lines.append(
            f"{f.name:15}{f.times:6g}{f.flops / 1e12:10.3f}{f.bytes / 1e9:9.2f}"
            + f"{sum(s.bytes for s in f.sent) / 1e9:8.2f}"
            + "".join(f"{f.seconds[side]:10.4f}" for side in aot_estimate.SIDES)
            + f"  {f.bound}"
        )
    lines += ["", "collectives: times, GB sent by a device, seconds (estimate)"]
    for f in step.programs:
        lines += [f"{f.name:15}{line}" for line in format_collectives(f)]
    lines += ["", "a step (estimate: every program at its bound, nothing else takes time)"]
    for phase, seconds in step.phases.items():
        lines.append(f"{phase:15}{seconds:9.3f} s{seconds / step.seconds:7.0%}")
    lines.append(
        f"{'in all':15}{step.seconds:9.3f} s, {step.tokens:,} sampled tokens: "
        f"{step.tokens_per_second:,.0f} tokens/s, {step.tokens_per_second / len(topology.devices):,.0f} a device"
    )
    verdict = "fits" if step.fits else "DOES NOT FIT"
    lines.append(
        f"{verdict}: {step.largest.name} is the largest, {step.largest.total / GIB:.2f} GiB of "
        f"{step.memory / GIB:.2f}, of which {step.limit / GIB:.2f} may be used (reserve {step.reserve:.0%})"
    )
    return "\n".join(lines)


def format_collectives(f: Figures, most: int = 3) -> list[str]:
    """The largest by seconds, and the others of a kind together."""
    named = list(f.sent[:most])
    lines = [
        f"{s.kind} of {s.group}, {s.shape}: {s.times:g}, {s.bytes / 1e9:.3f}, {s.seconds:.4f}" for s in named
    ]
    rest: dict[str, list] = {}
    for s in f.sent[most:]:
        rest.setdefault(s.kind, []).append(s)
    for kind, others in rest.items():
        times, sent, seconds = (sum(getattr(s, n) for s in others) for n in ("times", "bytes", "seconds"))
        lines.append(f"{kind}, {len(others)} other shapes: {times:g}, {sent / 1e9:.3f}, {seconds:.4f}")
    return lines


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        exit_with_error(f"unexpected arguments {argv[1:]}; flags look like --config.steps=20")
    logging.set_verbosity(logging.WARNING)
    keep = Path(KEEP.value) if KEEP.value else None
    try:
        compile_and_report(
            common.read_config(), TOPOLOGY.value, reserve=RESERVE.value, look=SEARCH.value,
            compiles=SEARCH_COMPILES.value, keep=keep, out=OUT.value,
        )  # fmt: skip
    except SetupError as error:
        print_setup_error(error)


if __name__ == "__main__":
    app.run(main, flags_parser=common.make_flags_parser(__doc__))
