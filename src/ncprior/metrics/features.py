"""Feature spaces for distances between sets of images, each with a name and a checksum."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ncprior.metrics.classifier import SHIPPED, Classifier, load_classifier
from ncprior.metrics.inception import NAMES, load_inception
from ncprior.storage import fingerprint
from ncprior.walk import device_of, evaluating

PIXELS_UP_TO = 256  # numbers per image; above it PCA
COMPONENTS = 64
ROWS_AT_ONCE = 250


class FeatureSpace(Protocol):
    """Images (n, c, h, w) in [0, 1] to features (n, f), in float64 on the CPU."""

    @property
    def name(self) -> str: ...

    @property
    def checksum(self) -> str:
        """SHA-256 of the weights in hexadecimal digits; empty where there are none."""
        ...

    def __call__(self, images: Tensor) -> Tensor: ...


class Features(NamedTuple):
    """A linear feature space: images (n, c, h, w) in [0, 1] to (n, f), in float64."""

    name: str
    mean: Tensor | None = None  # (c*h*w,)
    basis: Tensor | None = None  # (c*h*w, f)

    @property
    def checksum(self) -> str:
        if self.mean is None or self.basis is None:
            return ""
        digest = hashlib.sha256()
        for part in (self.mean, self.basis):
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()

    def __call__(self, images: Tensor) -> Tensor:
        flat = images.flatten(1).double().cpu()
        if self.mean is None or self.basis is None:
            return flat
        if flat.shape[1] != len(self.mean):
            raise ValueError(
                f"images must have {len(self.mean)} numbers each for the features {self.name}, got "
                f"{flat.shape[1]}"
            )
        return (flat - self.mean) @ self.basis


class ModuleFeatures:
    """The feature space of any module: what it makes of images, flattened.

    Args:
        module: Takes images (n, c, h, w) in [0, 1]. It is put into evaluation mode for each call.
        name: What to call it; by default the name of its class.
        rows_at_once: Images at a time.
    """

    def __init__(
        self, module: nn.Module, name: str | None = None, *, rows_at_once: int = ROWS_AT_ONCE
    ) -> None:
        if rows_at_once < 1:
            raise ValueError(f"rows_at_once must be at least 1, got {rows_at_once}")
        self.module, self.rows_at_once = module, rows_at_once
        self.name = name or type(module).__name__
        self.checksum = fingerprint(module)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        check_images(images)
        device = device_of(self.module)
        found = []
        with evaluating(self.module):
            for part in images.split(self.rows_at_once):
                features = self._features(part.to(device))
                if not isinstance(features, Tensor) or len(features) != len(part):
                    raise ValueError(
                        f"features {self.name} must be a tensor with {len(part)} rows for as many "
                        f"images, got {getattr(features, 'shape', type(features))}"
                    )
                found.append(features.flatten(1).double().cpu())
        return torch.cat(found)

    def _features(self, images: Tensor) -> Tensor:
        return self.module(images.to(dtype_of(self.module)))


class ClassifierFeatures(ModuleFeatures):
    """The last hidden layer of a small classifier, which also tells classes.

    Args:
        classifier: As `load_classifier` reads it.
        name: What to call it.
        class_names: A name for each class.
    """

    def __init__(
        self, classifier: Classifier, name: str = "classifier", class_names: list[str] | None = None
    ) -> None:
        super().__init__(classifier, name)
        self.classifier = classifier
        self.class_names = class_names or [str(k) for k in range(classifier.num_classes)]

    @torch.no_grad()
    def classes(self, features: Tensor) -> Tensor:
        """The most probable class (n,) of each row of features that this space made, (n, f)."""
        head = self.classifier.head
        return head(features.to(head.weight)).argmax(1).cpu()

    def _features(self, images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != self.classifier.image_shape:
            c, h, w = self.classifier.image_shape
            raise ValueError(
                f"images must be {c}x{h}x{w} for the features {self.name}, got "
                f"{'x'.join(map(str, images.shape[1:]))}; ncprior features train makes others"
            )
        return self.classifier.features(images.to(dtype_of(self.classifier)))


def load_features(
    spec: str | Path | nn.Module | FeatureSpace, training_images: Tensor | None = None
) -> FeatureSpace:
    """A feature space by name, from a file, or of a module.

    Args:
        spec: "pixels"; "pca-64" (any number of components); "mnist", the classifier that is
            shipped; "inception"; a directory that `ncprior features train` wrote; a file of
            Inception weights (.pth); a module; or a feature space, which is returned as it is.
        training_images: Images (n, c, h, w) that "pca-..." is fitted on.

    Raises:
        FileNotFoundError: no such directory, or no Inception weights; says how to get them.
        ValueError: an unknown name, a damaged directory, or "pca-..." without training images.
    """
    if isinstance(spec, nn.Module):
        return ClassifierFeatures(spec) if isinstance(spec, Classifier) else ModuleFeatures(spec)
    if not isinstance(spec, str | Path):
        return spec
    name, path = str(spec), Path(spec).expanduser()
    if name == "pixels":
        return pixels()
    if found := re.fullmatch(r"pca-(\d+)", name):
        if training_images is None:
            raise ValueError(f"features {name} need training_images to be fitted on")
        return pca(training_images, int(found[1]))
    if name == "mnist":
        return _classifier_in(SHIPPED)
    if name == "inception" or path.suffix == ".pth":
        network = load_inception(None if name == "inception" else path)
        return ModuleFeatures(network, "inception", rows_at_once=50)
    if path.is_dir():
        return _classifier_in(path)
    if path.name == "model.safetensors" and path.is_file():
        return _classifier_in(path.parent)
    if path.exists():
        raise ValueError(
            f"features must be a directory that ncprior features train wrote, or {NAMES[0]}; got "
            f"the file {path}"
        )
    problem = ValueError if path.name == name else FileNotFoundError
    raise problem(
        "features must be pixels, pca-64, mnist, inception, or the path of a directory that "
        f"ncprior features train wrote; got {name!r}, and there is no such directory"
    )


def label(space: FeatureSpace) -> str:
    """Name and short checksum, as they stand beside every figure."""
    return f"{space.name} {space.checksum[:8]}".rstrip()


def pixels() -> Features:
    """The pixels themselves."""
    return Features("pixels")


def pca(images: Tensor, components: int = COMPONENTS) -> Features:
    """The first principal components of training images (n, c, h, w), unscaled."""
    from sklearn.decomposition import PCA

    flat = images.flatten(1).double().cpu()
    if not 1 <= components <= min(flat.shape):
        raise ValueError(
            f"components must be at most {min(flat.shape)} for {len(flat)} images of "
            f"{flat.shape[1]} numbers, got {components}"
        )
    found = PCA(components, random_state=0).fit(flat.numpy())  # randomised where pixels are many
    mean, basis = torch.from_numpy(found.mean_), torch.from_numpy(found.components_.T.copy())
    return Features(f"pca-{components} of pixels", mean, basis)


def default_features(training_images: Tensor) -> Features:
    """Pixels for small images, else 64 principal components of the training images."""
    numbers = training_images[0].numel()
    if numbers <= PIXELS_UP_TO:
        return pixels()
    return pca(training_images, min(COMPONENTS, len(training_images)))


def check_images(images: Tensor, name: str = "images") -> None:
    """Raise ValueError unless these are images (n, c, h, w) in [0, 1], at least one."""
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{name} must have the shape (n, c, h, w), got {tuple(images.shape)}")
    low, high = (float(value) for value in images.aminmax())
    if not (low >= 0 and high <= 1):  # NaN fails too
        raise ValueError(
            f"{name} must lie in [0, 1], got {low:g} to {high:g}; sets of images in different "
            "ranges cannot be compared"
        )


def check_features(features: Tensor, name: str = "features") -> None:
    """Raise ValueError unless these are finite features (n, f) that tell images apart."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"{name} must be (n, f) with n of at least 2, got {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError(f"{name} must be finite, found NaN or infinity")
    if (features == features[0]).all():
        raise ValueError(
            f"{name} must differ from image to image, but all {len(features)} rows are the same"
        )


def dtype_of(module: nn.Module) -> torch.dtype:
    """The type of a module's weights; float32 where it has none."""
    return next((p.dtype for p in module.parameters()), torch.float32)


def _classifier_in(directory: Path) -> ClassifierFeatures:
    classifier, config = load_classifier(directory)
    return ClassifierFeatures(classifier, config["name"], config["class_names"])
