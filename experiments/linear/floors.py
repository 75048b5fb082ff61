"""The fewest matmul FLOPs of the chunk forms that `bench_linear` times.

Per token and value head, for chunks of C tokens, keys of K and values of V
numbers, counted as 2 m n k for each product, whole squares, as the chunk
algebra (kernels_pallas/linear/DERIVATION.md) has them:

  scores          2 C K each: Q K^T, and P K^T under the delta rule
  values          2 C V each: At E, and T R under the delta rule
  states          2 K V each: Q X, K^T E, and P X under the delta rule, for
                  each of the M state matrices (2 with momentum)
  coefficients    2 C^2 each: A beta U, with momentum only
  inverse         substitution inside blocks of 16, then the real halves of
                  each doubling; under the delta rule only

and backward, with the inputs, E, T and the states at the chunks' starts
saved, the same scores (and coefficients) again and

  C K             2 for the scores' other factor and 1 for the transposed one:
                  X1 K, X1^T Q, and (X2 + X2^T) K under the delta rule
  C V             At^T dO, dO E^T, and T^T dE, Z E^T under the delta rule
  K V             K dX, E dX^T, dO X^T, Q^T dO, and Z X^T, P^T Z under the
                  delta rule, for each state matrix
  C^2             the two transposes of the coefficients' product

Elementwise work, decays and exponentials are not counted, nor is what a
per-channel decay adds to the scores: a floor, not an estimate.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from experiments import reports
from experiments.linear import cases

_BLOCK = 16


def inverse(size: int) -> float:
  """FLOPs per token of inverting a unit lower triangular C x C matrix.

  A block of n costs 2 FLOPs for each of the n (n - 1) (n - 2) / 6 triples
  i > k > j, joining two blocks of b two products of b x b matrices.
  """
  block = min(_BLOCK, size)
  flops = (block - 1) * (block - 2) / 3
  while block < size:
    flops += 2 * block**2
    block *= 2
  return flops


def forward(op: str, size: int, key: int, value: int) -> float:
  """FLOPs per token and head of a forward pass.

  Args:
    op: a key of `cases.OPS`.
    size: C.
    key: K.
    value: V.
  """
  if op in cases.PLAIN:
    return 2 * size * (key + value) + 4 * key * value
  flops = 4 * size * (key + value) + inverse(size)
  if op == "mdn":
    return flops + 12 * key * value + 2 * size**2
  return flops + 6 * key * value


def backward(op: str, size: int, key: int, value: int) -> float:
  """FLOPs per token and head of the backward pass alone; as `forward`."""
  if op in cases.PLAIN:
    return size * (6 * key + 4 * value) + 8 * key * value
  flops = size * (10 * key + 8 * value)
  if op == "mdn":
    return flops + 24 * key * value + 6 * size**2
  return flops + 12 * key * value


def walk_rate(shape: cases.Shape, size: int, dtype: str) -> float:
  """FLOP/s of a chunk's product with a state and of its own to the next one.

  Every chunk of a sequence needs both, of all heads at once, and none before
  the one that precedes it. The best of five.

  Args:
    shape: the sizes.
    size: C.
    dtype: of the operands; sums are float32.
  """
  batch, steps = shape.batch * shape.heads, 64
  state = jnp.zeros((batch, shape.key, shape.value), dtype)
  k = jnp.ones((batch, size, shape.key), dtype)
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def step(state, _):
    read = dot("bck,bkv->bcv", k, state).astype(dtype)
    return (state + dot("bck,bcv->bkv", k, read)).astype(dtype), None

  run = jax.jit(lambda x: jax.lax.scan(step, x, None, length=steps)[0])
  flops = steps * batch * 4 * size * shape.key * shape.value
  return reports.flop_rate(lambda: run(state), flops)
