"""Checks a device that this project has not run on: kernels, programs, speeds and one training step.

    python launch/check_device.py --out=device.json --report=device.md
    python launch/check_device.py --small --parts=kernels

It needs no weights, no data and no network, uses one device, and takes at most --seconds.

1. kernels: each kernel of the platform against a float64 computation on the host.
2. programs: a rollout's log-probabilities and an update's gradients against the plain form.
3. speeds: tokens/s of rollout, scoring and updates (random weights of Qwen2.5-0.5B's shape), beside the roofline
   and the chip's public peaks.
4. step: one Cooper step through the trainer's own objects.

Each part runs in a process of its own, which is ended after its share of the time; the other parts run all the
same.  A wrong kernel is named, with the flag that replaces it.  The report is Markdown for a bug report.  On a CPU,
sizes are small and kernels are interpreted.

Exit codes: 0 all is well; 1 something is wrong; 2 an error in the flags.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# As a file (not as a module of the package), the script imports the package of its own checkout.
if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags

from cooper_jax.launch import command_line

# The parts with their shares of the time.
PARTS = {"kernels": 0.3, "programs": 0.25, "speeds": 0.25, "step": 0.2}
# Seconds to start JAX and to ask for the device, of the whole time.
DEVICE_SECONDS = 60.0

OUT = flags.DEFINE_string("out", "", "A JSON file to write.", allow_override=True)
REPORT = flags.DEFINE_string("report", "", "A Markdown file to write; the report is printed in any case.")
SECONDS = flags.DEFINE_float("seconds", 300.0, "Limit for all parts together.")
SMALL = flags.DEFINE_bool("small", False, "Small sizes; always on a CPU.", allow_override=True)
CHOSEN = flags.DEFINE_list("parts", list(PARTS), f"Parts to run, of {', '.join(PARTS)}.")
# What a part's process gets; not for users.
PART = flags.DEFINE_string("part", "", "Run this part in this process, and write its records to --records.")
RECORDS = flags.DEFINE_string("records", "", "The file for the records of --part.")


# --- the process of a part -----------------------------------------------------------------------------------


def run_part(part: str, small: bool, write: Callable[[dict[str, Any]], None]) -> None:
    """Run a part's checks in this process.  write: receives its records (device_report.py)."""
    from cooper_jax.perf import device_report

    recorder = device_report.Recorder(write)
    run = {
        "device": _describe_device,
        "kernels": _check_kernels,
        "programs": _check_programs,
        "speeds": _measure_speeds,
        "step": _run_step,
    }[part]
    run(recorder, small)
    recorder.end()


def _describe_device(recorder: Any, small: bool) -> None:
    def describe() -> tuple[Any, list[str]]:
        import jax

        from cooper_jax import __version__
        from cooper_jax.kernels import platform

        device = jax.devices()[0]
        values = {
            "kind": device.device_kind,
            "platform": device.platform,
            "devices": jax.device_count(),
            "kernels": platform.default_implementation(),
            "jax": jax.__version__,
            "version": __version__,
        }
        return values, []

    recorder.run("device", describe)


def _check_kernels(recorder: Any, small: bool) -> None:
    from cooper_jax.perf import kernel_checks, kernel_oracles

    size = kernel_oracles.SMALL if small else kernel_oracles.FULL
    for check in kernel_checks.list_kernel_checks(kernel_checks.choose_forms(), size):

        def run(check: kernel_checks.KernelCheck = check) -> tuple[Any, list[str]]:
            result = kernel_checks.run_kernel_check(check)
            return dataclasses.asdict(result), [result.advice] if result.advice else []

        recorder.run(check.name, run, check.fallback)


def _check_programs(recorder: Any, small: bool) -> None:
    from cooper_jax.perf import device_checks, kernel_checks

    cfg = device_checks.make_check_config(small)

    def as_record(result: device_checks.ProgramResult) -> tuple[Any, list[str]]:
        return dataclasses.asdict(result), [result.advice] if result.advice else []

    # The form of the platform, or the interpreted one on a CPU.
    [form] = kernel_checks.choose_forms()
    recorder.run(
        "rollout", lambda: as_record(device_checks.check_rollout(cfg, form)), kernel_checks.PLAIN_ROLLOUT
    )
    recorder.run("policy gradients", lambda: as_record(device_checks.check_update(cfg)))


