"""Sampling from a model through the compressed decode cache."""
