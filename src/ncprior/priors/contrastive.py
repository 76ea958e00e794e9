"""The noise contrastive prior p_NCP(z) = r(z) p(z) / Z.

Two densities must be kept apart in a hierarchical model (K > 1). Sampling group by group follows
the product of *locally* normalised factors r_k p_k / Z_k(z_<k). The likelihood uses the *globally*
normalised product r_1 p_1 ... r_K p_K / Z. With one group, or perfect ratios, they are the same.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from torch import Tensor, nn

from ncprior.numerics import LogZ
from ncprior.priors.pretrained import load_prior, save_prior
from ncprior.walk import Density, Group


class NoiseContrastivePrior(nn.Module):
    """A log-ratio for each latent group, on top of a base prior.

    Args:
        ratios: K modules; the k-th maps z_k (n, *event) and its context to log r_k (n,) in nats.
        base: The base prior under a flat VAE; None for the VAE's own.
        log_z: The global log Z, once it was estimated; `log_prob` needs it.

    Reference: Aneja et al. (NeurIPS 2021), Eq. 3 and section 4.4.
    """

    def __init__(
        self,
        ratios: Sequence[nn.Module],
        base: Density | None = None,
        *,
        log_z: LogZ | None = None,
    ) -> None:
        super().__init__()
        if not ratios:
            raise ValueError("ratios must hold one module per latent group, got none")
        self.ratios = nn.ModuleList(ratios)
        self.base: Any = base
        self.log_z = log_z
        self.weighs_in: torch.dtype | None = None  # the precision of the ratios; None for that of z
        self.record: dict[str, Any] = {}  # how it was fitted: kept beside the weights
        self.heldout_rows: Tensor | None = None  # rows of the data that were held out of the fit

    @property
    def num_groups(self) -> int:
        return len(self.ratios)

    def under(self, vae: Any) -> Any:
        """The VAE with this prior's base under it."""
        if vae.num_groups != self.num_groups:
            raise ValueError(
                f"this prior has {self.num_groups} groups, the VAE has {vae.num_groups}; "
                "it was fitted for another VAE"
            )
        if self.base is None or self.base is getattr(vae, "prior", None):
            return vae
        return vae.with_prior(self.base)

    def log_ratio(self, k: int, z: Tensor, context: Tensor | None = None) -> Tensor:
        """log r_k(z_k, c(z_<k)) in nats, (n,)."""
        return self.ratios[k](z, context)

    def weight(self, k: int, group: Group, z: Tensor, draws: slice) -> Tensor:
        """log r_k of proposals z (j, m, *event) for rows `draws` of a walk, (j, m)."""
        context = group.context
        if context is not None:
            context = context[draws].repeat_interleave(z.shape[1], 0)
        flat = z.flatten(0, 1)
        flat = flat if self.weighs_in is None else flat.to(self.weighs_in)
        return self.log_ratio(k, flat, context).view(z.shape[:2]).to(z.dtype)

    def in_bfloat16(self) -> Self:
        """A copy whose ratios are computed in bfloat16; the base keeps its precision."""
        other = copy.copy(self)
        other.weighs_in = torch.bfloat16
        other._modules = self._modules | {"ratios": copy.deepcopy(self.ratios).bfloat16()}
        return other

    def chunk(self, k: int) -> int:
        """How many proposals the ratio of group k weighs fastest at a time."""
        return int(getattr(self.ratios[k], "chunk", 4096))

    def unnormalized_log_prob(self, z: Tensor) -> Tensor:
        """log r(z) + log p(z) in nats of z (n, d), (n,); one group and a base of its own only."""
        return self.log_ratio(0, z) + self._density().log_prob(z)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self._density().event_shape)

    def log_prob(self, z: Tensor) -> Tensor:
        """log p_NCP(z) in nats, normalised by the estimated `log_z`, (n,)."""
        if self.log_z is None:
            raise ValueError("log_prob needs log_z; estimate it with ncprior.diagnose")
        return self.unnormalized_log_prob(z) - self.log_z.value

    def _density(self) -> Density:
        if self.base is None or self.num_groups > 1:
            raise ValueError("a density needs one group and a base; set prior.base = vae.prior")
        return self.base

    @torch.no_grad()
    def draw_log_ratio(self, num: int, *, generator: torch.Generator, chunk: int = 8192) -> Tensor:
        """log r at `num` draws of the base (num,), in pieces of `chunk`; for log Z and its ESS."""
        base = self._density()
        pieces = [min(chunk, num - first) for first in range(0, num, chunk)]
        return torch.cat(
            [self.log_ratio(0, base.sample((k,), generator=generator)) for k in pieces]
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors into `directory`."""
        save_prior(self, Path(directory))

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> Self:
        """Read a prior from a directory or, where there is none, from the Hugging Face hub."""
        if Path(name).is_dir():
            return load_prior(cls, Path(name))
        from huggingface_hub import snapshot_download

        patterns = ["config.json", "model.safetensors"]
        found = snapshot_download(str(name), revision=revision, allow_patterns=patterns)
        return load_prior(cls, Path(found))

    def push_to_hub(self, repo: str, *, private: bool = False) -> str:
        """Upload the prior to a hub repository, made if need be; return the commit's address."""
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        with TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            return str(api.upload_folder(repo_id=repo, folder_path=directory))
