"""Samples answers to a question from a language model, with their log-probabilities.

    python examples/sample_answers.py Qwen/Qwen2.5-0.5B-Instruct

The argument is a Hugging Face directory, a hub id, a .gguf file, or a run directory.
"""

import sys

import cooper_jax


def main(weights: str, max_new_tokens: int = 256) -> list[cooper_jax.Sample]:
    """Print and return two replies, after one continuation of a plain text."""
    sampler = cooper_jax.Sampler.load(weights)
    ((continued,),) = sampler.generate(["14 + 6 ="], temperature=0.0, max_new_tokens=8)
    print(f"14 + 6 ={continued.text}")

    messages = [
        {"role": "system", "content": "Reason step by step."},
        {"role": "user", "content": "Tom has 14 apples and buys 6 more. How many apples has he?"},
    ]
    samples = sampler.chat(messages, n=2, temperature=0.7, max_new_tokens=max_new_tokens)
    for sample in samples:
        print(f"{len(sample.tokens)} tokens, log-probability {sample.logprobs.sum():.2f}: {sample.text}")
    return samples


if __name__ == "__main__":
    main(sys.argv[1])
