"""LLaMA weights in the Hugging Face layout: `config.json` and safetensors."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import safetensors.flax

from jaxlib_ext import reading, records
from models import config as config_lib
from models import hf_files, transformer

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HEAD = "lm_head.weight"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_ARCHITECTURES = ["LlamaForCausalLM"]

# Our names and theirs. Their matrices are (out, in), ours (in, out).
_LAYER_NAMES = {
  "attn_norm": "input_layernorm",
  "q": "self_attn.q_proj",
  "k": "self_attn.k_proj",
  "v": "self_attn.v_proj",
  "o": "self_attn.o_proj",
  "mlp_norm": "post_attention_layernorm",
  "gate": "mlp.gate_proj",
  "up": "mlp.up_proj",
  "down": "mlp.down_proj",
}
# Buffers that older exports carry; they follow from the config.
_IGNORED = "rotary_emb.inv_freq"

# Fields of config.json for which only one value is our LLaMA.
_ONLY = {
  "model_type": "llama",
  "hidden_act": "silu",
  "attention_bias": False,
  "mlp_bias": False,
  "pretraining_tp": 1,
  "partial_rotary_factor": 1.0,
  "sliding_window": None,
  "quantization_config": None,
}


def load_hf(
  path: str | os.PathLike[str], **overrides: Any
) -> tuple[config_lib.Config, Any]:
  """Reads a LLaMA as `transformers` saves it.

  Args:
    path: the directory, or a `.safetensors` file beside its `config.json`;
      a directory may hold shards and their `model.safetensors.index.json`.
    **overrides: fields of `Config` that the weights do not decide, such as
      `compute_dtype`.

  Returns:
    `(cfg, params)`, the parameters of dtype `cfg.param_dtype`. Where the
    config ties the output head to the embedding and the file has another head,
    the model is untied, with that head.

  Raises:
    FileNotFoundError: no config or no weights there that are read.
    ValueError: a config that is not this model, a damaged file, an index that
      names files elsewhere, or a tensor that is missing, unexpected or of
      another shape; the message names it.
  """
  path = os.fspath(path)
  if not os.path.exists(path):
    raise FileNotFoundError(f"{path!r} does not exist")
  folder = path if os.path.isdir(path) else os.path.dirname(path)
  hf = reading.read_json(os.path.join(folder, "config.json"))
  cfg = _from_hf_config(hf, overrides)
  _check_llama(cfg)
  tensors = {}
  for file in _weight_files(path):
    tensors.update(_load_weights(file))
  if cfg.tie_embeddings and _has_own_head(tensors):
    if "tie_embeddings" in overrides:
      raise ValueError(
        f"tie_embeddings: got True; tensor {_HEAD!r} is not the embedding"
      )
    cfg = dataclasses.replace(cfg, tie_embeddings=False)
  return cfg, _from_hf_tensors(tensors, cfg)


def save_hf(
  directory: str | os.PathLike[str],
  params: Any,
  cfg: config_lib.Config,
  *,
  tokenizer: str | os.PathLike[str] | None = None,
  eos: int | None = None,
  bos: int | None = None,
  max_length: int | None = None,
) -> None:
  """Writes a directory that `transformers` loads, and generates from.

  These are `config.json`, `generation_config.json` and `model.safetensors`,
  and with a tokenizer `tokenizer.json` and `tokenizer_config.json`.

  Args:
    directory: made if it does not exist.
    params: as `transformer.param_specs` describes; `QTensor` leaves are
      written dequantized, in float32.
    cfg: the model.
    tokenizer: the path of a tokenizer.json, such as a run's, for
      `AutoTokenizer`.
    eos: the id at which `generate` stops; None for the tokenizer's end of a
      document if it has a well-known name, else for none.
    bos: the id that `generate` starts from without a prompt, or None.
    max_length: the longest context, in tokens; None says nothing, and
      `transformers` takes 2048.

  Raises:
    FileNotFoundError: no such `tokenizer`.
    ValueError: the model has other mixers than softmax attention, or what
      `models.osp.to_llama` takes away; ids out of range; a tokenizer with
      more ids than the model, or none.
  """
  _check_llama(cfg)
  read = None
  if tokenizer is not None:
    read = hf_files.Tokenizer(tokenizer)
    if read.vocab_size > cfg.vocab_size:
      raise ValueError(
        f"tokenizer: {os.fspath(tokenizer)} has {read.vocab_size} ids; "
        f"allowed: at most vocab_size={cfg.vocab_size}"
      )
    eos = read.end if eos is None else eos
  _check_ids(cfg, eos=eos, bos=bos, max_length=max_length)
  directory = os.fspath(directory)
  os.makedirs(directory, exist_ok=True)
  if read is not None:
    hf_files.write_tokenizer(
      directory, read, eos=eos, bos=bos, max_length=max_length
    )
  dequantize = lambda x: x.dequantize() if hasattr(x, "dequantize") else x
  params = jax.tree.map(
    dequantize, params, is_leaf=lambda x: hasattr(x, "dequantize")
  )
  tensors = {
    name: jnp.asarray(value) for name, value in _to_hf_tensors(params, cfg)
  }
  safetensors.flax.save_file(
    tensors, os.path.join(directory, _WEIGHTS), metadata={"format": "pt"}
  )
  # Without these fields `transformers` takes LLaMA's own, 2 and 1.
  ids = {"eos_token_id": eos, "bos_token_id": bos}
  records.write_json(os.path.join(directory, "generation_config.json"), ids)
  config = {**_to_hf_config(cfg), **ids}
  if max_length is not None:
    config["max_position_embeddings"] = max_length
  records.write_json(os.path.join(directory, "config.json"), config)


def _check_ids(
  cfg: config_lib.Config,
  *,
  eos: int | None,
  bos: int | None,
  max_length: int | None,
) -> None:
  for name, value in (("eos", eos), ("bos", bos)):
    if value is not None and not 0 <= value < cfg.vocab_size:
      raise ValueError(
        f"{name}: got {value}; allowed: 0 to {cfg.vocab_size - 1}, or None"
      )
  if max_length is not None and max_length < 1:
    raise ValueError(f"max_length: got {max_length}; allowed: at least 1")


def _check_llama(cfg: config_lib.Config) -> None:
  if cfg.pattern != ("full",):
    raise ValueError(
      f"mixers: got {cfg.mixers!r}; allowed: ('full',), for a LLaMA in the "
      "Hugging Face layout has softmax attention in every layer"
    )
  if cfg.norm != "rms" or cfg.embed_projection:
    raise ValueError(
      f"norm, embed_projection: got {cfg.norm!r}, {cfg.embed_projection}; "
      "allowed: 'rms', False, for the Hugging Face layout has neither; "
      "models.osp.to_llama gives the same function without them"
    )


def _weight_files(path: str) -> list[str]:
  if not os.path.isdir(path):
    return [path]
  index = os.path.join(path, _INDEX)
  if os.path.exists(index):
    found = reading.read_json(index, {"weight_map": {str: str}})["weight_map"]
    where = f"{index}: weight_map"
    shards = sorted({reading.plain_name(f, where) for f in found.values()})
    if not shards:
      raise ValueError(f"{where}: got no files")
    return [os.path.join(path, shard) for shard in shards]
  weights = os.path.join(path, _WEIGHTS)
  pickles = sorted(f for f in os.listdir(path) if f.endswith(_PICKLES))
  if pickles and not os.path.exists(weights):
    raise FileNotFoundError(
      f"no {_WEIGHTS} in {path}; {pickles[0]} is a pickle, which can run code "
      "and is not read: save the model with safe_serialization=True"
    )
  return [weights]


def _load_weights(file: str) -> dict[str, jax.Array]:
  if not os.path.exists(file):
    raise FileNotFoundError(f"no weights at {file}")
  if not os.path.isfile(file):
    raise ValueError(f"{file} is not a file")
  if file.endswith(_PICKLES):
    raise ValueError(f"{file} is a pickle; allowed: .safetensors")
  try:
    return safetensors.flax.load_file(file)
  except Exception as e:  # The library's own exception is a bare Exception.
    reason = " ".join(str(e).split())
    raise ValueError(f"{file} is no safetensors file: {reason}") from e


def _has_own_head(tensors: dict[str, jax.Array]) -> bool:
  """Whether there is a head that is not the embedding, entry by entry."""
  head, embed = (
    tensors.get(name) for name in (_HEAD, "model.embed_tokens.weight")
  )
  return (
    head is not None
    and embed is not None
    and not bool(jnp.array_equal(head, embed, equal_nan=True))
  )


def _from_hf_config(hf: dict[str, Any], overrides: dict[str, Any]):
  """Our config from theirs; ValueError names what we cannot represent."""
  for name, allowed in _ONLY.items():
    if hf.get(name, allowed) != allowed:
      raise ValueError(
        f"config.json: {name}: got {hf[name]!r}; allowed: {allowed!r}"
      )
  known = hf.get("architectures")
  if not known and "model_type" not in hf:
    raise ValueError(
      "config.json: architectures, model_type: both are missing; allowed: "
      f"{_ARCHITECTURES}, 'llama'"
    )
  if known and known != _ARCHITECTURES:
    raise ValueError(
      f"config.json: architectures: got {known!r}; allowed: {_ARCHITECTURES}"
    )
  # transformers 5 keeps the rotary base in "rope_parameters", 4 beside a
  # "rope_scaling" that is null for the plain rotation.
  rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
  if not isinstance(rope, dict):
    raise ValueError(
      f"config.json: rope_scaling: got {rope!r}; allowed: an object or null"
    )
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind != "default":
    raise ValueError(
      f"config.json: rope_scaling: got {kind!r}; allowed: 'default' or null"
    )
  theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
  required = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
  }
  missing = [name for name in required.values() if name not in hf]
  if missing:
    raise ValueError(f"config.json: missing fields {missing}")
  fields = {
    ours: _number(theirs, hf[theirs], int) for ours, theirs in required.items()
  }
  for ours, theirs in (
    ("num_kv_heads", "num_key_value_heads"),
    ("head_dim", "head_dim"),
  ):
    fields[ours] = _number(theirs, hf.get(theirs) or 0, int)
  fields["rope_theta"] = float(_number("rope_theta", theta, (int, float)))
  eps = hf.get("rms_norm_eps", 1e-6)
  fields["norm_eps"] = float(_number("rms_norm_eps", eps, (int, float)))
  tied = hf.get("tie_word_embeddings", False)
  fields["tie_embeddings"] = bool(_number("tie_word_embeddings", tied, bool))
  return config_lib.Config(**{**fields, **overrides})


def _number(name: str, value: Any, kinds: Any) -> Any:
  if not isinstance(value, kinds) or (
    isinstance(value, bool) and kinds is not bool
  ):
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    allowed = " or ".join(kind.__name__ for kind in kinds)
    raise ValueError(f"config.json: {name}: got {value!r}; allowed: {allowed}")
  return value


def _to_hf_config(cfg: config_lib.Config) -> dict[str, Any]:
  return {
    "architectures": _ARCHITECTURES,
    "model_type": "llama",
    "vocab_size": cfg.vocab_size,
    "hidden_size": cfg.d_model,
    "intermediate_size": cfg.d_ff,
    "num_hidden_layers": cfg.num_layers,
    "num_attention_heads": cfg.num_heads,
    "num_key_value_heads": cfg.kv_heads,
    "head_dim": cfg.key_size,
    "hidden_act": "silu",
    "rms_norm_eps": cfg.norm_eps,
    "rope_theta": cfg.rope_theta,
    "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": cfg.tie_embeddings,
    "initializer_range": cfg.init_std,
    "torch_dtype": cfg.param_dtype,
  }


def _hf_name(name: str, layer: int) -> str:
  return f"model.layers.{layer}.{_LAYER_NAMES[name]}.weight"


def _to_hf_tensors(params, cfg):
  yield "model.embed_tokens.weight", params["embed"]
  yield "model.norm.weight", params["final_norm"]
  if not cfg.tie_embeddings:
    yield _HEAD, params["head"].T
  for name, stack in params["layers"].items():
    for i in range(cfg.num_layers):
      yield _hf_name(name, i), stack[i].T


def _from_hf_tensors(tensors, cfg):
  dtype = jnp.dtype(cfg.param_dtype)
  tree = transformer.param_specs(cfg)
  left = {name for name in tensors if not name.endswith(_IGNORED)}

  def take(name, shape):
    if name not in tensors:
      near = sorted(left)[:3]
      raise ValueError(f"missing tensor {name!r}; the file has {near} ...")
    left.discard(name)
    value = tensors[name]
    if value.shape != shape:
      raise ValueError(
        f"tensor {name!r}: got shape {value.shape}; allowed: {shape}"
      )
    return value.T.astype(dtype)

  def stack(name, spec):
    shape = spec.shape[1:][::-1]
    pieces = [take(_hf_name(name, i), shape) for i in range(cfg.num_layers)]
    return jnp.stack(pieces)

  params = {
    "embed": take("model.embed_tokens.weight", tree["embed"].shape).T,
    "layers": {n: stack(n, spec) for n, spec in tree["layers"].items()},
    "final_norm": take("model.norm.weight", tree["final_norm"].shape),
  }
  if not cfg.tie_embeddings:
    params["head"] = take(_HEAD, tree["head"].shape[::-1])
  else:
    left.discard(_HEAD)
  if left:
    raise ValueError(f"unexpected tensors: {sorted(left)[:5]}")
  return params
