"""Where the latents of a flat VAE lie: posterior draws against those of base prior and NCP."""

import torch
from torch import Tensor

from ncprior.group_samples import GroupSamples
from ncprior.report.plots import COLORS, Plot, as_svg, new_axes

POINTS = 350  # of each kind; more would make a heavy page


def plane(samples: GroupSamples) -> Plot:
    """The first two principal components of the posterior draws; base and NCP over it, apart."""
    q = samples.posterior.double()
    centre = q.mean(0)
    axes_of_q = torch.linalg.svd(q - centre, full_matrices=False).Vh[:2].T  # (f, 1 or 2)
    sets = {"base": samples.base, "ncp": samples.ncp}
    figure, first = new_axes("", "second component", (5.6, 3.0))
    first.remove()
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, (name, z) in zip(panels, sets.items(), strict=True):
        _like(axes)
        for color, points in (("reconstruction", q), (name, z)):
            if points is None:
                continue
            at = _flat((points.double() - centre) @ axes_of_q)[:POINTS]
            axes.plot(*at.T.tolist(), "o", color=COLORS[color], markersize=2.6, alpha=0.55, mew=0)
        axes.set_xlabel("first component", color=COLORS["soft"], fontsize=11)
    panels[0].set_ylabel("second component", color=COLORS["soft"], fontsize=11)
    share = float(((q - centre) @ axes_of_q).square().sum() / (q - centre).square().sum())
    return Plot(
        "Where latents lie",
        as_svg(figure, "plane", "Posterior, base and NCP draws in two principal components"),
        [
            ("posterior draws of test images", "reconstruction", "dot"),
            ("base samples", "base", "dot"),
            ("NCP samples", "ncp", "dot"),
        ],
        "Left the posterior and the base prior, right the posterior and the NCP, along the two "
        f"directions in which posterior draws spread most ({100 * share:.0f} % of their variance). "
        "Base samples where the posterior has none are in the hole; a hole in other directions "
        "does not show here.",
    )


def _flat(points: Tensor) -> Tensor:
    """Two columns also where latents have one number."""
    return points if points.shape[1] == 2 else torch.cat([points, 0 * points], 1)


def _like(axes: object) -> None:
    """The look of `new_axes`, for a panel."""
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(COLORS["soft"])
    axes.tick_params(colors=COLORS["soft"], labelsize=11, length=0, pad=5)
    axes.grid(True, color=COLORS["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.locator_params(nbins=5)
