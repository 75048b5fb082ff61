"""Roles of parameters by their names and shapes."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.core import frozen_dict

import optim
from jaxlib_ext import labels, quantization
from tests.jaxlib_ext import model_trees


def abstract(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def flat(names, shapes):
  return {
    name: abstract(*shape) for name, shape in zip(names, shapes, strict=True)
  }


def nested(names, shapes):
  """The same as dicts of dicts; in JAX's order, so labels come by name."""
  tree: dict[str, Any] = {}
  for name, shape in zip(names, shapes, strict=True):
    *path, last = name.replace(".", "/").split("/")
    node = tree
    for part in path:
      node = node.setdefault(part, {})
    node[last] = abstract(*shape)
  return tree


def by_name(tree):
  return {
    leaf.name.replace(".", "/"): leaf.label for leaf in labels.explain(tree)
  }


CASES = [
  (name, layout)
  for name, text in model_trees.TREES.items()
  for layout in ("per_layer", "stacked")
  if layout == "per_layer" or "#" in text
]


@pytest.mark.parametrize(("name", "layout"), CASES)
@pytest.mark.parametrize("make", [flat, nested])
def test_public_models(name, layout, make):
  text = model_trees.TREES[name]
  if layout == "per_layer":
    names, shapes, want = model_trees.per_layer(text)
  else:
    names, shapes, want = model_trees.stacked(text, 7)
  keys = [name.replace(".", "/") for name in names]
  tree = make(names, shapes)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    labels.label_params(tree)
  assert by_name(tree) == dict(zip(keys, want, strict=True))


# One dimension fewer than the kernel beside it, and one vector per layer.
@pytest.mark.parametrize(
  ("kernel", "bias"),
  [
    ("w", "b"),
    ("wq", "bq"),
    ("w1", "b1"),
    ("W_in", "b_in"),
    ("kernel", "bias"),
  ],
)
def test_biases_of_stacked_kernels(kernel, bias):
  tree = {"dense": {kernel: abstract(2, 4, 4), bias: abstract(2, 4)}}
  assert labels.label_params(tree)["dense"] == {
    kernel: "matrix",
    bias: "vector",
  }


@pytest.mark.parametrize(
  "tree",
  [
    {"a": abstract(8, 2), "b": abstract(2, 8)},
    {"lora_a": abstract(3, 8, 2), "lora_b": abstract(3, 2, 8)},
    {"w": abstract(4, 6), "b": abstract(6, 4)},
    {"up": abstract(8, 16), "foo": abstract(16, 8)},
    {"norm_proj": abstract(8, 8), "ada_ln": {"w": abstract(8, 48)}},
    {"time_embed": {"mlp": abstract(8, 8), "0": {"weight": abstract(8, 8)}}},
    {"multi_head_attention": {"w": abstract(8, 8)}},
    {"head_dim_proj": abstract(8, 6)},
    {"router_logits": {"kernel": abstract(8, 4)}},
    {"text_embedding": {"weight": abstract(8, 99), "bias": abstract(8)}},
    {"in": abstract(4, 8), "out": abstract(8, 4)},
  ],
)
def test_matrices(tree):
  found = [x.label for x in labels.explain(tree) if len(x.shape) > 1]
  assert set(found) == {"matrix"}


def test_the_last_of_a_chain():
  sizes = (784, 300, 100, 100, 10)
  tree = {
    f"Dense_{i}": {"kernel": abstract(*pair), "bias": abstract(pair[1])}
    for i, pair in enumerate(zip(sizes, sizes[1:], strict=False))
  }
  found = by_name(tree)
  assert [found[f"Dense_{i}/kernel"] for i in range(4)] == [
    *["matrix"] * 3,
    "head",
  ]
  # All its sizes are found elsewhere: nothing says that it is the last.
  tree["Dense_4"] = {"kernel": abstract(10, 784)}
  assert set(by_name(tree).values()) == {"matrix", "vector"}


def test_tables_of_one_module():
  tree = {
    "embed": {"tokens": abstract(99, 8), "positions": abstract(12, 8)},
    "linear": {"w": abstract(8, 99)},
    "extra": {"w": abstract(8, 12)},
  }
  assert by_name(tree) == {
    "embed/tokens": "embedding",
    "embed/positions": "embedding",
    "linear/w": "head",
    "extra/w": "matrix",
  }


def test_stacks_know_their_vectors_without_names():
  tree = {
    "layers": {"q": abstract(3, 4, 4), "anything": abstract(3, 4)},
    "other": abstract(3, 4),
  }
  assert labels.label_params(tree) == {
    "layers": {"q": "matrix", "anything": "vector"},
    "other": "matrix",
  }


class Net(nnx.Module):
  def __init__(self, rngs):
    self.a_log = nnx.Param(jnp.ones((3, 4)))
    self.layers = nnx.List([nnx.Linear(4, 6, rngs=rngs) for _ in range(2)])
    self.lm_head = nnx.Linear(4, 9, use_bias=False, rngs=rngs)

  def __call__(self, x):
    return x


NNX_WANT = {
  "a_log": "vector",
  "layers/0/bias": "vector",
  "layers/0/kernel": "matrix",
  "layers/1/bias": "vector",
  "layers/1/kernel": "matrix",
  "lm_head/kernel": "head",
}


