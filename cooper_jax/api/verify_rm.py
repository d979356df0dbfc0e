"""VerifyRM for notebooks and scripts: probabilities that completions are correct.

    model = VerifyRM.load("exported/verifyrm")
    p = model.score(["What is 2 + 3?"], ["5"], ["2 + 3 = 5. The answer is 5."])    # f32[1]

The scores are those of training and of launch/evaluate.py: one template, one loader, one program.

    N  rows
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np

from cooper_jax.api.named_models import choose_model, name_arguments, set_fields
from cooper_jax.data.row_reader import replace_surrogates
from cooper_jax.evaluation.evaluated_models import RewardModel
from cooper_jax.runtime import device_layouts
from cooper_jax.runtime.compilation_cache import enable_compilation_cache
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.types import Triple


class VerifyRM:
    """A reward model that is loaded for scoring.  `VerifyRM.load` makes one."""

    def __init__(self, model: RewardModel):
        self._model = model

    @classmethod
    def load(
        cls,
        weights: str | os.PathLike[str],
        *,
        step: int | None = None,
        calibrated: bool | None = None,
        max_tokens: int | None = None,
        rows: int = 8,
        dtype: str | None = None,
    ) -> VerifyRM:
        """Load a reward model onto all devices.

        Args:
          weights: a *ForSequenceClassification directory, a hub id, or the run directory of launch/train.py.
          step: of a run's checkpoint; None: the newest.
          calibrated: True: sigmoid((z - b) / T) with temperature and threshold of the calibration.json beside the
            weights; False: sigmoid(z).  None: as in the run, and False for weights.
          max_tokens: limit of an input; longer completions are cut in the middle.  None: 2,048 or the run's, and no
            more than the model's context length.
          rows: number that are scored at a time; fewer are padded to it.
          dtype: of the computation, float32 or bfloat16.  None: float32, or the run's.

        Raises SetupError for weights that cannot be loaded or have no trained score head, for a calibration that is
        missing, and for settings out of range.
        """
        for name, value in (("rows", rows), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise SetupError(f"{name}={value}: it must be at least 1")
        if dtype not in (None, "float32", "bfloat16"):
            raise SetupError(f"dtype={dtype!r}: it is float32 or bfloat16")
        enable_compilation_cache()
        chosen = choose_model(weights, "reward", step)
        section = chosen.cfg.reward
        set_fields(section, {"calibrated": calibrated, "microbatch": rows, "dtype": dtype})
        with name_arguments():
            fitted = chosen.read_calibration()
            layout = device_layouts.make_layouts(chosen.cfg)["reward"]
            model, params = chosen.load("reward", layout)

        # Without a limit of the caller's, a model of a shorter context sets it.
        if max_tokens is None:
            max_tokens = min(section.max_tokens, model.config.max_len or section.max_tokens)
        section.max_tokens = max_tokens
        return cls(RewardModel(chosen.cfg, layout, model, params, fitted))

    def score(
        self, questions: Iterable[str], references: Iterable[str], completions: Iterable[str]
    ) -> np.ndarray:
        """Compute the probability that each completion answers its question as its reference does: f32[N].

        Each argument is a list, an array, a column of a table or any other iterable of texts.  Half of a surrogate
        pair, which no tokenizer reads, counts as U+FFFD.

        Raises ValueError for sequences of different lengths, and SetupError for a reference that leaves no room in
        `max_tokens` and for logits that are not finite.
        """
        given = {
            "questions": _read_texts("questions", questions),
            "references": _read_texts("references", references),
            "completions": _read_texts("completions", completions),
        }
        lengths = {name: len(texts) for name, texts in given.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{count} {name}" for name, count in lengths.items())
            raise ValueError(f"{counts}: give as many of each")
        if not given["questions"]:
            return np.zeros(0, np.float32)

        self._model.check(given["references"])
        return self._model.rewards([Triple(*row) for row in zip(*given.values(), strict=True)])


def _read_texts(name: str, texts: Iterable[str]) -> list[str]:
    """The texts of an argument of `score`.  Raises ValueError, with its name, for anything else."""
    # A single text is iterable, too: over its characters.
    listed = None if isinstance(texts, str) else [*texts]
    if listed is None or not all(isinstance(text, str) for text in listed):
        raise ValueError(f"{name}: give a list of texts, one per row")
    return [replace_surrogates(text) for text in listed]
