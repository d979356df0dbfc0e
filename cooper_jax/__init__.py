"""Cooper (arXiv 2508.05613) in JAX: a policy and its reward model, trained together."""
