import json
import re

import pytest
import torch
from huggingface_hub.utils import LocalEntryNotFoundError
from torch import nn
from toys import standard_normal

from ncprior import GaussianMixture, NoiseContrastivePrior
from ncprior.normal import Normal
from ncprior.numerics import LogZ
from ncprior.ratios import MLPRatio, ResidualRatio

CASES = {
    "gaussian": lambda: NoiseContrastivePrior([MLPRatio(3, members=2)], standard_normal(3)),
    "mixture": lambda: NoiseContrastivePrior(
        [ResidualRatio(3, width=8, members=2)],
        GaussianMixture.fit(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), 2),
        log_z=LogZ(0.1, 0.01, 12.5, 100),
    ),
    "two groups": lambda: NoiseContrastivePrior([MLPRatio(3, hidden=(4,)), ResidualRatio(5)]),
}


@pytest.fixture(params=CASES)
def prior(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = CASES[request.param]()
    for ratio in found.ratios:
        ratio.standardize(torch.arange(4.0 * ratio.latent_size).view(4, -1) ** 2)
        ratio.temperature.fill_(0.7)
        ratio.shift.fill_(-0.2)
    found.record = {"seed": 3, "groups": [{"loss": 1.0, "warnings": []}]}
    return found.eval()


@pytest.fixture
def saved(prior, tmp_path):
    prior.save_pretrained(tmp_path)
    return tmp_path


def test_round_trip_is_equal_to_the_bit(prior, saved):
    read = NoiseContrastivePrior.from_pretrained(saved)
    assert read.record == prior.record and read.log_z == prior.log_z
    assert type(read.base) is type(prior.base)
    assert read.state_dict().keys() == prior.state_dict().keys()
    for name, tensor in prior.state_dict().items():
        torch.testing.assert_close(read.state_dict()[name], tensor, rtol=0, atol=0)
    for k, ratio in enumerate(prior.ratios):
        z = torch.randn(5, ratio.latent_size, generator=torch.Generator().manual_seed(1))
        assert torch.equal(read.log_ratio(k, z), prior.log_ratio(k, z))
    assert not read.training and not any(p.requires_grad for p in read.parameters())


def test_only_plain_files(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_file_cut_short(name, share, saved):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=name):
        NoiseContrastivePrior.from_pretrained(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_file_of_noise(name, saved):
    (saved / name).write_bytes(bytes(range(128, 256)) * 4)
    with pytest.raises(ValueError, match=name):
        NoiseContrastivePrior.from_pretrained(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_file_missing(name, saved):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        NoiseContrastivePrior.from_pretrained(saved)


@pytest.mark.parametrize("change", [{"format": 99}, {"class": "FlatVAE"}])
def test_other_format_or_class(change, saved):
    file = saved / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=r"config\.json is not a noise contrastive prior"):
        NoiseContrastivePrior.from_pretrained(saved)


def test_weights_of_another_size(saved):
    file = saved / "config.json"
    config = json.loads(file.read_text())
    config["ratios"][0]["latent_shape"] = [7]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"do not fit its config\.json"):
        NoiseContrastivePrior.from_pretrained(saved)


def test_what_cannot_be_saved(tmp_path):
    normal = Normal(torch.zeros(2), torch.ones(2))
    with pytest.raises(TypeError, match="a base of class Normal"):
        NoiseContrastivePrior([MLPRatio(2)], normal).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="a ratio of class Identity"):
        NoiseContrastivePrior([nn.Identity()]).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("nope", LocalEntryNotFoundError("Got: ConnectError\nmore"), "not be reached (Got: Conn"),
        ("you/nope", OSError("404 Client Error\nmore"), "gives no prior of that name (404 Client"),
        ("runs/nope/ncp", None, "gives no prior of that name (Repo id must be"),
    ],
)
def test_neither_here_nor_on_the_hub(name, error, said, monkeypatch):
    """A name of three parts is asked of nobody: it cannot be the hub's."""

    def ask(*_, **__):
        raise error

    if error:
        monkeypatch.setattr("huggingface_hub.snapshot_download", ask)
    with pytest.raises(FileNotFoundError, match=re.escape(said)) as caught:
        NoiseContrastivePrior.from_pretrained(name)
    assert f"there is no directory {name}, and" in str(caught.value)
    assert "\n" not in str(caught.value)
