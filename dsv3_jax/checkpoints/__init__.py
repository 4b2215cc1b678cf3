"""Weights and training states on disk: Orbax checkpoints, and Hugging Face folders both ways."""
