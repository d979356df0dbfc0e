"""Hybrid annotation: completions labelled where a rule and a language model agree."""
