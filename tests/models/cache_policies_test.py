"""Cache policies against ordinary decoding and against float64 numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from models import attention, block, cache_policies, decode, layers, transformer
from models.cache_policies import rolling
from tests.common import assert_close, jitted

CFG = transformer.Config(
  vocab_size=29,
  d_model=16,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  d_ff=24,
  init_std=0.3,
  mixers=("full", "window"),
  window=(5,),
  sink=1,
)
B, T, H, G, K = 2, 13, 4, 2, 4
WIDTH = G * K


@functools.cache
def model():
  """Parameters with exact factors and open gates, tokens, logits."""
  params = jitted(transformer.init, cfg=CFG)(jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (B, 12), 0, 29)
  out = jitted(transformer.apply, cfg=CFG, return_qkv=True)(params, tokens)
  factors = jitted(cache_policies.low_rank_factors, cfg=CFG, rank=WIDTH)(
    out.qkv
  )
  params = cache_policies.with_factors(params, factors, CFG)
  gates = jax.random.normal(jax.random.key(2), (3, 16, G))
  params = cache_policies.with_gates(params, gates, jnp.zeros((3, G)), CFG)
  return params, tokens, out


def random_heads(seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda heads: rng.standard_normal((B, T, heads, K), np.float32)
  return block.Heads(normal(H), normal(G), normal(G))


def run(policy, heads, p, pieces):
  """Outputs `[B, T, H, K]` of one layer, and every state."""
  rng = np.random.default_rng(9)
  x = rng.standard_normal((B, T, 16), np.float32)

  @jitted
  def attend(state, x, heads, start):
    positions = start + jnp.arange(x.shape[1])
    rotation = layers.rope_table(positions, K, CFG.rope_theta)
    new = cache_policies.New(x, heads, rotation, start)
    return policy.attend(state, new, p, CFG)

  state, start = policy.init(CFG, B, 100), 0
  out, states = [], []
  for piece in pieces:
    cut = lambda x, at=start, n=piece: jnp.asarray(x[:, at : at + n])
    y, state = attend(state, cut(x), jax.tree.map(cut, heads), jnp.int32(start))
    out.append(np.asarray(y))
    states.append(state)
    start += piece
  return np.concatenate(out, axis=1), states, x


def rotate(x, position):
  """One head [K] turned by its position."""
  angle = position * CFG.rope_theta ** (-np.arange(0, K, 2) / K)
  a, b = x[: K // 2], x[K // 2 :]
  c, s = np.cos(angle), np.sin(angle)
  return np.concatenate([a * c - b * s, a * s + b * c])


def softmax_output(q, keys, values):
  scores = np.array([q @ k for k in keys]) / np.sqrt(K)
  weights = np.exp(scores - scores.max())
  return weights @ np.array(values) / weights.sum()


class ModelTest(parameterized.TestCase):
  @parameterized.parameters(
    cache_policies.Full(),
    cache_policies.Streaming((8,), 4),
    cache_policies.LowRank(WIDTH, 2),
    cache_policies.Retention(12),
  )
  def test_where_nothing_is_lost_it_is_ordinary_decoding(self, policy):
    params, tokens, out = model()
    prefill = jitted(decode.prefill, cfg=CFG)
    cache = transformer.init_cache(CFG, B, 40, policy=policy)
    for start in (0, 4, 8):
      logits, cache = prefill(params, cache, tokens[:, start : start + 4])
      assert_close(logits, out.logits[:, start + 3], units=128)
    self.assertEqual(int(cache.length), 12)

  def test_bytes(self):
    # Of two full layers and one window of 5 + 1: keys and values, 2 heads of
    # 4, float32.
    token = 2 * G * K * 4
    ring = 6 * token
    size = functools.partial(decode.cache_bytes, CFG, 1000)
    self.assertEqual(size(), 2 * 1000 * token + ring)
    streaming = cache_policies.Streaming((30,), 2)
    self.assertEqual(size(policy=streaming), 2 * 32 * token + ring)
    # A rank of 2 is a quarter; 7 tokens whole.
    low_rank = cache_policies.LowRank(2, 7)
    self.assertEqual(size(policy=low_rank), 2 * (1000 // 4 + 7) * token + ring)
    # With a position and a log beta of each head and slot.
    retention = cache_policies.Retention(50)
    self.assertEqual(
      size(policy=retention), 2 * 50 * (token + 2 * G * 4) + ring
    )

  def test_missing_parameters_and_a_full_cache_are_named(self):
    params, tokens, _ = model()
    added = ("cskv", "trim")
    bare = lambda p: {n: x for n, x in p.items() if n[:4] not in added}
    stacks = {n: bare(p) for n, p in params["layers"].items()}
    plain = {**params, "layers": stacks}
    for policy, message in (
      (cache_policies.LowRank(3), "params: .*without factors"),
      (cache_policies.Retention(3), "params: .*without gates"),
    ):
      cache = transformer.init_cache(CFG, B, 20, policy=policy)
      with self.assertRaisesRegex(ValueError, message):
        decode.prefill(plain, cache, tokens, cfg=CFG)
    cache = transformer.init_cache(CFG, B, 20, policy=cache_policies.LowRank(3))
    with self.assertRaisesRegex(ValueError, "rank: got 3; allowed: 8"):
      decode.prefill(params, cache, tokens, cfg=CFG)
    cache = transformer.init_cache(
      CFG, B, 11, policy=cache_policies.LowRank(WIDTH)
    )
    with self.assertRaisesRegex(ValueError, "length of 12.*max_length=11"):
      decode.prefill(params, cache, tokens, cfg=CFG)

  @parameterized.parameters(
    (lambda: cache_policies.Streaming((0,)), "window: got 0"),
    (lambda: cache_policies.Streaming((4, 4)), "window: got .*one number"),
    (lambda: cache_policies.Streaming((4,), -1), "sink: got -1"),
    (lambda: cache_policies.LowRank(0), "rank: got 0"),
    (lambda: cache_policies.LowRank(2, 0), "window: got 0"),
    (lambda: cache_policies.Retention(0), "budget: got 0"),
    (
      lambda: cache_policies.low_rank_factors(model()[2].qkv, CFG, rank=9),
      "rank: got 9; allowed: 1 to .* = 8",
    ),
  )
  def test_bad_arguments(self, make, message):
    with self.assertRaisesRegex(ValueError, message):
      make()


class RollingTest(parameterized.TestCase):
  def test_positions_of_slots(self):
    # Two sinks and a ring of three, after 1, 4, 5 and 9 tokens.
    for length, want in (
      (0, [-1, -1, -1, -1, -1]),
      (1, [0, -1, -1, -1, -1]),
      (4, [0, 1, 2, 3, -1]),
      (5, [0, 1, 2, 3, 4]),
      (9, [0, 1, 8, 6, 7]),
    ):
      got = rolling.positions(5, 2, jnp.int32(length))
      np.testing.assert_array_equal(got, want)

  def test_streaming_renumbers_what_it_kept(self):
    window, sink = 4, 2
    heads = random_heads()
    policy = cache_policies.Streaming((window,), sink)
    got, states, _ = run(policy, heads, {}, (1,) * T)
    self.assertEqual(states[-1].keys.shape, (B, 6, G, K))
    want = np.zeros(got.shape)
    for b, t, h in np.ndindex(B, T, H):
      kept = [s for s in range(t + 1) if s < sink or s > t - window]
      g = h // (H // G)
      # Everything in the cache stands at its place there.
      keys = [rotate(heads.k[b, s, g], i) for i, s in enumerate(kept)]
      q = rotate(heads.q[b, t, h], len(kept) - 1)
      values = [heads.v[b, s, g] for s in kept]
      want[b, t, h] = softmax_output(q, keys, values)
    assert_close(got, want)
    # A prompt at once evicts as it goes.
    assert_close(run(policy, heads, {}, (T,))[0], want)


class LowRankTest(parameterized.TestCase):
  def test_old_tokens_are_projected_and_recent_ones_whole(self):
    heads, rng = random_heads(), np.random.default_rng(3)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    p = {
      f"cskv_{x}_{end}": normal(*shape)
      for x in ("keys", "values")
      for end, shape in (("down", (WIDTH, 3)), ("up", (3, WIDTH)))
    }
    window = 2
    policy = cache_policies.LowRank(3, window)
    pieces = (4, *(1,) * (T - 4))
    got, states, _ = run(policy, heads, p, pieces)
    self.assertEqual(states[0].keys.shape, (B, 100, 3))
    lossy = lambda x, name: (
      x.reshape(B, T, WIDTH) @ p[f"cskv_{name}_down"] @ p[f"cskv_{name}_up"]
    ).reshape(x.shape)
    old_k, old_v = lossy(heads.k, "keys"), lossy(heads.v, "values")
    want = np.zeros(got.shape)
    for b, t, h in np.ndindex(B, T, H):
      g = h // (H // G)
      # The first four came together and see each other whole.
      start = 0 if t < 4 else t
      pick = lambda old, x, b=b, g=g, start=start, t=t: [
        (old if s < start - window else x)[b, s, g] for s in range(t + 1)
      ]
      keys = [rotate(k, s) for s, k in enumerate(pick(old_k, heads.k))]
      q = rotate(heads.q[b, t, h], t)
      want[b, t, h] = softmax_output(q, keys, pick(old_v, heads.v))
    assert_close(got, want)

  def test_factors_lose_the_least(self):
    heads = model()[2].qkv
    factors = cache_policies.low_rank_factors(heads, CFG, rank=3)
    self.assertEqual(factors.keys_up.shape, (3, 3, WIDTH))
    for layer in range(3):
      values = np.asarray(heads.v[layer], np.float64).reshape(-1, WIDTH)
      project = factors.values_down[layer] @ factors.values_up[layer]
      lost = np.sum((values - values @ project) ** 2)
      # Eckart and Young: the squares of the singular values left out.
      least = np.sum(np.linalg.svd(values, compute_uv=False)[3:] ** 2)
      np.testing.assert_allclose(lost, least, rtol=1e-4)
      # Keys are taken before the rotation.
      keys = np.asarray(heads.k[layer], np.float64)
      for b, t, g in np.ndindex(keys.shape[:3]):
        keys[b, t, g] = rotate(keys[b, t, g], -t)
      keys = keys.reshape(-1, WIDTH)
      project = factors.keys_down[layer] @ factors.keys_up[layer]
      lost = np.sum((keys - keys @ project) ** 2)
      least = np.sum(np.linalg.svd(keys, compute_uv=False)[3:] ** 2)
      np.testing.assert_allclose(lost, least, rtol=1e-4)


class RetentionTest(parameterized.TestCase):
  def test_the_least_retained_is_evicted(self):
    budget, heads = 4, random_heads()
    rng = np.random.default_rng(5)
    p = {
      "trim_gate": rng.standard_normal((16, G)).astype(np.float32),
      "trim_bias": np.array([0.5, -1.0], np.float32),
    }
    policy = cache_policies.Retention(budget)
    got, states, x = run(policy, heads, p, (1,) * T)
    logits = x.astype(np.float64) @ p["trim_gate"] + p["trim_bias"]
    log_beta = -np.log1p(np.exp(-logits))
    want, kept = np.zeros(got.shape), {}
    for t, b, g in np.ndindex(T, B, G):
      seen = [*kept.get((b, g), []), t]
      keys = [rotate(heads.k[b, s, g], s) for s in seen]
      values = [heads.v[b, s, g] for s in seen]
      for h in range(g * (H // G), (g + 1) * (H // G)):
        q = rotate(heads.q[b, t, h], t)
        want[b, t, h] = softmax_output(q, keys, values)
      if len(seen) > budget:
        seen.remove(min(seen, key=lambda s: (t - s) * log_beta[b, s, g]))
      kept[b, g] = seen
      if b == B - 1 and g == G - 1:
        for (i, j), positions in kept.items():
          held = np.asarray(states[t].positions[i, :, j])
          self.assertEqual(sorted(held[held >= 0]), positions)
    assert_close(got, want)

  def test_training_form(self):
    heads = jax.tree.map(jnp.asarray, random_heads())
    rng = np.random.default_rng(7)
    log_beta = np.float32(-rng.uniform(0, 2, (B, T, G)))
    attend = jitted(cache_policies.retention_attention)
    got = attend(heads, log_beta)
    want = np.zeros(got.shape)
    for b, t, h in np.ndindex(B, T, H):
      g = h // (H // G)
      age = t - np.arange(t + 1)
      # A logit is a product with a key of one more number.
      keys = np.concatenate(
        [heads.k[b, : t + 1, g], (age * log_beta[b, : t + 1, g])[:, None]], 1
      )
      q = np.append(heads.q[b, t, h], np.sqrt(K))
      want[b, t, h] = softmax_output(q, keys, heads.v[b, : t + 1, g])
    assert_close(got, want)
    # A gate that forgets nothing is causal attention.
    want = jitted(attention.causal_attention)(*heads)
    assert_close(attend(heads, 0 * log_beta), want)

  def test_capacity_loss(self):
    # One half forever: 1, 1.5, 1.75, 1.875 keys, over a budget of 1.
    log_beta = jnp.full((1, 4, 1), np.log(0.5), jnp.float32)
    loss = jitted(jax.value_and_grad(cache_policies.capacity_loss))
    got, grad = loss(log_beta, 1)
    np.testing.assert_allclose(got, (0.5 + 0.75 + 0.875) / 4, rtol=1e-6)
    self.assertEqual(loss(log_beta, 2)[0], 0)
    # It pulls every gate down, and not those of keys that nothing follows.
    self.assertTrue(np.all(grad[0, :3] > 0))
    self.assertEqual(grad[0, 3, 0], 0)


if __name__ == "__main__":
  absltest.main()
