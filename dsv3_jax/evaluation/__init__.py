"""Baselines and measurements of a trained model on held-out text."""
