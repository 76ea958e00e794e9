"""Samplers of r(z) p(z) / Z: pure functions of callables that know no model."""

from ncprior.samplers.annealed import AnnealedResult, annealed
from ncprior.samplers.langevin import LangevinResult, langevin
from ncprior.samplers.sir import SIRResult, sir

__all__ = ["AnnealedResult", "LangevinResult", "SIRResult", "annealed", "langevin", "sir"]
