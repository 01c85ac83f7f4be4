"""Losses: each factory returns ``loss_fn(params, key, batch) -> (loss (B,), metrics)``."""

from jaxdiff.losses.denoising import denoising

__all__ = ["denoising"]
