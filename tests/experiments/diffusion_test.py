"""Images and video are read as they are; pictures; PSNR and SSIM."""

import math
import tarfile

import numpy as np
import pytest
from PIL import Image

from experiments import errors
from experiments.diffusion import configs, data, metrics, pictures


@pytest.fixture
def pictures_on_disk(tmp_path):
  """Twelve PNGs of one colour each, in two classes."""
  root = tmp_path / "images"
  for i in range(12):
    name = root / ("cat", "dog")[i % 2] / f"{i:02}.png"
    name.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 6), (20 * i, 0, 0)).save(name)
  (root / "notes.txt").write_text("not an image")
  return root


def load_images(path, **changes):
  settings = configs.Data(source="images", path=str(path), **changes)
  return data.load(settings, (4, 4, 3))


def test_images_from_a_directory_a_glob_and_an_archive(
  tmp_path, pictures_on_disk
):
  corpus = load_images(pictures_on_disk, held_out=0.25)
  assert corpus.classes == ("cat", "dog")
  assert len(corpus.train) == 9 and len(corpus.held_out) == 3
  everything = np.concatenate([corpus.train.x, corpus.held_out.x])
  labels = np.concatenate([corpus.train.labels, corpus.held_out.labels])
  assert everything.shape == (12, 4, 4, 3)
  order = np.argsort(everything[:, 0, 0, 0])
  np.testing.assert_array_equal(
    everything[order][:, :, :, 0],
    np.broadcast_to(20 * np.arange(12)[:, None, None], (12, 4, 4)),
  )
  np.testing.assert_array_equal(labels[order], np.arange(12) % 2)

  archive = tmp_path / "images.tar.xz"
  with tarfile.open(archive, "w:xz") as out:
    out.add(pictures_on_disk, "images")
  same = load_images(archive, held_out=0.25)
  assert same.hash == corpus.hash
  assert load_images(pictures_on_disk / "*" / "*.png").classes == corpus.classes
  few = load_images(pictures_on_disk, limit=4, held_out=0.25)
  assert len(few.train) + len(few.held_out) == 4
  assert few.hash != corpus.hash


def test_a_directory_named_test_is_held_out(pictures_on_disk):
  for kind, numbers in (("train", (0, 1, 2)), ("test", (3,))):
    for i in numbers:
      old = next(pictures_on_disk.rglob(f"{i:02}.png"))
      new = pictures_on_disk / kind / old.parent.name / old.name
      new.parent.mkdir(parents=True, exist_ok=True)
      old.rename(new)
  corpus = load_images(pictures_on_disk)
  np.testing.assert_array_equal(corpus.held_out.x[:, 0, 0, 0], [60])
  np.testing.assert_array_equal(corpus.held_out.labels, [1])


def test_bad_data(tmp_path, pictures_on_disk):
  (tmp_path / "bad").mkdir()
  (tmp_path / "bad" / "x.png").write_text("no image")
  (tmp_path / "x.tar").write_text("no archive")
  for path, words in (
    (tmp_path / "none", "no images in"),
    (tmp_path / "bad", "cannot read .*x.png"),
    (tmp_path / "x.tar", "cannot read .*x.tar"),
    (pictures_on_disk / "*" / "03.png", "1 images leave none"),
  ):
    with pytest.raises(errors.UserError, match=words):
      load_images(path)
  corpus = load_images(pictures_on_disk)
  with pytest.raises(errors.UserError, match="batch_size: got 5; .* the 1"):
    next(corpus.eval_batches(5, 1))
  settings = configs.Data(source="images", path=str(pictures_on_disk))
  for shape in ((8, 4, 4, 3), (4, 4, 1)):
    with pytest.raises(errors.UserError, match="model.input_shape"):
      data.load(settings, shape)


def test_batches_hold_everything_once_an_epoch():
  corpus = data.load(configs.Data(limit=24, held_out=0.25), (8, 8, 3))
  batch_of = corpus.batches(6, seed=1)
  seen = [batch_of(step) for step in range(3)]
  again = np.concatenate([b.x for b in seen])
  sort = lambda x: np.sort(x.reshape(len(x), -1).sum(1, dtype=np.int64))
  np.testing.assert_array_equal(sort(again), sort(corpus.train.x))
  np.testing.assert_array_equal(batch_of(2).x, seen[2].x)
  other = corpus.batches(6, seed=2)(0)
  assert np.any(other.x != seen[0].x)
  assert next(corpus.eval_batches(6, 5)).x.shape == (6, 8, 8, 3)


def test_crops():
  """Number 0, the last, and all in between are different places."""
  frames = np.arange(3 * 4 * 5 * 3, dtype=np.uint8).reshape(3, 4, 5, 3)
  crops = data.Crops(frames, (2, 3, 3))
  assert len(crops) == 2 * 2 * 3
  x = crops.get(np.arange(12)).x
  np.testing.assert_array_equal(x[0], frames[:2, :3, :3])
  np.testing.assert_array_equal(x[1], frames[:2, :3, 1:4])
  np.testing.assert_array_equal(x[-1], frames[1:, 1:, 2:])
  assert len(np.unique(x.reshape(12, -1), axis=0)) == 12


