"""Optax gradient transformations that keep little or no state."""
