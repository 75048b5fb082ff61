"""How alike two images are: PSNR and SSIM, in float64."""

from __future__ import annotations

import math

import numpy as np

# Of the window, and of the two constants (Wang et al., "Image quality
# assessment: from error visibility to structural similarity", 2004, III.B).
_SIZE, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def psnr(a: np.ndarray, b: np.ndarray, *, peak: float = 255.0) -> float:
  """Peak signal-to-noise ratio over all elements, in dB; equal is infinite.

  Args:
    a: any shape, integer or float.
    b: likewise.
    peak: the range of a value.

  Raises:
    ValueError: shapes that differ.
  """
  a, b = _pair(a, b)
  error = float(np.mean(np.square(a - b)))
  return 10 * math.log10(peak**2 / error) if error else math.inf


def ssim(a: np.ndarray, b: np.ndarray, *, peak: float = 255.0) -> float:
  """Mean structural similarity (Wang et al., 2004, equation 13).

  Windows of 11 x 11 with Gaussian weights of standard deviation 1.5, only
  where they lie inside the image, each channel by itself.

  Args:
    a: `[..., height, width, channels]`, sides of at least 11.
    b: likewise.
    peak: the range of a value.

  Returns:
    The mean over windows, channels and images.

  Raises:
    ValueError: shapes that differ, or an image smaller than a window.
  """
  a, b = _pair(a, b)
  if a.ndim < 3 or min(a.shape[-3:-1]) < _SIZE:
    raise ValueError(
      f"a: got shape {a.shape}; allowed: (..., height, width, channels) with "
      f"sides of at least {_SIZE}"
    )
  mean_a, mean_b = _blur(a), _blur(b)
  # Rounding may leave the variance of a constant a little below zero, which
  # the constants outweigh.
  var_a = _blur(a * a) - mean_a**2
  var_b = _blur(b * b) - mean_b**2
  covariance = _blur(a * b) - mean_a * mean_b
  c1, c2 = (_K1 * peak) ** 2, (_K2 * peak) ** 2
  value = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
  value /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
  return float(np.mean(value))


def _pair(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.shape != b.shape or not a.size:
    raise ValueError(f"b: got shape {b.shape}; allowed: a's, {a.shape}")
  return a, b


def _blur(x: np.ndarray) -> np.ndarray:
  """Weighted means over the windows inside the image."""
  weights = np.exp(-((np.arange(_SIZE) - _SIZE // 2) ** 2) / (2 * _SIGMA**2))
  weights /= weights.sum()
  for axis in (-3, -2):
    x = np.lib.stride_tricks.sliding_window_view(x, _SIZE, axis) @ weights
  return x
