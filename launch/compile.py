"""Compiles every program of a run for other hardware, to see if the run fits and which resource bounds it.

    python launch/compile.py --config=configs/qwen_1p5b.py --topology=v5e:4x4
    python launch/compile.py --config=configs/qwen_7b.py --topology=v5e:16x16 --config.mesh.tensor=4 \\
        --out=7b.json
    python launch/compile.py --config=configs/qwen_1p5b.py --topology=h100:1x1x8 --search

Any field of configs/base.py is a flag, as for launch/train.py.  The script needs XLA's TPU or GPU compiler
(requirements-tpu.txt, requirements-cuda.txt; both run without the hardware), and neither problems nor
weights: shapes come from the weights' config.json if it exists, otherwise from the config's `arch`.

1. Each program is compiled (cooper_jax/perf/aot_programs.py).  The compiler reports the program's memory; the
   compiled text shows its FLOPs, its memory traffic and its collectives.
2. The chip's public peaks (cooper_jax/perf/chips.py) give a lower bound on a program's time (the roofline)
   and the resource that bounds it.  These figures, and the seconds of a step, are estimates: nothing is run.
3. The largest program, together with all other arrays of the run, must leave --reserve of the memory free.
4. Beside the bound stands a forecast: the bound at the efficiencies of published runs
   (launch/check_estimates.py), and the host's work from assumptions that --assume changes.

--search tries meshes, microbatches and slots: all candidates by arithmetic, the best --search_compiles of
them with the compiler.  It prints the flags of the best one.  The compiler's reports are cached in --keep, so
that no program is compiled twice.

Exit codes: 0 the run fits; 2 it does not fit, or an error in the settings.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# As a file (not as a module of the package), the script imports the package of its own checkout.
if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# The devices to compile for are described by a topology, so no accelerator of this machine is used.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import app, flags, logging

from cooper_jax.launch import command_line, common
from cooper_jax.launch.common import exit_with_error, print_setup_error

TOPOLOGY = flags.DEFINE_string(
    "topology", "", "The machine: v5e:4x4, v5p:4x4x4, v5e:16x16*2, h100:1x2x8, l4:1x1x1, ..."
)
OUT = flags.DEFINE_string("out", "", "A JSON file to write.", allow_override=True)
RESERVE = flags.DEFINE_float("reserve", 0.08, "Share of a device's memory that must stay free.")
SEARCH = flags.DEFINE_bool("search", False, "Search for a mesh, microbatches and slots.")
SEARCH_COMPILES = flags.DEFINE_integer("search_compiles", 3, "Number of candidates that are compiled.")
ASSUME = flags.DEFINE_multi_string(
    "assume",
    [],
    "NAME=VALUE: an assumption of the forecast, such as assistant_seconds=4; the printed forecast names them.",
)
KEEP = flags.DEFINE_string(
    "keep",
    str(Path.home() / ".cache" / "cooper_jax" / "ahead"),
    "A folder for the compiler's reports; '': none.",
)
# --help is answered before the imports below, because importing JAX takes seconds.
if __name__ == "__main__":
    command_line.answer_help(sys.argv, __doc__, flags.FLAGS)

from ml_collections import ConfigDict

from cooper_jax.perf import (
    aot_estimate,
    aot_job,
    aot_search,
    budget_report,
    chips,
    speed_calibration,
    step_forecast,
)
from cooper_jax.perf.aot_compile import CompiledProgram, TooLarge
from cooper_jax.perf.aot_estimate import CollectiveTotal, ProgramEstimate, StepEstimate
from cooper_jax.perf.aot_programs import StepProgram
from cooper_jax.perf.aot_search import LayoutCandidate
from cooper_jax.perf.chips import GIB, Topology
from cooper_jax.perf.step_forecast import HostAssumptions
from cooper_jax.runtime import device_layouts, mesh
from cooper_jax.runtime.mesh import Layout
from cooper_jax.settings.setup_errors import SetupError, setup_errors


def measure_config(
    cfg: ConfigDict,
    topology: Topology,
    reserve: float,
    cache: Path | None,
    on_compiled: Callable[[StepProgram, CompiledProgram], None] | None = None,
    assumptions: HostAssumptions | None = None,
) -> StepEstimate:
    """Compile a config's programs, estimate its step and forecast it.

    assumptions: of the forecast; None: the defaults.

    Raises TooLarge for a program that the compiler refuses for its memory, SetupError for other errors.
    """
    # All models share the policy's mesh in this estimate.
    layouts = device_layouts.make_layouts(cfg, topology.devices)
    policy, rollout = layouts["policy"], layouts["rollout"]
    if cfg.rollout.ahead:
        # The TPU compiler refuses a part of a slice whose devices are scattered over its hosts, as the run's are.
        # On the first devices the programs are the same.
        policy, rollout = (
            mesh.move_layout(layout, topology.devices[: layout.mesh.size]) for layout in (policy, rollout)
        )
    job = aot_job.describe_job(cfg, policy, topology.chip.memory)
    if cfg.rollout.ahead:
        ahead = aot_job.describe_job(cfg, rollout, topology.chip.memory)
        job = dataclasses.replace(job, ahead=ahead)
    print(format_headline(job, topology), flush=True)
    compiled = aot_estimate.compile_programs(job, cache, on_compiled)
    step = aot_estimate.estimate_step(job, topology, compiled, reserve)
    calibration = speed_calibration.calibrate()
    forecast = step_forecast.forecast_step(
        job, topology, step.phases, assumptions or HostAssumptions(), calibration
    )
    return dataclasses.replace(step, forecast=forecast)


def compile_and_report(
    cfg: ConfigDict,
    name: str,
    *,
    reserve: float = 0.08,
    search: bool = False,
    compiles: int = 3,
    cache: Path | None = None,
    out: str = "",
    assume: Sequence[str] = (),
) -> StepEstimate:
    """Compile a config for the topology `name`, print the estimates and write them.

    The arguments are the flags' values.  Raises SetupError for a config that cannot be compiled, and, with
    both numbers, for one that does not fit.
    """
    _check_flags(reserve, compiles, out)
    assumptions = step_forecast.parse_assumptions(assume)
    cfg, topology = aot_job.drop_data(cfg), chips.find_topology(name)
    report: dict[str, Any] = {"config": cfg.name, "topology": name, "devices": len(topology.devices)}

    # Large programs compile for minutes.  Progress goes to stderr, because stdout is the report.
    def print_progress(program: StepProgram, compiled: CompiledProgram) -> None:
        print(f"  {program.name}: compiled in {compiled.seconds:.1f} s", file=sys.stderr, flush=True)

    # In a search, a candidate that the compiler refuses is skipped; without one, it ends the job.
    def measure_candidate(cfg: ConfigDict, candidate: LayoutCandidate) -> StepEstimate | None:
        try:
            return measure_config(cfg, topology, reserve, cache, print_progress, assumptions)
        except TooLarge as error:
            print(f"  {candidate.flags}: {error}", flush=True)
            return None

    if search:
        if cfg.rollout.ahead:
            raise SetupError(
                "--search does not choose the mesh of rollouts one step ahead: set rollout.ahead=0"
            )
        limit = topology.chip.memory * (1 - reserve)
        chosen, step = aot_search.search_layouts(cfg, topology, limit, compiles, measure_candidate, print)
        report["flags"] = chosen.flags
    else:
        step = measure_config(cfg, topology, reserve, cache, print_progress, assumptions)

    print(format_step(step, topology, cfg.steps))
    if search:
        print(f"best of those compiled: {report['flags']}")
    if out:
        with setup_errors(f"--out={out}"):
            report |= aot_estimate.step_to_json(step)
            report["budgets"] = budget_report.budgets_to_json(step.budgets)
            Path(out).write_text(json.dumps(report, indent=1) + "\n")
    # The report is written even if the run does not fit, because it shows why.
    if not step.fits:
        raise SetupError(f"{name}: {step.describe_excess()}")
    return step


def _check_flags(reserve: float, compiles: int, out: str) -> None:
    """Raise SetupError for flags out of range, before a compilation that may take minutes."""
    if not 0 <= reserve < 1:
        raise SetupError(f"--reserve={reserve}: it is a share, from 0 to below 1")
    if compiles < 1:
        raise SetupError(f"--search_compiles={compiles}: it must be at least 1")
    if out and not Path(out).parent.is_dir():
        raise SetupError(f"--out={out}: there is no directory {Path(out).parent}")


# --- printed tables -----------------------------------------------------------------------------------------

# Headings of the memory table with their widths.  The first column names the program.
COLUMNS = (("", 15), ("compiled", 9), ("args", 8), ("temps", 8), ("outputs", 8), ("code", 7), ("other", 8),
           ("total", 8), ("share", 7))  # fmt: skip


def format_headline(job: aot_job.CompileJob, topology: Topology) -> str:
    """Format the run's sizes: devices, mesh, responses, slots and microbatches."""
    cfg, rollout = job.cfg, job.rollout_job
    rollout_weights = "gathered" if rollout.gathers_weights else "as in training"
    meshes = _format_mesh(job.layout)
    if job.ahead is not None:
        meshes += f" and {_format_mesh(rollout.layout)} for rollouts one step ahead"
    lines = [
        f"{cfg.name} on {topology.name}: {len(topology.devices)} devices, mesh {meshes}, "
        f"{cfg.data.prompts_per_step} x {cfg.rollout.group_size} responses of {cfg.data.max_prompt_tokens} + "
        f"{cfg.rollout.max_new_tokens} tokens",
        f"  per shard: {rollout.prompts} prompts, {rollout.slots} slots for {rollout.requests} responses; rollout "
        f"weights {rollout_weights}, microbatches {cfg.policy.microbatch} and {cfg.reward.microbatch}, "
        f"kernels {rollout.rollout.implementation}",
    ]
    # Notes name the parts of a run that the estimate leaves out or pads.
    return "\n".join(lines + [f"  {note}" for note in job.notes])


