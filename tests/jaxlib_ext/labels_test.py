"""Roles of parameters by their names."""

from __future__ import annotations

from absl.testing import absltest, parameterized

from jaxlib_ext import labels


class LeadsBackTest(parameterized.TestCase):
  @parameterized.parameters(
    "layers/attn/o",
    "layers/0/attention/wo/kernel",
    "model.layers.3.self_attn.o_proj.weight",
    "blocks/mlp/down",
    "encoder/Attention/out/kernel",
    "h/0/attn/c_proj",
  )
  def test_writes_the_width(self, name):
    self.assertTrue(labels.leads_back(name))

  @parameterized.parameters(
    "layers/attn/q", "layers/mlp/up", "layers/mlp/gate", "head/foo", "outer/v"
  )
  def test_reads_it(self, name):
    self.assertFalse(labels.leads_back(name))


if __name__ == "__main__":
  absltest.main()
