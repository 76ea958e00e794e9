"""Batch norm over the images of all processes, on any backend.

Torch's own works on GPUs only. With it a step of two processes is the step that one process would
take on both their images.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose means and variances are those of the batch of all processes."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        share = x.numel() // x.shape[1]
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        mean, variance = mean.double(), variance.double()  # lest the difference below lose digits
        moments = torch.cat([mean, variance + mean.square(), torch.ones_like(mean[:1])])
        moments = _AllSum.apply(share * moments)
        count = moments[-1].detach()
        mean, square = (moments[:-1] / count).chunk(2)
        variance = square - mean.square()
        if self.track_running_stats and self.running_mean is not None:
            self._follow(mean.detach(), (variance * count / (count - 1)).detach())
        mean, variance = mean.to(x), variance.to(x)  # (c,)
        columns = (slice(None), None, None)
        y = (x - mean[columns]) * (variance + self.eps).rsqrt()[columns]
        if self.affine:
            y = torch.addcmul(self.bias[columns], y, self.weight[columns])
        return y.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        rate = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if rate is None:  # the mean of all batches so far
                rate = 1 / float(self.num_batches_tracked)
        assert rate is not None
        self.running_mean.lerp_(mean.to(self.running_mean), rate)
        self.running_var.lerp_(variance.to(self.running_var), rate)


class _AllSum(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        distributed.all_reduce(total)
        return total


@contextmanager
def synchronised_batch_norms(module: nn.Module, *, wanted: bool = True) -> Iterator[None]:
    """Within the block the batch norms of `module` look across processes.

    Parameters, buffers and their names are those of the batch norms that stand there otherwise.
    """
    replaced: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
    for parent in list(module.modules()) if wanted else []:
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                replaced.append((parent, name, child, _synced(child)))
    for parent, name, _, synced in replaced:
        parent._modules[name] = synced
    try:
        yield
    finally:
        for parent, name, plain, synced in replaced:
            plain.train(synced.training)
            parent._modules[name] = plain


def _synced(norm: nn.BatchNorm2d) -> SyncedBatchNorm2d:
    """The synchronised twin of a batch norm, with the very same tensors."""
    twin = SyncedBatchNorm2d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    twin._parameters, twin._buffers = norm._parameters, norm._buffers
    return twin.train(norm.training)
