"""Loading of the models that a config's sections name: policy, reward model, assistant, judge or source.

    load_tokenizer    tokenizer only
    describe_model    tokenizer and shape, before any parameter is read
    load_model        tokenizer, shape and parameters, sharded over a mesh
    check_length      check that rows of a given length fit a model's context length

`section` is a section of the config (`cfg.policy`) and `name` its name, for messages.  `section.weights` is a
Hugging Face directory, a hub id, a .gguf file, or "random".  A model with random weights has the shape
`section.arch`, and its tokenizer is stored in the run directory.  It is trained on the synthetic corpus, unless
`train_tokenizer` has trained one on another text before.  All functions raise SetupError if the model cannot be
loaded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from etils import epath
from ml_collections import ConfigDict

from cooper_jax.data import prompts, synthetic
from cooper_jax.model import tokenizer as tokenizers
from cooper_jax.model import transformer, weights
from cooper_jax.model.config import ModelConfig
from cooper_jax.model.model_source import ModelSource, read_lora
from cooper_jax.runtime import hosts, keys, mesh
from cooper_jax.runtime.optim import ADAPTERS
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.types import Params

Directory: TypeAlias = Path | epath.Path  # a run directory, local or under gs://


@dataclasses.dataclass(frozen=True)
class Model:
    """A model's shape and tokenizer; its parameters are kept in the training state."""

    config: ModelConfig
    tokenizer: tokenizers.Tokenizer


def load_tokenizer(section: ConfigDict | ModelSource, name: str, run_dir: Directory) -> tokenizers.Tokenizer:
    """Load the tokenizer that `section` names; for random weights, train one on the synthetic corpus."""
    source = section.tokenizer or section.weights
    field = "tokenizer" if section.tokenizer else "weights"
    with setup_errors(f"{name}.{field}={source!r}"):
        if source != "random":
            return tokenizers.load_tokenizer_from(source)
        path = train_tokenizer(section.arch.vocab_size, name, run_dir, None)
        return tokenizers.load_tokenizer_from(str(path))


def train_tokenizer(
    vocab_size: int, name: str, run_dir: Directory, corpus: Iterable[str] | None
) -> Directory:
    """Train the tokenizer of models with random weights, unless the run directory has it; return its path.

    Args:
      vocab_size: the largest number of pieces.
      name: of the model, for the hosts' exchange.
      corpus: the text to train on; None: the synthetic problems'.
    """
    # One file per size: models of one run with equal sizes share a tokenizer, and a resumed run finds it.
    path = run_dir / f"tokenizer_{vocab_size}.model"

    def train() -> None:
        if not path.exists():
            symbols = [*prompts.VERIFIER_TAGS, "\n"]
            texts = synthetic.make_corpus() if corpus is None else corpus
            tokenizers.train_sentencepiece(texts, path, vocab_size, symbols=symbols)

    # All hosts read the file that the first one writes.
    hosts.on_primary_first(f"tokenizer of {name}", train)
    return path


def describe_model(
    section: ConfigDict | ModelSource, name: str, run_dir: Directory, layout: mesh.Layout
) -> Model:
    """Read a model's shape and tokenizer; the vocabulary is padded so that it divides over the mesh."""
    tokenizer = load_tokenizer(section, name, run_dir)

    # The embedding's rows are sharded over the mesh axes of the logical axis "vocab".
    multiple = math.lcm(section.vocab_multiple, layout.first_ways("vocab"))
    lora = section.lora if isinstance(section, ModelSource) else read_lora(section, name)
    with setup_errors(f"{name}.weights={section.weights!r}"):
        if section.weights == "random":
            config = ModelConfig.from_arch(section.arch, tokenizer.vocab_size, multiple)
            return Model(dataclasses.replace(config, lora=lora), tokenizer)

        # The embedding may have more rows than the tokenizer has ids (Qwen2.5's does), but not fewer.
        config = weights.read_config(section.weights, section.num_layers)
        config = dataclasses.replace(config, vocab_multiple=multiple, lora=lora)
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids but the embedding {config.vocab_size} rows: "
                f"set --config.{name}.tokenizer to the one that belongs to these weights"
            )
        return Model(config, tokenizer)


def check_length(config: ModelConfig, name: str, lengths: Mapping[str, int]) -> None:
    """Raise SetupError if rows are longer than the context length that the model `name` was trained for.

    Longer rows would run without an error, at positions for which the model was not trained.  With scaled
    RoPE the limit is the scaled length, as in Hugging Face's configs.

    Args:
      lengths: flag of the config -> tokens; a row has their sum.
    """
    total = sum(lengths.values())
    if config.max_len is None or total <= config.max_len:
        return
    given = " + ".join(f"{flag}={tokens}" for flag, tokens in lengths.items())
    flags = " or ".join(f"--config.{flag}" for flag in lengths)
    raise SetupError(
        f"{given}: rows of {total} tokens do not fit the {name} model, which was trained for "
        f"{config.max_len} (max_position_embeddings, or a GGUF file's context_length): lower {flags}, "
        f"by {total - config.max_len} in all"
    )


def load_model(
    section: ConfigDict | ModelSource,
    name: str,
    head: str,
    layout: mesh.Layout,
    run_dir: Directory,
    seed: int,
    lengths: Mapping[str, int] | None = None,
) -> tuple[Model, Params, bool]:
    """Load a model and its parameters -> (model, parameters, whether its head has been trained).

    Args:
      head: "logits" or "score".
      seed: of initial values: of all parameters ("random") or of a score head that the source does not have.
      lengths: for `check_length`, which is called before parameters are read.
    """
    model = describe_model(section, name, run_dir, layout)

    # Find wrong settings before the weights are read, which may take minutes.
    check_length(model.config, name, lengths or {})
    with setup_errors("mesh"):
        mesh.check_sharding(layout, transformer.param_specs(model.config, head))

    with setup_errors(f"{name}.weights={section.weights!r}"):
        # Random weights: a fresh language-model head is trained with the rest, but a fresh score head counts
        # as untrained, because rewards from it mean nothing.
        if section.weights == "random":
            specs = transformer.param_specs(model.config, head)
            params = mesh.init_params(keys.make_key(seed, f"init_{name}"), specs, layout)
            return model, params, head == "logits"

        loaded = weights.load_weights(
            section.weights,
            num_layers=section.num_layers,
            head=head,
            layout=layout,
            vocab_multiple=model.config.vocab_multiple,
            seed=seed,
            base_dtype="float32" if model.config.lora is None else model.config.lora.base_dtype,
        )
        params = loaded.params
        if model.config.lora is not None:
            adapters = {ADAPTERS: transformer.param_specs(model.config, head)[ADAPTERS]}
            params = params | mesh.init_params(keys.make_key(seed, f"init_{name}"), adapters, layout)
        return model, params, loaded.head_trained
