"""What JAX itself lacks: specs, sharding rules, formats, records.

Knows nothing of models, optimizers or kernels, and imports none of them.
"""
