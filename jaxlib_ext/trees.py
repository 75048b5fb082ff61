"""Arguments that are a tree beside the parameters, or a function of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxlib_ext import paths


def given(argument: Any, params: Any) -> Any:
  """Calls what is a function of the parameters; a tree stays as it is.

  A tree can be callable itself, as an `nnx.Module` or a registered dataclass
  with a `__call__` is. So what decides is whether `argument` is a node of a
  pytree that holds anything, or is of the parameters' own type, not whether
  it can be called.

  Args:
    argument: a pytree, or a function of `params` giving one.
    params: the parameters.

  Returns:
    The pytree.
  """
  if not callable(argument):
    return argument
  is_function = isinstance(argument, jax.tree_util.Partial)
  is_function |= jax.tree_util.all_leaves([argument])
  if is_function or (
    type(argument) is not type(params) and not jax.tree.leaves(argument)
  ):
    return argument(params)
  return argument


def spread(
  name: str,
  entries: Any,
  params: Any,
  *,
  is_entry: Callable[[Any], bool] | None = None,
  is_param: Callable[[Any], bool] | None = None,
) -> Any:
  """Gives every parameter the entry of a tree that stands at or above it.

  The trees are compared by their nodes, then by the names of their leaves,
  so that a dict can speak of an `nnx.State`.

  Args:
    name: of the argument, for messages.
    entries: a pytree like `params` or a prefix of it.
    params: the parameters.
    is_entry: what else than a leaf of `entries` is an entry.
    is_param: what else than a leaf of `params` is a parameter.

  Returns:
    A pytree like `params` with an entry for each parameter.

  Raises:
    ValueError: a parameter without an entry, or an entry for none; it is
      named.
  """
  try:
    return jax.tree.map(
      lambda entry, sub: jax.tree.map(lambda _: entry, sub, is_leaf=is_param),
      entries,
      params,
      is_leaf=is_entry,
    )
  except (ValueError, TypeError):
    pass  # Other kinds of nodes, or other names.
  named, treedef = jax.tree_util.tree_flatten_with_path(
    params, is_leaf=is_param
  )
  known = {
    _keys(path): entry
    for path, entry in jax.tree_util.tree_leaves_with_path(
      entries, is_leaf=is_entry
    )
  }
  unused = set(known)
  out = []
  for path, _ in named:
    keys = _keys(path)
    heads = (keys[:end] for end in range(len(keys), -1, -1))
    found = next((head for head in heads if head in known), None)
    if found is None:
      raise ValueError(
        f"{name}: its tree does not fit the parameters: nothing stands for "
        f"{paths.leaf_name(path)!r}"
      )
    unused.discard(found)
    out.append(known[found])
  if unused:
    raise ValueError(
      f"{name}: its tree does not fit the parameters: "
      f"{'/'.join(min(unused))!r} is none of them"
    )
  return treedef.unflatten(out)


def _keys(path: Any) -> tuple[str, ...]:
  """A leaf's name in parts; one key may hold slashes."""
  path = tuple(path)
  whole = paths.leaf_name(path)
  keys = tuple(paths.leaf_name((key,)) for key in path)
  return keys if whole == "/".join(keys) else keys[:-1]
