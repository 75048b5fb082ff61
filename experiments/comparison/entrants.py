"""Who takes part in a comparison of optimizers."""

from __future__ import annotations

import dataclasses

from experiments import optimizers

# The reference comes first: the table sets all others against it.
ALL = (
  "adamw",
  "scaled_adamw",
  "lion",
  "sgd",
  "muon",
  "normuon",
  "adamuon",
  "dion",
  "dion2",
  "column_normalized_sgd",
  "swan",
  "sinkgd",
  "spam",
  "stable_spam",
  "galore",
  "q_galore",
  "fira",
  "apollo",
  "apollo_mini",
  "frugal",
  "eco,quantization.format=int4:32",
  "eco,quantization.format=float8_e4m3fn",
)


@dataclasses.dataclass(frozen=True)
class Entrant:
  """An optimizer and what distinguishes its runs."""

  name: str
  overrides: tuple[str, ...]

  @property
  def label(self) -> str:
    """The name, then the values of the overrides."""
    values = [o.split("=", 1)[1] for o in self.overrides]
    return " ".join([self.name, *values])

  @classmethod
  def parse(cls, text: str) -> Entrant:
    """Reads "name,path.to.field=value,..."."""
    name, *overrides = text.split(",")
    return cls(optimizers.canonical(name), tuple(overrides))
