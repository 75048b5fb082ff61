"""Pallas kernels for linear and sparse attention, on TPU and GPU."""

from kernels_pallas.linear.api import MomentumState as MomentumState
from kernels_pallas.linear.api import gated_delta_rule as gated_delta_rule
from kernels_pallas.linear.api import kda as kda
from kernels_pallas.linear.api import linear_attention as linear_attention
from kernels_pallas.linear.api import (
  momentum_delta_rule as momentum_delta_rule,
)
from kernels_pallas.linear.relatives import delta_product as delta_product
from kernels_pallas.linear.relatives import (
  delta_product_step as delta_product_step,
)
from kernels_pallas.linear.relatives import gdn2 as gdn2
from kernels_pallas.linear.relatives import gdn2_step as gdn2_step
from kernels_pallas.linear.relatives import rwkv7 as rwkv7
from kernels_pallas.linear.relatives import rwkv7_step as rwkv7_step
from kernels_pallas.linear.steps import (
  gated_delta_rule_step as gated_delta_rule_step,
)
from kernels_pallas.linear.steps import kda_step as kda_step
from kernels_pallas.linear.steps import (
  linear_attention_step as linear_attention_step,
)
from kernels_pallas.linear.steps import (
  momentum_delta_rule_step as momentum_delta_rule_step,
)
from kernels_pallas.sparse.api import (
  block_sparse_attention as block_sparse_attention,
)
from kernels_pallas.sparse.blocks import BlockIndices as BlockIndices
from kernels_pallas.sparse.clusters import (
  clustered_attention as clustered_attention,
)
from kernels_pallas.sparse.clusters import kmeans as kmeans
from kernels_pallas.sparse.dense import full_attention as full_attention
from kernels_pallas.sparse.in_context import (
  in_context_attention as in_context_attention,
)
from kernels_pallas.sparse.piecewise import (
  piecewise_attention as piecewise_attention,
)
from kernels_pallas.sparse.prefix import (
  prefix_shared_attention as prefix_shared_attention,
)
from kernels_pallas.sparse.select import select_blocks as select_blocks
from kernels_pallas.sparse.tiling import tile as tile
from kernels_pallas.sparse.tiling import untile as untile
from kernels_pallas.sparse.windowed import banded_attention as banded_attention
from kernels_pallas.sparse.windowed import (
  windowed_attention as windowed_attention,
)
