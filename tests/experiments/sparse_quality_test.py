"""Choices, densities and errors are what NumPy says, and a study resumes."""

import dataclasses
import json
import math
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import errors, sparse_quality
from experiments.diffusion import configs as dit_configs
from experiments.diffusion import run as dit_run
from experiments.sparse import (
  choices,
  measure,
  picture,
  sampling,
  sources,
  text_loss,
)
from jaxlib_ext import records
from tests.experiments import runs

BLOCK, LENGTH, SIZE = 8, 64, 8
NUMBER = LENGTH // BLOCK


def source(*, causal=False, tile=(), parts=1, scale=2.0):
  """One layer of two heads; a grid of 8 x 8 tokens unless causal."""
  rng = np.random.default_rng(0)
  shape = (1, 2, LENGTH * parts, 2, SIZE)
  q, k, v = (rng.standard_normal(shape).astype(np.float32) for _ in "qkv")
  return sources.Source(
    name="text" if causal else "images",
    q=scale * q,
    k=k,
    v=v,
    causal=causal,
    block=BLOCK,
    grid=(LENGTH,) if causal else (8, 8),
    tile=tile,
    parts=parts,
    model={"d_model": 16},
    facts={"step": 3, "parameters": "0", "data": "1", "examples": 2},
  )


def softmax(x):
  x = np.exp(x - x.max(axis=-1, keepdims=True))
  return x / x.sum(axis=-1, keepdims=True)


def by_hand(src):
  """Probabilities [B, H, T, S] and output [B, T, H, K] in float64."""
  q, k, v = (x[0].astype(np.float64) for x in (src.q, src.k, src.v))
  scores = np.einsum("bthk,bshk->bhts", q, k) / math.sqrt(SIZE)
  if src.causal:
    scores = np.where(np.tri(LENGTH, dtype=bool), scores, -np.inf)
  return scores, np.einsum("bhts,bshk->bthk", softmax(scores), v)


def relative(out, want):
  square = lambda x: np.square(x).sum(axis=(0, 1, 3))
  return np.sqrt(square(out - want) / square(want))


# float32 sums of some tens of terms against float64, errors near one, and
# four digits in the record.
CLOSE = dict(rtol=1e-3)


