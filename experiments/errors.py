"""How the mains report a mistake of the user's."""

from __future__ import annotations


class UserError(ValueError):
  """A mistake of the user's: printed as one line, exit code 2."""
