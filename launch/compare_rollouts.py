"""Draws one rollout twice, the second time with some fields changed, and lists where the two part.

    python launch/compare_rollouts.py --config=configs/tiny.py --other=rollout.max_rows=24 --other=rollout.segment=5
    python launch/compare_rollouts.py --config=configs/tiny.py --other=mesh.data=2 --other=mesh.fsdp=2

Random bits depend on (seed, step, prompt, sample, position) alone, but logits change in their last bits with the
batch and the mesh, so a draw that was near another token may fall on it, and the row goes on otherwise.  Each line
is a row's first such token with its margin (cooper_jax/rollout/differences.py): small ones are rounding.  Prompts
are random tokens, as in launch/bench.py.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: the checkout it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ast

from absl import app, flags, logging

from cooper_jax.launch import command_line, common
from cooper_jax.launch.common import CONFIG, exit_with_error, print_setup_error

OTHER = flags.DEFINE_multi_string("other", [], "A field of the second rollout's config: rollout.max_rows=24.")
if __name__ == "__main__":
    command_line.answer_help(sys.argv, __doc__, flags.FLAGS)  # before the imports below, which take seconds

import numpy as np
from ml_collections import ConfigDict

from cooper_jax.perf import bench_programs
from cooper_jax.rollout import engine, rollout_config
from cooper_jax.rollout.differences import first_differences
from cooper_jax.rollout.head_sampling import should_fuse_head
from cooper_jax.runtime import device_layouts, keys
from cooper_jax.settings.config_fields import describe_unknown_field, flatten_config
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.trainer.run_settings import RunSettings


def change_config(cfg: ConfigDict, assignments: list[str]) -> ConfigDict:
    """A copy of cfg with `field=value` set.  Raises SetupError for a field that it does not have."""
    cfg = cfg.copy_and_resolve_references()
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        if name not in (fields := flatten_config(cfg)):
            raise SetupError(f"--other={assignment}: as in {describe_unknown_field(name, fields)}")
        with setup_errors(f"--other={assignment}"):
            *path, leaf = name.split(".")
            section = cfg
            for part in path:
                section = section[part]
            kind = type(section[leaf])
            section[leaf] = value if kind is str else kind(ast.literal_eval(value))
    return cfg


def run_rollout(cfg: ConfigDict, key):
    """One step's rollout under cfg, with its inputs."""
    RunSettings.from_config(cfg, with_assistant=False)
    layout = device_layouts.make_policy_layout(cfg)
    config, params = bench_programs.make_bench_model(cfg.policy, "policy", "logits", layout, cfg.seed)
    load = bench_programs.make_load(cfg, config.vocab_size, cfg.data.max_prompt_tokens, ragged=False)
    prompts, spec = load.prompts.tolist(), bench_programs.make_bench_sampling(cfg)
    options = rollout_config.get_engine_options(cfg)
    with setup_errors("rollout"):
        drawn = engine.generate(params, config, layout, prompts, range(len(prompts)), key, spec, **options)
    fused = should_fuse_head(options["implementation"] or engine.choose_kernels(config, layout), spec)
    return drawn, (params, config, layout, prompts, range(len(prompts)), key, spec), fused


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        exit_with_error(f"unexpected arguments {argv[1:]}; flags look like --other=rollout.segment=5")
    logging.set_verbosity(logging.WARNING)
    try:
        first, second = CONFIG.value, change_config(CONFIG.value, OTHER.value)
        key = keys.make_key(first.seed, "rollout", 1)
        a, inputs, fused = run_rollout(first, key)
        b, _, _ = run_rollout(second, key)
    except SetupError as error:
        print_setup_error(error)
    found = first_differences(*inputs, a, b, fused=fused)
    rows, mask = len(a.finished), np.asarray(a.mask) & np.asarray(b.mask)
    same = mask & (np.cumsum(np.asarray(a.tokens) != np.asarray(b.tokens), axis=1) == 0)
    gap = np.abs(np.asarray(a.logprobs) - np.asarray(b.logprobs))[same].max(initial=0.0)
    print(f"{len(found)} of {rows} rows differ; log-probabilities before that by at most {gap:.1e}")
    for d in found:
        print(
            f"row {d.row} token {d.index}: {d.tokens[0]} ({d.logprobs[0]:.4f}) or {d.tokens[1]} "
            f"({d.logprobs[1]:.4f}), margin {d.margin:.1e}"
        )


if __name__ == "__main__":
    app.run(main, flags_parser=common.make_flags_parser(__doc__))
