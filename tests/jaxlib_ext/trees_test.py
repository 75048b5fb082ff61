"""Arguments that are a tree beside the parameters, or a function of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import optim
from jaxlib_ext import labels, paths, quantization, trees


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Net:
  """Parameters that can be called."""

  w: Any
  b: Any = None

  def __call__(self, x):
    return x @ self.w


@jax.tree_util.register_static
class Rule:
  """A function that is a node without leaves."""

  def __call__(self, params):
    return jax.tree.map(lambda _: "vector", params)


class Module(nnx.Module):
  def __init__(self):
    self.dense = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    self.a_log = nnx.Param(jnp.ones((3, 4)))

  def __call__(self, x):
    return self.dense(x)


NET = Net(jnp.ones((4, 6)), jnp.zeros(6))


@pytest.mark.parametrize(
  "make", [lambda: NET, Module, lambda: nnx.state(Module(), nnx.Param)]
)
def test_a_tree_that_is_callable(make):
  params = make()
  tree = labels.label_params(params)
  assert jax.tree.leaves(labels.resolve(tree, params)) == jax.tree.leaves(tree)
  tx = optim.muon(1e-3, labels=tree)
  tx.init(params)


def test_axes_in_a_tree_that_is_callable():
  axes = Net(optim.MatrixAxes(1, 0))
  tree = Net(NET.w)
  tx = optim.muon(1e-3, labels=Net("matrix"), matrix_axes=axes)
  tx.update(tree, tx.init(tree), tree)
  # Nothing but None in it: a tree all the same, of the parameters' type.
  assert trees.given(Net(None), tree) == Net(None)


@pytest.mark.parametrize(
  "function",
  [
    lambda p: jax.tree.map(lambda _: "vector", p),
    Rule(),
    jax.tree_util.Partial(
      lambda label, p: jax.tree.map(lambda _: label, p), "vector"
    ),
  ],
)
def test_functions_are_called(function):
  assert labels.resolve(function, NET) == Net("vector", "vector")


def test_a_dict_speaks_of_an_nnx_state():
  params = nnx.state(Module(), nnx.Param)
  given = {"a_log": "vector", "dense": "matrix"}
  full = labels.resolve(given, params)
  assert jax.tree.structure(full) == jax.tree.structure(params)
  assert jax.tree.leaves(full) == ["vector", "matrix", "matrix"]


@pytest.mark.parametrize(
  ("given", "words"),
  [
    ({"dense": "matrix"}, "nothing stands for 'a_log'"),
    (
      {"a_log": "vector", "dense": "matrix", "c": {"d": "head"}},
      "'c' is none of them",
    ),
  ],
)
def test_what_does_not_fit_is_named(given, words):
  params = nnx.state(Module(), nnx.Param)
  with pytest.raises(ValueError, match=f"labels: .*{words}"):
    labels.resolve(given, params)


def test_names_leave_out_the_box():
  params = {"state": nnx.state(Module(), nnx.Param), "value": jnp.ones(2)}
  flat = jax.tree_util.tree_leaves_with_path(params)
  assert [paths.leaf_name(path) for path, _ in flat] == [
    "state/a_log",
    "state/dense/bias",
    "state/dense/kernel",
    "value",
  ]


def test_one_parameter_by_its_class():
  tensor = quantization.quantize(jnp.ones((4, 4)), "int8")
  assert labels.is_param(tensor)
  assert not labels.is_param(nnx.Param(tensor))
  assert not labels.is_param(nnx.state(Module()))
  found = labels.label_params({"w": nnx.Param(tensor)})
  assert jax.tree.leaves(found) == ["matrix"]
