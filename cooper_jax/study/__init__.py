"""Comparison of arms over several seeds: runs of launch/train.py, their metrics, tables and figure."""
