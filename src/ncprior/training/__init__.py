"""Stage 1 trains the VAE, stage 2 the ratios."""

from ncprior.training.combining import combine
from ncprior.training.finetune import finetune_vae
from ncprior.training.ratios import fit_prior, settings_of
from ncprior.training.vae import train_vae

__all__ = ["combine", "finetune_vae", "fit_prior", "settings_of", "train_vae"]
