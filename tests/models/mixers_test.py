"""Each linear mixer as a layer, against float64 loops and against itself."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import kernels_pallas
from jaxlib_ext import quantization, specs
from models import config, gates, layers, mixers, transformer
from tests.common import assert_close
from tests.models import linear_reference

pytestmark = pytest.mark.slow

EPS = 2.0**-24
LINEAR = config.LINEAR
# Two value heads to a key head; sizes that no power of two hides.
CFG = transformer.Config(
  mixers=("mdn",),
  d_model=12,
  linear_heads=4,
  linear_key_heads=2,
  linear_key_dim=6,
  linear_value_dim=10,
  init_std=0.4,
  tau_factor=2.0,
  min_log_mu=-3.0,
)


def setup(mixer, *, length=70, batch=2, cfg=CFG):
  """A layer's parameters with gains away from one, and its input."""
  params = specs.init(jax.random.key(0), mixers.param_specs(mixer, cfg))
  keys = iter(jax.random.split(jax.random.key(1), 3))
  for name in ("o_norm", "d_skip", "f_bias"):
    if name in params:
      noise = jax.random.normal(jax.random.key(2), params[name].shape)
      params[name] += 0.3 * noise
  y = jax.random.normal(next(keys), (batch, length, cfg.d_model))
  return params, y


def segments(length=70):
  """Cuts inside and at the end of chunks, a segment of one token, one row."""
  cuts = np.zeros((2, length), np.int32)
  cuts[0, [3, 4, 64, 66]] = 1
  return jnp.asarray(np.cumsum(cuts, axis=1))


def run(mixer, cfg=CFG):
  return jax.jit(
    lambda y, p, **kwargs: mixers.apply(mixer, y, p, cfg, **kwargs)
  )


class MixerTest(parameterized.TestCase):
  @parameterized.parameters(*LINEAR)
  def test_is_the_float64_recurrence(self, mixer):
    p, y = setup(mixer)
    apply = run(mixer)
    # A chain of about 30 roundings (products, norms, a recurrence that
    # forgets), and norms that magnify those of rows with small outputs.
    got, _ = apply(y, p)
    assert_close(got, linear_reference.mix(mixer, y, p, CFG), 64)
    ids = segments()
    got, _ = apply(y, p, segments=ids)
    assert_close(got, linear_reference.mix(mixer, y, p, CFG, ids), 64)

  @parameterized.parameters(
    ("mdn", "silu"), ("gdn", "sigmoid"), ("kda", "silu")
  )
  def test_another_output_gate(self, mixer, name):
    cfg = dataclasses.replace(CFG, output_gate=name)
    p, y = setup(mixer, length=9)
    got, _ = run(mixer, cfg)(y, p)
    assert_close(got, linear_reference.mix(mixer, y, p, cfg), 64)

  @parameterized.parameters(*LINEAR)
  def test_no_gradient_from_later_tokens_or_other_segments(self, mixer):
    p, y = setup(mixer)
    ids = segments()
    slope = jax.jit(
      jax.grad(
        lambda y, t: jnp.sum(
          jnp.sin(mixers.apply(mixer, y, p, CFG, segments=ids)[0][0, t])
        )
      )
    )
    for t in (0, 3, 5, 63, 64, 69):
      g = np.asarray(slope(y, t))
      self.assertTrue(np.all(np.isfinite(g)))
      seen = (np.asarray(ids[0]) == ids[0, t]) & (np.arange(70) <= t)
      np.testing.assert_array_equal(g[0, ~seen], 0.0)
      np.testing.assert_array_equal(g[1], 0.0)
      self.assertTrue(np.any(g[0, t] != 0))
      # Of its own segment at least what the convolution reaches.
      self.assertTrue(np.all(np.any(g[0, seen][-4:] != 0, axis=-1)))

  @parameterized.parameters(*LINEAR)
  def test_pieces_and_steps_are_the_parallel_form(self, mixer):
    p, y = setup(mixer, length=21)
    apply = run(mixer)
    want, final = apply(y, p)
    state = mixers.init_state(mixer, CFG, 2)
    pieces = []
    # Shorter than the convolution, past it, then token by token.
    for start, stop in ((0, 2), (2, 15), *((t, t + 1) for t in range(15, 21))):
      out, new = apply(y[:, start:stop], p, state=state)
      self.assertEqual(jax.tree.structure(new), jax.tree.structure(state))
      jax.tree.map(
        lambda a, b: self.assertEqual((a.shape, a.dtype), (b.shape, b.dtype)),
        new,
        state,
      )
      pieces.append(out)
      state = new
    assert_close(jnp.concatenate(pieces, axis=1), want, 64)
    jax.tree.map(functools.partial(assert_close, units=64), state, final)

  @parameterized.parameters(*LINEAR)
  def test_bfloat16_is_float32_to_its_rounding(self, mixer):
    p, y = setup(mixer)
    y = y.astype(jnp.bfloat16)
    want, _ = run(mixer)(y.astype(jnp.float32), p)
    got, state = run(mixer)(y, p)
    self.assertEqual(got.dtype, jnp.bfloat16)
    for x in jax.tree.leaves(state.memory):
      self.assertEqual(x.dtype, jnp.float32)
    for x in state.tails.values():
      self.assertEqual(x.dtype, jnp.bfloat16)
    # q, k, v, outputs and gates are each rounded to 8 bits; the norm of a
    # head magnifies where its output is small, so judge the whole.
    error = np.asarray(got.astype(jnp.float32) - want)
    self.assertLess(
      np.linalg.norm(error), 6 * 2.0**-8 * np.linalg.norm(np.asarray(want))
    )

  @parameterized.parameters("mdn", "kda", "mamba2")
  def test_quantized_leaves_are_their_dequantized_values(self, mixer):
    p, y = setup(mixer, length=5)
    q = quantization.quantize_tree(p, "int8")
    self.assertTrue(quantization.is_qtensor(q["o"]))
    plain = quantization.dequantize_tree(q, jnp.float32)
    apply = run(mixer)
    np.testing.assert_array_equal(apply(y, q)[0], apply(y, plain)[0])

  def test_zero_input_is_zero_with_a_finite_gradient(self):
    for mixer in ("mdn", "gdn", "kda"):
      p, y = setup(mixer, length=3)
      f = lambda y, p, m=mixer: jnp.sum(mixers.apply(m, y, p, CFG)[0])
      slope = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))
      value, g = slope(0.0 * y, p)
      self.assertEqual(float(value), 0.0)
      for x in jax.tree.leaves(g):
        self.assertTrue(np.all(np.isfinite(x)), mixer)


