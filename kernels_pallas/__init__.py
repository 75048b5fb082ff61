"""Pallas kernels for linear and sparse attention, on TPU and GPU."""
