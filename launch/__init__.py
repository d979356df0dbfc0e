"""One script a job: `python launch/train.py` from a checkout, `cooper-jax train` from the installed package."""
