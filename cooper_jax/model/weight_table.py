"""The table of parameters and their Hugging Face tensors, for weights.py and weight_export.py."""

from __future__ import annotations

import dataclasses
import math

from cooper_jax.model.config import ModelConfig
from cooper_jax.model.transformer import param_specs, set_base_dtype
from cooper_jax.runtime.mesh import ParamSpec

# A row is (Hugging Face name, key in `Params`, inputs).  A name with {} is one tensor per layer.  `inputs` is the
# number of leading axes of the parameter that are the matrix's inputs: matrices are [out, in] in torch and
# [in, out] here.  With 0 the order of axes is kept.
Row = tuple[str, str, int]
_LAYER = "model.layers.{}."
_MODEL_AND_ATTENTION: tuple[Row, ...] = (
    ("model.embed_tokens.weight", "embed", 0),
    ("model.norm.weight", "final_norm", 0),
    ("lm_head.weight", "lm_head", 0),
    ("score.weight", "score", 0),
    (_LAYER + "input_layernorm.weight", "attn_norm", 0),
    (_LAYER + "self_attn.q_proj.weight", "q", 1),
    (_LAYER + "self_attn.k_proj.weight", "k", 1),
    (_LAYER + "self_attn.v_proj.weight", "v", 1),
    (_LAYER + "self_attn.q_proj.bias", "q_bias", 0),
    (_LAYER + "self_attn.k_proj.bias", "k_bias", 0),
    (_LAYER + "self_attn.v_proj.bias", "v_bias", 0),
    (_LAYER + "self_attn.q_norm.weight", "q_norm", 0),
    (_LAYER + "self_attn.k_norm.weight", "k_norm", 0),
    (_LAYER + "self_attn.o_proj.weight", "o", 2),
)
_MLP: tuple[Row, ...] = (
    (_LAYER + "mlp.gate_proj.weight", "gate", 1),
    (_LAYER + "mlp.up_proj.weight", "up", 1),
    (_LAYER + "mlp.down_proj.weight", "down", 1),
)

# `post_attention_layernorm` is the norm before the feed-forward block, unless a family also norms what blocks
# add to the residual stream.
_NORMS: tuple[Row, ...] = ((_LAYER + "post_attention_layernorm.weight", "mlp_norm", 0),)
_NORMS_WITH_POST_NORMS: tuple[Row, ...] = (
    (_LAYER + "post_attention_layernorm.weight", "attn_post_norm", 0),
    (_LAYER + "pre_feedforward_layernorm.weight", "mlp_norm", 0),
    (_LAYER + "post_feedforward_layernorm.weight", "mlp_post_norm", 0),
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the table for one model: a parameter, and its tensor or tensors (one per layer)."""

    key: str  # of the parameter, in `Params` or in its "layers"
    names: tuple[str, ...]  # Hugging Face's, of the tensors

    # Shapes.
    shape: tuple[int, ...]  # of the parameter, without the layer axis
    hf_shape: tuple[int, ...]  # of each tensor
    inputs: int  # see Row
    spec: ParamSpec

    # Differences between the parameter and its tensors.
    stacked: bool  # the parameter has a leading layer axis
    vocab: bool  # rows are tokens: the parameter has padded rows, the tensor does not


def make_entries(config: ModelConfig, head: str, base_dtype: str = "float32") -> list[Entry]:
    """List the rows of the table that a model with this head ("logits" or "score") has.

    base_dtype: see `set_base_dtype`.
    """
    # A tied model has no lm_head, Llama no biases: their keys are missing in the specs.
    specs = set_base_dtype(param_specs(config, head), base_dtype)
    norms = _NORMS_WITH_POST_NORMS if config.post_norms else _NORMS
    entries = []
    for name, key, inputs in _MODEL_AND_ATTENTION + norms + _MLP:
        stacked, vocab = "{}" in name, key in ("embed", "lm_head")
        tree = specs["layers"] if stacked else specs
        if key not in tree:
            continue
        shape = tree[key].shape[1:] if stacked else tree[key].shape

        # torch keeps matrices as [out, in] with all heads on one axis, and vectors flat.
        hf_shape: tuple[int, ...]
        if inputs:
            hf_shape = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
        elif vocab:
            hf_shape = (config.vocab_size, config.width)
        elif key == "score":
            hf_shape = (1, config.width)
        else:
            hf_shape = (math.prod(shape),)

        names = tuple(name.format(i) for i in range(config.layers)) if stacked else (name,)
        entries.append(Entry(key, names, shape, hf_shape, inputs, tree[key], stacked, vocab))
    return entries
