"""The programs of a paper config, compiled for devices that are not there."""

from __future__ import annotations

import dataclasses
import functools

import topologies

from cooper_jax.configs import llama3p2_1b, qwen_1p5b
from cooper_jax.model.config import ModelConfig
from cooper_jax.perf import aot_job, aot_programs
from cooper_jax.perf.aot_compile import CompiledProgram, compile_program
from cooper_jax.runtime import device_layouts

CONFIGS = {"qwen_1p5b": qwen_1p5b, "llama3p2_1b": llama3p2_1b}


def _model(name: str) -> ModelConfig:
    arch = CONFIGS[name].get_config().policy.arch
    return ModelConfig.from_arch(arch, arch.vocab_size)


MODELS = {name: _model(name) for name in CONFIGS}


@dataclasses.dataclass(frozen=True)
class Case:
    """A paper config on the devices of a chip, `tensor` ways; aligned: as many slots as requests."""

    name: str
    chip: str
    tensor: int
    aligned: bool = True
    kv_dtype: str = ""
    top_p: float = 1.0

    @functools.cached_property
    def job(self) -> aot_job.CompileJob:
        cfg = CONFIGS[self.name].get_config()
        cfg.mesh.tensor, cfg.rollout.kv_dtype = self.tensor, self.kv_dtype
        if not self.aligned:
            cfg.rollout.max_rows = cfg.data.prompts_per_step * cfg.rollout.group_size // 2
        cfg = aot_job.drop_data(cfg)
        cfg.rollout.top_p = self.top_p  # an evaluation's: training samples from the whole distribution
        topology = topologies.topology(self.chip)
        layout = device_layouts.make_layouts(cfg, topology.devices)["policy"]
        return aot_job.describe_job(cfg, layout, topology.chip.memory)


def made(case: Case, phase: str) -> dict[str, CompiledProgram]:
    """The programs of a phase by their names; each one's outputs are the next one's inputs."""
    out: dict[str, CompiledProgram] = {}
    for program in aot_programs.list_programs(case.job):
        if program.phase == phase:
            lowered = program.lower({name: c.output_arrays for name, c in out.items()})
            out[program.name] = compile_program(program.name, lowered, case.job.layout)
    return out
