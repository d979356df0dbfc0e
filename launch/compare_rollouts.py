"""Samples one rollout twice, the second time with changed fields, and lists the rows that differ.

    python launch/compare_rollouts.py --config=configs/tiny.py \\
        --other=rollout.max_rows=24 --other=rollout.segment=5
    python launch/compare_rollouts.py --config=configs/tiny.py --other=mesh.data=2 --other=mesh.fsdp=2

Random bits depend on (seed, step, prompt, sample, position) alone, but the last bits of logits depend on the
batch and the mesh.  A token that won narrowly may therefore change, and the rest of its row with it.  Each
line is a row's first changed token with its margin (cooper_jax/rollout/differences.py); a small margin means
that rounding explains the change.  Prompts are random tokens, as in launch/bench.py.
"""

import sys
from pathlib import Path
from typing import NamedTuple

# As a file (not as a module of the package), the script imports the package of its own checkout.
if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ast

from absl import app, flags, logging

from cooper_jax.launch import command_line, common
from cooper_jax.launch.common import CONFIG, exit_with_error, print_setup_error

OTHER = flags.DEFINE_multi_string("other", [], "A field of the second rollout's config: rollout.max_rows=24.")
# --help is answered before the imports below, because importing JAX takes seconds.
if __name__ == "__main__":
    command_line.answer_help(sys.argv, __doc__, flags.FLAGS)

import jax
import numpy as np
from ml_collections import ConfigDict

from cooper_jax.model.config import ModelConfig
from cooper_jax.perf import bench_programs
from cooper_jax.rollout import engine, rollout_config
from cooper_jax.rollout.differences import find_first_differences
from cooper_jax.rollout.head_sampling import should_fuse_head
from cooper_jax.runtime import device_layouts, keys
from cooper_jax.runtime.mesh import Layout
from cooper_jax.settings.config_fields import describe_unknown_field, flatten_config
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.trainer.run_settings import RunSettings
from cooper_jax.types import Params, Rollout


class SampledRollout(NamedTuple):
    """A rollout and its inputs."""

    rollout: Rollout
    params: Params
    config: ModelConfig
    layout: Layout
    prompts: list[list[int]]
    spec: engine.SamplingSpec
    fused_head: bool


def change_config(cfg: ConfigDict, assignments: list[str]) -> ConfigDict:
    """Copy a config and set its fields by `field=value`.  Raises SetupError for an unknown field."""
    cfg = cfg.copy_and_resolve_references()
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        if name not in (fields := flatten_config(cfg)):
            raise SetupError(f"--other={assignment}: as in {describe_unknown_field(name, fields)}")
        # Text needs no quotes; values of other types are Python literals.
        with setup_errors(f"--other={assignment}"):
            kind = type(fields[name])
            new_value = value if kind is str else kind(ast.literal_eval(value))
            cfg.update_from_flattened_dict({name: new_value})
    return cfg


def sample_rollout(cfg: ConfigDict, key: jax.Array) -> SampledRollout:
    """Sample the rollout of one step under a config."""
    # This call is for its checks.
    RunSettings.from_config(cfg, with_assistant=False)
    layout = device_layouts.make_policy_layout(cfg)
    config, params = bench_programs.make_bench_model(cfg.policy, "policy", "logits", layout, cfg.seed)
    workload = bench_programs.make_workload(cfg, config.vocab_size, cfg.data.max_prompt_tokens, ragged=False)
    prompts, spec = workload.prompts.tolist(), bench_programs.make_bench_sampling(cfg)

    # The fused head samples without materialising logits, and rounds differently.
    options = rollout_config.get_engine_options(cfg)
    with setup_errors("rollout"):
        rollout = engine.generate(params, config, layout, prompts, range(len(prompts)), key, spec, **options)
    implementation = options["implementation"] or engine.choose_kernels(config, layout)
    fused_head = should_fuse_head(implementation, spec)
    return SampledRollout(rollout, params, config, layout, prompts, spec, fused_head)


def main(argv: list[str]) -> None:
    """Compare the rollouts of --config and of --config changed by --other."""
    if len(argv) > 1:
        exit_with_error(f"unexpected arguments {argv[1:]}; flags look like --other=rollout.segment=5")
    logging.set_verbosity(logging.WARNING)

    # Both rollouts use the same key, so that they differ by rounding alone.
    try:
        first_cfg, second_cfg = CONFIG.value, change_config(CONFIG.value, OTHER.value)
        key = keys.make_key(first_cfg.seed, "rollout", 1)
        first = sample_rollout(first_cfg, key)
        second = sample_rollout(second_cfg, key)
    except SetupError as error:
        print_setup_error(error)

    a, b = first.rollout, second.rollout
    differences = find_first_differences(
        first.params, first.config, first.layout, first.prompts, range(len(first.prompts)), key, first.spec,
        a, b, fused=first.fused_head,
    )  # fmt: skip

    # Log-probabilities are comparable up to a row's first difference.
    same_prefix = np.cumsum(np.asarray(a.tokens) != np.asarray(b.tokens), axis=1) == 0  # bool[N, T]
    comparable = np.asarray(a.mask) & np.asarray(b.mask) & same_prefix
    gaps = np.abs(np.asarray(a.logprobs) - np.asarray(b.logprobs))  # f32[N, T]
    largest_gap = gaps[comparable].max(initial=0.0)

    print(
        f"{len(differences)} of {len(a.finished)} rows differ; before that, log-probabilities differ by at "
        f"most {largest_gap:.1e}"
    )
    for difference in differences:
        (first_token, second_token), (first_logprob, second_logprob) = difference.tokens, difference.logprobs
        print(
            f"row {difference.row} token {difference.index}: {first_token} ({first_logprob:.4f}) or "
            f"{second_token} ({second_logprob:.4f}), margin {difference.margin:.1e}"
        )


if __name__ == "__main__":
    app.run(main, flags_parser=common.make_flags_parser(__doc__))
