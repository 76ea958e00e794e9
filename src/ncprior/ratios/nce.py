"""Noise contrastive estimation: the loss whose optimum is log q(z) / p(z), and what it says.

The loss is the *sum* of two expectations (Eq. 3 of Aneja et al., NeurIPS 2021): 2 log 2 when q = p,
0 when they do not overlap. At the optimum JSD(q, p) = log 2 - loss / 2.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_2 = math.log(2)


def nce_loss(log_ratio_q: Tensor, log_ratio_p: Tensor, noise_ratio: float = 1.0) -> Tensor:
    """-E_q[log D] - E_p[log(1 - D)] in nats, over the last axis.

    With a noise ratio nu, p counts nu times and the logit of D is log r - log nu (Gutmann and
    Hyvarinen 2010). The optimum is log r = log q / p whatever nu is; a larger one asks for more
    care where r is large, which is where q lives, and tends to maximum likelihood.

    Args:
        log_ratio_q: log r at draws of q(z), (..., n).
        log_ratio_p: log r at draws of p(z), (..., m).
        noise_ratio: nu; 1 is Eq. 3.
    """
    if noise_ratio == 1:
        return F.softplus(-log_ratio_q).mean(-1) + F.softplus(log_ratio_p).mean(-1)
    offset = math.log(noise_ratio)
    of_q = F.softplus(offset - log_ratio_q).mean(-1)
    return of_q + noise_ratio * F.softplus(log_ratio_p - offset).mean(-1)


def jsd(loss: Tensor | float) -> Tensor | float:
    """Jensen-Shannon divergence in nats from the NCE loss; a lower bound for a held-out loss."""
    return LOG_2 - 0.5 * loss


def calibrate(log_ratio_q: Tensor, log_ratio_p: Tensor, most: float = 20.0) -> tuple[float, float]:
    """(temperature, shift) so that temperature * logit + shift has the smallest NCE loss.

    A temperature below 1 is that of an over-confident classifier; the shift moves log Z towards 0.
    The loss is convex in both; damped Newton steps find the minimum. The temperature is kept within
    [0.05, most].

    Args:
        log_ratio_q: Held-out logits at q(z), (n,).
        log_ratio_p: Held-out logits at p(z), (m,).
        most: The largest temperature; 1 never makes a classifier more confident.

    Reference: Platt (1999); temperature scaling: Guo et al. (2017).
    """
    a, b = log_ratio_q.double(), log_ratio_p.double()
    temperature, shift = _newton(a, b, [1.0, 0.0], fixed=False)
    bounded = min(most, max(0.05, temperature))
    if bounded != temperature:
        _, shift = _newton(a, b, [bounded, 0.0], fixed=True)
    return bounded, shift


def _newton(a: Tensor, b: Tensor, start: list[float], *, fixed: bool) -> tuple[float, float]:
    """Minimise the NCE loss over temperature and shift, or with `fixed` over the shift alone."""
    features = [torch.stack([x, torch.ones_like(x)], 1) for x in (a, b)]
    found = torch.tensor(start, dtype=torch.float64, device=a.device)
    for _ in range(100):
        miss = [torch.sigmoid(-features[0] @ found), torch.sigmoid(features[1] @ found)]
        gradient = features[1].T @ miss[1] / len(b) - features[0].T @ miss[0] / len(a)
        hessian: Any = sum(
            (x * (m * (1 - m) / len(x))[:, None]).T @ x for x, m in zip(features, miss, strict=True)
        )
        if fixed:
            gradient[0], hessian[0, 1], hessian[1, 0] = 0.0, 0.0, 0.0
        ridge = 1e-9 * torch.eye(2, dtype=torch.float64, device=a.device)
        step = torch.linalg.solve(hessian + ridge, gradient).clamp(-0.5, 0.5)
        found = found - step
        if step.abs().max() < 1e-9:
            break
    return float(found[0]), float(found[1])
