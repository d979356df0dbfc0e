"""Floor 0: numerical kernels.  Imports jax only; each has a plain-jnp form that runs on every platform."""
