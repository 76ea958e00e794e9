"""Priors by name, fitted to the codes of a frozen VAE in one call."""

from typing import Any

from torch import Tensor

from ncprior.priors.codes import Codes
from ncprior.priors.fitting import Report, ignore
from ncprior.priors.pretrained import BASES

PRIORS: dict[str, Any] = BASES
"""Every prior that can be fitted by name, and be the base of an NCP, under its name on disk."""


def fit_density(
    name: str,
    codes: Codes,
    *,
    vae: Any = None,
    images: Tensor | None = None,
    seed: int = 0,
    report: Report = ignore,
    **settings: Any,
) -> Any:
    """The prior of that name, fitted to codes with its own defaults.

    Args:
        name: A key of `PRIORS`.
        codes: What the frozen encoder says of the training images.
        vae: The VAE that they are of; only "vamp" asks for it.
        images: Images (n, c, h, w) in [0, 1] that "vamp" starts from.
        seed: Decides everything that is drawn.
        report: Called with the step and its figures.
        **settings: Other arguments of that prior's `fit`.

    Raises:
        ValueError: an unknown name, or codes that cannot be fitted.
    """
    if name not in PRIORS:
        raise ValueError(f"name must be one of {', '.join(PRIORS)}, got {name!r}")
    if name == "vamp":
        settings = {"vae": vae, "images": images} | settings
    return PRIORS[name].fit(codes, seed=seed, report=report, **settings)