@pytest.mark.parametrize("causal", [False, True])
def test_a_choice_is_what_numpy_says(causal):
  src = source(causal=causal)
  layer = measure.Layer(src, 0)
  got = layer.choice("oracle", 0.25, ("drop", "mean"))
  scores, want = by_hand(src)
  probs = softmax(scores)
  cut = probs.reshape(2, 2, NUMBER, BLOCK, NUMBER, BLOCK)
  mass = cut.mean(axis=3).sum(axis=-1)
  ranked = mass.copy()
  if causal:  # the diagonal first, and a quarter of what a row sees
    ranked[..., np.arange(NUMBER), np.arange(NUMBER)] = 2
  counts = np.maximum(1, np.arange(1, NUMBER + 1) // 4) if causal else [2] * 8
  member = np.zeros(mass.shape, bool)
  for row, count in enumerate(counts):
    best = np.argsort(-ranked[:, :, row], axis=-1)[..., :count]
    np.put_along_axis(member[:, :, row], best, True, axis=-1)
  seen = NUMBER * (NUMBER + 1) / 2 if causal else NUMBER**2
  np.testing.assert_allclose(
    got["achieved"], member.sum(axis=(2, 3)).mean(axis=0) / seen, **CLOSE
  )
  kept = np.where(member, mass, 0).sum(axis=-1).mean(axis=(0, 2))
  np.testing.assert_allclose(got["mass"], kept, **CLOSE)

  tokens = member.repeat(BLOCK, axis=2).repeat(BLOCK, axis=3)
  v = src.v[0].astype(np.float64)
  out = softmax(np.where(tokens, scores, -np.inf))
  out = np.einsum("bhts,bshk->bthk", out, v)
  np.testing.assert_allclose(got["error"]["drop"], relative(out, want), **CLOSE)
  assert list(got["error"]) == ["drop", "mean"]
  assert set(np.argsort(got["error"]["mean"])) == {0, 1}


def test_facts_check_density_one():
  layer = measure.Layer(source(), 0)
  facts = layer.facts()
  # As `measure` argues of float32.
  assert facts["error_at_density_1"] < 1e-5
  probs = softmax(by_hand(source())[0])
  entropy = -(probs * np.log(probs)).sum(axis=-1) / math.log(LENGTH)
  np.testing.assert_allclose(
    facts["entropy"], entropy[:, :, 1:].mean(axis=(0, 2)), **CLOSE
  )
  layer.attend = lambda blocks, tail: layer._dense.out * 1.001
  with pytest.raises(measure.DisagreementError, match="images: attention"):
    layer.facts()
  with pytest.raises(FloatingPointError, match="not finite"):
    measure.error(jnp.full((1, 2, 1, 2), jnp.nan), jnp.ones((1, 2, 1, 2)))


def test_the_best_tokens_and_the_nearest():
  src = source(tile=(2, 4))
  layer = measure.Layer(src, 0)
  scores, want = by_hand(src)
  achieved = float(layer.lists("topk", 0.25).density)
  count = round(achieved * LENGTH)
  masks = {"tokens": np.zeros(scores.shape, bool)}
  best = np.argsort(-scores, axis=-1)[..., :count]
  np.put_along_axis(masks["tokens"], best, True, axis=-1)
  # Tokens of tiles of 2 x 4, tile after tile.
  places = np.array(
    [
      (2 * i + a, 4 * j + b)
      for i in range(4)
      for j in range(2)
      for a in range(2)
      for b in range(4)
    ]
  )
  np.testing.assert_array_equal(src.places(), places)
  square = ((places[:, None] - places) ** 2).sum(axis=-1)
  near = np.argsort(square, axis=1, kind="stable")[:, :count]
  masks["window"] = np.zeros((LENGTH, LENGTH), bool)
  np.put_along_axis(masks["window"], near, True, axis=1)
  for name, mask in masks.items():
    got = layer.mask(name, 0.25)
    out = softmax(np.where(mask, scores, -np.inf))
    kept = np.where(mask, softmax(scores), 0).sum(axis=-1).mean(axis=(0, 2))
    out = np.einsum("bhts,bshk->bthk", out, src.v[0].astype(np.float64))
    np.testing.assert_allclose(
      got["error"]["drop"], relative(out, want), **CLOSE
    )
    np.testing.assert_allclose(got["mass"], kept, **CLOSE)
    np.testing.assert_allclose(got["achieved"], count / LENGTH, **CLOSE)


@pytest.mark.parametrize("sink", [0, 4])
def test_windows_keep_what_they_should(sink):
  length, density = 50, 0.3
  mask = choices.window(length, density, sink)
  seen = np.tri(length, dtype=bool)
  assert not (mask & ~seen).any()
  assert mask[:, :sink].sum() == seen[:, :sink].sum()
  # The next size has 50 - size pairs more.
  assert abs(mask.sum() - density * seen.sum()) <= length / 2
  near = np.cumsum(mask[-1, ::-1] == 0)[: length - sink]
  assert near[-1] == length - mask[-1].sum()


def test_causal_best_tokens():
  scores = np.where(np.tri(6, dtype=bool), np.arange(6.0), -np.inf)[None, None]
  ordered = np.sort(scores, axis=-1)
  mask = choices.best_tokens(scores, ordered, True, 0.5)
  # Half of what each sees, 0.5 to the even number, but at least one.
  counts = [1, 1, 2, 2, 2, 3]
  want = [[t + 1 - c <= s <= t for s in range(6)] for t, c in enumerate(counts)]
  np.testing.assert_array_equal(mask[0, 0], want)


@pytest.mark.parametrize("target", [0.004, 0.13, 0.7, 2.0])
def test_the_nearest_density_is_found(target):
  asked = []

  def choose(amount):
    asked.append(amount)
    return types.SimpleNamespace(amount=amount, density=amount**2)

  amounts = np.arange(0.02, 1, 0.02).tolist()
  found = choices._nearest(choose, amounts, target)
  assert found.amount == min(amounts, key=lambda a: abs(a * a - target))
  assert len(asked) <= 8


@pytest.mark.parametrize("name", ["threshold", "top_p"])
def test_lists_meet_the_density_of_topk(name, monkeypatch):
  # Fewer amounts, each of which is compiled.
  monkeypatch.setattr(choices, "_TAUS", [2.0, 1.0, 0.5, 0.0])
  monkeypatch.setattr(choices, "_SHARES", [0.2, 0.4, 0.6, 0.8])
  layer = measure.Layer(source(), 0)
  blocks = layer.lists(name, 0.25)
  amounts = [0.0, 2.0] if name == "threshold" else [0.2, 0.8]
  q, k, _ = layer._dense.qkv
  key = {"threshold": "tau", "top_p": "top_p"}[name]
  for amount in amounts:
    end = choices._select(
      q, k, method=name, block_q=BLOCK, block_kv=BLOCK, causal=False,
      **{key: amount},
    )  # fmt: skip
    assert abs(blocks.density - 0.25) <= abs(end.density - 0.25)


def test_raster_order_is_undone_tiling():
  src = source(tile=(4, 2), parts=2)
  place = src.places()
  q = np.broadcast_to(place[None, None, :, None, :], (1, 2, 128, 2, 2))
  raster = dataclasses.replace(src, q=q).raster()
  plain = np.indices((8, 8)).reshape(2, -1).T
  want = np.concatenate([plain, plain])
  np.testing.assert_array_equal(raster.q[0, 0, :, 0], want)
  np.testing.assert_array_equal(raster.places(), want)
  assert (src.layout, raster.layout) == ("tiled", "raster")
  assert measure.names(raster) == ("topk", "topk_cov")
  assert src.context == LENGTH and source().context == 0


@pytest.mark.parametrize("sharp", measure.SHARP)
def test_exact_blocks_of_in_context_attention(sharp):
  # 16 target and 16 context blocks, of which 2 stay: 18 for a sharp query
  # block, a sixteenth of them, 1, for a flat one.
  full = {0.1: 3, 0.25: 8, 0.5: 16}[sharp]
  want = (full * 18 + (32 - full) * 1) / 32**2
  assert measure.in_context_density(32, sharp) == want
  # All stay: 32 blocks, and a sixteenth of them, 2.
  want = (full * 32 + (32 - full) * 2) / 32**2
  assert measure.in_context_density(32, sharp, 1.0) == want


def test_tables_and_figures(tmp_path):
  layers = []
  for number in range(2):
    results = []
    for density in (0.1, 0.2):
      for choice in ("topk", "window"):
        tails = ("drop", "mean") if choice == "topk" else ("drop",)
        results.append(
          {
            "choice": choice,
            "density": density,
            "achieved": [density, density],
            "mass": [0.5, 0.7],
            "error": {t: [0.1 * (1 + number), 0.3] for t in tails},
          }
        )
    results.append(
      {
        "choice": "in_context",
        "sharp": 0.5,
        "density": 0.1 * (1 + number),
        "error": {"in_context": [0.2, 0.4], "drop": [0.5, 0.5]},
      }
    )
    layers.append({"layer": 1 - number, "results": results})
  found = picture.Results(layers)
  lines = picture.table("images", found).splitlines()
  assert lines[0].startswith("| images: blocks | tail | 0.1 (0.100) | 0.2 (0.2")
  assert lines[2] == "| topk | drop | 0.225 | 0.225 | 0.600 |"
  assert lines[3].startswith("| topk | mean |")
  assert lines[-1] == (
    "in-context, 0.125 kept, at 0.150 exact, beside top-k: in_context 0.300, "
    "drop 0.500"
  )
  np.testing.assert_allclose(found["topk", "mean", 0.1][2][:, 0], [0.2, 0.1])


@pytest.fixture(scope="module")
def small_dit(tmp_path_factory):
  """The directory of a DiT that has taken one step."""
  settings = [
    "model.input_shape=16,16,3", "model.tile=2,2", "model.d_model=16",
    "training.steps=1", "training.batch_size=4", "data.limit=40",
    "samples.count=1", "samples.steps=1",
  ]  # fmt: skip
  workdir = tmp_path_factory.mktemp("dit")
  dit_run.Run(dit_configs.resolve("smoke", settings), workdir).train()
  return workdir


def options(tmp_path, **more):
  values = dict(
    lm=None, dit=(), sample=False, examples=2, block=BLOCK,
    densities=(0.125, 0.25), steps=2, full_steps=0,
    record=tmp_path / "record.jsonl",
  )  # fmt: skip
  return sparse_quality.Options(**(values | more))


@pytest.mark.slow
def test_a_study_of_trained_models(small_dit, tmp_path, monkeypatch, capsys):
  """Both models, some choices; then again."""
  monkeypatch.setattr(choices, "LISTS", ("topk", "topk_sink"))
  monkeypatch.setattr(measure, "TAILS", ("drop", "mean"))
  monkeypatch.setattr(measure, "SHARP", (0.5,))
  corpus = runs.write_corpus(tmp_path / "corpus")
  runs.run(
    tmp_path / "lm",
    runs.settings(
      corpus,
      "training.steps=1",
      "training.warmup_steps=1",
      "training.seq_len=68",
    ),
  )
  capsys.readouterr()
  given = options(
    tmp_path, lm=tmp_path / "lm", dit=(small_dit,), densities=(0.25,)
  )
  sparse_quality.measure_heads(given)
  lines = records.read(given.record)
  kinds = [(r["source"], r["layout"], r["layer"]) for r in lines]
  assert kinds == [
    *(("text", "sequence", layer) for layer in range(2)),
    *(("smoke", "tiled", layer) for layer in range(2)),
    *(("smoke", "raster", layer) for layer in range(2)),
  ]
  assert [r["tokens"] for r in lines[::2]] == [64, 128, 128]
  for record in lines:
    assert {"versions", "device", "git", "model", "entropy"} <= set(record)
    for result in record["results"]:
      found = result["error"].values()
      assert np.isfinite(list(found)).all() and np.min(list(found)) >= 0
  text = {r["choice"] for r in lines[0]["results"]}
  assert text == {"topk", "topk_sink", "in_context", *choices.MASKS}
  for name in ("text", "smoke"):
    for suffix in (".png", ".svg"):
      assert (tmp_path / f"record_{name}{suffix}").stat().st_size > 10_000
  printed = capsys.readouterr().out
  assert "| text, sequence: blocks |" in printed
  assert "in-context, 0.125 kept, at" in printed
  assert "in-context, 1 kept, at" in printed

  sparse_quality.measure_heads(given)
  assert records.read(given.record) == lines
  assert capsys.readouterr().out == printed

  monkeypatch.setattr(text_loss, "TAILS", ("mean",))
  given = dataclasses.replace(given, sample=True, densities=(1.0,))
  sparse_quality.take_losses(given)
  *_, record = records.read(given.record)
  full, blocks, window, in_context = (r["loss"] for r in record["results"])
  assert full != in_context == pytest.approx(full, abs=0.1)
  # Everything is exact, and the record has five decimals.
  assert full == pytest.approx(blocks, abs=2e-5)
  assert full == pytest.approx(window, abs=2e-5)


@pytest.mark.slow
def test_samples_are_compared(small_dit, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(measure, "SHARP", (0.5,))
  monkeypatch.setattr(sampling, "TAILS", ("mean",))
  given = options(tmp_path, dit=(small_dit,), sample=True, full_steps=1)
  sparse_quality.draw_samples(given)
  (record,) = records.read(given.record)
  assert [r["attention"] for r in record["results"]] == [
    "piecewise",
    "in_context",
  ]
  number = 2 * 64 // 4
  want = measure.in_context_density(number, 0.5)
  assert {r["density"] for r in record["results"]} == {round(want, 4)}
  for result in record["results"]:
    # An untrained model's samples are its noise, however it attends.
    assert result["psnr"] > 30 and result["ssim"] > 0.9
  # A row each of context, dense and the methods, of 16 pixels doubled.
  with Image.open(tmp_path / "record_smoke_samples_1.png") as image:
    assert image.size[1] == 4 * (16 * 2 + 2)
  sparse_quality.draw_samples(given)
  assert len(records.read(given.record)) == 1
  assert "| ISA " in capsys.readouterr().out


def test_shares_of_the_losses_methods():
  length, block = 64, 8
  for method in text_loss.methods(length, block, (0.3,))[1:]:
    seen = np.tril(np.ones((length, length), bool))
    if method.fields["mixers"] == ("window",):
      far = np.subtract.outer(np.arange(length), np.arange(length))
      exact = seen & (far < method.fields["window"][0])
      # The nearest whole window.
      assert abs(exact.sum() / seen.sum() - method.share) < 1 / length
    elif method.fields["mixers"] == ("sparse",):
      exact = 0
      for i in range(length // block):
        rows = seen[i * block : (i + 1) * block]
        listed = max(1, int(0.3 * (i + 1)))  # its own and whole ones
        exact += rows[:, i * block :].sum() + (listed - 1) * block**2
      assert exact / seen.sum() == pytest.approx(method.share)


def test_bound_of_in_context_attention():
  """Four blocks of context, one of which stays, and four of the target."""
  found = {
    m.fields["sharp"]: m.share
    for m in text_loss.methods(64, 8, ())
    if m.fields["mixers"] == ("in_context",)
  }
  # Two sharp ones of each part: 3 + 4 and 4 + 5 blocks, and one of each other.
  blocks = (1 + 1 + 3 + 4) + (1 + 1 + 4 + 5)
  pairs = blocks * 8**2 - 8 * (8 * 7 / 2)
  assert found[0.5] == pytest.approx(pairs / (64 * 65 / 2))
  assert found[0.1] < found[0.25] < found[0.5]


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (dict(), "--lm, --dit: expected"),
    (dict(lm="lm", densities=(0.0,)), "--densities: got 0; allowed"),
    (dict(dit=("a",), full_steps=3), "--full_steps: got 3; allowed"),
  ],
)
def test_bad_flags(tmp_path, more, message):
  with pytest.raises(errors.UserError, match=message):
    options(tmp_path, **more)


def test_no_run(tmp_path):
  with pytest.raises(errors.UserError, match="--lm: .* is no run's"):
    sources.text(tmp_path, 1, 8)
  (tmp_path / "config.json").write_text(json.dumps({"config": {"name": 3}}))
  with pytest.raises(errors.UserError, match="--lm: .* is no run's"):
    sources.text(tmp_path, 1, 8)
