"""Losses, optimizer, train step, metrics and the training loop."""
