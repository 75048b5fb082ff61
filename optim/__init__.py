"""Optax gradient transformations that keep little or no state."""

from jaxlib_ext.labels import label_params as label_params
from optim import diagnostics as diagnostics
from optim.accounting import state_bytes as state_bytes
from optim.adaptive.spam import SpamState as SpamState
from optim.adaptive.spam import scale_by_spam as scale_by_spam
from optim.adaptive.spam import spam as spam
from optim.adaptive.stable_spam import StableSpamState as StableSpamState
from optim.adaptive.stable_spam import (
  scale_by_stable_spam as scale_by_stable_spam,
)
from optim.adaptive.stable_spam import stable_spam as stable_spam
from optim.apply import apply_updates as apply_updates
from optim.describe import describe_labels as describe_labels
from optim.flax_axes import flax_matrix_axes as flax_matrix_axes
from optim.groups import add_cautious_decay as add_cautious_decay
from optim.low_rank.apollo import ApolloState as ApolloState
from optim.low_rank.apollo import apollo as apollo
from optim.low_rank.apollo import apollo_mini as apollo_mini
from optim.low_rank.apollo import scale_by_apollo as scale_by_apollo
from optim.low_rank.fira import FiraState as FiraState
from optim.low_rank.fira import fira as fira
from optim.low_rank.fira import scale_by_fira as scale_by_fira
from optim.low_rank.frugal import FrugalState as FrugalState
from optim.low_rank.frugal import frugal as frugal
from optim.low_rank.frugal import scale_by_frugal as scale_by_frugal
from optim.low_rank.galore import GaloreState as GaloreState
from optim.low_rank.galore import galore as galore
from optim.low_rank.galore import scale_by_galore as scale_by_galore
from optim.matrices import MatrixAxes as MatrixAxes
from optim.normalized.norms import scale_by_column_norm as scale_by_column_norm
from optim.normalized.norms import (
  scale_by_spectral_norm as scale_by_spectral_norm,
)
from optim.normalized.scale import (
  column_normalized_sgd as column_normalized_sgd,
)
from optim.normalized.sinkgd import scale_by_sinkgd as scale_by_sinkgd
from optim.normalized.sinkgd import sinkgd as sinkgd
from optim.normalized.swan import scale_by_swan as scale_by_swan
from optim.normalized.swan import swan as swan
from optim.orthogonal.adamuon import AdamuonState as AdamuonState
from optim.orthogonal.adamuon import adamuon as adamuon
from optim.orthogonal.adamuon import scale_by_adamuon as scale_by_adamuon
from optim.orthogonal.dion import DionState as DionState
from optim.orthogonal.dion import dion as dion
from optim.orthogonal.dion import scale_by_dion as scale_by_dion
from optim.orthogonal.dion2 import Dion2State as Dion2State
from optim.orthogonal.dion2 import dion2 as dion2
from optim.orthogonal.dion2 import scale_by_dion2 as scale_by_dion2
from optim.orthogonal.muon import MuonState as MuonState
from optim.orthogonal.muon import muon as muon
from optim.orthogonal.muon import scale_by_muon as scale_by_muon
from optim.orthogonal.normuon import NormuonState as NormuonState
from optim.orthogonal.normuon import normuon as normuon
from optim.orthogonal.normuon import scale_by_normuon as scale_by_normuon
from optim.orthogonal.polar import newton_schulz as newton_schulz
from optim.orthogonal.qk_clip import apply_qk_clip as apply_qk_clip
from optim.quantized.eco import EcoState as EcoState
from optim.quantized.eco import eco as eco
from optim.quantized.eco import eco_flush as eco_flush
from optim.quantized.q_galore import QGaloreState as QGaloreState
from optim.quantized.q_galore import q_galore as q_galore
from optim.quantized.q_galore import scale_by_q_galore as scale_by_q_galore
from optim.zeroth_order.mezo import mezo as mezo
from optim.zeroth_order.mezo import mezo_replay as mezo_replay
from optim.zeroth_order.mezo import scale_by_mezo as scale_by_mezo
from optim.zeroth_order.qzo import qzo as qzo
from optim.zeroth_order.qzo import scale_by_qzo as scale_by_qzo
from optim.zeroth_order.spsa import SpsaState as SpsaState
