"""The equations of DERIVATION.md in float64 NumPy, in its letters.

A problem is a dict of its letters: matrices Q, K, P, V, the states X, columns
`log_alpha`, `log_mu`, `beta` and `eta`, and `seg`, the segment of the state
that enters and then those of the tokens. A suffix `_` is the document's minus:
what the erase key meets.
"""

from __future__ import annotations

import numpy as np

C, K, V, SCALE = 16, 5, 3, 0.7
# Delta rule, order, free erase key.
MEMBERS = {
  "linear": (False, 1, False),
  "gdn": (True, 1, False),
  "gdn_erase": (True, 1, True),
  "mdn": (True, 2, False),
  "mdn_erase": (True, 2, True),
}
# The segment of the state that enters, then those of the tokens.
SEGMENTS = {
  "one": [0] * (C + 1),
  "three": [0] * 5 + [1] * 7 + [2] * 5,
  "fresh": [0] + [1] * C,
}


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def problem(member, segments, *, channels=1, seed=0):
  """Random arrays by the document's letters."""
  rng = np.random.default_rng(seed)
  delta, order, free = MEMBERS[member]
  one = np.ones((C, 1))
  return dict(
    delta=delta,
    free=free,
    order=order,
    Q=unit(rng.standard_normal((C, K))),
    K=unit(rng.standard_normal((C, K))),
    P=unit(rng.standard_normal((C, K))) if free else None,
    V=rng.standard_normal((C, V)),
    log_alpha=-np.exp(rng.uniform(-4, 1, (C, channels))),
    log_mu=-np.exp(rng.uniform(-3, 1, (C, 1))) if order == 2 else None,
    beta=rng.uniform(0, 1, (C, 1)) if delta else one,
    eta=rng.uniform(0, 2, (C, 1)) if order == 2 else one,
    X=tuple(rng.standard_normal((K, V)) for _ in range(order)),
    seg=np.array(SEGMENTS[segments]),
  )


def recurrence(z):
  """Section 2 with the resets of section 8: O and the states."""
  X, O, seg = z["X"], [], z["seg"]
  for t in range(C):
    if seg[t + 1] != seg[t]:
      X = tuple(np.zeros_like(x) for x in X)
    alpha, k = np.exp(z["log_alpha"][t]), z["K"][t]
    p = z["P"][t] if z["free"] else alpha * k
    e = z["V"][t] - X[0].T @ p if z["delta"] else z["V"][t]
    if z["order"] == 2:
      N = np.exp(z["log_mu"][t]) * X[1] + z["eta"][t] * np.outer(k, e)
      X = (alpha * X[0] + z["beta"][t] * N, N)
    else:
      X = (alpha[:, None] * X[0] + z["beta"][t] * np.outer(k, e),)
    O.append(SCALE * X[0].T @ z["Q"][t])
  return np.array(O), X


def decays(log, seg, before=False):
  """A and a of sections 3 and 8 (or A^-, a^- of a free erase key)."""
  A = np.zeros((C, C, log.shape[1]))
  a = np.zeros((C, log.shape[1]))
  for t in range(C):
    end = t if before else t + 1
    for j in range(end):
      A[t, j] = np.exp(log[j + 1 : end].sum(0)) * (seg[t + 1] == seg[j + 1])
    a[t] = np.exp(log[:end].sum(0)) * (seg[t + 1] == seg[0])
  return A, a


def scalar(z):
  """Sections 3 and 4: the system, and what its transpose needs."""
  A, a = decays(z["log_alpha"], z["seg"])
  A = A[..., 0]
  A_, a_ = np.tril(A, -1), a
  if z["free"]:
    A_, a_ = decays(z["log_alpha"], z["seg"], before=True)
    A_ = A_[..., 0]
  beta, eta = z["beta"], z["eta"]
  U, m = np.eye(C), np.zeros((C, 1))
  if z["order"] == 2:
    U, m = decays(z["log_mu"], z["seg"])
    U = U[..., 0]
  W = np.diag(beta[:, 0]) @ U @ np.diag(eta[:, 0])
  Gamma, Gamma_ = A @ W, A_ @ W
  b, b_ = A @ (beta * m), A_ @ (beta * m)
  P = z["P"] if z["free"] else z["K"]
  second = slice(0, z["order"])
  D = [[a[-1:], b[-1:]], [None, m[-1:]]]
  system = dict(
    lower=(P @ z["K"].T) * Gamma_ if z["delta"] else None,
    at=SCALE * (z["Q"] @ z["K"].T) * Gamma,
    p_scale=(a_, b_)[second] if z["delta"] else (),
    q_scale=(SCALE * a, SCALE * b)[second],
    k_scale=(Gamma[-1:].T, U[-1:].T * eta)[second],
    decay=tuple(tuple(row[second]) for row in D[second]),
  )
  extra = dict(A=A, A_=A_, U=U, m=m, W=W, Gamma=Gamma, Gamma_=Gamma_)
  return system, extra | dict(a=a, a_=a_, b=b, P=P)


