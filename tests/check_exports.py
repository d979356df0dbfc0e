"""Check that exports of every family load in another version of transformers, with the same logits and scores.

    python tests/check_exports.py write DIR     in this environment: small random models, and what they compute
    OTHER/bin/python tests/check_exports.py load DIR     in one with another transformers, torch and numpy

`load` imports nothing of this repository.  tests/test_families.py compares with the version in requirements.txt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

TOKENS = np.random.default_rng(0).integers(2, 61, (2, 24))


def write_exports(directory: Path) -> None:
    """Write every case of tiny_models.py with both heads, and our logits and scores beside it."""
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root), str(root / "tests")]
    import conftest  # noqa: F401  # sets the compiler's flags
    import jax
    import jax.numpy as jnp
    from tiny_models import CASES, FAMILY_CASES, one_device, random_params

    from cooper_jax.model import transformer, weight_export

    valid = jnp.ones(TOKENS.shape, bool)
    for name, config in (CASES | FAMILY_CASES).items():
        trunk = jax.jit(
            lambda params, config=config: transformer.hidden_states(
                params, config, jnp.asarray(TOKENS), valid, dtype=jnp.float32, layout=one_device()
            )
        )
        for head in ("logits", "score"):
            params = random_params(config, head)
            out = directory / f"{name}_{head}"
            weight_export.save_pretrained(out, config, params, head, pad_token_id=0)
            shared = {k: params[k] for k in ("embed", "layers", "final_norm")}
            hidden = trunk(shared)
            if head == "logits":
                result = transformer.compute_logits(params, config, hidden)
            else:
                result = transformer.score_last_token(params, config, hidden, valid)
            np.save(out / "computed.npy", np.asarray(result))
        print(f"wrote {name}", flush=True)


def load_exports(directory: Path) -> int:
    """Load each export and compare; print a line each, and return the number that differ by over 1e-4."""
    import torch
    import transformers

    failures = 0
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    for out in sorted(p for p in directory.iterdir() if p.is_dir()):
        is_policy = out.name.endswith("_logits")
        auto = transformers.AutoModelForCausalLM
        if not is_policy:
            auto = transformers.AutoModelForSequenceClassification
        try:
            model, info = auto.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
        except (ValueError, KeyError) as e:  # an architecture that this version does not have
            print(f"{out.name}: not loaded: {str(e).splitlines()[0]}")
            failures += 1
            continue
        with torch.no_grad():
            theirs = model.eval()(torch.tensor(TOKENS)).logits.numpy()
        difference = np.abs((theirs if is_policy else theirs[:, 0]) - np.load(out / "computed.npy")).max()
        lost = [*info["missing_keys"], *info["unexpected_keys"]]
        failures += bool(difference > 1e-4 or lost)
        print(f"{out.name}: largest difference {difference:.1e}, keys lost {lost}")
    return failures


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("write", "load"):
        sys.exit(__doc__)
    mode, folder = sys.argv[1], Path(sys.argv[2])
    if mode == "write":
        write_exports(folder)
    else:
        sys.exit(min(load_exports(folder), 1))
