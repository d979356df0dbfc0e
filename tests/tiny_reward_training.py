"""Runs of train_rm of seconds: a small task, a random trunk with its tokenizer, and their config."""

import itertools
import json
from pathlib import Path

import jax
import numpy as np
import tiny_models
import tiny_tokenizers

from cooper_jax.configs import base
from cooper_jax.model import tokenizer as tokenizers
from cooper_jax.model import transformer, weight_export
from cooper_jax.reward_training import examples
from cooper_jax.reward_training.rm_config import TrainRmConfig
from cooper_jax.runtime import mesh

WORDS = ("3", "7")


def write_task(path: Path, questions: range, each: int = 8, seed: int = 0, **fields) -> Path:
    """Rows that are right exactly where the completion's answer is the reference."""
    rng = np.random.default_rng((seed, questions.start))
    rows = []
    for q, k in itertools.product(questions, range(each)):
        reference, answer = (WORDS[i] for i in rng.integers(0, len(WORDS), 2))
        rows.append(
            {
                "id": f"{q}/{k}",
                "question": f"What is the answer {q}?",
                "reference_answer": reference,
                "completion": "What is final. " * int(rng.integers(0, 3)) + f"The answer is {answer}",
                "label": int(reference == answer),
                "source": ("odd", "even")[q % 2 == 0],
                "model": "m",
            }
            | fields
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_place(path: Path) -> Path:
    """Write a trunk with its tokenizer, and data."""
    tiny_tokenizers.write(path / "tokenizer", "qwen")
    size = tokenizers.load_tokenizer_from(str(path / "tokenizer")).vocab_size
    config = tiny_models.config(vocab_size=size, width=32, head_dim=8, ffn=64)
    params = mesh.init_params(jax.random.key(0), transformer.param_specs(config), tiny_models.one_device())
    weight_export.save_pretrained(path / "trunk", config, params, "logits", tokenizer_dir=path / "tokenizer")
    write_task(path / "train.jsonl", range(1, 9))
    write_task(path / "dev.jsonl", range(20, 25))
    return path


def run_config(place: Path, run_dir: Path, **changes):
    c = base.get_config()
    c.name = "tiny_rm"
    c.run_dir = str(run_dir)
    c.reward.weights = str(place / "trunk")
    c.reward.max_tokens = 96
    c.reward.microbatch = 4
    c.reward.remat = False
    c.data.bucket = 16
    c.checkpoint.every = 2
    c.log.to = ""
    c.train_rm.data = str(place / "train.jsonl")
    c.train_rm.eval_data = str(place / "dev.jsonl")
    c.train_rm.batch = 16
    c.train_rm.epochs = 2
    c.train_rm.optimiser.update(lr=3e-3, warmup_steps=2)
    c.train_rm.widths = 2
    c.train_rm.eval_every = 3
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return c


def load_examples(place: Path, **changes) -> examples.RewardData:
    """Read the rows of a config of this task."""
    cfg = run_config(place, Path("nowhere"), **changes)
    return examples.load_examples(
        cfg, TrainRmConfig.from_config(cfg.train_rm), tokenizers.load_tokenizer_from(str(place / "tokenizer"))
    )
