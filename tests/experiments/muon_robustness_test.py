"""Probes, spectra and the study, each against what it means."""

import dataclasses
import functools
import json
import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import errors, muon_robustness
from experiments.robustness import (
  corruptions,
  learner,
  measure,
  probes,
  report,
  runs,
  spectra,
  tasks,
)
from jaxlib_ext import records


def test_spectra_of_known_matrices():
  rng = np.random.default_rng(0)
  q = np.linalg.qr(rng.standard_normal((40, 8)) - 0)[0]
  q = np.linalg.qr(q - q.mean(0))[0]  # Columns of mean zero.
  same = spectra.spectrum(5 + 3 * q)
  # Eight equal directions, whatever the mean and the scale.
  for value in same.values():
    assert value == pytest.approx(8, rel=1e-9)
  one = spectra.spectrum(np.outer(rng.standard_normal(40), np.ones(8)))
  for value in one.values():
    # Others are rounding, sqrt(8) 1e-16 of it each.
    assert value == pytest.approx(1, rel=1e-6)
  sigma = np.array([4.0, 2.0, 1.0, 1.0])
  found = spectra.spectrum(q[:, :4] * sigma)
  p = sigma / 8
  assert found["effective_rank"] == pytest.approx(np.exp(-p @ np.log(p)))
  assert found["stable_rank"] == pytest.approx(22 / 16)
  assert found["participation"] == pytest.approx(22**2 / (256 + 16 + 2))
  assert set(spectra.spectrum(np.ones((5, 3))).values()) == {0.0}


def test_probe_is_the_regularised_optimum():
  """Its gradient vanishes, in float64 and by its own formula."""
  rng = np.random.default_rng(0)
  y = rng.integers(0, 3, 200)
  x = rng.standard_normal((200, 5)) * [1, 10, 0.1, 1, 0]
  x[:, 1] += 15 * y
  x[:, 4] = 7.0  # Does not vary.
  probe = probes.fit(jnp.asarray(x), jnp.asarray(y), classes=3, steps=2000)
  p = probes.Probe(*(np.asarray(a, np.float64) for a in probe))
  z = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), np.inf)
  logits = z @ p.weight + p.bias
  share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  error = share - np.eye(3)[y]
  gradient = z.T @ error / 200 + 1e-3 * p.weight
  # Against terms of size 1 and the descent's float32.
  assert np.abs(gradient).max() < 1e-5
  assert np.abs(error.mean(0)).max() < 1e-5
  found = probes.margins(probe, x, y)
  assert found["positive"] == np.mean(logits.argmax(1) == y)
  other = np.where(np.eye(3)[y] > 0, -np.inf, logits)
  margin = logits[np.arange(200), y] - other.max(1)
  assert found["mean"] == pytest.approx(margin.mean(), rel=1e-4)
  assert found["median"] == pytest.approx(np.median(margin), rel=1e-4)
  # Twice the weights are twice the margins at the same distance.
  twice = probes.margins(
    probe._replace(weight=2 * probe.weight, bias=2 * probe.bias), x, y
  )
  assert twice["mean"] == pytest.approx(2 * found["mean"], rel=1e-6)
  for name in ("distance_mean", "distance_median"):
    assert twice[name] == pytest.approx(found[name], rel=1e-6)
    rival = other.argmax(1)
    apart = np.linalg.norm(p.weight[:, y] - p.weight[:, rival], axis=0)
  assert found["distance_mean"] == pytest.approx(
    (margin / apart).mean(), rel=1e-4
  )


def test_features_of_examples_and_of_positions():
  hidden = [np.arange(24.0).reshape(2, 3, 4)]
  (pooled,), y = learner.features(hidden, np.array([1, 0]), 5)
  np.testing.assert_allclose(pooled, hidden[0].mean(1))
  labels = np.array([[-1, 2, 0], [1, -1, 2]])
  (rows,), y = learner.features(hidden, labels, 3)
  np.testing.assert_array_equal(y, [2, 0, 1])
  np.testing.assert_array_equal(rows, hidden[0].reshape(6, 4)[[1, 2, 3]])


def test_kernels_of_a_convolution_have_a_merged_fan_in():
  tree = {
    "kernel": jnp.zeros((2, 3, 3, 4, 5)),
    "dense": jnp.zeros((2, 4, 5)),
    "other": optax.MaskedNode(),
  }
  found = learner.convolution_axes(tree)
  assert found["kernel"] == ((-4, -3, -2), -1, 1, 1)
  assert found["dense"] is None and found["other"] is None


