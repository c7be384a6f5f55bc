"""Contracts that hold for any model, tried on a user's own checkpoint."""
