"""launch/compile.py on devices that are there: sizes, arithmetic, refusals, the search.

The whole tool runs on a tiny run over the eight virtual CPU devices, whose compiler is always at hand.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cooper_jax.configs import base, gsm8k_0p5b, gsm8k_0p5b_cooper, qwen_1p5b, tiny
from cooper_jax.launch import compile as tool
from cooper_jax.perf import (
    aot_compile,
    aot_estimate,
    aot_job,
    aot_programs,
    aot_search,
    chips,
    kernel_costs,
    roofline,
)
from cooper_jax.perf.aot_compile import CompiledProgram, TooLarge, compile_program
from cooper_jax.perf.aot_estimate import ProgramEstimate, StepEstimate
from cooper_jax.perf.aot_programs import StepProgram
from cooper_jax.perf.aot_search import LayoutCandidate, RoughEstimate
from cooper_jax.runtime import device_layouts
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer.run_settings import RunSettings

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "data.prompts_per_step": 8,
    "data.max_prompt_tokens": 64,
    "data.bucket": 16,
    "reward.max_tokens": 128,
    "rollout.group_size": 4,
    "rollout.max_new_tokens": 24,
    "policy.microbatch": 16,
    "reward.microbatch": 16,
    "policy.arch.layers": 2,
    "reward.arch.layers": 2,
}


def config(**changes):
    cfg = tiny.get_config()
    cfg.update_from_flattened_dict(SMALL | {name.replace("__", "."): x for name, x in changes.items()})
    return cfg


def job_of(cfg, topology="cpu:8") -> aot_job.CompileJob:
    topology = chips.find_topology(topology)
    cfg = aot_job.drop_data(cfg)
    layout = device_layouts.make_layouts(cfg, topology.devices)["policy"]
    return aot_job.describe_job(cfg, layout, topology.chip.memory)


# --- the job ---------------------------------------------------------------------------------------------


def test_what_a_run_settles():
    job = job_of(config())
    assert (job.prompts, job.requests, job.slots, job.slot_per_request) == (1, 4, 4, True)
    assert job.rows == 32 and job.row_tokens == (64, 24)  # 24 responses' tokens round up to 32, cut to 24
    assert job.reward_tokens == 112  # 64 + 24 + a bucket of 16, rounded up to buckets
    assert job.count_microbatch_rows(job.rows, 16) == 2
    assert job.decode_steps == 23


def test_fewer_slots_take_turns():
    job = job_of(config(rollout__max_rows=16))
    assert (job.slots, job.slot_per_request, job.decode_steps) == (2, False, 46)
    times = {p.name: p.times for p in aot_programs.list_programs(job)}
    assert times["segment"] == 6  # 23 steps in segments of 8, twice
    assert times["refill"] == 1 and times["resize"] == 1
    assert "compact" not in times  # 1 slot is fewer than are halved


def test_arms_have_their_programs():
    names = {
        arm: {p.name for p in aot_programs.list_programs(job_of(config(reward__arm=arm)))}
        for arm in ("rule", "model")
    }
    assert not names["rule"] & {"score", "pair update"}
    assert "score" in names["model"] and "pair update" not in names["model"]


def test_several_updates_score_the_policy_too():
    times = {
        p.name: p.times
        for p in aot_programs.list_programs(job_of(config(policy__minibatches=2, policy__epochs=2)))
    }
    assert times["policy update"] == 4 and times["logprobs"] == 2


def test_a_shape_of_arch_must_be_somebodys():
    layout = job_of(config()).layout
    section = base.get_config().policy
    assert "weights are random" in aot_job.read_model_shape(section, "policy", layout)[1]
    section.weights = "nobody/has-this"
    with pytest.raises(
        SetupError, match=r"policy.weights='nobody/has-this': they are not on this machine, and .*arch"
    ):
        aot_job.read_model_shape(section, "policy", layout)
    section.arch.width = 256
    shape, note = aot_job.read_model_shape(section, "policy", layout)
    assert shape.width == 256 and "weights are not on this machine" in note


def test_a_shape_is_read_from_a_directory(tmp_path):
    cfg = qwen_1p5b.get_config()
    shape, _ = aot_job.read_model_shape(cfg.policy, "policy", job_of(config()).layout)
    written = dataclasses.replace(shape, layers=3).to_hf("Qwen2ForCausalLM")
    (tmp_path / "config.json").write_text(json.dumps(written))
    cfg.policy.weights = str(tmp_path)
    found, note = aot_job.read_model_shape(cfg.policy, "policy", job_of(config()).layout)
    assert found == dataclasses.replace(shape, layers=3, max_len=32768) and str(tmp_path) in note


def test_the_paper_configs_know_their_shapes():
    """Parameters of Qwen2.5-1.5B: 1.54e9, of which 1.31e9 are not the embedding's (its model card)."""
    cfg = qwen_1p5b.get_config()
    shape, _ = aot_job.read_model_shape(cfg.policy, "policy", job_of(config()).layout)
    body, head = roofline.count_weights(shape)
    assert body == pytest.approx(1.31e9, rel=0.01) and body + head == pytest.approx(1.54e9, rel=0.01)


