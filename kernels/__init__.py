"""Numerical kernels, the lowest layer: imports jax only; each has a plain jnp version for any platform."""