def curve(*losses):
  points = [{"step": i, "loss": x} for i, x in enumerate(losses, 1)]
  return {"curve": points}


def test_matched_steps_are_before_overfitting():
  common, steps = runs.matched_steps(
    [curve(3.0, 2.0, 1.0, 1.9), curve(2.5, 1.8, 1.5, 2.0)]
  )
  assert common == 1.5
  # Of the first both 2.0 and 1.0 are near; its later 1.9 does not count.
  assert steps == [2, 3]


def test_advantage_is_welch_s_statistic():
  a, b = [1.0, 2.0, 3.0], [0.0, 0.5, 1.0]
  want = 1.5 / math.sqrt((1 + 0.25) / 3)
  assert report.advantage(a, b) == pytest.approx(want)
  assert math.isnan(report.advantage([1.0], b))
  assert report.advantage([1.0, 1.0], [1.0, 1.0]) == 0
  assert report.advantage([2.0, 2.0], [1.0, 1.0]) == math.inf


def test_text_compares_muon_with_the_others():
  layer = {
    "margin": dict(mean=1.0, distance_mean=0.5, positive=0.9),
    "effective_rank": 3.0,
    "stable_rank": 2.0,
  }

  def row(name, seed, accuracy):
    score = dict(loss=1.0, accuracy=accuracy)
    run = curve(2.0, 1.5) | dict(
      optimizer=dict(name=name), learning_rate=0.1, seed=seed
    )
    measured = dict(
      step=2,
      clean=score,
      corrupted=dict(blur=[dict(loss=1.5, accuracy=accuracy / 2)] * 5),
      layers=[layer, layer],
    )
    return report.Row("end", run, measured)

  accuracies = {"muon": (0.8, 0.9), "adamw": (0.6, 0.7)}
  lines = report.text(
    "vit",
    [
      row(n, i, a) for n, both in accuracies.items() for i, a in enumerate(both)
    ],
  ).splitlines()
  cells = [cell.strip() for cell in lines[2].split("|")]
  assert cells[1:7] == [
    "end", "muon (0.1)", "2", "2", "1.500 ± 0.000", "0.850 ± 0.071"
  ]  # fmt: skip
  assert cells[7:9] == ["0.500 ± 0.000", "0.500 ± 0.000"]
  assert cells[-2] == "-"  # Nothing to transfer to.
  # 0.2 over sqrt(0.005 / 2 + 0.005 / 2); Student's t of 2 and 1 degrees.
  assert "beyond 4.3 to 12.7:" in lines[-2]
  assert "end, against adamw: accuracy +2.8, accuracy kept +0.0" in lines[-1]


def options(tmp_path, **kwargs):
  text = tmp_path / "text.txt"
  if not text.exists():
    words = np.random.default_rng(0).choice(["ab", "cd ", "efg", " h"], 900)
    text.write_text("".join(words))
  values = dict(
    models=("cnn",),
    optimizers=("muon", "sgd"),
    seeds=1,
    images="digits",
    text=str(text),
    other_text="",
    sizes=tasks.Sizes(width=4, layers=1, seq_len=8, test=40, validation=20),
    training=runs.Training(steps=4, batch_size=8, evaluations=2),
    budget=measure.Budget(
      probe_rows=40,
      probe_steps=5,
      spectrum_rows=64,
      tune_steps=2,
      batch_size=8,
    ),
    workdir=tmp_path / "work",
    record=tmp_path / "records" / "study.jsonl",
  )
  return muon_robustness.Options(**values | kwargs)


class Bar:
  """Counts steps, and says like tqdm's that it was drawn."""

  def __init__(self, total, done, visible):
    self.total, self.steps = total, done

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    pass

  def update(self, steps=1):
    self.steps += steps
    return True

  def clear(self):
    pass

  def set_postfix_str(self, text, refresh):
    pass

  set_description_str = set_postfix_str