def test_the_first_runs_know_their_shapes_and_need_no_flag():
    """Qwen2.5-0.5B: 0.49e9 parameters, of which 0.36e9 are not the embedding's (its model card)."""
    layout = job_of(config()).layout
    rule, cooper = gsm8k_0p5b.get_config(), gsm8k_0p5b_cooper.get_config()
    for cfg in (rule, cooper):
        shape, _ = aot_job.read_model_shape(cfg.policy, "policy", layout)
        body, head = roofline.count_weights(shape)
        assert body == pytest.approx(0.36e9, rel=0.01) and body + head == pytest.approx(0.49e9, rel=0.01)
        assert shape.heads * shape.head_dim == shape.width and shape.padded_vocab % 256 == 0
        settings = RunSettings.from_config(cfg)
        assert settings.data.prompts_per_step * settings.rollout.group_size == 256

    # Neither has a server, and the reward model is half of the policy.
    assert RunSettings.from_config(rule).assistant is None
    assert RunSettings.from_config(cooper).assistant.kind == "local"
    half, _ = aot_job.read_model_shape(cooper.reward, "reward", layout)
    whole, _ = aot_job.read_model_shape(cooper.policy, "policy", layout)
    assert half == dataclasses.replace(whole, layers=12)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"mesh.tensor": 8}, r"mesh.tensor=8: a model has 4 heads, .* to one of \[1, 2, 4\]"),
        ({"mesh.tensor": 3}, "mesh"),
        ({"mesh.reward": "1x2x1"}, "mesh.reward='1x2x1': .* leave --config.mesh.reward empty"),
        ({"rollout.max_rows": 4}, "max_rows 4 is less than one row on each of 8 batch shards"),
        ({"rollout.memory_gib": 1e-6}, "raise it"),
        ({"rollout.temperature": 0.0}, "rollout.temperature"),
    ],
)
def test_what_cannot_be_laid_out(changes, complaint):
    cfg = config()
    cfg.update_from_flattened_dict(changes)
    with pytest.raises(SetupError, match=complaint):
        job_of(cfg)


# --- costs and figures, by hand --------------------------------------------------------------------------


