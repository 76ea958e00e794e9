"""A small image classifier: classes for histograms, and its last hidden layer as features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncprior.storage import fingerprint, load_tensors, restore, save_tensors

FORMAT = "ncprior classifier 1"
SMALLEST = 8  # pixels on a side
SHIPPED = Path(__file__).parent / "weights" / "mnist"


class Classifier(nn.Module):
    """Three convolutions and a hidden layer, for images of one size, 8 by 8 or more.

    Args:
        image_shape: Channels, height and width.
        num_classes: At least 2.
        width: Channels of the first convolution; each of the next two has twice as many.
        num_features: Width of the hidden layer, whose activations are the features.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: int = 16,
        num_features: int = 64,
    ) -> None:
        super().__init__()
        c, h, w = image_shape
        if c < 1 or min(h, w) < SMALLEST:
            raise ValueError(
                f"image_shape must be (c, h, w) of at least {SMALLEST} pixels a side, got "
                f"{tuple(image_shape)}"
            )
        if num_classes < 2 or width < 1 or num_features < 1:
            raise ValueError(
                "num_classes must be at least 2, width and num_features at least 1, got "
                f"{num_classes=}, {width=}, {num_features=}"
            )
        self.image_shape, self.num_classes = (c, h, w), num_classes
        self.config = {
            "image_shape": list(image_shape),
            "num_classes": num_classes,
            "width": width,
            "num_features": num_features,
        }
        self.first = nn.Sequential(_convolution(c, width), nn.MaxPool2d(2))
        self.second = nn.Sequential(_convolution(width, 2 * width), nn.MaxPool2d(2))
        self.third = _convolution(2 * width, 4 * width)
        side = min(3, h // 4, w // 4)
        self.pool = nn.AdaptiveAvgPool2d(side)
        self.hidden = nn.Sequential(
            nn.Linear(4 * width * side**2, num_features, bias=False),
            nn.BatchNorm1d(num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(num_features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Activations (n, num_features) of the hidden layer for images (n, c, h, w) in [0, 1]."""
        x = self.third(self.second(self.first(2 * images - 1)))
        return self.hidden(self.pool(x).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, num_classes)."""
        return self.head(self.features(images))


def _convolution(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def shifted(images: Tensor, most: int, *, generator: torch.Generator) -> Tensor:
    """Images (n, c, h, w) moved by up to `most` pixels each way, each by its own draw.

    What comes in at the border repeats it.
    """
    if not most:
        return images
    n, _, h, w = images.shape
    padded = F.pad(images, (most,) * 4, mode="replicate")
    down, right = torch.randint(2 * most + 1, (2, n, 1), generator=generator, device=images.device)
    rows = down + torch.arange(h, device=images.device)  # (n, h)
    columns = right + torch.arange(w, device=images.device)
    which = torch.arange(n, device=images.device)[:, None, None]
    # The slice over channels lies between index tensors, so that channels come last.
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def save_classifier(classifier: Classifier, directory: Path, facts: dict[str, Any]) -> None:
    """Write model.safetensors and config.json into `directory`.

    Args:
        classifier: The classifier.
        directory: Made if it does not exist.
        facts: What to tell of it: `name`, `class_names` (one for each class), and more.
    """
    config = {"format": FORMAT, **facts, "sha256": fingerprint(classifier)}
    save_tensors(directory, config | classifier.config, classifier.state_dict())


def load_classifier(directory: Path) -> tuple[Classifier, dict[str, Any]]:
    """A classifier in evaluation mode, and its config.json. Nothing in the files is executed.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no classifier of ours, damaged, or weights that are not those that were saved.
    """
    config, tensors = load_tensors(directory)
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{directory}/config.json must say that its format is {FORMAT!r}, got "
            f"{config.get('format')!r}; such a directory comes from ncprior features train"
        )
    try:
        found = Classifier(
            tuple(config["image_shape"]),
            config["num_classes"],
            width=config["width"],
            num_features=config["num_features"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{directory}/config.json is damaged: {error!r}; make it anew") from None
    restore(found, tensors, directory)
    if fingerprint(found) != config.get("sha256"):
        raise ValueError(f"the weights in {directory} are not those its config.json describes")
    return found.eval(), config