def _measure_speeds(recorder: Any, small: bool) -> None:
    from cooper_jax.perf import bench_programs, device_checks

    # Small sizes only show that the path works, for which one kind is enough.
    cfg = device_checks.make_check_config(small)
    for kind in ("score",) if small else bench_programs.KINDS:
        speeds = device_checks.measure_speeds(cfg, [kind])

        # The updates of both models are one kind.
        def measure_next(speeds: Any = speeds) -> tuple[Any, list[str]]:
            return next(speeds), []

        for name in ("policy update", "reward-model update") if kind == "train" else (kind,):
            recorder.run(name, measure_next)


def _run_step(recorder: Any, small: bool) -> None:
    from cooper_jax.perf import device_checks

    def run() -> tuple[Any, list[str]]:
        with tempfile.TemporaryDirectory(prefix="check_device_") as folder:
            result = device_checks.run_step(device_checks.make_check_config(small, folder), Path(folder))
        return result, [f"step: {problem}" for problem in result["problems"]]

    recorder.run("step", run)


# --- the process that starts them ----------------------------------------------------------------------------


def start_part(part: str, small: bool, seconds: float, environment: dict[str, str]) -> Any:
    """Run a part in a process of its own, for at most so many seconds; returns its PartSummary."""
    from cooper_jax.perf import device_report

    with tempfile.TemporaryDirectory(prefix="check_device_") as folder:
        records, log = Path(folder) / "records.jsonl", Path(folder) / "log"
        command = [
            sys.executable, str(Path(__file__).resolve()), f"--part={part}", f"--records={records}",
            f"--small={small}",
        ]  # fmt: skip
        start = time.perf_counter()
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            try:
                code = process.wait(timeout=max(seconds, 1.0))
                end = "" if code == 0 else f"ended with code {code}"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                end = f"was ended after {seconds:.0f} s"
        elapsed = time.perf_counter() - start

        # The last lines of a process that ended early are all that is known of the reason.
        if end:
            tail = log.read_text(errors="replace").splitlines()[-15:]
            print("\n".join([f"{part}: the process {end}; its last lines:", *tail]), file=sys.stderr)
        lines = records.read_text().splitlines() if records.exists() else []
    return device_report.collect_part(part, [json.loads(line) for line in lines], elapsed, end)


def check_device(parts: list[str], small: bool, seconds: float) -> dict[str, Any]:
    """Run the parts one after the other and return the report as JSON values."""
    from cooper_jax.perf import device_report

    start = time.perf_counter()
    environment = dict(os.environ)
    device = start_part("device", small, min(DEVICE_SECONDS, seconds), environment)
    found = device.results[0]["values"] if device.results else None
    if found is None:
        return device_report.make_report({}, small, [device])

    # On a CPU the programs compile for longer than they run.
    if found["platform"] == "cpu":
        small = True
        environment.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

    # A part may use what earlier ones have left.
    summaries = []
    for i, part in enumerate(parts):
        left = seconds - (time.perf_counter() - start)
        share = PARTS[part] / sum(PARTS[other] for other in parts[i:])
        print(f"{part}: at most {share * left:.0f} s ...", file=sys.stderr, flush=True)
        summaries.append(start_part(part, small, share * left, environment))
    return device_report.make_report(found, small, summaries)


def main(argv: list[str]) -> None:
    """Run the checks, or the part of them that this process was started for."""
    if len(argv) > 1:
        command_line.exit_with_errors([f"unexpected arguments {argv[1:]}; --help lists the flags"])
    if PART.value:
        with open(RECORDS.value, "a", encoding="utf-8") as file:

            def write(record: dict[str, Any]) -> None:
                # At once, so that nothing is lost if the process is ended.
                file.write(json.dumps(record) + "\n")
                file.flush()

            run_part(PART.value, SMALL.value, write)
        return

    errors = [
        f"--parts={part}: it is none of {', '.join(PARTS)}" for part in CHOSEN.value if part not in PARTS
    ]
    if not SECONDS.value > 0:
        errors.append(f"--seconds={SECONDS.value}: it must be above 0")
    for flag in (OUT, REPORT):
        if flag.value and not Path(flag.value).parent.is_dir():
            errors.append(f"--{flag.name}={flag.value}: there is no directory {Path(flag.value).parent}")
    if errors:
        command_line.exit_with_errors(errors)

    from cooper_jax.perf import device_report

    report = check_device(CHOSEN.value, SMALL.value, SECONDS.value)
    text = device_report.format_report(report)
    print(text)
    if OUT.value:
        Path(OUT.value).write_text(json.dumps(report, indent=1) + "\n")
    if REPORT.value:
        Path(REPORT.value).write_text(text + "\n")
    sys.exit(0 if report["ok"] else 1)


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: command_line.parse_own_flags(argv, __doc__, flags.FLAGS))