def test_what_kernels_cost():
    job = job_of(
        config(rollout__dtype="bfloat16"), "cpu:2"
    )  # a device: 4 prompts, 16 rows; 4 heads of 16, 2 kv
    found = kernel_costs.attention_cost(job, job.policy, 3, 64, "bfloat16")
    product = 2 * 3 * 4 * 64 * 64 * 16 / 2  # over half of the scores
    assert found["splash_mha_fwd_residuals"] == (2 * product, 3 * 64 * 16 * (4 + 2 + 2 + 4) * 2)
    assert found["splash_mha_dkv_no_residuals"][0] == 5 * product
    assert kernel_costs.head_cost(job, job.policy, 10, "head_draw") == {
        "head_draw": (2 * 10 * 640 * 64, 2 * (10 + 640) * 64)
    }
    decode = kernel_costs.decode_cost(job, (64, 12))
    assert decode["decode_attention_prompt"] == (4 * 16 * 4 * 16 * 64, 4 * 64 * 2 * 2 * 16 * 2)
    assert decode["decode_attention_suffix"] == (4 * 16 * 4 * 16 * 12, 16 * 12 * 2 * 2 * 16 * 2)
    both = zip(decode["decode_attention_prompt"], decode["decode_attention_suffix"], strict=True)
    assert decode["decode_attention"] == tuple(map(sum, both))

    # Two layers, one with a window of 16: the mean of both.  Of 64 + 12 keys it reads 12 of its own and 4 more.
    sliding = dataclasses.replace(job.policy, layers=2, layer_types=("full", "sliding"), window=16)
    found = kernel_costs.attention_cost(job, sliding, 3, 64, "bfloat16")
    scores = (64 * 64 / 2 + 16 * 64 - 16 * 16 / 2) / 2
    assert found["splash_mha_fwd_residuals"][0] == 2 * (2 * 3 * 4 * scores * 16)
    decode = kernel_costs.decode_cost(dataclasses.replace(job, policy=sliding), (64, 12))
    assert decode["decode_attention_prompt"][0] == 4 * 16 * 4 * 16 * (64 + 4) / 2
    assert decode["decode_attention_suffix"][0] == 4 * 16 * 4 * 16 * 12


def test_a_programs_figures():
    """[64, 256] x [256, 128], the second cut over 8 devices and gathered."""
    topology, layout = chips.find_topology("cpu:8"), job_of(config()).layout
    place = NamedSharding(layout.mesh, PartitionSpec("fsdp", None))
    rows, matrix = (jax.ShapeDtypeStruct(s, jnp.float32, sharding=place) for s in ((64, 256), (256, 128)))

    def product(x, w):
        w = jax.lax.with_sharding_constraint(w, layout.replicated)
        return jax.lax.with_sharding_constraint(x @ w, place)

    made = compile_program("product", jax.jit(product).lower(rows, matrix), layout)
    program = StepProgram("product", "policy", 3, None, ("policy", "reference"))
    f = aot_estimate.estimate_program(
        program, made, {"policy": 10**6, "reference": 500, "other": 7}, layout, topology
    )
    assert f.flops == 2 * 8 * 256 * 128
    (sent,) = f.sent
    assert (sent.kind, sent.group, sent.times) == ("all-gather", 8, 1)
    assert sent.bytes == 256 * 128 * 4 * 7 / 8
    assert f.arguments == 4 * (8 * 256 + 32 * 128) and f.outputs == 4 * 8 * 128
    assert f.others == 10**6 + 500 - f.arguments  # what lives, its own arguments being a part
    assert f.total == 10**6 + 500 + f.temporaries + f.outputs + f.code
    assert f.seconds["compute"] == f.flops / topology.chip.flops
    assert f.seconds["memory"] == f.bytes / topology.chip.bandwidth
    assert f.seconds["network"] == sent.bytes / topology.chip.link
    assert f.roofline_seconds == max(f.seconds.values()) == f.seconds[f.bound]


def figure(name="update", phase="policy", times=1, seconds=1.0, total=100):
    sides = {"compute": seconds / 2, "memory": seconds, "network": 0.0}
    return ProgramEstimate(name, phase, times, 0.1, total, 0, 0, 0, 0, 1.0, 1.0, (), sides, 0, {})


def test_a_step_adds_up():
    parts = (
        figure("a", "rollout", 8, 0.5, 60),
        figure("b", "policy", 2, 3.0, 90),
        figure("c", "rollout", 1, 2.0, 10),
    )
    step = StepEstimate(parts, memory=100, reserve=0.08, tokens=240)
    assert step.phases == {"rollout": 6.0, "policy": 6.0}
    assert step.seconds == 12.0 and step.tokens_per_second == 20.0
    assert step.limit == 92 and step.largest.name == "b" and step.fits
    assert not dataclasses.replace(step, reserve=0.11).fits
    # A rollout one step ahead runs beside the other phases, of which the slower side counts.
    assert dataclasses.replace(step, ahead=True).seconds == 6.0
    longer = dataclasses.replace(step, programs=(*parts, figure("d", "reward", 1, 3.0, 10)), ahead=True)
    assert longer.seconds == 9.0


