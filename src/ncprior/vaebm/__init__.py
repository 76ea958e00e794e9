"""VAEBM: an energy on images on top of a frozen VAE with any prior."""

from ncprior.vaebm.energy import ImageEnergy
from ncprior.vaebm.fit import fit_energy
from ncprior.vaebm.joint import Joint
from ncprior.vaebm.network import EnergyNetwork, FlatEnergyNetwork
from ncprior.vaebm.sampling import draw_with_energy

__all__ = [
    "EnergyNetwork",
    "FlatEnergyNetwork",
    "ImageEnergy",
    "Joint",
    "draw_with_energy",
    "fit_energy",
]
