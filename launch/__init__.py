"""Scripts, one per job: `python launch/train.py` in a checkout, `cooper-jax train` if installed."""
