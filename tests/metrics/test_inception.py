import hashlib
import urllib.error

import pytest
import torch

from ncprior.metrics import inception, load_features
from ncprior.metrics.inception import Inception, load_inception, stretched


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache without weights, and no network."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(inception.urllib.request, "urlopen", refuse)
    return tmp_path / "checkpoints"


def test_the_layers_are_those_of_the_published_file():
    """Counts of the published file: 566 tensors, of which 94 convolutions; names as in it."""
    with torch.device("meta"):
        state = Inception().state_dict()
    assert len(state) == 566
    assert sum(name.endswith("conv.weight") for name in state) == 94
    # 23.85 million parameters, of which 2048 * 1008 + 1008 of the classes.
    numbers = sum(t.numel() for name, t in state.items() if "running" not in name and t.ndim)
    assert numbers == 23_850_960
    for name, shape in {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
        "Mixed_7a.branch7x7x3_4.bn.running_var": (192,),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "fc.weight": (1008, 2048),
    }.items():
        assert tuple(state[name].shape) == shape


@pytest.mark.slow
def test_features_of_grey_and_coloured_images():
    torch.manual_seed(0)
    network = Inception().eval()
    grey = torch.rand(1, 1, 20, 24)
    with torch.no_grad():
        found = network(grey)
        again = network(grey.expand(-1, 3, -1, -1))
    assert found.shape == (1, 2048) and torch.equal(found, again)


def test_pools_take_no_padding():
    """Averages count what is there; the last block takes maxima, as the published program does."""
    ones = torch.ones(1, 2, 4, 4)
    assert torch.equal(inception._average(ones), ones)
    assert torch.equal(inception._maximum(-ones), -ones)
    with torch.device("meta"):
        network = Inception()
    pools = {name: b.branches[-1][0] for name, b in network.named_children() if "Mixed" in name}
    assert pools.pop("Mixed_7c") is inception._maximum
    assert {name for name, pool in pools.items() if pool is inception._halve} == {
        "Mixed_6a",
        "Mixed_7a",
    }
    assert sum(pool is inception._average for pool in pools.values()) == 8


def test_stretched_as_tensorflow_1_did():
    """Output i lies at i * size / side: corners coincide, and the last pixels repeat."""
    row = torch.tensor([0.0, 10.0, 20.0]).expand(1, 1, 2, 3)
    expected = torch.tensor([0.0, 5, 10, 15, 20, 20])
    assert torch.equal(stretched(row, 6), expected.expand(1, 1, 6, 6))
    column = row[:, :, :1].transpose(2, 3)
    assert torch.equal(stretched(column, 6)[0, 0, :, 0], expected)


def test_missing_weights(empty_cache):
    with pytest.raises(FileNotFoundError) as caught:
        load_features("inception")
    said = str(caught.value)
    for word in (str(empty_cache), "no network", inception.URL, "mnist (shipped)", "pca-64"):
        assert word in said
    assert not list(empty_cache.glob("*"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist; get https"):
        load_inception("nowhere.pth")


def test_another_file_is_not_opened(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    path.write_bytes(b"not weights")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(ValueError, match=r"is not the file of Inception weights"):
        load_features(path)


def test_weights_by_path_and_from_the_cache(empty_cache, monkeypatch):
    """Any file whose checksum is the expected one; here that of small stand-in weights."""
    network = torch.nn.Linear(3, 2)
    monkeypatch.setattr(inception, "Inception", lambda: torch.nn.Linear(3, 2))
    empty_cache.mkdir()
    path = empty_cache / inception.NAMES[1]
    torch.save(network.state_dict(), path)
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    for found in (load_inception(path), load_inception()):
        assert torch.equal(found.weight, network.weight) and not found.training


def test_what_is_fetched_is_checked(empty_cache, monkeypatch):
    class Stream:
        def __init__(self):
            self.parts = [b"some", b"thing", b""]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, _):
            return self.parts.pop(0)

    monkeypatch.setattr(inception.urllib.request, "urlopen", lambda *_, **__: Stream())
    with pytest.raises(FileNotFoundError, match="what came is damaged"):
        load_inception()
    assert not list(empty_cache.glob("*"))
    digest = hashlib.sha256(b"something").hexdigest()
    monkeypatch.setattr(inception, "SHA256", digest)
    assert inception._fetch().read_bytes() == b"something"
