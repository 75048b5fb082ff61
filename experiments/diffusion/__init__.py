"""Diffusion on images and video: data, training, pictures, metrics."""
