"""Priors by name, fitted to the codes of a frozen VAE in one call."""

import re
from typing import Any

from torch import Tensor

from ncprior.priors.codes import Codes
from ncprior.priors.fitting import Report, ignore
from ncprior.priors.mixture import AUTO
from ncprior.priors.pretrained import BASES

PRIORS: dict[str, Any] = BASES
"""Every prior that can be fitted by name, and be the base of an NCP, under its name on disk."""
_MIXTURE_OF = re.compile(r"mixture-([1-9][0-9]{0,3}|auto)")


def parse_name(name: str, argument: str = "name") -> tuple[str, dict[str, Any]]:
    """The key of `PRIORS` and the arguments of `fit` that a name stands for.

    Names are the keys, "mixture-N" for a Gaussian mixture of N components and "mixture-auto" for
    one of the number that held-out codes choose.

    Raises:
        ValueError: another name; `argument` is what it was given as.
    """
    if name in PRIORS:
        return name, {}
    if found := _MIXTURE_OF.fullmatch(name):
        return "mixture", {"components": AUTO if found[1] == AUTO else int(found[1])}
    raise ValueError(
        f"{argument} must be one of {', '.join(PRIORS)}, mixture-N for N components, or "
        f"mixture-auto, got {name!r}"
    )


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
        name: One that `parse_name` knows.
        codes: What the frozen encoder says of the training images.
        vae: The VAE that they are of; only "vamp" asks for it.
        images: Images (n, c, h, w) in [0, 1] that "vamp" starts from.
        seed: Decides everything that is drawn.
        report: Called with the step and its figures.
        **settings: Other arguments of that prior's `fit`.

    Raises:
        ValueError: an unknown name, or codes that cannot be fitted.
    """
    kind, own = parse_name(name)
    if kind == "vamp":
        own = {"vae": vae, "images": images}
    return PRIORS[kind].fit(codes, seed=seed, report=report, **(own | settings))
