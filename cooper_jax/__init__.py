"""Cooper (arXiv 2508.05613) in JAX: a policy and its reward model, trained together.

The Python API, for notebooks and scripts (docs/python_api.md):

    VerifyRM    a reward model: questions, references, completions -> probabilities
    Sampler     a language model: prompts or messages -> samples with log-probabilities
    train       a run of launch/train.py -> Result

`import cooper_jax` imports nothing else: JAX is imported when one of these names is used for the first time.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["Result", "Sample", "Sampler", "SetupError", "VerifyRM", "train"]

# Type checkers read these imports; at run time `__getattr__` makes them.
if TYPE_CHECKING:
    from cooper_jax.api.sampler import Sample, Sampler
    from cooper_jax.api.training import Result, train
    from cooper_jax.api.verify_rm import VerifyRM
    from cooper_jax.settings.setup_errors import SetupError
else:
    # The public names -> the modules that define them.
    _MODULES = {
        "Result": "cooper_jax.api.training",
        "Sample": "cooper_jax.api.sampler",
        "Sampler": "cooper_jax.api.sampler",
        "SetupError": "cooper_jax.settings.setup_errors",
        "VerifyRM": "cooper_jax.api.verify_rm",
        "train": "cooper_jax.api.training",
    }

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value  # the next access does not come here
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
