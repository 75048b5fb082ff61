"""Linear mixers in float64 numpy loops, written from the equations alone.

Shares no code with `models` or `kernels_pallas`; the tests judge them by it.
A sequence is `[T, D]`, one layer's parameters a dict of arrays.
"""

from __future__ import annotations

import numpy as np


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def softplus(x):
  return np.logaddexp(0.0, x)


def silu(x):
  return x * sigmoid(x)


def momentum_gates(p, cfg, a, b, m, e):
  """(alpha, mu, beta, eta), each [H], of one token, by trigonometry."""
  eta = 1 + np.tanh(e / np.sqrt(cfg.d_model / cfg.tau_factor))
  theta = np.arctan(eta * np.exp(p["factor_log"]))
  rate, momentum_rate = np.exp(p["a_log"])
  bias, momentum_bias = p["dt_bias"]
  alpha = np.cos(theta) ** 2 * np.exp(-rate * softplus(a + bias))
  log_mu = -momentum_rate * softplus(m + momentum_bias)
  if cfg.min_log_mu:
    log_mu = np.maximum(log_mu, cfg.min_log_mu)
  return alpha, np.exp(log_mu), np.sin(theta) ** 2 * sigmoid(b), eta


def _convolve(x, kernel):
  """Each output is a sum over the token and the W - 1 before it."""
  out = np.zeros_like(x)
  for t in range(len(x)):
    for back in range(min(len(kernel), t + 1)):
      out[t] += kernel[-1 - back] * x[t - back]
  return silu(out)


def _unit(x):
  return x / np.sqrt(np.sum(x * x) + 1e-6)


def _norm(x, gain, eps):
  return x / np.sqrt(np.mean(x * x) + eps) * gain


def _delta(s, k, v, decay, beta):
  """One step of the gated delta rule; `decay` scales the rows of s."""
  s = decay * s
  return s + beta * np.outer(k, v - k @ s)


def _qkv(y, p, size):
  """Convolved q, k `[T, G, K]` and v `[T, H, V]`."""
  q, k, v = (_convolve(y @ p[n], p[n + "_conv1d"]) for n in "qkv")
  split = lambda x, width: x.reshape(len(x), -1, width)
  return split(q, size.key), split(k, size.key), split(v, size.value)


def _mdn(y, p, cfg):
  size = cfg.linear_sizes
  q, k, v = _qkv(y, p, size)
  q = q - np.exp(p["d_log"])[:, None] * k
  out = np.zeros_like(v)
  for h in range(size.heads):
    g = h * size.key_heads // size.heads
    s = np.zeros((size.key, size.value))
    n = np.zeros_like(s)
    for t in range(len(y)):
      gates = momentum_gates(p, cfg, *(y[t] @ p[name] for name in "abme"))
      alpha, mu, beta, eta = (x[h] for x in gates)
      key = _unit(k[t, g])
      # As published: the memory of gradients is minus this n.
      w = (alpha * key) @ s - v[t, h]
      n = mu * n - eta * np.outer(key, w)
      s = alpha * s + beta * n
      out[t, h] = s.T @ _unit(q[t, g]) / np.sqrt(size.key)
  return _finish(out, y @ p["g"], "sigmoid", p, cfg)


def _finish(out, gate, own, p, cfg):
  name = {"own": own}.get(cfg.output_gate, cfg.output_gate)
  gate = silu(gate) if name == "silu" else sigmoid(gate)
  normed = np.stack(
    [[_norm(o, p["o_norm"], cfg.norm_eps) for o in row] for row in out]
  )
  return (normed.reshape(gate.shape) * gate) @ p["o"]


def _first_order(y, p, cfg):
  """GDN, KDA, GLA and linear attention, told apart by their parameters."""
  size = cfg.linear_sizes
  q, k, v = _qkv(y, p, size)
  delta, vector = "b" in p, "f_up" in p
  heads = lambda x: x.reshape(len(y), size.heads, -1)
  decay = np.ones((len(y), size.heads, 1))
  if vector:
    logits = heads(y @ p["f_down"] @ p["f_up"])
  if vector and delta:
    rate = np.exp(p["a_log"])[:, None]
    decay = np.exp(-rate * softplus(logits + p["dt_bias"]))
  elif vector:
    decay = sigmoid(logits + p["f_bias"]) ** (1 / 16)
  elif delta:
    rate = np.exp(p["a_log"])[:, None]
    logits = heads(y @ p["a"]) + p["dt_bias"][:, None]
    decay = np.exp(-rate * softplus(logits))
  out = np.zeros_like(v)
  for h in range(size.heads):
    g = h * size.key_heads // size.heads
    s = np.zeros((size.key, size.value))
    for t in range(len(y)):
      query, key = q[t, g], k[t, g]
      if delta:
        query, key = _unit(query), _unit(key)
        beta = sigmoid(y[t] @ p["b"])[h]
        s = _delta(s, key, v[t, h], decay[t, h][:, None], beta)
      else:
        s = decay[t, h][:, None] * s + np.outer(key, v[t, h])
      out[t, h] = s.T @ query / np.sqrt(size.key)
  if "g" in p:
    return _finish(out, y @ p["g"], "silu", p, cfg)
  return _finish(out, y @ p["g_down"] @ p["g_up"], "sigmoid", p, cfg)


def _mamba2(y, p, cfg):
  size = cfg.linear_sizes
  x, b, c = (_convolve(y @ p[n], p[n + "_conv1d"]) for n in "xbc")
  x = x.reshape(len(y), size.heads, size.value)
  b, c = (z.reshape(len(y), size.key_heads, size.key) for z in (b, c))
  dt = softplus(y @ p["dt"] + p["dt_bias"])
  out = np.zeros_like(x)
  for h in range(size.heads):
    g = h * size.key_heads // size.heads
    s = np.zeros((size.key, size.value))
    for t in range(len(y)):
      s = np.exp(-np.exp(p["a_log"][h]) * dt[t, h]) * s
      s = s + dt[t, h] * np.outer(b[t, g], x[t, h])
      out[t, h] = s.T @ c[t, g] + p["d_skip"][h] * x[t, h]
  gated = out.reshape(len(y), -1) * silu(y @ p["z"])
  return np.stack([_norm(o, p["o_norm"], cfg.norm_eps) for o in gated]) @ p["o"]


def mix(mixer, y, p, cfg, segments=None):
  """The branch `[B, T, D]`, each contiguous segment on its own."""
  y = np.asarray(y, np.float64)
  p = {name: np.asarray(x, np.float64) for name, x in p.items()}
  run = {"mdn": _mdn, "mamba2": _mamba2}.get(mixer, _first_order)
  if segments is None:
    segments = np.zeros(y.shape[:2], int)
  rows = []
  for row, ids in zip(y, np.asarray(segments), strict=True):
    cuts = np.flatnonzero(np.diff(ids)) + 1
    rows.append(
      np.concatenate([run(piece, p, cfg) for piece in np.split(row, cuts)])
    )
  return np.stack(rows)
