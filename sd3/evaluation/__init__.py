"""Measures pictures of a base model against those of fine-tuned ones; see sd3/evaluate_sd3.py."""