def test_video(tmp_path):
  av = pytest.importorskip("av")
  path = tmp_path / "clip.mp4"
  with av.open(str(path), "w") as out:
    stream = out.add_stream("mpeg4", rate=10)
    stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
    for i in range(12):
      image = np.full((32, 64, 3), 20 * i, np.uint8)
      frame = av.VideoFrame.from_ndarray(image, format="rgb24")
      out.mux(stream.encode(frame))
    out.mux(stream.encode())
  settings = configs.Data(source="video", path=str(path), downscale=2)
  corpus = data.load(settings, (4, 8, 8, 3))
  assert corpus.train.frames.shape == (8, 16, 32, 3)
  means = np.concatenate([corpus.train.frames, corpus.held_out.frames])
  # The codec's quantization of a grey, and the rounding of two colour spaces.
  np.testing.assert_allclose(means.mean((1, 2, 3)), 20 * np.arange(12), atol=4)
  for changes, words in (
    (dict(downscale=8), "too few for crops"),
    (dict(path=str(tmp_path / "none.mp4")), "cannot read"),
  ):
    bad = configs.Data(**{**vars(settings), **changes})
    with pytest.raises(errors.UserError, match=words):
      data.load(bad, (4, 8, 8, 3))


def test_psnr():
  a = np.zeros((4, 4, 3), np.uint8)
  assert metrics.psnr(a, a) == math.inf
  assert metrics.psnr(a, a + 255) == 0
  # A mean squared error of 1 of 255: 48.1308 dB.
  assert metrics.psnr(a, a + 1) == pytest.approx(48.1308036)
  assert metrics.psnr(a / 1.0, a + 0.1, peak=1.0) == pytest.approx(20)
  with pytest.raises(ValueError, match="b: got shape"):
    metrics.psnr(a, a[0])


def ssim_by_definition(a, b, peak):
  """Window by window, of one channel."""
  offset = np.arange(11) - 5
  window = np.exp(-(offset[:, None] ** 2 + offset**2) / (2 * 1.5**2))
  window /= window.sum()
  c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
  values = []
  for i in range(a.shape[0] - 10):
    for j in range(a.shape[1] - 10):
      x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
      mx, my = (window * x).sum(), (window * y).sum()
      vx = (window * (x - mx) ** 2).sum()
      vy = (window * (y - my) ** 2).sum()
      both = (window * (x - mx) * (y - my)).sum()
      values.append(
        (2 * mx * my + c1)
        * (2 * both + c2)
        / ((mx**2 + my**2 + c1) * (vx + vy + c2))
      )
  return np.mean(values)


def test_ssim():
  rng = np.random.default_rng(0)
  a = rng.uniform(0, 255, (2, 14, 13, 2))
  b = a + rng.normal(0, 40, a.shape)
  expected = np.mean(
    [
      ssim_by_definition(a[n, ..., c], b[n, ..., c], 255)
      for n in range(2)
      for c in range(2)
    ]
  )
  # Both float64; E x^2 - (E x)^2 cancels a few digits.
  assert metrics.ssim(a, b) == pytest.approx(expected, rel=1e-10)
  assert metrics.ssim(a / 255, b / 255, peak=1.0) == pytest.approx(expected)
  assert metrics.ssim(a, a) == pytest.approx(1, abs=1e-12)
  # Of constants: (2 x y + c1) / (x^2 + y^2 + c1).
  flat = np.ones((11, 11, 1))
  got = metrics.ssim(100 * flat, 150 * flat)
  assert got == pytest.approx((30000 + 6.5025) / (32500 + 6.5025))
  # Of opposites whose windowed mean is near zero: near -1.
  waves = 100 * np.sin(np.pi / 2 * np.add.outer(np.arange(24), np.arange(24)))
  assert metrics.ssim(waves[..., None], -waves[..., None]) < -0.9
  with pytest.raises(ValueError, match="sides of at least 11"):
    metrics.ssim(a[:, :10], a[:, :10])


def test_a_grid_of_pictures(tmp_path):
  path = tmp_path / "grid.png"
  red = np.full((3, 4, 6, 3), (255, 0, 0), np.uint8)
  pictures.save_grid(path, [("", red), ("", red[:1] // 5)], scale=2)
  with Image.open(path) as image:
    pixels = np.asarray(image)
  assert pixels.shape == (2 * 10, 3 * 14, 3)
  np.testing.assert_array_equal(
    pixels[:8, :12], np.full((8, 12, 3), red[0, 0, 0])
  )
  np.testing.assert_array_equal(pixels[17, 11], (51, 0, 0))
  assert np.all(pixels[10:, 14:] == 255)
  pictures.save_grid(path, [("a label", red)])
  with Image.open(path) as image:
    assert image.width > 3 * 14 + 20
  with pytest.raises(ValueError, match="rows: got images of shapes"):
    pictures.save_grid(path, [("", red), ("", red[:, :2])])