@pytest.mark.parametrize(
  "view",
  [
    lambda m: m,
    nnx.state,
    lambda m: nnx.state(m, nnx.Param),
    lambda m: nnx.split(m)[1],
    lambda m: nnx.to_pure_dict(nnx.state(m, nnx.Param)),
    lambda m: jax.eval_shape(lambda: nnx.state(m, nnx.Param)),
  ],
)
def test_nnx(view):
  tree = view(Net(nnx.Rngs(0)))
  assert by_name(tree) == NNX_WANT
  got = labels.label_params(tree)
  assert jax.tree.structure(got) == jax.tree.structure(tree)
  rules = [("kernel$", "head"), (r"^layers/0/bias$", "embedding")]
  found = {x.name: x for x in labels.explain(tree, rules)}
  assert found["layers/1/kernel"].label == "head"
  assert found["layers/1/kernel"].why == "the rule 'kernel$'"
  assert found["layers/0/bias"].label == "embedding"
  assert found["a_log"].label == "vector"


def test_linen_boxes():
  dense = linen.Dense(
    4, kernel_init=linen.with_partitioning(linen.initializers.ones, (None, "x"))
  )
  tree = dense.init(jax.random.key(0), jnp.ones((1, 3)))
  for view in (tree, frozen_dict.freeze(tree)):
    assert by_name(view) == {"params/bias": "vector", "params/kernel": "matrix"}


def test_attributes():
  @jax.tree_util.register_dataclass
  @dataclasses.dataclass
  class Model:
    tok_embeddings: Any
    blocks: Any
    lm_head: Any

  tree = Model(
    np.ones((32, 4)),
    [{"wq": np.ones((4, 4)), "norm": np.ones(4)}, optax.MaskedNode(), None],
    quantization.quantize(jnp.ones((4, 32)), "int8"),
  )
  got = labels.label_params(tree)
  assert (got.tok_embeddings, got.lm_head) == ("embedding", "head")
  assert got.blocks[0] == {"wq": "matrix", "norm": "vector"}
  assert got.blocks[1:] == [optax.MaskedNode(), None]


def test_python_numbers_are_vectors():
  assert labels.label_params({"lr": 0.5, "w": np.ones((2, 3))}) == {
    "lr": "vector",
    "w": "matrix",
  }


@pytest.mark.parametrize(
  ("tree", "name", "label"),
  [
    ({"tok_embed": abstract(99, 8), "foo": abstract(8, 99)}, "foo", "matrix"),
    ({"embed": {"kernel": abstract(99, 8)}}, "embed/kernel", "matrix"),
  ],
)
def test_doubts_are_told_once(tree, name, label):
  words = f"{name!r}.*taken for {label!r}.*rules="
  with pytest.warns(UserWarning, match=words) as caught:
    labels.label_params(tree)
  assert len(caught) == 1
  with pytest.warns(UserWarning, match=words):
    labels.resolve(None, tree)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    labels.resolve(None, tree)
    assert labels.label_params(tree, [(name, "head")]) is not None


def test_a_missing_head_is_told_once(caplog):
  tree = {"embedding": abstract(64, 4), "up_once": abstract(4, 8)}
  with caplog.at_level(logging.WARNING, "jaxlib_ext.labels"):
    labels.resolve(None, tree)
    labels.resolve(None, tree)
  (record,) = caplog.records
  assert "'head'" in record.getMessage()


def test_momentum_without_a_head(caplog):
  optim.column_normalized_sgd(0.1).init({"w": jnp.ones((4, 6))})
  assert "nothing has momentum" in caplog.text
  tree = {"embedding": jnp.ones((64, 4)), "norm": jnp.ones(4)}
  with pytest.warns(UserWarning, match="no parameter is labelled 'head'"):
    optim.column_normalized_sgd(0.1).init(tree)
  optim.column_normalized_sgd(0.1, momentum_on=("embedding",)).init(tree)
  optim.column_normalized_sgd(0.1, labels=labels.label_params).init(tree)


def test_describe():
  tree = {
    "embed": quantization.quantize(jnp.ones((9, 4)), "int8"),
    "layers": {"up": abstract(2, 4, 8), "norm": abstract(2, 4)},
    "lr": 0.1,
  }
  lines = [line.split("  ") for line in optim.describe_labels(tree).split("\n")]
  cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
  assert cells == [
    ["embed", "[9, 4]", "embedding", "its name, 'embed'"],
    ["layers/norm", "[2, 4]", "vector", "of a norm, 'norm'"],
    [
      *("layers/up", "[2, 4, 8]", "matrix", "[1] x [2], 2 of them"),
      "nothing says otherwise",
    ],
    ["lr", "[]", "vector", "fewer than two dimensions"],
    ["no parameter is labelled 'head'"],
  ]
  given = optim.describe_labels(tree, lambda p: "vector")
  assert given.count("given by labels=") == 4


class TestLeadsBack:
  @pytest.mark.parametrize(
    "name",
    [
      "layers/attn/o",
      "layers/0/attention/wo/kernel",
      "model.layers.3.self_attn.o_proj.weight",
      "blocks/mlp/down",
      "encoder/Attention/out/kernel",
      "h/0/attn/c_proj",
    ],
  )
  def test_writes_the_width(self, name):
    assert labels.leads_back(name)

  @pytest.mark.parametrize(
    "name",
    [
      "layers/attn/q",
      "layers/mlp/up",
      "layers/mlp/gate",
      "head/foo",
      "outer/v",
    ],
  )
  def test_reads_it(self, name):
    assert not labels.leads_back(name)
