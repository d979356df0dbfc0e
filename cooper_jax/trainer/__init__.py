"""The training algorithm.  Read `step.py` first: it is one step of Cooper from prompts to updated models."""
