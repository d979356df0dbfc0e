"""Sampling from a language model for notebooks and scripts, with log-probabilities.

    sampler = Sampler.load("Qwen/Qwen2.5-0.5B-Instruct")
    samples = sampler.chat([{"role": "user", "content": "What is 2 + 3?"}], n=2, temperature=0.7)
    samples[0].text, samples[0].logprobs                                           # str, f32[T]

The samples come from the rollout engine of training (cooper_jax/rollout/engine.py).  A sample's random bits depend
on (seed, index of the prompt in the call, sample, token) alone.  Each number of samples and each set of sampling
settings is a program of its own, which is compiled at its first use.

    B  prompts   T  sampled tokens of one sample
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np

from cooper_jax.api.named_models import choose_model, name_arguments, set_fields
from cooper_jax.data import policy_prompts
from cooper_jax.model.loading import Model
from cooper_jax.rollout import engine
from cooper_jax.rollout.rollout_config import RolloutConfig
from cooper_jax.runtime import device_layouts, keys
from cooper_jax.runtime.compilation_cache import enable_compilation_cache
from cooper_jax.runtime.mesh import Layout
from cooper_jax.types import Params, Rollout

Message = Mapping[str, str]  # {"role": "user", "content": "..."}
Prompt = str | Sequence[Message]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sampled response."""

    text: str  # without the end token
    tokens: np.ndarray  # i32[T], the end token included
    # f32[T]: natural logarithms under the distribution that was sampled from, after temperature, top-k, top-p and
    # min-p; at temperature 1 without filters they are the model's own.  0 for greedy samples.
    logprobs: np.ndarray
    truncated: bool  # True if the limit was reached before an end token


class Sampler:
    """A language model that is loaded for sampling.  `Sampler.load` makes one."""

    def __init__(self, model: Model, params: Params, layout: Layout, rollout: RolloutConfig):
        """Copy the weights for sampling.  rollout: settings of the engine; its sampling settings are not read."""
        self._model, self._layout, self._rollout = model, layout, rollout
        self._weights = engine.copy_rollout_weights(params, model.config, layout, rollout.dtype)

    @classmethod
    def load(
        cls,
        weights: str | os.PathLike[str],
        *,
        step: int | None = None,
        dtype: str | None = None,
        max_rows: int | None = None,
    ) -> Sampler:
        """Load a language model onto all devices.

        Args:
          weights: a Hugging Face directory, a hub id, a .gguf file, package:NAME/FILE.gguf, or the run directory of
            launch/train.py, whose policy is loaded.
          step: of a run's checkpoint; None: the newest.
          dtype: of weights and computation, float32 or bfloat16.  None: float32, or that of the run's rollouts.
          max_rows: number of samples that are decoded at a time; None: all of a call.

        Raises SetupError for weights that cannot be loaded and for settings out of range.
        """
        enable_compilation_cache()
        chosen = choose_model(weights, "policy", step)
        set_fields(chosen.cfg.rollout, {"dtype": dtype, "max_rows": max_rows})
        rollout = RolloutConfig.from_config(chosen.cfg.rollout)
        layout = device_layouts.make_policy_layout(chosen.cfg)
        with name_arguments():
            model, params = chosen.load("policy", layout)
        return cls(model, params, layout, rollout)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        max_new_tokens: int = 512,
        seed: int = 0,
        template_variables: Mapping[str, object] | None = None,
    ) -> list[Sample]:
        """Sample `n` replies to a conversation: messages with a `role` and a `content` each.

        The arguments are those of `generate`.  Raises ValueError for a text in place of messages, which would be
        continued without the chat template.
        """
        if isinstance(messages, str):
            raise ValueError(
                "messages: give a list, as in [{'role': 'user', 'content': 'What is 2 + 3?'}]; `generate` "
                "continues texts"
            )
        (samples,) = self.generate(
            [messages],
            n=n,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            max_new_tokens=max_new_tokens,
            seed=seed,
            template_variables=template_variables,
        )
        return samples

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        max_new_tokens: int = 512,
        seed: int = 0,
        template_variables: Mapping[str, object] | None = None,
    ) -> list[list[Sample]]:
        """Sample `n` responses to each prompt: lists of n samples, in the order of the prompts.

        Args:
          prompts: texts, which are continued as they stand; or conversations, which are rendered with the model's
            chat template.
          temperature: 0: greedy.
          top_p: 1: off.
          top_k: 0: off.
          min_p: 0: off.
          max_new_tokens: limit of a response, the end token included.
          template_variables: of the chat template, as {"enable_thinking": False}.

        Raises ValueError for prompts that are empty or too long for the model, for conversations if the tokenizer
        has no chat template, and for settings out of range; FloatingPointError for logits that are not finite.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts: give a list of prompts, even for one")
        if not prompts:
            return []
        spec = self._rollout.make_sampling_spec(
            self._model.tokenizer.eos_ids,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            max_new_tokens=max_new_tokens,
            group_size=n,
        )
        encoded = [self._encode(prompt, i, template_variables) for i, prompt in enumerate(prompts)]
        self._check_lengths(encoded, max_new_tokens)

        rollout = engine.generate(
            self._weights,
            self._model.config,
            self._layout,
            encoded,
            range(len(encoded)),
            keys.make_key(seed, "sampler"),
            spec,
            **self._rollout.make_engine_options(),
        )
        rows = self._read_rows(rollout, spec.eos_ids)
        return [rows[start : start + n] for start in range(0, len(rows), n)]

    def _encode(
        self, prompt: Prompt, index: int, template_variables: Mapping[str, object] | None
    ) -> list[int]:
        """Encode one prompt.  index: its number, for messages."""
        tokenizer = self._model.tokenizer
        if isinstance(prompt, str):
            return policy_prompts.encode_plain_text(tokenizer, prompt)
        try:
            messages = [(message["role"], message["content"]) for message in prompt]
            is_text = all(isinstance(part, str) for message in messages for part in message)
        except (TypeError, KeyError):
            is_text = False
        if not is_text:
            raise ValueError(
                f"prompt {index} is neither a text nor a list of messages, each with a role and a content "
                "that are texts"
            )
        return tokenizer.chat(messages, fallback=False, variables=template_variables)

    def _check_lengths(self, encoded: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Raise ValueError for the first prompt that does not fit, with its response, the model's context."""
        limit = self._model.config.max_len
        if limit is None:
            return
        for index, ids in enumerate(encoded):
            if len(ids) + max_new_tokens > limit:
                raise ValueError(
                    f"prompt {index} has {len(ids)} tokens: with max_new_tokens={max_new_tokens} it does not fit "
                    f"the {limit} tokens that the model was trained for"
                )

    def _read_rows(self, rollout: Rollout, eos_ids: Sequence[int]) -> list[Sample]:
        """Convert the rows of a rollout, which are prompt-major."""
        completions = engine.decode_completions(rollout, self._model.tokenizer.decode, eos_ids)
        samples = []
        for row, completion in enumerate(completions):
            length = completion.tokens  # sampled tokens come first; padding follows
            samples.append(
                Sample(
                    text=completion.text,
                    tokens=np.asarray(rollout.tokens[row, :length]),
                    logprobs=np.asarray(rollout.logprobs[row, :length]),
                    truncated=completion.truncated,
                )
            )
        return samples
