"""NVAE, the hierarchical VAE of Vahdat and Kautz (2020)."""

from ncprior.vaes.nvae.model import NVAE
from ncprior.vaes.nvae.presets import PRESETS

__all__ = ["NVAE", "PRESETS"]
