"""Random transformers: decoding token by token is the full forward pass."""

import functools

import jax
import numpy as np
from hypothesis import strategies as st

from models import config, decode, transformer
from tests import common
from tests.fuzz import budget

# "sparse" and "in_context" choose blocks by rows of queries, which one query
# has none of.
_DECODABLE = [
  name for name in config.MIXERS if name not in ("sparse", "in_context")
]


@st.composite
def _models(draw):
  groups = draw(st.integers(1, 2))
  heads = groups * draw(st.integers(1, 2))
  linear_groups = draw(st.integers(1, 2))
  layers = draw(st.integers(1, 3))
  mixers = draw(
    st.lists(st.sampled_from(_DECODABLE), min_size=1, max_size=layers)
  )
  return transformer.Config(
    vocab_size=draw(st.integers(2, 40)),
    d_model=2 * heads * draw(st.integers(1, 4)),
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=groups,
    head_dim=draw(st.sampled_from([0, 2, 6])),
    d_ff=draw(st.integers(1, 20)),
    norm=draw(st.sampled_from(["rms", "single_rms"])),
    tie_embeddings=draw(st.booleans()),
    embed_projection=draw(st.booleans()),
    scan_layers=draw(st.booleans()),
    mixers=tuple(mixers),
    window=(draw(st.integers(1, 9)),),
    sink=draw(st.integers(0, 3)),
    block_size=draw(st.sampled_from([4, 8])),
    linear_heads=linear_groups * draw(st.integers(1, 2)),
    linear_key_heads=linear_groups,
    linear_key_dim=draw(st.integers(1, 8)),
    linear_value_dim=draw(st.integers(1, 8)),
    conv_width=draw(st.integers(1, 4)),
    output_gate=draw(st.sampled_from(["own", "silu", "sigmoid"])),
    init_std=0.2,
  )


@budget.examples(
  4,
  200,
  cfg=_models(),
  length=st.integers(1, 12),
  seed=st.integers(0, 2**16),
)
def test_decoding_is_the_full_forward_pass(cfg, length, seed):
  """Also after a prompt in one piece, and whatever its length."""
  params = transformer.init(jax.random.key(seed), cfg)
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, cfg.vocab_size, (2, length))
  want = transformer.apply(params, tokens, cfg=cfg).logits
  step = jax.jit(functools.partial(transformer.decode_step, cfg=cfg))
  start = int(rng.integers(0, length))
  cache = transformer.init_cache(cfg, 2, length)
  if start:
    logits, cache = decode.prefill(params, cache, tokens[:, :start], cfg=cfg)
    _assert_close(logits, want[:, start - 1], want)
  for t in range(start, length):
    logits, cache = step(params, cache, tokens[:, t])
    _assert_close(logits, want[:, t], want)


def _assert_close(got, want, whole):
  # Three layers of products and norms, and two orders of summation; where a
  # norm divides by little, its rounding counts as much more.
  size = np.abs(whole).max()
  common.assert_close(got / size, want / size, units=2**10)
