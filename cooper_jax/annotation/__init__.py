"""Hybrid annotation: completions are labelled where the rule verifier and a language model agree."""
