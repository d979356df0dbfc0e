"""Cooper (arXiv 2508.05613) in JAX: a policy and its reward model, trained together."""

__version__ = "0.1.0"
