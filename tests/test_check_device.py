"""launch/check_device.py on a CPU: what it finds wrong, what it says, how it ends, and that it ends in time."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cooper_jax.kernels import attention, decode_attention, head, sampling
from cooper_jax.launch import check_device as tool
from cooper_jax.perf import chips, device_checks, device_report, kernel_checks, kernel_oracles, roofline

ROOT = Path(__file__).resolve().parents[1]
FORMS = ("triton_interpret",)


def find_check(beginning: str, forms=FORMS) -> kernel_checks.KernelCheck:
    checks = kernel_checks.list_kernel_checks(forms, kernel_oracles.SMALL)
    return next(check for check in checks if check.name.startswith(beginning))


# --- the kernels' oracles --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "decode_attention int8",
        "sample_logits, top-k",
        "head_sample",
        "head_logprobs",
        "causal_attention",
        "matmul",
    ],
)
def test_the_plain_forms_are_right(name):
    """Each oracle shares no code with what it judges, so this tests both."""
    result = kernel_checks.run_kernel_check(find_check(name, ("xla",)))
    assert result.ok and result.advice == "" and result.plain_error is None
    assert 0 <= result.error < result.limit / 4 and result.seconds > 0


def shift(value, by=0.05):
    return jax.tree.map(lambda x: x + jnp.asarray(by, x.dtype), value)


@pytest.mark.parametrize(
    "name, module, function, breakage, flag",
    [
        ("decode_attention int8", decode_attention, "_triton", shift, "--config.rollout.kernels=xla"),
        (
            "sample_logits, all tokens",
            sampling,
            "_triton_statistics",
            lambda out: out._replace(block_sums=1.01 * out.block_sums),
            "--config.rollout.kernels=xla",
        ),
        (
            "head_sample",
            head,
            "_triton",
            lambda acc: acc._replace(m=acc.m + 0.1),
            "--config.rollout.kernels=xla",
        ),
        ("head_logprobs", head, "_triton", lambda acc: acc._replace(l=1.1 * acc.l), "no flag replaces it"),
    ],
)
def test_a_broken_kernel_is_named_with_its_flag(name, module, function, breakage, flag, monkeypatch):
    """Backends are looked up in a table of each module, whose entry is replaced."""
    working = getattr(module, function)

    def broken(*arguments, **options):
        return breakage(working(*arguments, **options))

    table = module._STATISTICS if module is sampling else module._BACKENDS
    monkeypatch.setitem(table, "triton", broken)
    check = find_check(name)
    result = kernel_checks.run_kernel_check(check)
    assert not result.ok and result.error > result.limit >= result.plain_error
    assert check.name in result.advice and "triton_interpret" in result.advice and flag in result.advice


def test_a_nan_is_wrong(monkeypatch):
    check = kernel_checks.KernelCheck(
        "x",
        "tpu",
        1.0,
        "use y",
        lambda: lambda form: kernel_oracles.Measurement(float("nan") if form == "tpu" else 0.0),
    )
    assert kernel_checks.run_kernel_check(check).advice == "x is wrong in the form tpu: use y"


def test_a_device_that_computes_plain_programs_wrongly():
    check = kernel_checks.KernelCheck(
        "x", "tpu", 1.0, "use y", lambda: lambda form: kernel_oracles.Measurement(2.0)
    )
    assert "in the plain one: nothing replaces it" in kernel_checks.run_kernel_check(check).advice


def test_broken_attention_of_training_is_found(monkeypatch):
    monkeypatch.setitem(
        attention._IMPLEMENTATIONS,
        "xla",
        lambda q, k, v, window, segments: 1.1 * attention._blocked(q, k, v, window, None),
    )
    assert not kernel_checks.run_kernel_check(find_check("causal_attention")).ok


def test_forms_of_platforms(monkeypatch):
    assert kernel_checks.choose_forms() == FORMS
    monkeypatch.setattr(kernel_checks.platform, "default_implementation", lambda: "tpu")
    assert kernel_checks.choose_forms() == ("tpu",)
    # A GPU whose jax has no backend for its kernels.
    monkeypatch.setattr(kernel_checks.platform, "default_implementation", lambda: "xla")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert kernel_checks.choose_forms() == ("xla",)


# --- whole programs --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_rollout_with_a_wrong_head_is_found(monkeypatch):
    cfg = device_checks.make_check_config(small=True)
    cfg.rollout.max_new_tokens = 3
    working = head._triton
    monkeypatch.setitem(
        head._BACKENDS,
        "triton",
        lambda *arguments, **options: (lambda acc: acc._replace(l=1.5 * acc.l))(
            working(*arguments, **options)
        ),
    )
    result = device_checks.check_rollout(cfg, "triton_interpret")
    assert not result.ok and result.error > result.limit
    assert result.advice.startswith(
        "rollout is wrong in the form triton_interpret: --config.rollout.kernels=xla"
    )


def test_gradients_are_compared_by_norm():
    expected = {"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray([[4.0]])}
    got = {"a": jnp.asarray([3.0, 0.5]), "b": jnp.asarray([[4.0]])}
    assert device_checks._compare_trees(got, expected) == pytest.approx(0.1)
    assert np.isnan(device_checks._compare_trees({**got, "b": jnp.asarray([[jnp.nan]])}, expected))
    judged = device_checks._judge_error("x", "tpu", float("nan"), 0.01, "do y")
    assert not judged.ok and judged.advice == "x is wrong in the form tpu: do y"


def test_a_plain_layout_has_no_kernels():
    cfg = device_checks.make_check_config(small=True)
    plain = device_checks._make_plain(device_checks.make_layout(cfg))
    assert plain.platform == "plain" and not plain.fast_cpu_products
    assert attention.default_implementation(jnp.dtype("bfloat16"), 64, plain.platform) == "xla"


def test_any_changed_bit_is_seen():
    one = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.zeros(3)}
    other = {"a": jnp.asarray([1.0, np.nextafter(np.float32(2), np.float32(3))]), "b": jnp.zeros(3)}
    assert int(device_checks._add_bits(one)) != int(device_checks._add_bits(other))


def test_speeds_beside_the_peaks():
    """100 s of decoding 1e12 bytes and 2e14 FLOPs on a v5e."""
    measured = {
        "program": "rollout", "tokens_per_second": 10.0, "tokens_are": "sampled tokens", "median_seconds": 101.0,
        "first_call_seconds": 200.0, "phase_seconds": {"prefill": 1.0, "decode": 100.0},
        "roofline": {"share": 0.1, "flops_per_second": 1e14, "bytes_per_second": 5e11},
    }  # fmt: skip
    work = {"prefill": roofline.Work(flops=1e9), "decode": roofline.Work(2e14, 1e12)}
    speeds = device_checks.summarise_speed(measured, work, chips.CHIPS["v5e"])
    assert speeds["bytes_per_second"] == 1e10 and speeds["share_of_peak_bandwidth"] == pytest.approx(
        1e10 / 819e9
    )
    assert speeds["flops_per_second"] == 2e12 and speeds["share_of_peak_flops"] == pytest.approx(
        2e12 / 197e12
    )
    unknown = device_checks.summarise_speed(measured, work, None)
    assert unknown["share_of_peak_bandwidth"] is None
    update = device_checks.summarise_speed(measured | {"phase_seconds": {}}, work, None)
    assert update["bytes_per_second"] == pytest.approx(1e12 / 101)


@pytest.mark.parametrize(
    "kind, chip",
    [
        ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", None), ("NVIDIA L4", "l4"), ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)  # fmt: skip
def test_chips_by_jaxs_names(kind, chip):
    found = chips.find_chip(kind)
    assert (found.name if found else None) == chip


# --- parts and their processes ---------------------------------------------------------------------------------


def record(name, values=None, problems=()):
    return {"record": "result", "name": name, "values": values, "problems": list(problems)}


def test_an_exception_is_a_result_and_does_not_hide_the_others():
    records = []
    recorder = device_report.Recorder(records.append)

    def fail():
        raise RuntimeError("no\nmemory")

    recorder.run("first", fail, "use y")
    recorder.run("second", lambda: ({"x": 1}, []))
    recorder.end()
    assert [r["record"] for r in records] == ["begin", "result", "begin", "result", "end"]
    assert (
        records[1]["problems"] == ["first fails: use y: RuntimeError: no memory"]
        and records[1]["values"] is None
    )
    assert records[3] == record("second", {"x": 1})


def test_a_process_that_did_not_end_is_a_problem_with_its_place():
    begun = [{"record": "begin", "name": "a"}, record("a", {}), {"record": "begin", "name": "b"}]
    summary = device_report.collect_part("kernels", begun, 3.0, "was ended after 3 s")
    assert summary.problems == (
        "kernels: the process was ended after 3 s in 'b'; the parts after it ran all the same",
    )
    assert len(summary.results) == 1
    done = device_report.collect_part("kernels", [*begun[:2], {"record": "end", "name": ""}], 3.0, "")
    assert done.problems == ()
    assert device_report.collect_part("step", [], 1.0, "").problems


def test_a_part_that_hangs_is_ended_and_its_results_are_kept(monkeypatch, tmp_path):
    """Another program in the script's place: it writes one result, begins a second and sleeps."""
    program = tmp_path / "part.py"
    program.write_text(
        "import json, sys, time\n"
        "path = next(a for a in sys.argv if a.startswith('--records=')).partition('=')[2]\n"
        "with open(path, 'w') as file:\n"
        f"    for r in [dict(record='begin', name='a'), {record('a', {})!r}, dict(record='begin', name='b')]:\n"
        "        file.write(json.dumps(r) + '\\n')\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(tool, "__file__", str(program))
    start = time.perf_counter()
    summary = tool.start_part("kernels", True, 3.0, dict(os.environ))
    assert time.perf_counter() - start < 60
    assert "was ended after 3 s in 'b'" in summary.problems[0] and summary.results[0]["name"] == "a"


def test_a_device_that_does_not_start_ends_the_check(monkeypatch):
    failed = device_report.collect_part("device", [], 1.0, "ended with code 1")
    monkeypatch.setattr(tool, "start_part", lambda *_: failed)
    report = tool.check_device(["kernels"], False, 100.0)
    assert not report["ok"] and report["problems"][0].startswith("device: the process ended with code 1")
    assert "no device" in device_report.format_report(report)


def test_later_parts_get_what_is_left(monkeypatch):
    asked = []

    def start_part(part, small, seconds, environment):
        asked.append((part, small, seconds, environment.get("XLA_FLAGS")))
        values = {"platform": "gpu"} if part == "device" else None
        return device_report.PartSummary(part, 0.0, (), (record(part, values),))

    monkeypatch.setattr(tool, "start_part", start_part)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    tool.check_device(["kernels", "step"], False, 100.0)
    assert [a[:2] for a in asked] == [("device", False), ("kernels", False), ("step", False)]
    assert asked[1][2] == pytest.approx(60.0, abs=0.5) and asked[2][2] == pytest.approx(100.0, abs=0.5)
    assert asked[2][3] is None


def test_a_wrong_kernel_in_the_report(monkeypatch):
    """As the process of the part would write it, from a broken kernel to the line to read."""
    working = decode_attention._triton
    monkeypatch.setitem(
        decode_attention._BACKENDS,
        "triton",
        lambda *arguments, **options: shift(working(*arguments, **options)),
    )
    records = []
    one = find_check("decode_attention int8")
    monkeypatch.setattr(kernel_checks, "list_kernel_checks", lambda *_: [one])
    tool.run_part("kernels", True, records.append)
    summary = device_report.collect_part("kernels", json.loads(json.dumps(records)), 1.0, "")
    report = device_report.make_report({"kind": "cpu"}, True, [summary])
    assert not report["ok"]
    text = device_report.format_report(report)
    assert text.startswith("**Something is wrong**: cpu")
    assert (
        "- decode_attention int8 is wrong in the form triton_interpret: --config.rollout.kernels=xla" in text
    )
    assert "| decode_attention int8 | triton_interpret | **wrong** |" in text


def test_bad_flags_are_told_in_one_line_each():
    done = subprocess.run(
        [
            sys.executable, ROOT / "launch/check_device.py", "--parts=kernel,step", "--seconds=0",
            "--out=/nowhere/x.json",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: --parts=kernel: it is none of kernels, programs, speeds, step",
        "error: --seconds=0.0: it must be above 0",
        "error: --out=/nowhere/x.json: there is no directory /nowhere",
    ]


@pytest.mark.slow
def test_the_whole_check(tmp_path):
    """As CI runs it: all parts, each in its own process."""
    out, written = tmp_path / "device.json", tmp_path / "device.md"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    done = subprocess.run(
        [
            sys.executable, ROOT / "launch/check_device.py", f"--out={out}", f"--report={written}",
            "--seconds=1500",
        ],
        env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, timeout=1600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["ok"] and report["small"] and report["device"]["platform"] == "cpu"
    assert [part["part"] for part in report["parts"]] == list(tool.PARTS)
    names = {part["part"]: [result["name"] for result in part["results"]] for part in report["parts"]}
    assert len(names["kernels"]) == 8 and names["programs"] == ["rollout", "policy gradients"]
    step = report["parts"][-1]["results"][0]["values"]
    assert step["pairs"] > 0 and step["reference"] and set(step["phases"]) >= {"time/policy", "time/reward"}
    assert written.read_text() == done.stdout and done.stdout.startswith("**All checks passed**: cpu")


def test_the_script_imports_no_jax_before_its_parts():
    """The parent must not take the accelerator from its parts."""
    module = importlib.import_module("cooper_jax.perf.device_report")
    source = (
        Path(module.__file__).read_text()
        + (ROOT / "launch/check_device.py").read_text().split("def run_part")[0]
    )
    assert "import jax" not in source
