"""The noise contrastive prior p_NCP(z) = r(z) p(z) / Z.

Two densities must be kept apart in a hierarchical model (K > 1). Sampling group by group follows
the product of *locally* normalised factors r_k p_k / Z_k(z_<k). The likelihood uses the *globally*
normalised product r_1 p_1 ... r_K p_K / Z. With one group, or perfect ratios, they are the same.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from torch import Tensor, nn

from ncprior.groups import check_groups
from ncprior.normal import StandardNormal
from ncprior.numerics import LogZ
from ncprior.priors.pretrained import load_prior, save_prior
from ncprior.ratios import CombinedRatio, RatioNetwork, ReencodedRatio, SummedRatio, UnitRatio
from ncprior.storage import fingerprint
from ncprior.walk import Density, Group


def identity(density: Any) -> Any:
    """Something that is the same for equal densities, such as one that was saved and read again."""
    if isinstance(density, StandardNormal):
        return StandardNormal
    weighted = isinstance(density, nn.Module) and density.state_dict()
    return (type(density), fingerprint(density)) if weighted else id(density)


class NoiseContrastivePrior(nn.Module):
    """A log-ratio for each latent group, on top of a base prior.

    Args:
        ratios: K modules; the k-th maps z_k (n, *event) and its context to log r_k (n,) in nats.
            Where there is a context, z_k comes in the coordinate of `Group.standardize`.
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
        for ratio in ratios:
            if isinstance(ratio, CombinedRatio):
                ratio.stand_on(base)
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
        self.attach(vae)
        if self.base is None or self.base is getattr(vae, "prior", None):
            return vae
        return vae.with_prior(self.base)

    def check_fitted_on(self, vae: Any) -> None:
        """Raise `ValueError` for a VAE with other weights, whatever prior is under it."""
        known = self.record.get("networks")
        if known is not None and known != fingerprint(vae, without="prior"):
            raise ValueError(
                "this prior was fitted on another VAE, or this one was trained since; fit it anew"
            )

    def has_other_base(self, vae: Any) -> bool:
        """Whether the base is another density than the VAE's own prior.

        An autoencoder has none: its N(0, I) says nothing of its codes.
        """
        own = getattr(vae, "prior", None)
        if self.base is None or self.base is own or getattr(vae, "deterministic", False):
            return False
        return bool(identity(self.base) != identity(own))

    def attach(self, vae: Any) -> None:
        """Let ratios that look at decoded latents (`fit_prior`'s `reencode`) know their VAE.

        Those that know one keep it.

        Raises:
            ValueError: a VAE that the prior was not fitted on.
        """
        waiting = [r for r in self.modules() if isinstance(r, ReencodedRatio) and not r.attached]
        if waiting and self.record.get("vae", (own := fingerprint(vae))) != own:
            raise ValueError("this prior was fitted on another VAE; fit one on this VAE first")
        for ratio in waiting:
            ratio.attach(vae)

    def log_ratio(self, k: int, z: Tensor, group: Group | None = None) -> Tensor:
        """log r_k(z_k, c(z_<k)) in nats for z (n, *event), (n,).

        Args:
            k: The latent group, from 0.
            z: Latents of that group.
            group: What the walk says of it; only a group without context can do without.
        """
        if group is None:
            return self.ratios[k](z, None)
        return self.ratios[k](group.standardize(z), group.context)

    def weigher(self, k: int, group: Group) -> Callable[[Tensor, slice], Tensor]:
        """A function from z (j, m, *event) for some rows of a walk to log r_k in nats, (j, m).

        What the context adds to the network is computed here, once for all proposals.
        """
        parts = self.stage_weighers(k, group)
        if len(parts) == 1:
            return parts[0]
        return lambda z, rows: torch.stack([part(z, rows) for part in parts]).sum(0)

    def stage_weighers(self, k: int, group: Group) -> list[Callable[[Tensor, slice], Tensor]]:
        """As `weigher`, one for each stage of the ratio; log r is their sum."""
        ratio = self.ratios[k]
        parts = ratio.parts if isinstance(ratio, SummedRatio) else [ratio]
        return [self._weigher(part, group) for part in parts]

    def _weigher(self, ratio: nn.Module, group: Group) -> Callable[[Tensor, slice], Tensor]:
        dtype = self.weighs_in
        context = group.context
        if dtype is not None and context is not None:
            context = context.to(dtype)
        embedded = ratio.embed(context) if isinstance(ratio, RatioNetwork) else context

        def weigh(z: Tensor, rows: slice) -> Tensor:
            x = group.standardize(z, rows)
            x = x if dtype is None else x.to(dtype)
            own = None if embedded is None else embedded[rows]
            if isinstance(ratio, RatioNetwork):
                return ratio.weigh(x, own).to(z.dtype)
            own = None if own is None else own.repeat_interleave(z.shape[1], 0)
            return ratio(x.flatten(0, 1), own).view(z.shape[:2]).to(z.dtype)

        return weigh

    def only(self, groups: Iterable[int]) -> Self:
        """The same prior with its ratios in `groups` alone; the others keep their base prior."""
        wanted = check_groups(groups, self.num_groups)
        ratios = [r if k in wanted else UnitRatio() for k, r in enumerate(self.ratios)]
        other = type(self)(ratios, self.base)
        other.record, other.heldout_rows = self.record, self.heldout_rows
        return other.train(self.training)

    @property
    def fitted_groups(self) -> list[int]:
        """The groups that have a ratio; the others keep their base prior."""
        return [k for k, ratio in enumerate(self.ratios) if not isinstance(ratio, UnitRatio)]

    @property
    def in_stages(self) -> bool:
        """Whether a ratio is a sum of several; then log Z is of annealed pools."""
        return any(isinstance(ratio, SummedRatio) for ratio in self.ratios)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """One prior from parts that were fitted on different groups of the same VAE.

        Raises:
            ValueError: parts of different VAEs, or a group in two parts.
        """
        first = parts[0]
        joined = cls(list(first.ratios), first.base)
        joined.record = first.record | {"groups": list(first.record.get("groups", []))}
        joined.heldout_rows = first.heldout_rows
        for part in parts[1:]:
            if part.record.get("vae") != first.record.get("vae"):
                raise ValueError("the parts of a prior must have been fitted on the same VAE")
            for k in part.fitted_groups:
                if k in joined.fitted_groups:
                    raise ValueError(f"group {k} is in two parts of the prior; remove one of them")
                joined.ratios[k] = part.ratios[k]
                if part.record:
                    joined.record["groups"][k] = part.record["groups"][k]
        return joined.train(first.training)

    def in_bfloat16(self) -> Self:
        """A copy whose ratios are computed in bfloat16; the base keeps its precision.

        The prior itself if it was combined from others, whose densities would lose too much.
        """
        if any(isinstance(ratio, CombinedRatio) for ratio in self.ratios):
            return self
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

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors into `directory`."""
        save_prior(self, Path(directory))

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, vae: Any = None, revision: str | None = None
    ) -> Self:
        """Read a prior from a directory or, where there is none, from the Hugging Face hub.

        A prior that was fitted with `reencode` looks at its VAE: pass that here, or it is the first
        VAE that the prior is used with (`under`).

        Raises:
            FileNotFoundError: no such directory, and nothing from the hub; says why not.
            ValueError: files that are damaged, of another class or format, or that disagree.
        """
        if Path(name).is_dir():
            return cls._read(Path(name), vae)
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import LocalEntryNotFoundError

        patterns = ["config.json", "model.safetensors"]
        try:
            found = snapshot_download(str(name), revision=revision, allow_patterns=patterns)
        except (OSError, ValueError) as error:
            offline = isinstance(error, LocalEntryNotFoundError)
            hub = "could not be reached" if offline else "gives no prior of that name"
            why = str(error).partition("\n")[0]
            raise FileNotFoundError(
                f"there is no directory {name}, and the Hugging Face hub {hub} ({why})"
            ) from None
        return cls._read(Path(found), vae)

    @classmethod
    def _read(cls, directory: Path, vae: Any) -> Self:
        prior: Self = load_prior(cls, directory)
        if vae is not None:
            prior.attach(vae)
        return prior

    def push_to_hub(self, repo: str, *, private: bool = False) -> str:
        """Upload the prior to a hub repository, made if need be; return the commit's address."""
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        with TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            return str(api.upload_folder(repo_id=repo, folder_path=directory))
