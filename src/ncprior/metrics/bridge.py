"""Bridge sampling: the ratio of two normalising constants from draws of both densities."""

import math

import torch
from torch import Tensor

from ncprior.numerics import LogZ, effective_sample_size
from ncprior.tail import pareto_k

ROUNDS, TOLERANCE = 100, 1e-9
FARTHEST = 10.0  # nats in one round


def bridge_log_z(at_base: Tensor, at_target: Tensor, log_weights: Tensor | None = None) -> LogZ:
    """log Z = log E_p[r] from log r at draws of p and of r p / Z, in float64.

    With s_0 and s_1 the shares of draws of p and of r p / Z it solves

        Z = E_0[r / (s_1 r + s_0 Z)] / E_1[1 / (s_1 r + s_0 Z)].

    Both quotients are bounded, so that no heavy tail of r under p spoils it; it fails where the
    two sets of draws hardly overlap, and then says so by its error.

    The standard error adds the variances of both means, relative to their squares. That of the
    second one is between chains: how much draws of one chain depend on each other enters by
    itself. How Z depends on itself does not, as the derivative of the right-hand side is zero.

    Args:
        at_base: log r in nats at independent draws of p, (m,).
        at_target: log r at draws of r p / Z, (chains, draws); chains are independent.
        log_weights: Importance weights of the chains, (chains,): their draws are of r p / Z only
            under them. Equal by default.

    Returns:
        Its `ess` is the smallest effective number of the terms of both means and of the weights.
        Both terms are bounded, so that the only tail is that of the weights: `k_hat` is theirs.

    Raises:
        ValueError: fewer than two base draws or chains, or a log-ratio that is NaN or +inf.

    Reference: Meng and Wong (1996), Eq. 4.1; Fruehwirth-Schnatter (2004) for the error, there with
    the autocorrelation of one chain.
    """
    if at_target.ndim != 2 or len(at_target) < 2 or at_base.ndim != 1 or len(at_base) < 2:
        raise ValueError(
            "at_base must be (m,) and at_target (chains, draws), with two draws and two chains at "
            f"least; got {tuple(at_base.shape)} and {tuple(at_target.shape)}"
        )
    base, target = at_base.double(), at_target.double()
    if not (base.amax() < math.inf and target.amax() < math.inf):  # NaN fails too
        raise ValueError("log-ratios have NaN or +inf; their network is not usable")
    weights = target.new_zeros(len(target)) if log_weights is None else log_weights.double()
    weights = weights.softmax(0)
    total = base.numel() + target.numel()
    log_s0, log_s1 = math.log(base.numel() / total), math.log(target.numel() / total)

    def terms(log_z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logarithms of both means' terms, (m,) and (chains,); the slope for Newton's method."""
        low, high = (torch.logaddexp(log_s1 + log_r, log_s0 + log_z) for log_r in (base, target))
        of_base, of_target = base - low, weights.log()[:, None] - high
        slope = 1 + (of_base.softmax(0) * (log_s0 + log_z - low).exp()).sum()
        slope -= (of_target.flatten().softmax(0) * (log_s0 + log_z - high).flatten().exp()).sum()
        chains = of_target.logsumexp(1) - math.log(target.shape[1])
        return of_base, chains, slope

    # Newton's method on the logarithm of the quotient of both sides, which rises with log Z.
    log_z = base.logsumexp(0) - math.log(base.numel())
    for _ in range(ROUNDS):
        of_base, of_target, slope = terms(log_z)
        excess = log_z + of_target.logsumexp(0) - of_base.logsumexp(0) + math.log(base.numel())
        step = (-excess / slope).clamp(-FARTHEST, FARTHEST)
        log_z = log_z + step
        if abs(float(step)) < TOLERANCE:
            break
    of_base, of_target, _ = terms(log_z)
    shares = of_base.softmax(0)
    variance = float((shares - 1 / len(shares)).square().sum())
    # A weighted mean of chain means f: its error comes from sum_c w_c (f_c - mean), delta method.
    residual = of_target.softmax(0) - weights
    chains = len(residual)
    variance += float(residual.square().sum()) * chains / (chains - 1)
    parts = (of_base, of_target, weights.log())
    return LogZ(
        float(log_z),
        math.sqrt(variance),
        min(float(effective_sample_size(part)) for part in parts),
        total,
        pareto_k(weights.log()),
    )