def test_a_rollout_ahead_has_the_programs_and_the_memory_of_its_own_mesh():
    cfg = aot_job.drop_data(config(mesh__rollout="1x4x1", mesh__fsdp=2, mesh__tensor=2, rollout__ahead=1))
    topology = chips.find_topology("cpu:8")
    layouts = device_layouts.make_layouts(cfg, topology.devices)
    learner, ahead = (
        aot_job.describe_job(cfg, layouts[name], topology.chip.memory) for name in ("policy", "rollout")
    )
    job = dataclasses.replace(learner, ahead=ahead)
    sizes = aot_programs.resident_bytes(job)
    # Two float32 copies of the policy on four devices; the learner's four hold one with two moments.
    assert sizes["rollout's policy"] == pytest.approx(2 / 3 * sizes["policy"], rel=0.1)
    for program in aot_programs.list_programs(job):
        is_rollout = program.phase == "rollout"
        assert ("rollout's policy" in program.live, "policy" in program.live) == (is_rollout, not is_rollout)
        assert job.layout_of(program.phase).mesh.shape["tensor"] == (1 if is_rollout else 2)


def test_exact_mode_is_not_estimated():
    with pytest.raises(SetupError, match="exact=True: its forward passes are not estimated"):
        job_of(config(exact=True))


def test_what_is_held_is_what_the_compiler_made():
    held = {"policy": 1200, "reference": 400, "reward model": 900}
    update = StepProgram("policy update", "policy", 1, None, (), makes="policy")
    made = CompiledProgram("", 0.0, 0, 1500, 1500, 0, 0, 0, None)
    assert aot_estimate.list_sizes(held, [(update, made)]) == {
        "policy": 1500,
        "reference": 500,
        "reward model": 900,
    }


def test_only_named_kernels_lose_their_notes():
    note = 'backend_config={"custom_call_config":{"cost_estimate":{"flops":"8","bytes_accessed":"9"},"x":1}}'
    lines = [
        f'  %a = custom-call(), metadata={{op_name="jit/{k}/pallas_call"}}, {note}' for k in ("one", "other")
    ]
    found = aot_estimate.remove_cost_estimates("\n".join(lines), ("one",)).split("\n")
    assert "cost_estimate" not in found[0] and '"custom_call_config":{"x":1}' in found[0]
    assert found[1] == lines[1]


# --- the whole tool --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keep(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def ran(keep, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "step.json"
    step = tool.compile_and_report(config(), "cpu:8", cache=keep, out=str(out))
    return step, json.loads(out.read_text())


def test_the_tool_writes_what_it_found(ran):
    step, written = ran
    assert written["fits"] is True and written["topology"] == "cpu:8" and written["devices"] == 8
    names = [p["name"] for p in written["programs"]]
    assert names == [
        "reshard", "no_prompts", "prefill", "begin", "open_slots", "segment", "score", "logprobs", "policy update",
        "pair update",
    ]  # fmt: skip
    assert written["tokens"] == 8 * 4 * 24
    assert written["seconds"] == pytest.approx(
        sum(p["times"] * p["roofline_seconds"] for p in written["programs"])
    )
    assert written["tokens_per_second"] == pytest.approx(written["tokens"] / written["seconds"])
    assert written["largest_bytes"] == max(p["total"] for p in written["programs"])
    assert list(written["phases"]) == ["rollout", "score", "logprobs", "policy", "reward"]


