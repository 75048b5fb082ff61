"""Arrays of small integers and floats with scales: `quantize`, `QTensor`."""

from jaxlib_ext.quantization import flax_states as _flax_states
from jaxlib_ext.quantization.formats import Format
from jaxlib_ext.quantization.qtensor import (
  QTensor,
  dequantize_tree,
  is_qtensor,
  quantize,
  quantize_tree,
)

_flax_states.install()

__all__ = [
  "Format",
  "QTensor",
  "dequantize_tree",
  "is_qtensor",
  "quantize",
  "quantize_tree",
]
