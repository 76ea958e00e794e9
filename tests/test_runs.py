import pytest
import torch

import ncprior
from ncprior.data import Splits
from ncprior.figures import Figure
from ncprior.numerics import LogZ
from ncprior.ratios import MLPRatio
from ncprior.runs import Run, load_vae
from ncprior.storage import fingerprint

RECIPE = {"data": {"source": "digits"}, "vae": {"latent_size": 3}}


def vae(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ncprior.build_vae((1, 8, 8), latent_size=3, hidden=(8,))


def prior_for(vae, heldout=None):
    prior = ncprior.NoiseContrastivePrior([MLPRatio(3)], vae.prior, log_z=LogZ(0.0, 0.1, 9.0, 10))
    prior.record = {"vae": fingerprint(vae)}
    prior.heldout_rows = heldout
    return prior


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", RECIPE)


def test_create_and_open(run):
    found = Run.open(run.path)
    assert found.section("data") == {"source": "digits"} and found.section("fit") == {}
    assert found.config["version"] == ncprior.__version__
    assert not found.has_vae and not found.has_prior and found.metrics() == {}


def test_splits_are_recorded_and_reused(run):
    """Also where the recipe would now give others."""
    _, first = run.load_data()
    again = Run(run.path, run.config | {"data": {"source": "digits", "seed": 7}})
    _, second = again.load_data()
    assert isinstance(second, Splits)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    _, other = ncprior.load_data("digits", seed=7)
    assert not torch.equal(first.train, other.train)


def test_splits_of_data_that_shrank(run):
    rows = torch.arange(3)
    run.write_splits(train=rows, validation=rows + 3, test=rows + 2000)
    with pytest.raises(ValueError, match="lacks; the data have changed"):
        run.load_data()


def test_vae_round_trip(run):
    saved = vae()
    run.save_vae(saved)
    for found in (run.load_vae(), load_vae(run.path), ncprior.load_vae(str(run.path))):
        assert fingerprint(found) == fingerprint(saved)
        assert not found.training and found.latent_size == 3


def test_nvae_round_trip(run):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        saved = ncprior.build_vae((1, 8, 8), preset="nvae-digits", num_flows=1)
    run.save_vae(saved)
    found = run.load_vae()
    assert isinstance(found, ncprior.NVAE) and not found.training and found.config == saved.config
    assert fingerprint(found) == fingerprint(saved)


def test_prior_round_trip_and_its_rows(run):
    run.load_data()
    train = run.read_splits()["train"]
    saved = prior_for(vae(), train[:100])
    run.save_prior(saved)
    found = run.load_prior(vae())
    assert torch.equal(found.log_ratio(0, torch.ones(2, 3)), saved.log_ratio(0, torch.ones(2, 3)))
    rows = run.read_splits()
    assert torch.equal(rows["heldout"], train[:100]) and torch.equal(rows["fit"], train[100:])


def test_prior_of_another_vae_is_refused(run):
    run.save_prior(prior_for(vae(0)))
    with pytest.raises(ValueError, match=r"was fitted on another VAE .* --overwrite"):
        run.load_prior(vae(1))


def test_what_is_not_there_yet(run):
    with pytest.raises(FileNotFoundError, match="no trained VAE yet; finish 'ncprior train"):
        run.load_vae()
    with pytest.raises(FileNotFoundError, match="no noise contrastive prior yet; run 'ncprior fit"):
        run.load_prior(vae())


def test_metrics_are_added(run):
    a, b = Figure(1.0, "nats", 3, 0, 0.1), Figure(2.0, "nats", 3, 0)
    run.add_metrics({"a": a, "b": a})
    run.add_metrics({"b": b})
    assert Run.open(run.path).metrics() == {"a": a, "b": b}


def test_missing_run_names_its_neighbours(run):
    with pytest.raises(FileNotFoundError, match=r"does not exist; in .* there are run"):
        Run.open(run.path.parent / "rum")
    with pytest.raises(FileNotFoundError, match=r"does not exist$"):
        Run.open(run.path / "a" / "b")


def test_directory_that_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not a run directory \(no config.toml\)"):
        Run.open(tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds other files"):
        Run.create(tmp_path, RECIPE)
    with pytest.raises(ValueError, match="is a file"):
        Run.create(tmp_path / "thesis.tex", RECIPE)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format = 1", "format = 2", "this is ncprior .*, which reads format 1"),
        ("format = 1", "", "which reads format 1"),
        ("[data]", "[data", r"config\.toml is damaged"),
        ("latent_size", "latent_sise", r"unknown key in \[vae\] 'latent_sise' \(did you mean"),
    ],
)
def test_config_that_cannot_be_read(old, new, message, run):
    file = run.path / "config.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        Run.open(run.path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_vae_cut_short(name, run):
    run.save_vae(vae())
    file = run.path / "vae" / name
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ValueError, match=name):
        run.load_vae()


def test_vae_of_another_format(run):
    run.save_vae(vae())
    file = run.path / "vae" / "config.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 5'))
    with pytest.raises(
        ValueError, match=r"of format 5 .* this version reads FlatVAE and NVAE of format 1"
    ):
        run.load_vae()


def test_splits_cut_short(run):
    run.load_data()
    file = run.path / "splits.npz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"splits\.npz"):
        run.load_data()
