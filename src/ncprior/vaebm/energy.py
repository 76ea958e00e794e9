"""An energy on images, what it was fitted with, and its files."""

from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from ncprior.normal import StandardNormal
from ncprior.priors import NoiseContrastivePrior
from ncprior.priors.fitting import first_weights
from ncprior.storage import fingerprint, load_tensors, restore, save_tensors
from ncprior.vaebm.network import NETWORKS
from ncprior.vaes import FlatVAE

FORMAT = 1


class ImageEnergy(nn.Module):
    """E(x) of the model p(x | z) p(z) exp(-E(x)) / Z, and the dynamics that it was learned with.

    Sampling is a short run of Langevin dynamics. Learning fits the end of that run to the data, so
    that other steps or sizes than those it was learned with draw from another law.

    Args:
        network: Images (n, c, h, w) to energies (n,) in nats.
        langevin_steps: Steps of the run.
        step_size: eta of a step, noise <- noise + (eta / 2) gradient + sqrt(eta) N(0, I).
        pixel_noise: See `Joint`.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        langevin_steps: int,
        step_size: float,
        pixel_noise: bool = True,
    ) -> None:
        super().__init__()
        if langevin_steps < 1 or not step_size > 0:
            raise ValueError(
                "langevin_steps must be at least 1 and step_size positive, "
                f"got {langevin_steps=}, {step_size=}"
            )
        self.network = network
        self.langevin_steps, self.step_size = langevin_steps, step_size
        self.pixel_noise = pixel_noise
        self.record: dict[str, Any] = {}  # how it was fitted: kept beside the weights

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def convolution_weights(self) -> list[Tensor]:
        """What the penalty on spectral norms is about: all layers but the last."""
        kinds = (nn.Conv2d, nn.Linear)
        layers: list[Any] = [part for part in self.modules() if isinstance(part, kinds)]
        return [layer.weight for layer in layers[:-1]]

    def check(self, vae: Any, prior: NoiseContrastivePrior | None) -> None:
        """Raise ValueError unless the energy was fitted on this VAE and this prior.

        An energy without a record fits everything.
        """
        for name, found in fingerprints(vae, prior).items():
            if self.record.get(name, found) != found:
                raise ValueError(
                    f"the energy was fitted on another {name} than this one; fit one for it"
                )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors. Raises TypeError for a network not ours."""
        kind = next((k for k, known in NETWORKS.items() if isinstance(self.network, known)), None)
        if kind is None:
            raise TypeError(
                f"a network of class {type(self.network).__name__} has no config to save it by"
            )
        network: Any = self.network
        config = {
            "format": FORMAT,
            "class": "ImageEnergy",
            "network": {"kind": kind} | network.config,
            "langevin_steps": self.langevin_steps,
            "step_size": self.step_size,
            "pixel_noise": self.pixel_noise,
            "record": self.record,
        }
        save_tensors(Path(directory), config, self.state_dict())

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Read what `save_pretrained` wrote; in evaluation mode, without gradients.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: files that are damaged, of another class or format, or that disagree.
        """
        directory = Path(directory)
        config, tensors = load_tensors(directory)
        known = isinstance(config, dict) and config.pop("class", None) == "ImageEnergy"
        if not known or config.pop("format", None) != FORMAT:
            raise ValueError(
                f"{directory}/config.json is not that of an image energy of format {FORMAT}; "
                "fit it anew"
            )
        try:
            record = config.pop("record")
            with first_weights(0):  # thrown away
                options = config.pop("network")
                network = NETWORKS[options.pop("kind")](**options)
            energy = cls(network, **config)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{directory}/config.json is not one that this version reads "
                f"({type(error).__name__}: {error}); fit it anew"
            ) from None
        restore(energy, tensors, directory)
        energy.record = record
        return energy.eval().requires_grad_(False)


def fingerprints(vae: Any, prior: NoiseContrastivePrior | None) -> dict[str, str]:
    """What tells a VAE's networks, and the prior on them, from others."""
    own = None if prior is not None and prior.base is not None else getattr(vae, "prior", None)
    parts = [
        f"{type(m).__name__} {fingerprint(m)}" for m in (own, prior) if isinstance(m, nn.Module)
    ]
    bare = vae
    if isinstance(vae, FlatVAE):  # the prior may be a part of the module
        bare = vae.with_prior(StandardNormal(vae.latent_size))
    return {"VAE": fingerprint(bare), "prior": " ".join(parts)}
