"""What softmax attention remembers while it decodes.

A policy is a frozen dataclass that makes a layer's state and attends with it;
`decode.init_cache` takes one for the layers that attend to everything. Bytes
are what `decode.cache_bytes` says.

  Full       every key and value
  Window     the mixer "window": a ring of keys and the first ones
  Streaming  the same as an eviction, with positions of the cache
             (StreamingLLM, arXiv:2309.17453)
  LowRank    low-rank factors of old keys and values (CSKV, arXiv:2409.10593)
  Retention  a budget, by gates that say what to evict (TRIM-KV,
             arXiv:2512.03324)
"""

from models.cache_policies.base import Entry as Entry
from models.cache_policies.base import Full as Full
from models.cache_policies.base import New as New
from models.cache_policies.base import Policy as Policy
from models.cache_policies.low_rank import LowRank as LowRank
from models.cache_policies.low_rank import low_rank_factors as low_rank_factors
from models.cache_policies.low_rank import with_factors as with_factors
from models.cache_policies.retention import Retention as Retention
from models.cache_policies.retention import capacity_loss as capacity_loss
from models.cache_policies.retention import (
  retention_attention as retention_attention,
)
from models.cache_policies.retention import with_gates as with_gates
from models.cache_policies.rolling import Streaming as Streaming
from models.cache_policies.rolling import Window as Window