class GatesTest(parameterized.TestCase):
  def logits(self, scale, heads=5, tokens=400):
    keys = jax.random.split(jax.random.key(0), 4)
    return [scale * jax.random.normal(k, (1, tokens, heads)) for k in keys]

  def parameters(self, heads=5):
    own = jax.random.split(jax.random.key(1), 3)
    return {
      "a_log": gates.log_uniform_init(0.0, 16.0)(own[0], (2, heads)),
      "dt_bias": gates.shared_step_bias_init(own[1], (2, heads)),
      "factor_log": gates.log_uniform_init(0.0, 4.0)(own[2], (heads,)),
    }

  def ours(self, p, logits, cfg):
    return gates.momentum_gates(
      *logits,
      rate_log=p["a_log"],
      bias=p["dt_bias"],
      factor_log=p["factor_log"],
      tau=(cfg.d_model / cfg.tau_factor) ** 0.5,
      min_log_mu=cfg.min_log_mu,
    )

  @parameterized.parameters((1.0, 0.0), (1.0, -2.0), (6.0, -1.0), (6.0, 0.0))
  def test_momentum_gates_are_the_trigonometric_ones(self, scale, bound):
    cfg = dataclasses.replace(CFG, min_log_mu=bound)
    p, logits = self.parameters(), self.logits(scale)
    got = self.ours(p, logits, cfg)
    p64 = {n: np.asarray(x, np.float64) for n, x in p.items()}
    l64 = [np.asarray(x, np.float64) for x in logits]
    alpha, mu, beta, eta = linear_reference.momentum_gates(p64, cfg, *l64)
    # eta is 1 + tanh, so an absolute unit in eta; beta goes as its square,
    # and the logs are of size up to 16 softplus(25).
    np.testing.assert_allclose(got.eta, eta, rtol=0, atol=8 * EPS)
    np.testing.assert_allclose(got.beta, beta, rtol=0, atol=64 * EPS)
    for log, gate in ((got.log_decay, alpha), (got.log_momentum, mu)):
      # A log gate has its own relative rounding; the gate that much times it.
      wanted = np.log(np.maximum(gate, 1e-300))
      np.testing.assert_allclose(
        np.maximum(log, np.log(1e-300)), wanted, rtol=64 * EPS, atol=64 * EPS
      )

  def test_extreme_logits_stay_finite_and_in_range(self):
    p = self.parameters()
    for scale in (1e2, 1e4):
      logits = self.logits(scale)
      got = self.ours(p, logits, CFG)
      self.assertTrue(np.all((got.eta >= 0) & (got.eta <= 2)))
      self.assertTrue(np.all((got.beta >= 0) & (got.beta <= 1)))
      # alpha + beta <= 1 up to their roundings.
      self.assertTrue(np.all(np.exp(got.log_decay) + got.beta <= 1 + 4 * EPS))
      g = jax.grad(
        lambda x: sum(jnp.sum(jnp.sin(y)) for y in self.ours(p, x, CFG))
      )(logits)
      self.assertTrue(all(np.all(np.isfinite(x)) for x in g))

  def test_without_momentum_it_is_the_gated_delta_rule(self):
    p = self.parameters(heads=2)
    p["a_log"] = p["a_log"].at[1].set(12.0)
    cfg = dataclasses.replace(CFG, min_log_mu=0.0)
    logits = self.logits(1.0, heads=2, tokens=70)
    gate = self.ours(p, logits, cfg)
    self.assertLess(float(jnp.max(gate.log_momentum)), -100.0)
    q, k, v = (
      jax.random.normal(jax.random.key(i), (1, 70, 2, 8)) for i in range(3)
    )
    q, k = layers.l2_norm(q), layers.l2_norm(k)
    got, _ = kernels_pallas.momentum_delta_rule(q, k, v, *gate)
    want, _ = kernels_pallas.gated_delta_rule(
      q, k, v, gate.log_decay, gate.beta * gate.eta
    )
    assert_close(got, want, 128)

  def test_initial_gates(self):
    cfg = dataclasses.replace(CFG, linear_heads=2000)
    for mixer, low in (("mdn", 0.0), ("gdn", 0.0), ("kda", 1.0),
                       ("mamba2", 1.0)):  # fmt: skip
      spec = mixers.param_specs(mixer, cfg)
      p = {
        n: spec[n].init(jax.random.key(3), spec[n].shape, spec[n].dtype)
        for n in ("a_log", "dt_bias")
      }
      rate = np.exp(np.asarray(p["a_log"], np.float64))
      self.assertTrue(np.all((rate > low) & (rate < 16 * (1 + 8 * EPS))))
      # A mean of at least 2000 draws of standard deviation 4.6.
      self.assertLess(abs(rate.mean() - (16 + low) / 2), 5 * 4.6 / 2000**0.5)
      step = np.log1p(np.exp(np.asarray(p["dt_bias"], np.float64)))
      self.assertTrue(np.all((step > 0.00099) & (step < 0.1001)))
      # The median of a log-uniform draw is the geometric mean.
      self.assertLess(abs(np.log(np.median(step) / 0.01)), 0.3)
    p = gates.shared_step_bias_init(jax.random.key(0), (3, 2, 5))
    np.testing.assert_array_equal(p[:, 0], p[:, 1])
    self.assertGreater(float(jnp.std(p[:, 0])), 0.1)


