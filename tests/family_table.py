"""The table of supported model families in docs/models.md, made from cooper_jax/model/families.py.

    python tests/family_table.py          print it
    python tests/family_table.py --write  put it into docs/models.md

tests/test_families.py compares the page with it.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cooper_jax.model.families import FAMILIES, Family  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table: python tests/family_table.py --write -->\n", "<!-- end of the table -->\n"

# Fields of ModelConfig that a family sets -> what they say.
DIFFERENCES = {
    "qkv_bias": "biases on q, k and v",
    "qk_norm": "norms of q and k",
    "post_norms": "norms after each block, too",
    "norm_offset": "norms multiply with 1 + weight",
    "activation": "GeGLU (tanh)",
    "scaled_embedding": "scaled embedding",
}
# Settings that a family's files may have, by the key of config.json that a default stands for.
LAYERS = {
    "no_rope_layers": "layers without rotary embeddings",
    "sliding_window": "sliding windows",
    "query_pre_attn_scalar": "own scale of scores",
}


def describe_family(family: Family) -> str:
    """How the architecture differs from Llama's."""
    parts = [DIFFERENCES[field] for field in family.architecture]
    parts += [text for key, text in LAYERS.items() if key in family.defaults]
    if family.sliding_rope_theta is not None:
        parts.append("two rotary bases")
    return ", ".join(parts) or "-"


def format_table() -> str:
    """Markdown, one line a family."""
    lines = [
        "| `model_type` | models | differences from Llama | classes | GGUF |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, family in FAMILIES.items():
        classes = f"`{family.causal_class}`, `{family.score_class}`"
        gguf = f"`{family.gguf}`" if family.gguf else "no"
        lines.append(f"| `{name}` | {family.models} | {describe_family(family)} | {classes} | {gguf} |")
    return "\n".join(lines) + "\n"


def read_table() -> str:
    """The table as docs/models.md has it."""
    return PAGE.read_text().split(BEGIN)[1].split(END)[0]


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(before + BEGIN + format_table() + END + rest.split(END)[1])
    print(format_table(), end="")
