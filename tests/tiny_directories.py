"""Directories of tiny random models, as another program would publish them."""

from __future__ import annotations

from pathlib import Path

import tiny_models
import tiny_tokenizers

from cooper_jax.model import weight_export
from cooper_jax.model.config import ModelConfig


def write_model(folder: Path, head: str, template: bool = True, **changes) -> tuple[ModelConfig, dict]:
    """A model of one layer with Qwen's kind of tokenizer, in `folder`/hf: (its shape, its parameters).

    head: logits or score.  changes: of the shape.
    """
    tokenizer = tiny_tokenizers.write(folder / "tokenizer", "qwen", template)
    shape = dict(family="qwen2", vocab_size=512, width=16, layers=1, head_dim=8, max_len=512)
    config = tiny_models.config(**shape | changes)
    params = tiny_models.random_params(config, head)
    weight_export.save_pretrained(
        folder / "hf", config, params, head, tokenizer_dir=tokenizer, pad_token_id=0
    )
    return config, params
