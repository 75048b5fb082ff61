"""Images and video as examples by number, all of them in memory.

A source turns numbers into examples; which numbers make up the batch of a
step is `experiments.data.Stream`'s business, so that a run resumes anywhere.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import io
import lzma
import math
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from experiments import data, device_memory, errors
from experiments.diffusion import configs

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_TAR = (".tar", ".tar.gz", ".tar.xz", ".tar.bz2", ".tgz")


class Batch(NamedTuple):
  """Examples.

  Attributes:
    x: uint8 `[B, *input_shape]`.
    labels: int32 `[B]`, of the classes.
  """

  x: np.ndarray
  labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Images:
  """Examples that are stored: uint8 `[N, ...]` and int32 labels `[N]`."""

  x: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.x)

  def get(self, numbers: np.ndarray) -> Batch:
    """The examples of these numbers."""
    return Batch(self.x[numbers], self.labels[numbers])


@dataclasses.dataclass(frozen=True)
class Crops:
  """Every crop of a video: frames `[F, H, W, 3]` uint8, and a crop's shape."""

  frames: np.ndarray
  shape: tuple[int, int, int]

  @property
  def _starts(self) -> tuple[int, ...]:
    sizes = zip(self.frames.shape, self.shape, strict=False)
    return tuple(n - size + 1 for n, size in sizes)

  def __len__(self) -> int:
    return int(np.prod(self._starts))

  def get(self, numbers: np.ndarray) -> Batch:
    """The crops of these numbers, all of class 0."""
    starts = zip(*np.unravel_index(numbers, self._starts), strict=True)
    f, h, w = self.shape
    x = [self.frames[i : i + f, j : j + h, k : k + w] for i, j, k in starts]
    return Batch(np.stack(x), np.zeros(len(x), np.int32))


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Training and held-out examples.

  Attributes:
    train: to learn from.
    held_out: for evaluation.
    classes: names, in the order of the labels.
    hash: of all of it.
  """

  train: Images | Crops
  held_out: Images | Crops
  classes: tuple[str, ...]
  hash: str

  def describe(self) -> dict[str, Any]:
    """What records say of it."""
    return {
      "train": len(self.train),
      "held_out": len(self.held_out),
      "classes": list(self.classes),
      "hash": self.hash,
    }

  def batches(self, batch_size: int, seed: int) -> Any:
    """step → training batch; every example comes once in an epoch."""
    # A window of one token is an example's number.
    stream = data.Stream(
      np.arange(len(self.train) + 1),
      batch_size=batch_size,
      seq_len=1,
      seed=seed,
    )
    return lambda step: self.train.get(stream.batch(step)[:, 0])

  def eval_batches(self, batch_size: int, count: int) -> Iterator[Batch]:
    """At most `count` whole batches of held-out examples, evenly spread."""
    size = len(self.held_out)
    count = min(count, size // batch_size)
    if not count:
      raise errors.UserError(
        f"training.batch_size: got {batch_size}; allowed: at most the {size} "
        "held-out examples"
      )
    numbers = np.arange(count * batch_size) * size // (count * batch_size)
    # So that every batch holds examples of all classes.
    for part in numbers.reshape(batch_size, count).T:
      yield self.held_out.get(part)


def load(settings: configs.Data, input_shape: tuple[int, ...]) -> Corpus:
  """Reads or draws what a config names.

  Args:
    settings: the config's.
    input_shape: of an example; images are cropped to its proportions and
      scaled to it, videos are cropped.

  Raises:
    UserError: nothing there, or something that is not what it should be.
  """
  video = len(input_shape) == 4
  if input_shape[-1] != 3:
    raise errors.UserError(
      f"model.input_shape: got {input_shape}; allowed: 3 channels"
    )
  if settings.source != "synthetic" and video != (settings.source == "video"):
    raise errors.UserError(
      f"model.input_shape: got {input_shape}; allowed: "
      f"{'images' if video else 'frames in front'} for data.source="
      f"{settings.source}"
    )
  if settings.source == "video":
    train, held_out, classes = _read_video(settings, input_shape)
    arrays = (train.frames, held_out.frames)
  else:
    read = _draw if settings.source == "synthetic" else _read_images
    train, held_out, classes = read(settings, input_shape)
    arrays = (train.x, train.labels, held_out.x, held_out.labels)
  digest = hashlib.sha256(repr((input_shape, classes)).encode())
  for array in arrays:
    digest.update(np.ascontiguousarray(array).data)
  return Corpus(train, held_out, classes, digest.hexdigest()[:16])


def _read_images(settings, input_shape):
  files = _files(settings.path)
  if settings.limit and settings.limit < len(files):
    count = settings.limit
    files = [files[i * len(files) // count] for i in range(count)]
  folders = [pathlib.PurePath(name).parent for name, _ in files]
  classes = tuple(sorted({folder.name for folder in folders}))
  number = {name: i for i, name in enumerate(classes)}
  labels = np.array([number[f.name] for f in folders], np.int32)
  size = (input_shape[1], input_shape[0])
  _check_room(len(files), input_shape)
  x = np.stack([_decode(name, file, size) for name, file in files])
  test = np.array(["test" in folder.parts for folder in folders])
  if not test.any():
    test = _spread(len(files), settings.held_out)
  if test.all() or not test.any():
    raise errors.UserError(
      f"data.path: {len(files)} images leave none to train on or to hold out"
    )
  return Images(x[~test], labels[~test]), Images(x[test], labels[test]), classes


def _check_room(count, input_shape):
  """Refuses examples that memory has no room for."""
  needed, room = count * math.prod(input_shape), device_memory.host_bytes()
  if room and needed > room:
    raise errors.UserError(
      f"model.input_shape: {count} examples of {input_shape} take {needed} "
      f"bytes, more than the {room} of memory; set a smaller data.limit"
    )


def _spread(count, share):
  """Which of `count` are held out: a share of them, evenly spread."""
  ends = np.floor(np.arange(count + 1) * share)
  return ends[1:] > ends[:-1]


def _files(path):
  """Names, sorted, and what PIL opens: a path, or bytes as a file."""
  if path.endswith(_TAR):
    files = _tar_members(path)
  else:
    root = pathlib.Path(path)
    found = (
      root.rglob("*") if root.is_dir() else glob.glob(path, recursive=True)
    )
    files = {str(p): pathlib.Path(p) for p in found}
  out = [
    (name, file)
    for name, file in sorted(files.items())
    if name.lower().endswith(SUFFIXES)
  ]
  if not out:
    raise errors.UserError(
      f"data.path: no images in {path!r}; allowed: a directory, glob or tar "
      f"file of {', '.join(SUFFIXES)}"
    )
  return out


def _tar_members(path):
  """All at once: a compressed archive can only be read from the front."""
  try:
    with tarfile.open(path) as archive:
      return {
        member.name: io.BytesIO(archive.extractfile(member).read())
        for member in archive
        if member.isfile() and _fits(member, path)
      }
  except (tarfile.TarError, EOFError, lzma.LZMAError) as e:
    raise errors.UserError(f"data.path: cannot read {path}: {e}") from e


def _fits(member, path):
  """Whether to read it; what memory has no room for is refused."""
  if not member.name.lower().endswith(SUFFIXES):
    return False
  room = device_memory.host_bytes()
  if room and member.size > room:
    raise errors.UserError(
      f"data.path: {member.name} in {path} has {member.size} bytes, more than "
      f"the {room} of memory"
    )
  return True


def _decode(name, file, size):
  try:
    with Image.open(file) as image:
      image = ImageOps.exif_transpose(image).convert("RGB")
      if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
      return np.asarray(image)
  except (Image.DecompressionBombError, OSError) as e:
    raise errors.UserError(f"data.path: cannot read {name}: {e}") from e


def _read_video(settings, input_shape):
  frames = _decode_video(settings.path, settings.downscale)
  shape = input_shape[:-1]
  last = max(shape[0], round(settings.held_out * len(frames)))
  if any(
    n < size
    for n, size in zip(
      (len(frames) - last, *frames.shape[1:]), shape, strict=False
    )
  ):
    raise errors.UserError(
      f"data.path: {len(frames)} frames of {frames.shape[1:3]}, {last} of "
      f"them held out, are too few for crops of {shape}"
    )
  train, held_out = frames[:-last], frames[-last:]
  return Crops(train, shape), Crops(held_out, shape), ("",)


def _decode_video(path, downscale):
  """All frames, uint8 [F, H, W, 3]."""
  try:
    import av
  except ImportError as e:
    raise errors.UserError("data.source=video needs the package av") from e
  try:
    with av.open(path) as container:
      frames = [
        frame.to_ndarray(
          format="rgb24",
          width=frame.width // downscale,
          height=frame.height // downscale,
          interpolation="AREA",
        )
        for frame in container.decode(video=0)
      ]
    return np.stack(frames)
  except (av.error.FFmpegError, IndexError, ValueError) as e:
    raise errors.UserError(f"data.path: cannot read {path}: {e}") from e


def _draw(settings, input_shape):
  """Discs and squares that move in front of a slope of two colours."""
  count = settings.limit or 256
  _check_room(count, input_shape)
  rng = np.random.default_rng(0)
  *frames, height, width, _ = input_shape
  t = np.arange(frames[0] if frames else 1).reshape(-1, 1, 1)
  y, x = np.mgrid[0 : 1 : 1j * height, 0 : 1 : 1j * width]
  labels = rng.integers(0, 2, count).astype(np.int32)
  out = []
  for label in labels:
    (cy, cx), (vy, vx) = rng.uniform(0.3, 0.7, 2), rng.normal(0, 0.05, 2)
    radius, (colour, top, bottom) = rng.uniform(0.15, 0.3), rng.random((3, 3))
    dy, dx = y - cy - vy * t, x - cx - vx * t
    far = np.maximum(abs(dy), abs(dx)) if label else np.hypot(dy, dx)
    back = top + (bottom - top) * y[..., None]
    picture = np.where((far < radius)[..., None], colour, back)
    out.append(picture.reshape(input_shape) * 255)
  x = np.stack(out).astype(np.uint8)
  test = _spread(count, settings.held_out)
  return (
    Images(x[~test], labels[~test]),
    Images(x[test], labels[test]),
    ("disc", "square"),
  )
