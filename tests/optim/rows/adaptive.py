"""Rows of the spike-aware optimizers."""

import functools

import optim
from tests.optim.rows.row import Row

ROWS: dict[str, Row] = {
  "spam": Row(functools.partial(optim.spam, reset_every=100, warmup=10)),
  "spam_sparse": Row(
    functools.partial(
      optim.spam, reset_every=15, warmup=2, grace=5, density=0.5
    ),
    rate=0.3,
    sparse=True,
    static_args=("density",),
  ),
  "stable_spam": Row(functools.partial(optim.stable_spam, reset_every=100)),
}
