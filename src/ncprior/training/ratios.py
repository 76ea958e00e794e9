"""Stage 2: freeze the VAE and train the classifiers between q(z) and p(z)."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncprior.data import ImageDataset, as_dataset
from ncprior.groups import check_groups, spell_groups
from ncprior.metrics import base_log_ratios
from ncprior.normal import StandardNormal
from ncprior.numerics import log_z, stream
from ncprior.priors import NoiseContrastivePrior
from ncprior.ratios import RatioNetwork, ReencodedRatio, UnitRatio
from ncprior.ratios.reencoded import check_reencodable, view_of
from ncprior.storage import fingerprint, pack_rows
from ncprior.training.bases import check_base, draws_slowly, named_base, on_table
from ncprior.training.evidence import EvidenceStream, EvidenceTable, evidence_of
from ncprior.training.heldout import HeldOut
from ncprior.training.keeping import Place
from ncprior.training.loop import optimise
from ncprior.training.moments import match_moments as match
from ncprior.training.presets import SETTINGS, SMALL_DATA, default_preset, fit_settings
from ncprior.training.processes import make_fabric
from ncprior.training.ratio_job import Fitted, RatioJob, log_ratios, new_ratios, seen_pairs
from ncprior.training.stages import check_stages, fit_stages
from ncprior.training.verdict import calibrate_and_judge
from ncprior.vaes import check_vae
from ncprior.vaes.check import IMAGES
from ncprior.walk import Density, evaluating

MOMENT_DRAWS, LOG_Z_DRAWS = 100_000, 200_000
SLOW_DRAWS = 20_000
"""In their place where the base is slow to draw from."""


def fit_prior(
    vae: Any,
    data: ImageDataset | Tensor,
    *,
    rows: Tensor | None = None,
    base: Density | str | None = None,
    groups: str | Sequence[int] | None = None,
    preset: str | None = None,
    network: str | None = None,
    network_options: dict[str, Any] | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    warmup: int | None = None,
    weight_decay: float | None = None,
    noise_ratio: float | None = None,
    clip_norm: float | None = None,
    heldout: float | None = None,
    patience: int = 10,
    stages: int | str = 1,
    calibrate: bool = True,
    match_moments: bool | None = None,
    reencode: bool = False,
    refresh_passes: float = 4.0,
    log_z_draws: int | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "32-true",
    evaluate_every: int = 100,
    checkpoint_every: int = 1000,
    directory: Path | None = None,
    resume: bool = False,
    tensorboard: bool = True,
    progress: bool = True,
) -> NoiseContrastivePrior:
    """Fit a noise contrastive prior on a frozen VAE (section 4.2 of the paper).

    A held-out part of the images decides when to stop, calibrates the average of the members and
    gives the reported loss. The VAE is never changed.

    Args:
        vae: Any VAE that offers the walk.
        data: An `ImageDataset` or a tensor (n, c, h, w) in [0, 1].
        rows: Rows whose aggregate posterior is q(z), usually the VAE's training images; all by
            default.
        base: None or "gaussian" for the VAE's own prior; another name that `parse_name` knows, such
            as "mixture" (10 Gaussians) or "mixture-auto", for that prior fitted to the same images;
            or any density. One latent group only. From bases that are slow to draw from (diffusion,
            snis, ebm) the steps see a table of 50,000 draws that is made first.
        groups: Latent groups to fit, all by default; the others keep their base prior. They are
            independent: parts fitted apart are put together by `NoiseContrastivePrior.join`.
        preset: "small" (default below 20,000 images), "large" (default above), "near" (instead of
            that where a base is given, which is taken to lie near q(z)) or "published" for flat
            latents; "stages" with these; "groups" (default for latent maps, as in NVAE),
            "groups-small" or "groups-flat". The arguments that follow change it.
        network: "residual", "mlp" or "conv".
        network_options: Arguments of that network, such as width, blocks, dropout, members.
        steps: Optimiser steps at most.
        batch_size: Posterior and prior draws per step for each member.
        learning_rate: Peak rate of AdamW; it falls along half a cosine.
        warmup: Steps over which it rises before that; a preset's is a tenth of the steps at most.
        weight_decay: Decoupled weight decay.
        noise_ratio: How many times p counts in the training loss (`nce_loss`); what is reported is
            always Eq. 3, where it counts once.
        clip_norm: Largest gradient norm; none by default.
        heldout: Share of `rows` held out; that of the preset by default.
        patience: Evaluations without improvement after which a group stops; of a single group
            those of the first half of the steps do not count while it has found nothing.
        stages: How many classifiers, each between q(z) and the prior that those before it made, for
            a q(z) that hardly overlaps with the base; log r is the sum of theirs. "adaptive" for as
            many as it takes until held-out draws of q(z) cannot be told apart (16 at most). Sample
            with `sampler="annealed"`. One latent group only.
        calibrate: Calibrate the average of the members on the held-out images.
        match_moments: Add linear and quadratic terms to log r that give the prior the mean and
            covariance of q(z), unless held-out images object. By default below 20,000 images, where
            classifiers miss them. Flat latents and one stage only.
        reencode: Let the classifier also see what the VAE makes of z, decoded and encoded again. It
            learns in fewer steps then; on "mixture-auto" it won less than a longer fit of z alone
            on one VAE and more on another; on N(0, I) it has shown better likelihoods and worse
            samples. Each proposal costs a pass of decoder and encoder; all members see the same
            draws. Flat latents with normal posteriors and one stage only. The prior needs its VAE
            to be of use: see `NoiseContrastivePrior.from_pretrained`.
        refresh_passes: Passes over the images in which the kept evidence of each is drawn anew,
            where the input is random.
        log_z_draws: Draws of the base prior from which log Z is estimated; 0 for none. By default
            200,000 for one group, 20,000 where the base is slow to draw from; with several, each
            draw takes a pass of the decoder. With stages log Z is that of the annealed pools
            instead.
        seed: Seed of all randomness.
        device: "auto", "cpu", "cuda" or "mps".
        precision: Lightning Fabric's.
        evaluate_every: Steps between evaluations.
        checkpoint_every: Steps between checkpoints.
        directory: Where checkpoints and logs go; nowhere by default.
        resume: Go on from the checkpoint in `directory`, if there is one.
        tensorboard: Also write TensorBoard logs.
        progress: Show a progress bar.

    Returns:
        The prior; its `record` says how it was fitted and what was found.

    Raises:
        ValueError: settings that cannot work, before any step.
    """
    if patience < 1:
        raise ValueError(f"patience must be at least 1 evaluation, got {patience}")
    check_base(base, vae)
    check_stages(stages, vae, base)
    wanted = check_groups(range(vae.num_groups) if groups is None else groups, vae.num_groups)
    data = as_dataset(data)
    rows = torch.arange(len(data)) if rows is None else rows
    latent_maps = _has_latent_maps(vae)
    flat = vae.num_groups == 1 and not latent_maps and stages == 1
    if match_moments and not flat:
        raise ValueError("match_moments needs flat latents in one group, and one stage")
    if reencode:
        check_reencodable(vae)
        if latent_maps:
            raise ValueError("reencode needs flat latents, this VAE has maps; fit without it")
        if stages != 1:
            raise ValueError(f"reencode needs one stage, got stages = {stages!r}")
    matching = flat and (len(rows) < SMALL_DATA if match_moments is None else match_moments)
    settings = _settings(
        latent_maps,
        len(rows),
        base=base,
        stages=stages,
        preset=preset,
        network=network,
        network_options=network_options,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        noise_ratio=noise_ratio,
        heldout=heldout,
    )
    rows_fit, rows_heldout = _split(rows, settings["heldout"], seed)
    fabric = make_fabric(device, precision, alone=True)
    device_ = fabric.device
    vae_fingerprint, networks = fingerprint(vae), fingerprint(vae, without="prior")
    looked_at = data.batch(rows_fit[:IMAGES], generator=stream(seed, "check"))
    looks_wrong = check_vae(vae.to(device_), looked_at)
    for text in looks_wrong:
        warnings.warn(text, stacklevel=2)
    named = base if isinstance(base, str) else None
    with evaluating(vae):
        if isinstance(base, str):
            base = named_base(
                base, vae, data, rows_fit, seed=seed, device=device_, progress=progress
            )
        vae = vae if base is None else vae.with_prior(base)
        view = view_of(vae) if reencode else None
        held = HeldOut(vae, data, rows_heldout, wanted, seed=seed, device=device_, view=view)
        ratios = new_ratios(settings, held, seed)
        rows_per_step = settings["batch_size"] * (1 if reencode else ratios[0].members)
        table = evidence_of(
            vae,
            data,
            rows_fit,
            slices=max(1, round(refresh_passes * len(rows_fit) / rows_per_step)),
            seed=seed,
            device=device_,
        )
        common: dict[str, Any] = {
            "clip_norm": clip_norm,
            "evaluate_every": min(evaluate_every, settings["steps"]),
            "checkpoint_every": checkpoint_every,
            "progress": progress,
        }
        if stages == 1:
            place = Place(
                directory,
                "ncp",
                resume,
                tensorboard,
                part=_part(None if groups is None else wanted),
            )
            quick = on_table(vae, seed=seed, device=device_, progress=progress)
            found = _fit_groups(
                ratios, vae, quick, table, held, fabric, place, settings, patience, calibrate,
                matching, seed, vae_fingerprint, common,
            )  # fmt: skip
        else:
            found = fit_stages(
                vae,
                table,
                held,
                fabric,
                stages=stages,
                settings=settings,
                patience=patience,
                calibrate=calibrate,
                seed=seed,
                of_vae=vae_fingerprint,
                directory=directory,
                resume=resume,
                tensorboard=tensorboard,
                **common,
            )
        every = range(vae.num_groups)
        prior = NoiseContrastivePrior(
            [found.ratios.get(k) or UnitRatio() for k in every], getattr(vae, "prior", None)
        )
        prior.eval().requires_grad_(False)
        prior.heldout_rows = rows_heldout
        prior.record = {
            "settings": settings,
            "seed": seed,
            "steps": found.steps,
            "best_step": max(judged["best_step"] for judged in found.judged.values()),
            "fitted_images": len(rows_fit),
            "heldout_images": len(rows_heldout),
            "rows": pack_rows(rows),
            "data": data.digest(),
            "vae": vae_fingerprint,
            "networks": networks,
            "vae_warnings": looks_wrong,
            "base": named,
            "groups": [found.judged.get(k) for k in every],
        }
        draws = _log_z_draws(vae) if log_z_draws is None else log_z_draws
        if found.log_z is not None:
            prior.log_z = found.log_z
        elif draws:
            of_base = stream(seed, "log z", device=device_)
            prior.log_z = log_z(base_log_ratios(vae, prior, draws, generator=of_base))
        return prior


def settings_of(vae: Any, images: int, **options: Any) -> dict[str, Any]:
    """What `fit_prior` with these of its arguments takes from a preset, changed by what is given.

    Args:
        vae: The VAE.
        images: How many images it is fitted on; with `vae` and `base` it decides the preset.
        options: Arguments of `fit_prior`; those that no preset has are passed over.
    """
    return _settings(_has_latent_maps(vae), images, **options)


def _settings(latent_maps: bool, images: int, **options: Any) -> dict[str, Any]:
    base, stages = options.get("base"), options.get("stages", 1)
    near = base not in (None, "gaussian") and not isinstance(base, StandardNormal)
    preset = options.get("preset") or (
        "stages" if stages != 1 else default_preset(images, latent_maps, near)
    )
    given = {name: options.get(name) for name in SETTINGS}
    return fit_settings(preset, options.get("network_options"), **given)


def _log_z_draws(vae: Any) -> int:
    if vae.num_groups > 1:
        return 0
    return SLOW_DRAWS if draws_slowly(vae) else LOG_Z_DRAWS


def _fit_groups(
    ratios: list[RatioNetwork],
    vae: Any,
    quick: Any,
    table: EvidenceTable | EvidenceStream,
    held: HeldOut,
    fabric: Any,
    place: Place,
    settings: dict[str, Any],
    patience: int,
    calibrate: bool,
    matching: bool,
    seed: int,
    of_vae: str,
    options: dict[str, Any],
) -> Fitted:
    """One classifier for each group, all at the same time.

    Steps draw from `quick`, the VAE itself or the VAE on a table; `options` are those of
    `optimise`.
    """
    job = RatioJob(
        ratios,
        quick,
        table,
        held,
        batch_size=settings["batch_size"],
        steps=settings["steps"],
        patience=patience,
        seed=seed,
        noise_ratio=settings["noise_ratio"],
        of_vae=of_vae,
    )
    history = optimise(
        job,
        fabric,
        place=place,
        steps=settings["steps"],
        learning_rate=settings["learning_rate"],
        warmup=settings["warmup"],
        weight_decay=settings["weight_decay"],
        seed=seed,
        description="fitting the prior",
        **options,
    )
    job.module.load_state_dict(job.best_weights)
    job.module.eval().requires_grad_(False)
    seen = job.logits([seen_pairs(quick, table, held, seed)])
    fitted = {k: r.eval() for k, r in zip(held.groups, job.module.ratios(), strict=True)}
    judged = {
        k: calibrate_and_judge(*parts, heldout_images=held.images, seed=seed, fit=calibrate)
        | {"best_step": int(job.best_step[i])}
        for i, (k, *parts) in enumerate(
            zip(held.groups, fitted.values(), job.logits(held), seen, held.kls, strict=True)
        )
    }
    if held.view is not None:
        size = vae.group(vae.start(1)).prior.event_shape[0]
        fitted = {k: ReencodedRatio(ratio, size, vae).eval() for k, ratio in fitted.items()}
    if matching:
        (k,) = fitted
        held = held.unviewed()
        draws = SLOW_DRAWS if draws_slowly(vae) else MOMENT_DRAWS
        matched = match(fitted[k], vae, table, held, draws=draws, seed=seed)
        if matched.figures["kept"]:
            ratio, pairs = matched.ratio, [seen_pairs(quick, table, held, seed)]
            again = calibrate_and_judge(
                ratio, log_ratios(ratio, held), log_ratios(ratio, pairs), held.kls[0],
                heldout_images=held.images, seed=seed, fit=False,
            )  # fmt: skip
            known = {name: judged[k][name] for name in ("temperature", "shift")}
            fitted[k], judged[k] = ratio, judged[k] | again | known
        judged[k]["moments"] = matched.figures
    return Fitted(fitted, judged, int(history[-1]["step"]))


def _split(rows: Tensor, heldout: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit on and rows held out."""
    count = round(len(rows) * heldout)
    if count < 2 or len(rows) - count < 2:
        raise ValueError(
            f"heldout = {heldout} of {len(rows)} images leaves {len(rows) - count} to fit on and "
            f"{count} held out; both need at least 2, so pass more images or another share"
        )
    order = rows[torch.randperm(len(rows), generator=stream(seed, "heldout rows"))]
    return order[count:], order[:count]


def _has_latent_maps(vae: Any) -> bool:
    """Whether latents are (c, h, w), as in NVAE, not flat."""
    with torch.no_grad(), evaluating(vae):
        return len(vae.group(vae.start(1)).prior.event_shape) == 3


def _part(groups: Sequence[int] | None) -> str:
    """What tells the files of a part from those of others, such as "-0-4"."""
    return "" if groups is None else f"-{spell_groups(groups)}"
