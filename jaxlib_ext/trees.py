"""Arguments that are a tree beside the parameters, or a function of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

# How many names a message lists.
_MOST_NAMES = 5


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
  is_entry: Callable[[Any, Any], bool] | None = None,
  is_param: Callable[[Any], bool] | None = None,
) -> Any:
  """Gives every parameter the entry of a tree that stands at or above it.

  The two need not be of the same types: children are matched by name, so that
  a dictionary can speak of an `nnx.State`, a dataclass or a sequence. A key of
  a dictionary may be a whole path, `"attn/query"` or `("attn", "query")`.

  Args:
    name: of the argument, for messages.
    entries: a pytree like `params` or a prefix of it.
    params: the parameters; nodes that hold none, as masked ones, need no
      entry.
    is_entry: `(x, node) -> bool`: whether x, found at a node of `params`, is
      an entry rather than a tree of them; default whether it is a leaf.
    is_param: what else than a leaf of `params` is a parameter.

  Returns:
    A pytree like `params` with an entry for each parameter.

  Raises:
    ValueError: a parameter without an entry, or an entry for none; the first
      is named.
  """
  found = spread_leaves(
    name, entries, params, is_entry=is_entry, is_param=is_param
  )
  return jax.tree.structure(params, is_leaf=is_param).unflatten(found)


def spread_leaves(
  name: str,
  entries: Any,
  params: Any,
  *,
  is_entry: Callable[[Any, Any], bool] | None = None,
  is_param: Callable[[Any], bool] | None = None,
) -> list[Any]:
  """The entries of `spread`, in the order of the parameters."""
  is_entry = is_entry or (lambda x, node: _is_leaf(x))
  unfit = f"{name}: its tree does not fit the parameters"

  def walk(entries, node, path):
    count = len(jax.tree.leaves(node, is_leaf=is_param))
    if not count:
      return []
    if is_entry(entries, node):
      return [entries] * count
    at_param = _is_leaf(node) or (is_param is not None and is_param(node))
    children = {} if at_param else _children(node)
    named = _nested(entries, children)
    if at_param and list(named) == ["value"]:
      # A variable in the tree of entries where the other has the array.
      return walk(named["value"], node, path)
    missing = [
      child
      for child in children
      if child not in named
      and jax.tree.leaves(children[child], is_leaf=is_param)
    ]
    if missing or at_param:
      first = "/".join((*path, *missing[:1]))
      raise ValueError(
        f"{unfit}: nothing stands for {first!r}, got "
        f"{_in_words(named, entries)}"
      )
    extra = [child for child in named if child not in children]
    if extra:
      raise ValueError(
        f"{unfit}: {'/'.join((*path, extra[0]))!r} is none of them; there they "
        f"have {some(list(children))}"
      )
    return [
      entry
      for child, below in children.items()
      for entry in walk(named.get(child), below, (*path, child))
    ]

  return walk(entries, params, ())


def some(names: Sequence[str]) -> str:
  """Lists the first few names: a message does not grow with a tree."""
  shown = ", ".join(map(repr, names[:_MOST_NAMES]))
  more = len(names) - _MOST_NAMES
  return f"{shown} and {more} more" if more > 0 else shown or "nothing"


def _is_leaf(x: Any) -> bool:
  return jax.tree_util.all_leaves([x])


def _in_words(named: dict[str, Any], entries: Any) -> str:
  """What stands in place of an entry."""
  if named:
    return f"entries for {some(list(named))}"
  text = repr(entries)
  return text if len(text) <= 80 else f"a value of {type(entries).__name__}"


def _children(node: Any) -> dict[str, Any]:
  """A node's children by name, in JAX's order."""
  flat, _ = jax.tree_util.tree_flatten_with_path(
    node, is_leaf=lambda x: x is not node
  )
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return {name(path): child for path, child in flat}


def _nested(entries: Any, children: Mapping[str, Any]) -> dict[str, Any]:
  """A node's entries by name; keys that are paths become dictionaries."""
  if not isinstance(entries, Mapping):
    return {} if _is_leaf(entries) else _children(entries)
  out = {}
  for key, entry in entries.items():
    parts = tuple(map(str, key)) if isinstance(key, tuple) else (str(key),)
    if len(parts) == 1 and parts[0] not in children:
      parts = tuple(parts[0].split("/"))
    if len(parts) == 1:
      out[parts[0]] = entry
    else:
      out[parts[0]] = {**out.get(parts[0], {}), parts[1:]: entry}
  return out
