"""FLOPs of mixing, counted by hand and against compiled programs."""

import functools

import jax
import pytest

from jaxlib_ext import hlo
from models import config, flops, transformer

_SIZES = dict(
  vocab_size=32, d_model=32, num_layers=3, num_heads=4, head_dim=6, d_ff=16
)


def _mixing(length, **fields):
  return flops.mixing(transformer.Config(**{**_SIZES, **fields}), length)


@pytest.mark.parametrize("mixer", config.LINEAR)
def test_linear_mixers_do_not_know_the_length(mixer):
  sizes = dict(linear_heads=2, linear_key_dim=5, linear_value_dim=7)
  got = _mixing(32768, mixers=(mixer,), **sizes)
  assert got == _mixing(1, mixers=(mixer,), **sizes)
  products = 3 if mixer in ("mdn", "gdn", "kda") else 2
  assert got == 3 * 2 * products * 2 * 5 * 7


@pytest.mark.parametrize(
  ("fields", "keys"),
  [
    (dict(mixers=("full",)), 3 * 4 * 100),
    (dict(mixers=("window",), window=(10,), sink=2), 3 * 4 * 12),
    (dict(mixers=("window",), window=(1, 2, 3, 500), sink=0), 3 * 106),
    (dict(mixers=("full", "window"), window=(10,), sink=0), 4 * (200 + 10)),
    (
      dict(mixers=("sparse",), density=0.25, block_size=10),
      3 * 4 * (25 + 10),
    ),
    (dict(mixers=("sparse",), density=1.0), 3 * 4 * 100),
    (
      dict(
        mixers=("in_context",), context=40, keep=0.5, sharp=0.25, density=0.1,
        block_size=10,
      ),
      3 * 4 * (0.25 * 80 + 0.75 * 16),
    ),
  ],
)  # fmt: skip
def test_softmax_mixers_count_the_keys_they_meet(fields, keys):
  assert _mixing(100, **fields) == pytest.approx(4 * 6 * keys)


def test_full_attention_is_what_is_compiled():
  """Of one block of queries, and with the weights, without the embedding."""
  cfg = transformer.Config(**_SIZES)
  params = jax.eval_shape(lambda: transformer.init(jax.random.key(0), cfg))
  tokens = jax.ShapeDtypeStruct((2, 100), "int32")
  apply = functools.partial(transformer.apply, cfg=cfg)
  compiled = jax.jit(lambda p, t: apply(p, t).logits).lower(params, tokens)
  weights = (
    sum(x.size for x in jax.tree.leaves(params) if x.ndim > 1 and x.size > 96)
    - params["embed"].size
  )
  want = 200 * (2 * weights + flops.mixing(cfg, 100))
  assert hlo.costs(compiled.compile().as_text()).matmul_flops == want