def test_all_that_a_run_holds_is_counted(ran):
    """Masters and moments of two models and the reference, f32, cut over 8 devices but for norms and counters."""
    step, _ = ran
    held = aot_programs.resident_bytes(job_of(config()))
    sizes = {f.name: f.arguments + f.others for f in step.programs}
    assert sizes["policy update"] == pytest.approx(sum(held.values()), rel=0.02)
    layer = 64 * (4 + 2 + 2 + 4) * 16 + 3 * 64 * 192  # a layer's matrices
    norms = 4 * (2 * 2 * 64 + 64)
    assert held["reference"] == 4 * (2 * layer + 640 * 64) // 8 + norms
    assert held["policy"] == 3 * held["reference"] + 4 * 4  # with counters
    copy = 4 * (2 * layer + 640 * 64) + norms
    assert sizes["segment"] == pytest.approx(sum(held.values()) + copy, rel=0.1)  # beside small caches


def test_a_decode_segment_counts_its_steps(ran):
    step, _ = ran
    segment = next(f for f in step.programs if f.name == "segment")
    assert segment.times == 3 and segment.unknown_loops == 1  # 23 steps in segments of 8
    layer = 64 * (4 + 2 + 2 + 4) * 16 + 3 * 64 * 192
    products = 2 * 4 * (2 * layer + 640 * 64) * 8  # 4 rows a device, 8 steps
    assert products < segment.flops < 1.5 * products  # attention beside


def test_what_is_kept_is_not_compiled_again(ran, keep, monkeypatch, capsys):
    monkeypatch.setattr(aot_compile, "_compile", None)
    again = tool.compile_and_report(config(), "cpu:8", cache=keep)
    assert again == ran[0]
    printed = capsys.readouterr().out
    assert "fits: " in printed and "policy: shape from policy.arch, weights are random" in printed


def test_what_does_not_fit_is_refused_with_both_numbers(ran, keep):
    step, gib = ran[0], 2**30
    reserve = 1 - step.largest.total / 2 / step.memory
    with pytest.raises(SetupError) as refused:
        tool.compile_and_report(config(), "cpu:8", cache=keep, reserve=reserve)
    message = str(refused.value)
    assert f"{step.largest.name} needs {step.largest.total / gib:.2f} GiB" in message
    assert (
        f"of its {step.memory / gib:.2f} GiB may be used" in message
        and aot_estimate.suggest_flags(step.largest.phase) in message
    )


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"reserve": 1.0}, "--reserve=1.0"),
        ({"compiles": 0}, "--search_compiles=0"),
        ({"out": "/nowhere/x.json"}, "there is no directory /nowhere"),
    ],
)
def test_flags_out_of_range(options, complaint):
    with pytest.raises(SetupError, match=complaint):
        tool.compile_and_report(config(), "cpu:8", **options)


def test_a_program_that_the_compiler_refuses(monkeypatch):
    """As XLA:TPU words it."""

    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used "
                "20.10G of 15.75G hbm. Exceeded hbm capacity by 4.35G."
            )

    with pytest.raises(TooLarge, match=r"update: by itself it takes 20.10G of a device's 15.75G"):
        aot_compile._compile("update", Lowered())


def test_a_kernel_that_the_compiler_refuses():
    """Its errors are of a class of their own, and many lines long."""

    class Lowered:
        def compile(self):
            raise Exception(
                "Mosaic failed to compile TPU kernel: offsets must be aligned\n\nThe operation involved: ..."
            )

    with pytest.raises(
        SetupError, match=r"^segment: the compiler refuses it: Mosaic .* must be aligned$"
    ) as refused:
        aot_compile._compile("segment", Lowered())
    assert not isinstance(refused.value, TooLarge)