class ConvolutionTest(parameterized.TestCase):
  @parameterized.parameters((1, 5), (4, 2), (4, 9), (3, 1))
  def test_tails_and_segments(self, width, length):
    x = jax.random.normal(jax.random.key(0), (2, length, 3))
    kernel = jax.random.normal(jax.random.key(1), (width, 3))
    want, tail = layers.short_convolution(x, kernel)
    self.assertEqual(tail.shape, (2, width - 1, 3))
    carried, pieces = None, []
    for t in range(length):
      y, carried = layers.short_convolution(
        x[:, t : t + 1], kernel, tail=carried
      )
      pieces.append(y)
    np.testing.assert_array_equal(jnp.concatenate(pieces, 1), want)
    np.testing.assert_array_equal(carried, tail)
    own = jnp.tile(jnp.arange(length, dtype=jnp.int32), (2, 1))
    alone, _ = layers.short_convolution(x, kernel, segments=own)
    np.testing.assert_allclose(
      alone, jax.nn.silu(x * kernel[-1]), rtol=4 * EPS, atol=EPS
    )

  def test_l2_norm(self):
    x = jax.random.normal(jax.random.key(0), (4, 7)).at[1].set(0.0)
    y, vjp = jax.vjp(layers.l2_norm, x)
    want = np.asarray(x, np.float64)
    want = want / np.sqrt(np.sum(want**2, axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y, want, rtol=0, atol=8 * EPS)
    np.testing.assert_array_equal(y[1], 0.0)
    (g,) = vjp(jnp.ones_like(y))
    # At zero the slope is that of x / sqrt(1e-6).
    np.testing.assert_allclose(g[1], 1e3, rtol=1e-6)
    self.assertTrue(np.all(np.isfinite(g)))


if __name__ == "__main__":
  absltest.main()