def _format_mesh(layout: Layout) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items())


def format_step(step: StepEstimate, topology: Topology, steps: int) -> str:
    """Format the tables of memory, work, collectives and phases, the forecast and the verdict on memory.

    steps: of the run.
    """
    sections = [
        _format_memory(step),
        _format_work(step, topology),
        _format_all_collectives(step),
        budget_report.format_budgets(step.budgets),
        _format_phases(step, len(topology.devices)),
        _format_forecast(step, steps, len(topology.devices)),
    ]
    # The programs run one after another, so the largest one decides.
    largest, verdict = step.largest, "fits" if step.fits else "DOES NOT FIT"
    summary = (
        f"{verdict}: {largest.name} is the largest, {largest.total / GIB:.2f} GiB of "
        f"{step.memory / GIB:.2f}, of which {step.limit / GIB:.2f} may be used (reserve {step.reserve:.0%})"
    )
    return "\n\n".join(sections) + "\n" + summary


def _format_memory(step: StepEstimate) -> str:
    """Format the memory of each program, one row per program."""
    lines = [
        "memory, GiB per device: args, temps, outputs, code from the compiler; other (the run's other "
        "arrays) and total are estimates",
        "".join(f"{name:>{width}}" for name, width in COLUMNS),
    ]
    for program in step.programs:
        from_compiler = (program.arguments, program.temporaries, program.outputs)
        sizes = "".join(f"{size / GIB:8.2f}" for size in from_compiler)
        lines.append(
            f"{program.name:15}{program.compile_seconds:7.1f} s{sizes}{program.code / GIB:7.2f}"
            f"{program.others / GIB:8.2f}{program.total / GIB:8.2f}{program.total / step.memory:7.0%}"
        )
    return "\n".join(lines)


