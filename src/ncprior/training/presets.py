"""Settings of the second stage that are known to work, by the number of images."""

from typing import Any

from ncprior.ratios import NETWORKS

# Chosen on MNIST's validation images by E_q[log r] - log Z, a lower bound of KL(q || p).
LARGE: dict[str, Any] = dict(
    network="residual",
    network_options=dict(width=192, blocks=3, dropout=0.1, members=2),
    steps=10000,
    batch_size=512,
    learning_rate=2e-3,
    weight_decay=0.1,
    noise_ratio=10.0,
    heldout=0.04,
)

PRESETS: dict[str, dict[str, Any]] = {
    # Few images: the average of many small members, whose mistakes differ.
    "small": dict(
        network="residual",
        network_options=dict(width=64, blocks=2, dropout=0.3, members=8),
        steps=3000,
        batch_size=128,
        learning_rate=3e-3,
        weight_decay=0.03,
        noise_ratio=1.0,
        heldout=0.15,
    ),
    "large": LARGE,
    # The same work in fewer steps of larger batches: next to a good base the noise of gradients
    # outweighs what there is to find, and "large" often does not get going.
    "near": LARGE | dict(steps=2500, batch_size=2048, warmup=250),
    # One of several classifiers in stages: moving its population takes longer than training it.
    "stages": dict(
        network="residual",
        network_options=dict(width=32, blocks=2, dropout=0.2, members=1),
        steps=400,
        batch_size=128,
        learning_rate=3e-3,
        weight_decay=0.03,
        noise_ratio=1.0,
        heldout=0.15,
    ),
    # The network of LARS, SNIS and the paper on MNIST.
    "published": dict(
        network="mlp",
        network_options=dict(hidden=(100, 100), activation="tanh", members=1),
        steps=10000,
        batch_size=512,
        learning_rate=1e-3,
        weight_decay=0.0,
        noise_ratio=1.0,
        heldout=0.04,
    ),
    # Latent maps, one classifier per group: the network of the paper's section 5.2.
    "groups": dict(
        network="conv",
        network_options=dict(width=32, blocks=3, stages=3, members=1),
        steps=20000,
        batch_size=64,
        learning_rate=1e-3,
        weight_decay=0.01,
        noise_ratio=1.0,
        heldout=0.04,
    ),
    # The network of "groups" at a size for CPUs and few images.
    "groups-small": dict(
        network="conv",
        network_options=dict(width=16, blocks=1, stages=2, members=1),
        steps=3000,
        batch_size=128,
        learning_rate=1e-3,
        weight_decay=0.01,
        noise_ratio=1.0,
        heldout=0.1,
    ),
    # Latent maps of few numbers, flattened: on a CPU a step costs a fifth of the last preset's.
    "groups-flat": dict(
        network="residual",
        network_options=dict(width=192, blocks=2, dropout=0.2, members=1),
        steps=1200,
        batch_size=512,
        learning_rate=3e-3,
        weight_decay=0.1,
        noise_ratio=1.0,
        heldout=0.06,
    ),
}
SETTINGS = ({"warmup"} | PRESETS["large"].keys()) - {"network_options"}
"""What a preset decides, beside the options of its network."""
SMALL_DATA = 20_000  # images below which "small" is the default


def default_preset(images: int, latent_maps: bool, fitted_base: bool = False) -> str:
    """The preset for so many images, latents that are maps (c, h, w) or flat, and a base.

    That is the VAE's own prior, or one that was fitted to the posterior and lies near to it.
    """
    if latent_maps:
        return "groups"
    if images < SMALL_DATA:
        return "small"
    return "near" if fitted_base else "large"


def fit_settings(
    preset: str, network_options: dict[str, Any] | None, **given: Any
) -> dict[str, Any]:
    """The preset, changed by what was given."""
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    settings = {"warmup": 0} | PRESETS[preset] | {k: v for k, v in given.items() if v is not None}
    if settings["network"] not in NETWORKS:
        raise ValueError(
            f"network must be one of {', '.join(NETWORKS)}, got {settings['network']!r}"
        )
    for name in ("steps", "batch_size", "learning_rate", "noise_ratio"):
        if not settings[name] > 0:
            raise ValueError(f"{name} must be positive, got {settings[name]}")
    if settings["warmup"] < 0:
        raise ValueError(f"warmup must be at least 0 steps, got {settings['warmup']}")
    if given.get("warmup") is None:  # the preset's, made for its own number of steps
        settings["warmup"] = min(settings["warmup"], settings["steps"] // 10)
    same = settings["network"] == PRESETS[preset]["network"]
    options = (settings["network_options"] if same else {}) | (network_options or {})
    return settings | {"network_options": options}
