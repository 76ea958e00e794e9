"""Train the small classifier whose classes and features measure samples."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ncprior.data import ImageDataset, Splits, check_splits, load_data
from ncprior.figures import Figure, Figures
from ncprior.metrics.classifier import Classifier, save_classifier, shifted
from ncprior.numerics import stream_seed
from ncprior.recipes import load_recipe
from ncprior.storage import fingerprint, read_json
from ncprior.training.loop import Place, make_fabric, optimise
from ncprior.training.order import RowOrder
from ncprior.training.processes import check_device

SHIFTED_BY = 1 / 14  # of a side: 2 pixels of 28
ROWS_AT_ONCE = 1000


class _Loss(nn.Module):
    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.classifier(images), labels)


class _Job:
    """Keeps the weights of the lowest loss on the validation images."""

    def __init__(
        self,
        classifier: Classifier,
        data: ImageDataset,
        splits: Splits,
        labels: Tensor,
        batch_size: int,
        device: torch.device,
        seed: int,
    ) -> None:
        self.module = _Loss(classifier)
        self.data, self.splits, self.labels, self.device = data, splits, labels, device
        self.order = RowOrder(splits.train, batch_size, seed=seed)
        self.most = int(min(data.image_shape[1:]) * SHIFTED_BY)
        self.best, self.best_step = math.inf, 0
        self.best_weights: dict[str, Any] = {}

    def loss(self, model: Any, step: int, generator: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        rows = self.order(step)
        images = shifted(self.data.raw(rows).to(self.device), self.most, generator=generator)
        loss = model(images, self.labels[rows].to(self.device))
        return loss, {"loss": loss}

    def evaluate(self, step: int) -> dict[str, float]:
        loss, accuracy = self.score(self.splits.validation)
        if loss < self.best:  # the accuracy of few images has ties
            self.best, self.best_step = loss, step
            self.best_weights = copy.deepcopy(self.module.state_dict())
        return {"validation_loss": loss, "validation_accuracy": accuracy}

    @torch.no_grad()
    def score(self, rows: Tensor) -> tuple[float, float]:
        """The mean loss in nats of these rows, and the share whose class is the first choice."""
        self.module.eval()
        loss, right = 0.0, 0
        for part in rows.split(ROWS_AT_ONCE):
            logits = self.module.classifier(self.data.raw(part).to(self.device)).cpu()
            loss += float(F.cross_entropy(logits, self.labels[part], reduction="sum"))
            right += int((logits.argmax(1) == self.labels[part]).sum())
        self.module.train()
        return loss / len(rows), right / len(rows)

    def should_stop(self) -> bool:
        return False

    def identity(self) -> dict[str, Any]:
        return {"batch_size": self.order.batch_size, "training images": len(self.splits.train)}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "best_weights": self.best_weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_step = state["best"], state["best_step"]
        self.best_weights = state["best_weights"]


def train_features(
    data: ImageDataset,
    splits: Splits,
    *,
    directory: Path,
    name: str | None = None,
    class_names: Sequence[str] | None = None,
    epochs: float = 10,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.05,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    progress: bool = True,
) -> Figures:
    """Train a classifier on grey or colour values as stored, and write it into `directory`.

    It is trained on the training images alone, each moved by up to a fourteenth of its side; the
    weights kept are those of the lowest loss on the validation images; the test images are looked
    at once, at the end.

    Args:
        data: Images with labels.
        splits: Which of them are for what.
        directory: Where model.safetensors and config.json go; `metrics.load_features` reads them.
        name: What to call the features; by default that of the data.
        class_names: A name for each class; by default the numbers 0, 1, ...
        epochs: Passes through the training images.
        batch_size: Images in a step.
        learning_rate: Peak of AdamW's cosine schedule.
        weight_decay: AdamW's.
        seed: Seed of weights, order and shifts.
        device: "auto", "cpu", "cuda" or "mps".
        resume: Go on where a stopped training was.
        progress: Show a progress bar.

    Returns:
        `classifier_accuracy`, on the test images.

    Raises:
        ValueError: no labels, one class only, class names that are not one for each, or an option
            out of range.
    """
    labels = _labels(data)
    check_splits(splits, len(data))
    classes = int(labels.max()) + 1
    names = [str(k) for k in range(classes)] if class_names is None else list(class_names)
    if len(names) != classes or len(set(names)) != classes:
        raise ValueError(f"class_names must be {classes} different names, got {names}")
    if not 0 < epochs < math.inf or not 1 < batch_size <= len(splits.train):
        raise ValueError(
            "epochs must be positive, and batch_size between 2 and the number of training images, "
            f"{len(splits.train)}; got {epochs=}, {batch_size=}"
        )
    with torch.random.fork_rng([]):
        torch.manual_seed(stream_seed(seed, "classifier weights"))
        classifier = Classifier(data.image_shape, classes)
    fabric = make_fabric(device, alone=True)
    job = _Job(classifier, data, splits, labels, batch_size, fabric.device, seed)
    each = math.ceil(len(splits.train) / batch_size)
    steps = max(1, round(epochs * len(splits.train) / batch_size))
    optimise(
        job,
        fabric,
        place=Place(directory, "classifier", resume, tensorboard=False),
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup=min(100, steps // 10),
        seed=seed,
        evaluate_every=min(each, steps),
        description="training features",
        progress=progress,
    )
    job.module.load_state_dict(job.best_weights)
    accuracy, tested = job.score(splits.test)[1], len(splits.test)
    facts = {
        "name": name or data.name,
        "class_names": names,
        "test_accuracy": accuracy,
        "test_images": tested,
        "validation_loss": job.best,
        "training_images": len(splits.train),
        "epochs": epochs,
        "best_step": job.best_step,
        "seed": seed,
    }
    save_classifier(classifier.cpu(), directory, facts)
    (directory / "classifier-checkpoint.pt").unlink(missing_ok=True)
    note = f"classifier {facts['name']}, sha256 {fingerprint(classifier)[:8]}"
    se = math.sqrt(accuracy * (1 - accuracy) / tested)
    return {"classifier_accuracy": Figure(accuracy, "share", tested, seed, se, note=note)}


def train_feature_directory(
    source: str, out: Path, *, resume: bool = False, overwrite: bool = False, **options: Any
) -> dict[str, Any]:
    """`train_features` of a named data set; returns what it wrote into config.json.

    Raises:
        ValueError: `out` holds features already; or as for `train_features` and `load_labelled`.
    """
    if (out / "config.json").exists() and not overwrite:
        raise ValueError(f"{out} already holds features; pass --overwrite, or another --out")
    check_device(options.get("device", "auto"))
    data, splits = load_labelled(source)
    train_features(data, splits, directory=out, resume=resume, **options)
    return read_json(out / "config.json")


def load_labelled(source: str) -> tuple[ImageDataset, Splits]:
    """Images with their labels: "digits", a recipe's [data], or a path of idx or parquet files.

    Raises:
        FileNotFoundError, ValueError: as for `load_data`, or images without labels.
    """
    if source == "digits":
        data, splits = load_data("digits")
    elif source.endswith(".toml"):
        options = load_recipe(Path(source)).get("data", {})
        grey = {name: value for name, value in options.items() if name not in ("binarize", "flip")}
        data, splits = load_data(**grey)
    else:
        data, splits = load_data("hub" if _is_parquet(source) else "idx", source)
    _labels(data)
    return data, splits


def _is_parquet(source: str) -> bool:
    from ncprior.data.source import resolve

    path = resolve(source)
    return path.suffix == ".parquet" or (path.is_dir() and any(path.rglob("*.parquet")))


def _labels(data: ImageDataset) -> Tensor:
    if data.labels is None:
        raise ValueError(
            f"data must have labels, and {data.name} has none; idx files need labels-idx1 files "
            "beside them, parquet files a column of whole numbers named label"
        )
    if data.labels.max() < 1:
        raise ValueError(f"data must have at least 2 classes, and {data.name} has one")
    return data.labels