def _format_work(step: StepEstimate, topology: Topology) -> str:
    """Format the work of each program and its seconds at the chip's peaks, one row per program."""
    # Chips without public figures have assumed ones, which the heading marks.
    chip = topology.chip
    peaks = f"{chip.flops / 1e12:,.0f} TFLOP/s, {chip.bandwidth / 1e9:,.0f} GB/s"
    nominal = ": nominal figures" if chip.nominal else ""
    lines = [
        "work per device in one run: TFLOP, GB and GB sent from the compiled text; seconds at the peaks of "
        f"{chip.name} ({peaks}){nominal}",
        f"{'':15}{'runs':>6}{'TFLOP':>10}{'GB':>9}{'sent':>8}{'compute':>10}{'memory':>10}{'network':>10}"
        "  bound",
    ]
    for program in step.programs:
        sent = sum(collective.bytes for collective in program.sent)
        seconds = "".join(f"{program.seconds[resource]:10.4f}" for resource in aot_estimate.RESOURCES)
        lines.append(
            f"{program.name:15}{program.times:6g}{program.flops / 1e12:10.3f}{program.bytes / 1e9:9.2f}"
            f"{sent / 1e9:8.2f}{seconds}  {program.bound}"
        )
    return "\n".join(lines)


def _format_all_collectives(step: StepEstimate) -> str:
    """Format the collectives of all programs."""
    lines = ["collectives: runs, GB sent per device, seconds (estimate)"]
    for p in step.programs:
        lines += [f"{p.name:15}{line}" for line in format_collectives(p)]
    return "\n".join(lines)


