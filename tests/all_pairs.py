"""Pairs of a step whose responses and verdicts are all known."""

from cooper_jax.reward.pairs.build_pairs import build_pairs
from cooper_jax.reward.pairs.pair_task import PairTask


def build_all(
    problems,
    completions,
    verdicts,
    group_size,
    assistant,
    rule,
    cfg,
    reference_fits=lambda answer: True,
    *,
    scores=None,
    **options,
):
    """The result of `build_pairs`.  options: other fields of PairTask."""
    task = PairTask(problems, group_size, assistant, rule, cfg, reference_fits=reference_fits, **options)
    return build_pairs(task, completions, verdicts, scores)
