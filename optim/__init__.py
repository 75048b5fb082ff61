"""Optax gradient transformations that keep little or no state."""

from jaxlib_ext.labels import label_params as label_params
from optim.accounting import state_bytes as state_bytes
from optim.apply import apply_updates as apply_updates
from optim.eco import EcoState as EcoState
from optim.eco import eco as eco
from optim.eco import eco_flush as eco_flush
from optim.muon import MuonState as MuonState
from optim.muon import muon as muon
from optim.muon import scale_by_muon as scale_by_muon
from optim.orthogonalize import newton_schulz as newton_schulz
from optim.scale import column_normalized_sgd as column_normalized_sgd
from optim.scale import scale_by_column_norm as scale_by_column_norm
