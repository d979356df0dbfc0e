"""Loads the models that a config's sections name: policy, reward model, assistant, judge or source.

    load_tokenizer    the text side alone
    describe_model    tokenizer and static shape, before any parameter is there
    load_model        the parameters too, laid out over a mesh
    check_length      whether rows of so many tokens fit a model's positions

`section` is the config's (`cfg.policy`) and `name` its name, for messages.  Weights are a Hugging Face directory, a
hub id, a .gguf file, or "random": of the size that `section.arch` gives, with a tokenizer that is trained on the
synthetic corpus and kept in the run's directory.  Raises SetupError for what cannot be loaded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

from etils import epath
from ml_collections import ConfigDict

from cooper_jax.data import prompts, synthetic
from cooper_jax.model import tokenizer as tokenizers
from cooper_jax.model import transformer, weights
from cooper_jax.model.config import ModelConfig
from cooper_jax.runtime import hosts, keys, mesh
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.types import Params

Directory = Path | epath.Path  # a run's, here or under gs://


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model: static shape and text side.  Its parameters live in the State."""

    config: ModelConfig
    tokenizer: tokenizers.Tokenizer


def load_tokenizer(section: ConfigDict, name: str, run_dir: Directory) -> tokenizers.Tokenizer:
    """The tokenizer that `section` names; for random weights, one trained from the synthetic corpus."""
    source = section.tokenizer or section.weights
    with setup_errors(f"{name}.tokenizer={section.tokenizer!r}, {name}.weights={section.weights!r}"):
        if source != "random":
            return tokenizers.load_tokenizer_from(source)
        path = run_dir / f"tokenizer_{section.arch.vocab_size}.model"

        def train() -> None:
            if not path.exists():
                symbols = [*prompts.VERIFIER_TAGS, "\n"]
                tokenizers.train_sentencepiece(
                    synthetic.make_corpus(), path, section.arch.vocab_size, symbols=symbols
                )

        hosts.on_primary_first(f"tokenizer of {name}", train)
        return tokenizers.load_tokenizer_from(str(path))


def describe_model(section: ConfigDict, name: str, run_dir: Directory, layout: mesh.Layout) -> Model:
    """A model of `section` without its parameters, its vocabulary padded so that it divides over the mesh."""
    tokenizer = load_tokenizer(section, name, run_dir)
    multiple = math.lcm(section.vocab_multiple, layout.first_ways("vocab"))
    with setup_errors(f"{name}.weights={section.weights!r}"):
        if section.weights == "random":
            config = ModelConfig.from_arch(section.arch, tokenizer.vocab_size, multiple)
            return Model(config, tokenizer)
        config = weights.read_config(section.weights, section.num_layers)
        config = dataclasses.replace(config, vocab_multiple=multiple)
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids but the embedding {config.vocab_size} rows: set "
                f"--config.{name}.tokenizer to the one that belongs to these weights"
            )
        return Model(config, tokenizer)


def check_length(config: ModelConfig, name: str, lengths: Mapping[str, int]) -> None:
    """Raise SetupError where rows are longer than what the model `name` was trained for.

    lengths: flag -> tokens; together they make a row.  Beyond its positions a model computes, but nothing that it
    has learned.  For scaled rotary positions the config's number is the scaled one, as Hugging Face has it.
    """
    total = sum(lengths.values())
    if config.max_len is None or total <= config.max_len:
        return
    given = " + ".join(f"{flag}={tokens}" for flag, tokens in lengths.items())
    flags = " or ".join(f"--config.{flag}" for flag in lengths)
    raise SetupError(
        f"{given}: rows of {total} tokens do not fit the {name} model, which was trained for {config.max_len} "
        f"(max_position_embeddings, or a GGUF file's context_length): lower {flags}, by {total - config.max_len} "
        "in all"
    )


def load_model(
    section: ConfigDict,
    name: str,
    head: str,
    layout: mesh.Layout,
    run_dir: Directory,
    seed: int,
    lengths: Mapping[str, int] | None = None,
) -> tuple[Model, Params, bool]:
    """A model of `section` with its parameters; the last value says whether its head has been trained.

    lengths: as in `check_length`, which is asked before parameters are read.
    """
    model = describe_model(section, name, run_dir, layout)
    check_length(model.config, name, lengths or {})
    with setup_errors("mesh"):
        mesh.check_sharding(layout, transformer.param_specs(model.config, head))
    with setup_errors(f"{name}.weights={section.weights!r}"):
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
        )
        return model, loaded.params, loaded.head_trained
