"""How many bytes parameters and optimizer state take, from shapes alone."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlib_ext import labels, sharding


def _bits(dtype: Any) -> int:
  if dtype == jnp.bool_:
    return 8
  if jnp.issubdtype(dtype, jnp.integer):
    return jnp.iinfo(dtype).bits
  if jnp.issubdtype(dtype, jnp.floating):
    return jnp.finfo(dtype).bits
  return 8 * dtype.itemsize


def _array_bytes(x: Any, where: NamedSharding | None) -> int:
  shape = x.shape if where is None else where.shard_shape(x.shape)
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    data = jax.eval_shape(jax.random.key_data, x)
    shape, dtype = (*shape, *data.shape[x.ndim :]), data.dtype
  else:
    dtype = x.dtype
  return -(-math.prod(shape) * _bits(dtype) // 8)


def _tree_bytes(tree: Any, shardings: Any) -> int:
  """Bytes of a tree; `shardings` has one per array, or is None."""
  if shardings is None:
    packed = lambda x: hasattr(type(x), "nbytes_packed")
    return sum(
      x.nbytes_packed if packed(x) else _array_bytes(x, None)
      for x in jax.tree.leaves(tree, is_leaf=packed)
    )
  pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
  return sum(_array_bytes(x, where) for x, where in pairs)


def _param_shardings(params: Any) -> Any:
  """One `NamedSharding` per parameter, or None where no leaf has one."""
  leaves, treedef = jax.tree.flatten(params, is_leaf=labels.is_param)
  found = [getattr(jax.tree.leaves(x)[0], "sharding", None) for x in leaves]
  named = [s for s in found if isinstance(s, NamedSharding)]
  if not named:
    return None
  whole = NamedSharding(named[0].mesh, PartitionSpec())
  return treedef.unflatten(
    [s if isinstance(s, NamedSharding) else whole for s in found]
  )


def state_bytes(
  tx: optax.GradientTransformation, params: Any
) -> dict[str, float]:
  """Bytes that parameters and optimizer state hold between steps.

  Nothing is computed or allocated. Four-bit types count half a byte, and a
  quantized parameter its packed bytes. Where parameters carry a
  `NamedSharding`, all figures are for one device, the state divided as by
  `jaxlib_ext.sharding.state_shardings`.

  Args:
    tx: the optimizer.
    params: pytree of arrays, abstract values or `QTensor`s.

  Returns:
    "params", "state", "total": bytes; "per_param": total divided by the
    number of parameters (by one device's share of them, where sharded).
  """
  state = jax.eval_shape(tx.init, params)
  where = _param_shardings(params)
  leaves = jax.tree.leaves(params, is_leaf=labels.is_param)
  if where is None:
    param_where = state_where = None
    count = sum(math.prod(x.shape) for x in leaves)
  else:
    param_where = sharding.expand(params, where)
    state_where = sharding.state_shardings(tx, params, where)
    count = sum(
      math.prod(s.shard_shape(x.shape))
      for x, s in zip(leaves, jax.tree.leaves(where), strict=True)
    )
  param_bytes = _tree_bytes(params, param_where)
  held = _tree_bytes(state, state_where)
  total = param_bytes + held
  return {
    "params": param_bytes,
    "state": held,
    "total": total,
    "per_param": total / max(count, 1),
  }
