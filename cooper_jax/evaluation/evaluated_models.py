"""The models of an evaluation: from weights, or from a run of launch/train.py; and the reward model's scores.

1. `Chosen` says where the models come from; `Chosen.load` brings one onto the mesh.
2. `RewardModel.rewards` gives p = sigmoid(z) of triples, read by the one template (data/prompts.py): rows of like
   length share a batch, of one number of rows and few widths, so that little is padding and few programs are made.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from cooper_jax.data import packing, prompts
from cooper_jax.model.loading import Directory, Model, check_length, load_model
from cooper_jax.reward import reward_losses, verifier_model
from cooper_jax.rollout import rollout_plan
from cooper_jax.runtime import hosts
from cooper_jax.runtime.mesh import Layout
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.trainer import run_checkpoint
from cooper_jax.types import Params, Triple


@dataclasses.dataclass(frozen=True)
class ChosenModels:
    """Where the models come from: a run's checkpoint, or (run_dir None) the config's weights."""

    cfg: ConfigDict
    folder: Directory  # where a tokenizer made for random weights is kept
    run_dir: Directory | None = None
    step: int | None = None  # None: the newest

    def load(self, name: str, layout: Layout) -> tuple[Model, Params]:
        """policy or reward.  Raises SetupError, also for a score head that nobody has trained."""
        cfg = self.cfg
        if self.run_dir is not None:
            with setup_errors(f"--run_dir={self.run_dir}"):
                model, params, _ = run_checkpoint.load_run_model(self.run_dir, cfg, name, layout, self.step)
            return model, params
        section = cfg.policy if name == "policy" else cfg.reward
        if not section.weights:
            raise SetupError(f"{name}.weights is empty: give --config.{name}.weights=DIR, or --run_dir=RUN")
        model, params, trained = load_model(
            section, name, run_checkpoint.HEADS[name], layout, self.folder, cfg.seed
        )
        if name == "reward" and not (trained or cfg.reward.allow_untrained_head):
            raise SetupError(
                f"reward.weights={section.weights!r} brings no trained score head, so its scores would be noise: "
                "give a *ForSequenceClassification directory, --run_dir=RUN, or accept it with "
                "--config.reward.allow_untrained_head"
            )
        return model, params

    def settings(self, name: str) -> dict[str, str | int | bool]:
        """What decides what a model computes, by the knobs' names."""
        section = self.cfg.policy if name == "policy" else self.cfg.reward
        if self.run_dir is not None:
            out = {f"{name}.run_dir": str(self.run_dir), f"{name}.step": self.step}
        else:
            out = {f"{name}.weights": section.weights, f"{name}.tokenizer": section.tokenizer}
            out |= {f"{name}.num_layers": section.num_layers} | _files(section.weights, name)
            if section.weights == "random":
                out |= {f"{name}.arch.{k}": v for k, v in section.arch.items()}
        return out | {f"{name}.dtype": section.dtype}


def label_models(models: Sequence[ChosenModels]) -> list[str]:
    """What reward models are called in tables: a run's step, or the end of a path.

    Of paths there are as many parts as tell all of them apart, two at least.  Raises SetupError for a model that is
    there twice.
    """
    names = [c.cfg.reward.weights.rstrip("/") if c.run_dir is None else f"step {c.step}" for c in models]
    paths = [Path(name).expanduser() for name in names]
    places = [str(p.resolve()) if p.exists() else name for name, p in zip(names, paths, strict=True)]
    if twice := next((n for n, p in zip(names, places, strict=True) if places.count(p) > 1), None):
        raise SetupError(
            f"--compare names one reward model twice, or the one that is compared with: {twice!r}; leave it out"
        )
    parts = [name.split("/") for name in names]
    found = names
    for count in range(2, max(map(len, parts)) + 1):
        found = ["/".join(p[-count:]) for p in parts]
        if len(set(found)) == len(found):
            break
    return found


def _files(weights: str, name: str) -> dict[str, str]:
    """Which version of a directory's weights there is: training may write others into the same place."""
    folder = Path(weights).expanduser()
    if not weights or not folder.is_dir():
        return {}
    found = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.glob("*.safetensors"))]
    return {f"{name}.files": hashlib.sha256(repr(found).encode()).hexdigest()[:16]}


class RewardModel:
    """A reward model that is asked for scores alone."""

    def __init__(self, cfg: ConfigDict, layout: Layout, model: Model, params: Params):
        section = cfg.reward
        check_length(model.config, "reward", {"reward.max_tokens": section.max_tokens})
        self._layout, self._tokenizer, self._params = layout, model.tokenizer, params
        self._bucket, self.max_tokens = cfg.data.bucket, section.max_tokens
        self._rows = packing.round_up(section.microbatch, layout.batch_shards)
        with setup_errors("reward"):
            self._score = verifier_model.make_score_fn(
                model.config, layout, dtype=section.dtype, microbatch=section.microbatch
            )

    def check(self, references: Sequence[str]) -> None:
        """Raise SetupError for a reference that leaves no room in `reward.max_tokens`."""
        with setup_errors("reward.max_tokens"):
            prompts.check_references(self._tokenizer, references, self.max_tokens)

    def rewards(self, triples: Sequence[Triple]) -> np.ndarray:
        """f32[N], in (0, 1)."""
        with setup_errors("reward.max_tokens"):
            rows = [
                prompts.encode_verifier_input(
                    self._tokenizer, t.question, t.reference, t.completion, self.max_tokens
                )
                for t in triples
            ]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # the largest first: memory fails early
        logits = np.zeros(len(rows), np.float32)
        under_way: list[tuple[list[int], jax.Array]] = []
        for start in range(0, len(order), self._rows):
            hosts.raise_if_stopping()
            taken = order[start : start + self._rows]
            under_way.append((taken, self._send([rows[i] for i in taken])))
        for taken, found in under_way:
            logits[taken] = hosts.fetch_arrays(found)[: len(taken)]
        if lost := int((~np.isfinite(logits)).sum()):
            raise SetupError(
                f"the reward model's logits are not finite for {lost} of {len(logits)} rows: look at its weights, "
                "or at --config.reward.dtype"
            )
        return np.asarray(reward_losses.rewards_from_logits(logits), np.float32)

    def _send(self, rows: Sequence[Sequence[int]]) -> jax.Array:
        """Logits on their way."""
        width = rollout_plan.round_to_bucket(-(-max(map(len, rows)) // self._bucket)) * self._bucket
        padded = [*rows, *[[]] * (self._rows - len(rows))]
        batch = packing.pack_score_batch(padded, bucket=width, rows_multiple=self._rows)
        return self._score(self._params, self._layout.put(batch, "batch"))