def test_the_command_refuses_in_one_line():
    run = subprocess.run(
        [sys.executable, ROOT / "launch/compile.py", f"--config={ROOT}/configs/tiny.py", "--topology=v9:4x4"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: topology 'v9:4x4' is unknown")


# --- the search ------------------------------------------------------------------------------------------


def test_candidates():
    cfg = qwen_1p5b.get_config()
    found = aot_search.list_candidates(cfg, (12, 12), 16)
    assert {c.tensor for c in found} == {1, 2, 4}  # neither 8 nor 16 divides 12 heads
    assert {c.rows for c in found if c.tensor == 2} == {8, 16, 32, 64}
    assert {c.max_rows for c in found} == {0, 1024, 512}
    assert {c.tensor for c in aot_search.list_candidates(cfg, (12, 12), 256)} == {
        2,
        4,
    }  # 256 shards are more than prompts
    assert {c.data for c in aot_search.list_candidates(cfg, (12, 12), 32, slices=2)} == {2}
    assert aot_search.list_candidates(cfg, (12, 12), 16)[0].flags.startswith(
        "--config.mesh.data=1 --config.mesh.fsdp=-1 "
    )


def test_a_guess_grows_with_what_is_asked():
    topology = dataclasses.replace(chips.find_topology("cpu:8"), chip=chips.CHIPS["v5e"])

    def guess(**fields):
        candidate = LayoutCandidate(**(dict(tensor=1, data=1, rows=8, max_rows=0) | fields))
        cfg = aot_search.apply_candidate(aot_job.drop_data(config(data__prompts_per_step=64)), candidate)
        layout = device_layouts.make_layouts(cfg, topology.devices)["policy"]
        return aot_search.estimate_roughly(
            aot_job.describe_job(cfg, layout, topology.chip.memory), topology, candidate
        )

    few, many = guess(), guess(rows=64)
    assert many.bytes > few.bytes and many.seconds < few.seconds
    assert guess(max_rows=64).seconds > few.seconds  # four turns read the weights four times


def test_pruning():
    guesses = [
        RoughEstimate(LayoutCandidate(1, 1, n, 0), bytes, seconds)
        for n, bytes, seconds in ((1, 5, 9), (2, 11, 1), (4, 9, 3))
    ]
    assert [g.candidate.rows for g in aot_search.prune_estimates(guesses, 10)] == [4, 1]
    one, other = (
        RoughEstimate(LayoutCandidate(1, 1, 8, 0), 1, 3.0),
        RoughEstimate(LayoutCandidate(2, 1, 8, 0), 1, 5.0),
    )
    same, slower = (
        RoughEstimate(LayoutCandidate(1, 1, 16, 0), 1, 3.0),
        RoughEstimate(LayoutCandidate(1, 1, 4, 0), 1, 4.0),
    )
    assert aot_search.prune_estimates([one, slower, other, same], 10) == [
        same,
        other,
        one,
        slower,
    ]  # each mesh once, first


def look(limit, measured, compiles=3):
    """A search in which compiling a candidate gives what `measured` does."""
    asked, cfg = [], aot_job.drop_data(config())

    def measure(cfg, candidate):
        asked.append(candidate)
        assert cfg.mesh.tensor == candidate.tensor and cfg.policy.microbatch == candidate.rows
        return measured(len(asked))

    return aot_search.search_layouts(
        cfg, chips.find_topology("cpu:8"), limit, compiles, measure, lambda line: None
    ), asked


def test_the_search_takes_the_fastest_that_fits():
    steps = {
        1: None,  # refused by the compiler
        2: StepEstimate((figure(seconds=2.0),), 1000, 0.1, 1),
        3: StepEstimate((figure(seconds=1.0, total=950),), 1000, 0.1, 1),  # too large
        4: StepEstimate((figure(seconds=3.0),), 1000, 0.1, 1),
    }
    (chosen, step), asked = look(2**33, steps.get, compiles=4)
    assert len(asked) == len(set(asked)) == 4
    assert step == steps[2] and chosen == asked[1]


@pytest.mark.slow
def test_a_search_in_vain():
    with pytest.raises(
        SetupError, match=r"takes about 0.00 GiB of a device, and 0.00 GiB may be used: give more chips"
    ):
        look(1, lambda n: pytest.fail("nothing is compiled that cannot fit"))
    with pytest.raises(
        SetupError, match="none of the 2 candidates that were compiled fits; raise --search_compiles"
    ):
        look(2**33, lambda n: None, compiles=2)
