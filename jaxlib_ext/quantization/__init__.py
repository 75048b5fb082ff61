"""Arrays of small integers and floats with scales: `quantize`, `QTensor`."""

from jaxlib_ext.quantization.formats import Format
from jaxlib_ext.quantization.qtensor import (
  QTensor,
  dequantize_tree,
  is_qtensor,
  quantize,
  quantize_tree,
)

__all__ = [
  "Format",
  "QTensor",
  "dequantize_tree",
  "is_qtensor",
  "quantize",
  "quantize_tree",
]
