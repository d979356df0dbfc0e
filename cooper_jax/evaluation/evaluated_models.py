"""Models of an evaluation, from weights or from a run of launch/train.py, and the reward model's scores.

1. `ChosenModels` names the models' source; `ChosenModels.load` loads one of them onto the mesh.
2. `RewardModel.rewards` computes p = sigmoid(z) of triples, rendered with the template of data/prompts.py; with
   `reward.calibrated` z is calibrated (reward/calibration.py).
   Rows of similar length share a batch; all batches have the same number of rows and one of few widths, so
   that there is little padding and few programs are compiled.

    N  triples   S  tokens of a reward model's input
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cooper_jax.data import packing, prompts
from cooper_jax.model.loading import Directory, Model, check_length, load_model
from cooper_jax.reward import calibration, reward_losses, verifier_model
from cooper_jax.reward.calibration import Calibration
from cooper_jax.rollout import rollout_plan
from cooper_jax.runtime import hosts
from cooper_jax.runtime.mesh import Layout
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.trainer import run_checkpoint
from cooper_jax.types import Params, Triple


@dataclasses.dataclass(frozen=True)
class ChosenModels:
    """Source of the models: a run's checkpoint or, if run_dir is None, the config's weights."""

    cfg: ConfigDict
    folder: Directory  # for a tokenizer made for random weights

    # A run's checkpoint.
    run_dir: Directory | None = None
    step: int | None = None  # of the checkpoint; None: the newest

    def load(self, name: str, layout: Layout) -> tuple[Model, Params]:
        """Load a model onto a layout.  name: policy or reward.

        Raises SetupError for weights that cannot be loaded, and for a reward model without a trained score
        head.
        """
        # From a run: its checkpoint has the policy and the co-trained reward model.
        cfg = self.cfg
        if self.run_dir is not None:
            with setup_errors(f"--run_dir={self.run_dir}"):
                model, params, _ = run_checkpoint.load_run_model(self.run_dir, cfg, name, layout, self.step)
            return model, params

        # From weights.
        section = cfg.policy if name == "policy" else cfg.reward
        if not section.weights:
            raise SetupError(f"{name}.weights is empty: give --config.{name}.weights=DIR, or --run_dir=RUN")
        head = run_checkpoint.HEADS[name]
        model, params, trained = load_model(section, name, head, layout, self.folder, cfg.seed)
        if name == "reward" and not (trained or cfg.reward.allow_untrained_head):
            raise SetupError(
                f"reward.weights={section.weights!r} has no trained score head, so its scores would be "
                "noise: give a *ForSequenceClassification directory, --run_dir=RUN, or accept it with "
                "--config.reward.allow_untrained_head"
            )
        return model, params

    def read_calibration(self) -> Calibration | None:
        """Read the calibration of the reward model, beside its weights or in its run; None if it is not calibrated.

        Raises SetupError, naming the path, for a missing or damaged file.
        """
        if not self.cfg.reward.calibrated:
            return None
        with setup_errors("reward.calibrated=True"):
            return calibration.read_calibration(
                self.cfg.reward.weights if self.run_dir is None else self.run_dir
            )

    def settings(self, name: str) -> dict[str, str | int | float | bool | None]:
        """List the settings that decide a model's outputs, by dotted names.  name: policy or reward.

        Raises SetupError for a calibration that cannot be read.
        """
        section = self.cfg.policy if name == "policy" else self.cfg.reward
        out: dict[str, str | int | float | bool | None] = {}
        if self.run_dir is not None:
            out = {f"{name}.run_dir": str(self.run_dir), f"{name}.step": self.step}
        else:
            out = {f"{name}.weights": section.weights, f"{name}.tokenizer": section.tokenizer}
            out |= {f"{name}.num_layers": section.num_layers} | _describe_weights(section.weights, name)
            # Random weights are decided by the architecture alone.
            if section.weights == "random":
                out |= {f"{name}.arch.{k}": v for k, v in section.arch.items()}

        # These are absent without a calibration, so that evaluations from before the setting existed resume.
        if name == "reward" and (fitted := self.read_calibration()) is not None:
            out |= {"reward.calibrated": True, "reward.temperature": fitted.temperature}
            out |= {"reward.threshold": fitted.threshold}
        return out | {f"{name}.dtype": section.dtype}


def label_models(models: Sequence[ChosenModels]) -> list[str]:
    """Name reward models for tables: by a run's step, or by the last parts of a path.

    Paths are shortened to the fewest parts that make all of them different, but to no fewer than two.

    Raises SetupError for a model that is named twice.
    """
    # Two spellings of one path are one model.
    names = [c.cfg.reward.weights.rstrip("/") if c.run_dir is None else f"step {c.step}" for c in models]
    paths = [Path(name).expanduser() for name in names]
    resolved = [str(p.resolve()) if p.exists() else name for name, p in zip(names, paths, strict=True)]
    for name, path in zip(names, resolved, strict=True):
        if resolved.count(path) > 1:
            raise SetupError(
                f"--compare names one reward model twice, or the one that is compared with: {name!r}; "
                "leave it out"
            )

    # Take more parts of every path until the labels differ.
    parts = [name.split("/") for name in names]
    labels = names
    for count in range(2, max(map(len, parts)) + 1):
        labels = ["/".join(p[-count:]) for p in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def _describe_weights(weights: str, name: str) -> dict[str, str | int | float | bool | None]:
    """Hash the weight files' names, sizes and times: training may write other weights to the same directory.

    The result is empty for weights that are not a local directory.
    """
    folder = Path(weights).expanduser()
    if not weights or not folder.is_dir():
        return {}
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.glob("*.safetensors"))]
    return {f"{name}.files": hashlib.sha256(repr(files).encode()).hexdigest()[:16]}


class RewardModel:
    """A reward model for scoring only, without an optimiser."""

    def __init__(
        self,
        cfg: ConfigDict,
        layout: Layout,
        model: Model,
        params: Params,
        fitted: Calibration | None = None,
    ):
        """Prepare the scoring program.

        Args:
          cfg: the whole config, of which `reward` and `data.bucket` are read.
          fitted: the calibration of the rewards; None: they are sigmoid(logit).
        """
        section = cfg.reward
        self._calibration = fitted
        check_length(model.config, "reward", {"reward.max_tokens": section.max_tokens})
        self._layout, self._tokenizer, self._params = layout, model.tokenizer, params
        self._bucket, self.max_tokens = cfg.data.bucket, section.max_tokens
        # The scoring program splits rows over the data shards, so it needs a multiple of their number.
        self.batch_rows = packing.round_up(section.microbatch, layout.batch_shards)
        with setup_errors("reward"):
            self._score = verifier_model.make_score_fn(
                model.config, layout, dtype=section.dtype, microbatch=section.microbatch
            )

    def check(self, references: Sequence[str]) -> None:
        """Raise SetupError for a reference that leaves no room in `reward.max_tokens`."""
        with setup_errors("reward.max_tokens"):
            prompts.check_references(self._tokenizer, references, self.max_tokens)

    def rewards(
        self, triples: Sequence[Triple], between_batches: Callable[[], None] = hosts.raise_if_stopping
    ) -> np.ndarray:
        """Compute the rewards f32[N] of triples, in (0, 1).  Questions and completions are truncated as needed.

        between_batches: called before each batch; by default it raises hosts.Stopped after SIGTERM.

        Raises SetupError for scores that are not finite.
        """
        with setup_errors("reward.max_tokens"):
            rows = [
                prompts.encode_verifier_input(
                    self._tokenizer,
                    t.question,
                    t.reference,
                    t.completion,
                    self.max_tokens,
                    # The references were checked with another text beside them; no completion may end the job.
                    truncate_below_minimum=True,
                )
                for t in triples
            ]

        # The longest rows come first: a batch that does not fit in memory fails at once.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        # (indices of the rows, their logits; those of padding rows last)
        launched: list[tuple[list[int], jax.Array]] = []
        for start in range(0, len(order), self.batch_rows):
            between_batches()
            indices = order[start : start + self.batch_rows]
            launched.append((indices, self._launch([rows[i] for i in indices])))

        # Results are fetched after all batches are launched, so that devices never wait for the host.
        logits = np.zeros(len(rows), np.float32)
        for indices, values in launched:
            logits[indices] = hosts.fetch_arrays(values)[: len(indices)]

        # NaN would compare as "not above 0.5" and count as a rejection.
        if not_finite := int((~np.isfinite(logits)).sum()):
            raise SetupError(
                f"the reward model's logits are not finite for {not_finite} of {len(logits)} rows: check its "
                "weights, or --config.reward.dtype"
            )
        logits = calibration.apply_calibration(logits, self._calibration)
        return np.asarray(reward_losses.rewards_from_logits(jnp.asarray(logits)), np.float32)

    def compile_programs(self) -> Iterator[str]:
        """Run the program of each width once, on empty rows; yields what is compiled next."""
        most = -(-self.max_tokens // self._bucket)
        for width in sorted({rollout_plan.round_to_bucket(n) * self._bucket for n in range(1, most + 1)}):
            yield f"scores, rows of up to {width} tokens"
            jax.block_until_ready(self._launch([[0] * width]))

    def _launch(self, rows: Sequence[Sequence[int]]) -> jax.Array:
        """Start the computation of a batch's logits, f32[batch_rows].

        rows: token ids of at most `batch_rows` rows.
        """
        # The width is rounded up coarsely: each width is a compilation.
        longest = max(map(len, rows))
        width = rollout_plan.round_to_bucket(-(-longest // self._bucket)) * self._bucket

        # Empty rows fill up the batch, so that one compiled program serves every batch of this width.
        padded = [*rows, *[[]] * (self.batch_rows - len(rows))]
        batch = packing.pack_score_batch(padded, bucket=width, rows_multiple=self.batch_rows)
        return self._score(self._params, self._layout.put(batch, "batch"))
