"""A LLaMA in float64 numpy loops, written from the equations alone.

Shares no code with `models`; the tests judge `models` by it.
"""

from __future__ import annotations

import numpy as np


def _norm(x, gain, eps):
  return x / np.sqrt(np.mean(x * x) + eps) * gain


def _rotate(x, position, theta):
  """Rotates one head [K]: pair (i, i + K/2) by position * theta^(-2i/K)."""
  size = x.shape[0]
  out = np.empty(size)
  for i in range(size // 2):
    angle = position * theta ** (-2.0 * i / size)
    c, s = np.cos(angle), np.sin(angle)
    a, b = x[i], x[i + size // 2]
    out[i], out[i + size // 2] = a * c - b * s, a * s + b * c
  return out


def _attend(x, p, cfg, segments):
  """Attention branch of one sequence of normed states [T, D]."""
  length, (h, g, size) = len(x), (cfg.num_heads, cfg.kv_heads, cfg.key_size)
  q = (x @ p["q"]).reshape(length, h, size)
  k = (x @ p["k"]).reshape(length, g, size)
  v = (x @ p["v"]).reshape(length, g, size)
  out = np.zeros((length, h, size))
  for head in range(h):
    group = head // (h // g)
    for t in range(length):
      query = _rotate(q[t, head], t, cfg.rope_theta)
      seen = [s for s in range(t + 1) if segments[s] == segments[t]]
      scores = np.array(
        [
          query @ _rotate(k[s, group], s, cfg.rope_theta) / np.sqrt(size)
          for s in seen
        ]
      )
      weights = np.exp(scores - scores.max())
      weights /= weights.sum()
      out[t, head] = sum(
        w * v[s, group] for w, s in zip(weights, seen, strict=True)
      )
  return out.reshape(length, -1) @ p["o"]


def _feed_forward(x, p):
  gate = x @ p["gate"]
  return (gate / (1 + np.exp(-gate)) * (x @ p["up"])) @ p["down"]


def logits(params, tokens, cfg, segments=None):
  """Logits [B, T, V] in float64 for parameters as nested dicts of arrays."""
  tokens = np.asarray(tokens)
  if segments is None:
    segments = np.zeros_like(tokens)
  p64 = {
    n: np.asarray(v, np.float64) for n, v in params.items() if n != "layers"
  }
  head = p64["embed"].T if cfg.tie_embeddings else p64["head"]
  out = []
  for row, ids in zip(tokens, np.asarray(segments), strict=True):
    x = p64["embed"][row]
    for i in range(cfg.num_layers):
      p = {n: np.asarray(v[i], np.float64) for n, v in params["layers"].items()}
      y = np.stack([_norm(s, p["attn_norm"], cfg.norm_eps) for s in x])
      x = x + _attend(y, p, cfg, ids)
      y = np.stack([_norm(s, p["mlp_norm"], cfg.norm_eps) for s in x])
      x = x + _feed_forward(y, p)
    x = np.stack([_norm(s, p64["final_norm"], cfg.norm_eps) for s in x])
    out.append(x @ head)
  return np.stack(out)


def loss(params, tokens, targets, cfg, weights=None, segments=None):
  """Mean (nll, z-loss) in float64."""
  values = logits(params, tokens, cfg, segments)
  targets = np.asarray(targets)
  if weights is None:
    weights = np.ones(targets.shape)
  nll = z = 0.0
  for index in np.ndindex(targets.shape):
    row = values[index]
    log_z = np.log(np.sum(np.exp(row - row.max()))) + row.max()
    nll += weights[index] * (log_z - row[targets[index]])
    z += weights[index] * log_z**2
  total = np.sum(weights)
  return nll / total, cfg.z_loss * z / total
