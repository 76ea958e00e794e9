"""Whether log r means what it says, as a picture."""

from ncprior.metrics.calibration import Reliability
from ncprior.report.plots import COLORS, Plot, as_svg, new_axes

SPAN = 1.1  # of the bins' range
LEAST = 1.0  # nats on either side of 0


def reliability_plot(found: Reliability) -> Plot:
    """Observed against predicted log-odds of q over p; on the diagonal the ratios are right."""
    figure, axes = new_axes("predicted log-odds (nats)", "observed log-odds (nats)")
    predicted, observed = found.predicted.tolist(), found.observed.tolist()
    reach = SPAN * max(LEAST, *(abs(x) for x in predicted + observed))
    axes.plot(
        [-reach, reach], [-reach, reach], color=COLORS["ink"], linewidth=1, linestyle=(0, (4, 3))
    )
    errors = [(found.observed - found.low).tolist(), (found.high - found.observed).tolist()]
    axes.errorbar(
        predicted, observed, yerr=errors, fmt="o", color=COLORS["ncp"], markersize=5,
        elinewidth=1.6, capsize=0,
    )  # fmt: skip
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-reach, reach)
    count = int(found.count_q.sum())
    return Plot(
        "Reliability of log r",
        as_svg(figure, "reliability", "Observed against predicted log-odds of q over p"),
        [("bins of draws, 95 %", "ncp", "dot"), ("ratios that are right", "ink", "dash")],
        f"{count:,} posterior draws of test images and as many of the base prior, in bins of equal "
        "numbers by their log r. Below the line at the right, the ratios promise more of a draw "
        "than there is (over-fitting); a steeper line than the dashed one means too cautious "
        f"ratios. On average bins are {found.error:.2f} nats off the line.",
    )