def format_collectives(program: ProgramEstimate, most: int = 3) -> list[str]:
    """Format a line for each of the `most` slowest collectives, and one for each kind of the others."""
    # `sent` is sorted by seconds, the slowest first.
    lines = [
        f"{c.kind} of {c.group}, {c.shape}: {c.times:g}, {c.bytes / 1e9:.3f}, {c.seconds:.4f}"
        for c in program.sent[:most]
    ]

    # A program may have dozens of small collectives, so the others are added up by kind.
    others: dict[str, list[CollectiveTotal]] = {}
    for collective in program.sent[most:]:
        others.setdefault(collective.kind, []).append(collective)
    for kind, collectives in others.items():
        times = sum(c.times for c in collectives)
        sent = sum(c.bytes for c in collectives)
        seconds = sum(c.seconds for c in collectives)
        lines.append(f"{kind}, {len(collectives)} other shapes: {times:g}, {sent / 1e9:.3f}, {seconds:.4f}")
    return lines


def _format_phases(step: StepEstimate, devices: int) -> str:
    """Format the seconds of each phase and of the whole step."""
    # A real step is slower: the host's work and the gaps between programs are left out.
    lines = ["a step (roofline: every program at its bound, nothing else takes time)"]
    if step.forecast is not None:
        lines.append(f"{'':15}{'bound':>11}{'share':>7}{'at published efficiencies':>29}")
    for phase, seconds in step.phases.items():
        published = "" if step.forecast is None else f"{step.forecast.phases[phase]:27.3f} s"
        lines.append(f"{phase:15}{seconds:9.3f} s{seconds / step.seconds:7.0%}{published}")
    if step.ahead:
        others = sum(step.phases.values()) - step.phases["rollout"]
        lines.append(
            f"the next step's rollout runs beside the other phases, which take {others:.3f} s together; "
            "the copy of the weights to its devices is not counted"
        )
    lines.append(
        f"{'in all':15}{step.seconds:9.3f} s, {step.tokens:,} sampled tokens: "
        f"{step.tokens_per_second:,.0f} tokens/s, {step.tokens_per_second / devices:,.0f} per device"
    )
    return "\n".join(lines)


def _format_forecast(step: StepEstimate, steps: int, devices: int) -> str:
    """Format the forecast of the step and of the run, or the reason why there is none."""
    calibration = speed_calibration.calibrate()
    if step.forecast is None:
        return speed_calibration.describe_fit(calibration)
    return step_forecast.format_forecast(step.forecast, calibration, steps=steps, devices=devices)


def main(argv: list[str]) -> None:
    """Compile the config for the topology that the flags name."""
    if len(argv) > 1:
        exit_with_error(f"unexpected arguments {argv[1:]}; flags look like --config.steps=20")
    logging.set_verbosity(logging.WARNING)
    try:
        compile_and_report(
            common.read_config(),
            TOPOLOGY.value,
            reserve=RESERVE.value,
            search=SEARCH.value,
            compiles=SEARCH_COMPILES.value,
            cache=Path(KEEP.value) if KEEP.value else None,
            out=OUT.value,
            assume=ASSUME.value,
        )
    except SetupError as error:
        print_setup_error(error)


if __name__ == "__main__":
    app.run(main, flags_parser=common.make_flags_parser(__doc__))