@pytest.mark.slow
def test_study_of_digits_is_whole_and_resumes(tmp_path, capsys, monkeypatch):
  bars = []
  monkeypatch.setattr(
    muon_robustness.reports,
    "progress",
    lambda *args: bars.append(Bar(*args)) or bars[-1],
  )
  chosen = options(tmp_path)
  rows = muon_robustness.study(chosen)["cnn"]
  assert [(r.name, r.point) for r in rows] == [
    (name, point) for name in ("muon", "sgd") for point in report.POINTS
  ]
  for row in rows:
    m = row.measured
    assert set(m["corrupted"]) == set(corruptions.IMAGE_STRENGTHS)
    assert [len(x) for x in m["corrupted"].values()] == [5] * 7
    # The stem and three stages; four classes of ten are the others.
    assert len(m["layers"]) == len(m["transfer"]["probe"]) == 4
    assert all(math.isfinite(f(m)) for f in report.MEASURES.values())
  known = records.read(chosen.record)
  assert {r["kind"] for r in known} == {"run", "measurement"}
  assert "Infinity" not in chosen.record.read_text()
  assert str(tmp_path) not in chosen.record.read_text()
  out = capsys.readouterr().out
  assert "| matched | muon (" in out and "| end | sgd (" in out
  assert "Muon minus" not in out  # Of one run there is no spread.
  for suffix in (".png", ".svg"):
    picture = chosen.record.with_name(f"study_cnn{suffix}")
    assert picture.stat().st_size > 10_000
  # Again nothing is done; without a measurement only that.
  last = known[-1]
  records.keep(chosen.record, lambda r: r != last)
  monkeypatch.setattr(runs.Runner, "_train", None)
  muon_robustness.study(chosen)
  again = records.read(chosen.record)
  assert again[:-1] == known[:-1]
  assert json.dumps(again[-1]["layers"]) == json.dumps(last["layers"])
  # The searches' and the fine-tunings' steps, then one fine-tuning's.
  count = {
    k: sum(r["kind"] == k for r in known) for k in ("run", "measurement")
  }
  assert bars[0].steps == 4 * count["run"] + 2 * count["measurement"]
  assert [bar.total for bar in bars] == [bar.steps for bar in bars]
  assert bars[1].steps == 2


@pytest.mark.slow
def test_study_of_text(tmp_path):
  chosen = options(
    tmp_path, models=("lm",), optimizers=("sgd",), other_text="python"
  )
  # The whole library is not needed.
  chosen = dataclasses.replace(chosen, other_text=chosen.text)
  (row, _) = muon_robustness.study(chosen)["lm"]
  m = row.measured
  assert set(m["corrupted"]) == set(corruptions.TEXT_KINDS)
  # The embedding and one layer.
  assert len(m["layers"]) == 2
  assert set(m["transfer"]) == {"probe", "before", "tuned"}
  # The other text is the same one.
  assert m["transfer"]["before"] == pytest.approx(m["clean"], rel=1e-6)


def test_scores_count_padding_and_weights_for_nothing():
  """Batches of 100 of 130 examples, against a sum over all at once."""
  apply = lambda p, x: (x[:, :, None] * p, [])
  scorer = learner.Scorer(tasks.Model(3, None, apply))
  rng = np.random.default_rng(0)
  examples = tasks.Examples(
    rng.standard_normal((130, 2)).astype(np.float32),
    rng.integers(0, 3, (130, 2)).astype(np.int32),
    rng.integers(0, 2, (130, 2)).astype(np.float32),
  )
  p = np.array([1.0, -2.0, 0.5], np.float32)
  got = scorer.evaluate(p, examples)
  logits = examples.x[..., None].astype(np.float64) * p
  nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(
    logits, examples.y[..., None], -1
  ).squeeze(-1)
  right = logits.argmax(-1) == examples.y
  mean = functools.partial(np.average, weights=examples.weight)
  assert got["loss"] == pytest.approx(mean(nll), rel=1e-5)
  assert got["accuracy"] == pytest.approx(mean(right), rel=1e-6)


@pytest.mark.parametrize(
  ("kwargs", "words"),
  [
    ({"models": ("vitt",)}, "--model: .*vit"),
    ({"optimizers": ("muon", "muon")}, "--optimizer: .*different"),
  ],
)
def test_flags_are_checked(tmp_path, kwargs, words):
  with pytest.raises(errors.UserError, match=words):
    options(tmp_path, **kwargs)


def test_bad_data_is_refused(tmp_path):
  load = functools.partial(
    tasks.load, images_path="digits", text="python", other_text=""
  )
  with pytest.raises(errors.UserError, match="--image_size: got 12"):
    load("cnn", tasks.Sizes(image_size=12))
  short = tmp_path / "short.txt"
  short.write_text("too short for windows")
  with pytest.raises(errors.UserError, match="--text: got .* tokens"):
    load("lm", tasks.Sizes(), text=str(short))
  with pytest.raises(errors.UserError, match="--text: data.path: .* not exist"):
    load("lm", tasks.Sizes(), text=str(tmp_path / "absent"))
  with pytest.raises(errors.UserError, match="--images: data.path: no images"):
    load("cnn", tasks.Sizes(), images_path=str(tmp_path))
