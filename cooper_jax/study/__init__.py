"""Arms compared over seeds: runs of launch/train.py, their figures, tables and picture."""
