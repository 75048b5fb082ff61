"""Sparse attention: block lists, pooled tails, PISA and ISA."""