def step(s, vectors, values, X):
  """Section 4: O, E and the states; `vectors` are P, Q and K."""
  P, Q, K = vectors
  R = values
  if s["p_scale"]:
    R = R - sum(p * (P @ x) for p, x in zip(s["p_scale"], X, strict=True))
  E = R if s["lower"] is None else np.linalg.solve(np.eye(C) + s["lower"], R)
  O = s["at"] @ E
  O = O + sum(q * (Q @ x) for q, x in zip(s["q_scale"], X, strict=True))
  new = [K.T @ (k * E) for k in s["k_scale"]]
  for m, row in enumerate(s["decay"]):
    for d, x in zip(row, X, strict=True):
      new[m] = new[m] if d is None else new[m] + d * x
  return O, E, tuple(new)


def transposed(s, vectors, E, X, dO, dX):
  """Section 7, the step: cotangents of the system by name, of V and of X."""
  P, Q, K = vectors
  fit = lambda x, d: x if len(d) > 1 else x.sum(0, keepdims=True)
  T = 1 if s["lower"] is None else np.linalg.inv(np.eye(C) + s["lower"])
  dE = s["at"].T @ dO
  dE = dE + sum(k * (K @ d) for k, d in zip(s["k_scale"], dX, strict=True))
  Z = dE if s["lower"] is None else T.T @ dE
  out = dict(at=dO @ E.T, lower=None if s["lower"] is None else -Z @ E.T)
  for name, x, left, right, sign in (
    ("q", Q, dO, X, 1),
    ("p", P, Z, X, -1),
    ("k", K, E, dX, 1),
  ):
    scales = s[f"{name}_scale"]
    Y = [sign * left @ right[i].T for i in range(len(scales))]
    out[name] = sum(c * y for c, y in zip(scales, Y, strict=True))
    out[f"{name}_scale"] = tuple((x * y).sum(-1, keepdims=True) for y in Y)
  out["decay"] = tuple(
    tuple(
      None if d is None else fit((dx * x).sum(-1, keepdims=True), d)
      for d, x in zip(row, X, strict=True)
    )
    for row, dx in zip(s["decay"], dX, strict=True)
  )
  states = [Q.T @ (q * dO) for q in s["q_scale"]]
  for n in range(len(X)):
    if s["p_scale"]:
      states[n] = states[n] - P.T @ (s["p_scale"][n] * Z)
    for row, dx in zip(s["decay"], dX, strict=True):
      states[n] = states[n] if row[n] is None else states[n] + row[n] * dx
  return out, Z, tuple(states)


def makers(z, s, extra, d):
  """Section 7, the makers: cotangents of Q, K, P and the gates."""
  last = np.arange(C)[:, None] == C - 1
  second = z["order"] == 2
  A, A_, U, m, W = (extra[name] for name in ("A", "A_", "U", "m", "W"))
  beta, eta, P = z["beta"], z["eta"], extra["P"]
  dGamma = SCALE * d.at * (z["Q"] @ z["K"].T) + last * d.k_scale[0].T
  da = SCALE * d.q_scale[0] + last * d.decay[0][0]
  dlower = d.lower if z["delta"] else np.zeros((C, C))
  da_ = d.p_scale[0] if z["delta"] else np.zeros((C, 1))
  db = db_ = np.zeros((C, 1))
  if second:
    db = SCALE * d.q_scale[1] + last * d.decay[0][1]
    db_ = d.p_scale[1]
  dGamma_ = dlower * (P @ z["K"].T)
  F, F_ = SCALE * d.at * extra["Gamma"], dlower * extra["Gamma_"]
  dQ, dK, dP = F @ z["K"], F.T @ z["Q"] + F_.T @ P, F_ @ z["K"]
  dA = dGamma @ W.T + db @ (beta * m).T
  dA_ = dGamma_ @ W.T + db_ @ (beta * m).T
  dW = A.T @ dGamma + A_.T @ dGamma_
  y = A.T @ db + A_.T @ db_
  dbeta = (dW * (U * eta.T)).sum(1, keepdims=True) + m * y
  deta = (beta * dW * U).sum(0)[:, None]
  dU, dm = beta * dW * eta.T, beta * y
  if second:
    dU = dU + last * (d.k_scale[1] * eta).T
    deta = deta + U[-1:].T * d.k_scale[1]
    dm = dm + last * d.decay[1][1]

  def log(pairs, columns, later):
    """The sums over pairs around i, and over tokens from i (or after) on."""
    out = np.zeros((C, 1))
    for i in range(C):
      t = i + later
      out[i] = pairs[t:, :i].sum() + columns[t:].sum()
    return out

  dalpha = log(dA * A, da * extra["a"], 0)
  dalpha += log(dA_ * A_, da_ * extra["a_"], int(z["free"]))
  if not z["free"]:
    dK, dP = dK + dP, None
  return (
    (dQ, dK, dP),
    dalpha,
    log(dU * U, dm * m, 0) if second else None,
    dbeta if z["delta"] else None,
    deta if second else None,
  )
