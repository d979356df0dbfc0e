"""Packed rows as a run of the trainer with default settings makes them, for the adapters beside this file."""

from cooper_jax.configs import base
from cooper_jax.data import row_packing
from cooper_jax.model import transformer


def choose_plan(W, config, layout, section):
    """Choose the packed rows of a workload.  section: the config's `policy`."""
    assert transformer.should_pack(section.packing, config, layout, W["dtype"])
    return row_packing.choose_packing(
        W["prompt_len"] + W["new_tokens"],
        section.microbatch,
        layout.batch_shards,
        width=config.width,
        bucket=base.get_config().data.bucket,
        shares_prompts=section.share_prompts and transformer.supports_shared_prompts(config, layout),
        new_tokens=W["new_tokens"],
        shortest_prompt=W["prompt_len"],
    )
