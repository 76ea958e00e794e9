"""What is said beside a negative log-likelihood: of its pixels, its weights and its log Z."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ncprior.data import ImageDataset
from ncprior.figures import Figure
from ncprior.numerics import LogZ
from ncprior.tail import DOUBTFUL, UNRELIABLE
from ncprior.vaes.likelihoods import Bernoulli, Gaussian, PixelNormal

FAR = 4.0  # standard errors between two estimates of log Z that are worth a word

METHOD_NAMES = {
    "base": "draws of the base",
    "ais": "annealed importance sampling",
    "bridge": "bridge sampling",
}


def chosen_method(estimates: Mapping[str, LogZ]) -> str:
    """Which estimate of log Z to use: base draws unless k-hat is above 0.7, then bridging."""
    for method in ("base", "bridge", "ais"):
        if method in estimates and (estimates[method].k_hat or 0.0) <= DOUBTFUL:
            return method
    return next(method for method in ("bridge", "ais", "base") if method in estimates)


def log_z_figure(z: LogZ, seed: int, method: str) -> Figure:
    """log Z with what its error rests on in the note."""
    tail = "no k-hat" if z.k_hat is None else f"k-hat {z.k_hat:.2f}"
    if z.k_hat is not None and z.k_hat > DOUBTFUL:
        tail += ", not reliable" if z.k_hat > UNRELIABLE else ", doubtful"
    name = METHOD_NAMES[method]
    return Figure(z.value, "nats", z.num, seed, z.se, note=f"{name}, ESS {z.ess:.0f}, {tail}")


def log_z_warnings(estimates: Mapping[str, LogZ]) -> list[str]:
    """What to be careful about in estimates of log Z."""
    warnings = []
    for method, z in estimates.items():
        if z.k_hat is None or z.k_hat <= DOUBTFUL:
            continue
        if z.k_hat > UNRELIABLE:
            said = "is not reliable: its weights have no mean as far as the sample shows"
        else:
            said = "is doubtful: its error is larger than stated"
        warnings.append(
            f"log Z by {METHOD_NAMES[method]} {said} (k-hat {z.k_hat:.2f}, above {DOUBTFUL}). "
            "Such an estimate is usually too low, and the NLL with it; trust nll_snis."
        )
    if len(estimates) == 1 and warnings and "base" in estimates:
        warnings[-1] += ' Or ask for log_z_methods "ais" and "bridge" as well.'
    if {"base", "bridge"} <= set(estimates):
        base, bridge = estimates["base"], estimates["bridge"]
        if abs(base.value - bridge.value) > FAR * math.hypot(base.se, bridge.se):
            warnings.append(
                f"log Z is {base.value:.3f} by draws of the base and {bridge.value:.3f} by bridge "
                f"sampling, more than {FAR:.0f} standard errors apart: one of them misses a region."
            )
    return warnings


def pixels_said(data: ImageDataset, binary: bool, seed: int) -> str:
    """What the pixels are that were scored: how they were binarised, if they were."""
    if data.binarize == "dynamic":
        said = f"dynamic binarisation: each test image drawn once, by seed {seed}"
    elif data.binarize is not None:
        said = f"binarised once, by the fixed seed {data.binarize}"
    else:
        said = "static binarisation: pixels stored as 0 and 1" if binary else "grey values"
    return said + (", mirrored at random" if data.flip else "")


def density_said(vae: Any) -> str:
    """Of what the likelihood is a density, if it is one; empty where it is a probability."""
    likelihood = getattr(vae, "likelihood", None)
    if isinstance(likelihood, Gaussian):
        return "a density of pixels in [0, 1]"
    return "a density of 2x - 1" if isinstance(likelihood, PixelNormal) else ""


def weights_said(ess: Tensor, k_hat: Tensor) -> str:
    """How far the importance weights of the images (n,) can be trusted."""
    said = f"ESS {float(ess.median()):.1f} in the median image"
    if k_hat.isnan().all():
        return said
    share = float((k_hat > DOUBTFUL).double().mean())
    return f"{said}, k-hat above {DOUBTFUL} in {100 * share:.0f} % of images"


def weights_warnings(k_hats: Mapping[str, Tensor]) -> list[str]:
    """What to be careful about in the importance weights of each prior, k-hats (n,)."""
    doubtful = [name for name, k_hat in k_hats.items() if float(k_hat.nanmedian()) > DOUBTFUL]
    if not doubtful:
        return []
    return [
        f"The importance weights of most images have a k-hat above {DOUBTFUL} "
        f"({', '.join(doubtful)}): the NLL is still an upper bound but a loose one. "
        "Raise importance_samples."
    ]


def pixels_warnings(vae: Any, binary: bool) -> list[str]:
    """What to be careful about where pixels are not what the likelihood is of."""
    if binary or not isinstance(getattr(vae, "likelihood", None), Bernoulli):
        return []
    return [
        "The images have grey values and the likelihood is Bernoulli: the figures are "
        "cross-entropies, not likelihoods. Binarise the data or use another likelihood."
    ]
