"""pythae's samplers and our priors on the same trained VAE: Frechet distance and times.

python benchmarks/bench_pythae.py [RUN] [--codes N] [--samples N] [--epochs N] [--seed S]
                                  [--only NAME ...]

Needs pythae: `pip install --no-deps pythae`, then `pip install imageio cloudpickle pydantic
scikit-learn` (its own requirements would fetch more). RUN is a run directory with a flat VAE and
Bernoulli pixels, `models/mnist-mlp` by default. All priors are fitted on the same training images
(10,000 by default), pythae's with its defaults: 100 epochs for flow and second VAE. All are
measured by the Frechet distance of the same number of samples, in the same features, to the same
test images. Times are the processor's, because other work on a machine stretches wall time.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncprior.data import ImageDataset, Splits
from ncprior.generation import draw
from ncprior.numerics import stream
from ncprior.priors import Codes, fit_density
from ncprior.quality_figures import quality_figures
from ncprior.runs import Run
from ncprior.sources import Source, reconstructions
from ncprior.training import fit_prior
from ncprior.training.evidence import encode

PROPOSALS = 1000
TIMED = 1000  # samples that a time is taken from, three times
QUICK: dict[str, Any] = dict(
    network="mlp",
    network_options=dict(hidden=(64, 64), activation="relu"),
    steps=1500,
    batch_size=512,
    learning_rate=3e-3,
    weight_decay=0.1,
    noise_ratio=10.0,
)
"""A network as cheap as a flow's, chosen by the held-out loss under a limit on both times."""


class Candidate(NamedTuple):
    """A prior of some library: its fit gives a function from a count to images."""

    library: str
    fit: Callable[[], Callable[[int], Tensor]]


class Row(NamedTuple):
    """What was measured."""

    name: str
    library: str
    fd: float
    se: float
    fit_seconds: float
    seconds_per_1000: float


def pythae_model(vae: Any) -> Any:
    """Our VAE as one of pythae's: the same encoder, decoder and posterior."""
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def forward(self, x: Tensor) -> Any:
            loc, scale = vae.encode(x)
            return ModelOutput(embedding=loc, log_covariance=2 * scale.log())

    class Decoder(BaseDecoder):
        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=vae.decoder(z).sigmoid())

    config = VAEConfig((1, 28, 28), vae.latent_size, reconstruction_loss="bce")
    return VAE(config, Encoder(), Decoder()).eval()


def theirs(vae: Any, images: Tensor, epochs: int) -> dict[str, Candidate]:
    """pythae's samplers with its defaults."""
    from pythae import samplers
    from pythae.trainers import BaseTrainerConfig

    def candidate(name: str, trained: bool) -> Candidate:
        def fit() -> Callable[[int], Tensor]:
            sampler = getattr(samplers, name)(pythae_model(vae))
            with tempfile.TemporaryDirectory() as directory:
                training = BaseTrainerConfig(output_dir=directory, num_epochs=epochs)
                sampler.fit(images, **({"training_config": training} if trained else {}))

            def sample(num: int) -> Tensor:
                with torch.no_grad():  # it builds a graph, which it never uses
                    return sampler.sample(num)

            return sample

        return Candidate("pythae", fit)

    return {
        "mixture (pythae)": candidate("GaussianMixtureSampler", False),
        "MAF (pythae)": candidate("MAFSampler", True),
        "two-stage (pythae)": candidate("TwoStageVAESampler", True),
    }


def ours(vae: Any, data: ImageDataset, rows: Tensor, seed: int) -> dict[str, Candidate]:
    """Our priors, with their defaults and two quick fits."""

    def sampler(prior: Any) -> Callable[[int], Tensor]:
        source = Source.of(vae, prior)
        return lambda num: draw(*source[:2], num, proposals=PROPOSALS, seed=seed).images

    def density(name: str) -> Candidate:
        def fit() -> Callable[[int], Tensor]:
            codes = Codes(*encode(vae, data, rows, generator=stream(0, "codes")))
            return sampler(fit_density(name, codes, seed=seed))

        return Candidate("ncprior", fit)

    def ncp(**options: Any) -> Candidate:
        def fit() -> Callable[[int], Tensor]:
            plain = dict(progress=False, tensorboard=False, seed=seed, device="cpu")
            prior = fit_prior(vae, data, rows=rows, **plain, **options)
            loss = prior.record["groups"][0]
            print("  fitted:", prior.record["steps"], "steps;", loss, flush=True)
            return sampler(prior)

        return Candidate("ncprior", fit)

    return {
        "gaussian": Candidate("ncprior", lambda: sampler(None)),
        "mixture": density("mixture"),
        "flow": density("flow"),
        "two-stage": density("two-stage"),
        "ncp": ncp(),
        "ncp, quick": ncp(**QUICK),
        "ncp-mixture": ncp(base="mixture"),
        "ncp-mixture, quick": ncp(base="mixture", **QUICK),
    }


def measured(
    candidates: dict[str, Candidate], data: ImageDataset, splits: Splits, samples: int, seed: int
) -> list[Row]:
    rows = []
    for name, candidate in candidates.items():
        torch.manual_seed(seed)
        began = time.process_time()
        sample = candidate.fit()
        fit_seconds = time.process_time() - began
        sample(TIMED)
        times = []
        for _ in range(3):
            began = time.process_time()
            sample(TIMED)
            times.append(time.process_time() - began)
        images = sample(samples)
        found = quality_figures({name: images}, data, splits, metrics=["fd"], features="mnist")
        figure = found[f"fd_{name}"]
        seconds = statistics.median(times) * 1000 / TIMED
        row = Row(name, candidate.library, figure.value, figure.se or 0.0, fit_seconds, seconds)
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", nargs="?", type=Path, default=Path("models/mnist-mlp"))
    parser.add_argument("--codes", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*")
    asked = parser.parse_args()

    run = Run.open(asked.run)
    vae = run.load_vae().eval()
    data, splits = run.load_data()
    rows = splits.train[: asked.codes]
    images = data.batch(rows, generator=stream(asked.seed, "pythae images"))
    candidates = theirs(vae, images, asked.epochs) | ours(vae, data, rows, asked.seed)
    if asked.only:
        candidates = {name: candidates[name] for name in asked.only}
    found = measured(candidates, data, splits, asked.samples, asked.seed)
    source = reconstructions(vae, data, splits, asked.seed)
    best = draw(vae, None, asked.samples, images=source.images, seed=asked.seed).images
    figures = quality_figures(
        {"reconstruction": best}, data, splits, metrics=["fd"], features="mnist"
    )
    print(f"\n{asked.run}, {len(rows):,} codes, {asked.samples:,} samples, seed {asked.seed}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")  # fmt: skip
    print("| prior | FD | fit (s) | 1000 samples (s) |\n|---|---|---|---|")
    for row in found:
        print(f"| {row.name} | {row.fd:.2f} ± {row.se:.2f} | {row.fit_seconds:.1f} | "
              f"{row.seconds_per_1000:.2f} |")  # fmt: skip
    figure = figures["fd_reconstruction"]
    print(f"| reconstructions | {figure.value:.2f} ± {figure.se:.2f} | | |")


if __name__ == "__main__":
    main()
