"""The page of tiny runs: whole, self-contained, escaped."""

import html.parser
import json
import re
import shutil

import pytest
import torch

import ncprior
from ncprior.figures import Figure
from ncprior.ratios import UnitRatio
from ncprior.report import write_report
from ncprior.report.build import _draw
from ncprior.report.words import base_note
from ncprior.runs import Run

NASTY = '<b>run & "quote" \'$(x)'
SECTIONS = ["verdict", "numbers", "images", "figures", "training", "ratios", "methods"]
RECIPE = {"data": {"source": "digits"}, "vae": {"hidden": [16], "latent_size": 2}}
QUIET = {"tensorboard": False, "progress": False}
FIGURES = {
    "fd_base": Figure(0.6, "squared, pixels", 500, 0, 0.03),
    "fd_ncp": Figure(0.3, "squared, pixels", 500, 0, 0.02),
    "fd_reconstruction": Figure(0.2, "squared, pixels", 500, 0, 0.01),
    "gap_closed": Figure(0.75, "share", 500, 0, 0.05, note="<i>a & b</i>"),
    "ess_share": Figure(0.0345, "of proposals", 500, 0, 0.0005),
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A run with a VAE and nothing else, under a name full of traps."""
    run = Run.create(tmp_path_factory.mktemp("bare") / NASTY, RECIPE)
    data, splits = run.load_data()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = ncprior.build_vae(data.image_shape, **run.section("vae"))
    options = {"steps": 4, "evaluate_every": 2, "directory": run.path, "device": "cpu"}
    ncprior.train_vae(vae, data, splits, **options, **QUIET)
    run.save_vae(vae)
    return run


@pytest.fixture(scope="module")
def fitted(bare, tmp_path_factory):
    """The same with a prior."""
    path = tmp_path_factory.mktemp("fitted") / NASTY
    shutil.copytree(bare.path, path)
    run = Run.open(path)
    data, splits = run.load_data()
    prior = ncprior.fit_prior(
        run.load_vae(),
        data,
        rows=splits.train,
        steps=4,
        evaluate_every=2,
        network_options={"width": 8, "members": 2},
        log_z_draws=2000,
        directory=run.path,
        device="cpu",
        **QUIET,
    )
    run.save_prior(prior)
    return run


@pytest.fixture
def copy(fitted, tmp_path):
    """A run that a test may change."""
    return Run.open(shutil.copytree(fitted.path, tmp_path / "run"))


class Reader(html.parser.HTMLParser):
    """Collects sections, addresses and tags; fails on tags that are not closed in order."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.sections, self.addresses, self.text, self.tags = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        found = dict(attributes)
        if tag == "section":
            self.sections.append(found["id"])
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            if name in found:
                self.addresses.append(found[name])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "pre"} & {*self.open}:
            self.text.append(data)


def read(run, **options):
    page = write_report(run, **({"num": 8, "proposals": 20} | options)).read_text("utf-8")
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    reader.page, reader.words = page, re.sub(r"\s+", " ", " ".join(reader.text))
    return reader


def assert_self_contained(found):
    assert found.sections == SECTIONS
    assert all(a.startswith(("data:image/png;base64,", "#")) for a in found.addresses)
    assert all(a.startswith("#") for a in re.findall(r"url\(['\"]?([^)]*)", found.page))
    assert not {"script", "link", "iframe", "object"} & {*found.tags}
    assert "@import" not in found.page and "http:" not in found.page


def test_full_report(copy):
    copy.add_metrics(FIGURES)
    found = read(copy)
    assert_self_contained(found)
    for title in ("Data", "Reconstructions", "Base samples", "NCP samples", "Nearest training"):
        assert title in found.words
    assert found.tags.count("img") == 5
    assert found.tags.count("svg") == 8  # distances, ELBO, KL, NCE, plane, log r, ESS, reliability
    assert "75.0 %" in found.words and "± 5 %" in found.words
    assert "3.450 %" in found.words
    assert "<i>a & b</i>" in found.words
    assert "Not measured yet" not in found.words
    assert "Can the ratios be trusted?" in found.words and "ncprior sample run --out" in found.words
    assert "What can be won at most?" not in found.words  # the verdict says it
    assert "Where latents lie" in found.words


def test_the_prior_of_the_vae_is_shown_where_the_base_is_another(copy):
    """Before and after are the VAE's own prior and the NCP, whatever that stands on."""
    vae = copy.load_vae()
    prior = copy.load_prior(vae)
    prior.base = ncprior.GaussianMixture(3, 2)
    prior.base.means += 0.1
    copy.save_prior(prior)
    of_own = {
        "fd_vae_prior": Figure(2.2, "squared, pixels", 500, 0, 0.03),
        "gap_closed_base": Figure(0.61, "share", 500, 0, 0.05),
    }
    copy.add_metrics(FIGURES | of_own)
    found = read(copy)
    assert "VAE prior samples" in found.words and "draws of the base prior" not in found.words
    assert "from samples of the VAE’s own prior to reconstructions; the base alone 61.0 %" in (
        found.words
    )
    assert "stands on a Gaussian mixture" in found.words
    assert "VAE's own prior" in found.page[found.page.index("Distance to the test images") :]
    assert found.tags.count("img") == 5


def test_pictures_of_an_autoencoder_are_of_the_base(tmp_path):
    """It has no prior of its own: before the NCP is the density that was fitted to its codes."""
    recipe = {"data": RECIPE["data"], "vae": RECIPE["vae"] | {"posterior_scale": "deterministic"}}
    run = Run.create(tmp_path / "run", recipe)
    data, splits = run.load_data()
    vae = ncprior.build_vae(data.image_shape, **recipe["vae"]).eval()
    mixture = ncprior.GaussianMixture(1, 2)
    mixture.means += 9
    prior = ncprior.NoiseContrastivePrior([UnitRatio()], mixture)
    images, _ = _draw(vae, prior, data, splits, 5, 3, 0)
    wanted = ncprior.draw(prior.under(vae), None, 5, seed=0).images
    assert "vae_prior" not in images and torch.equal(images["base"], wanted)
    assert base_note(vae, prior) == ""


def test_a_prior_without_measurements(fitted):
    found = read(fitted)
    assert_self_contained(found)
    assert "Not measured yet: gap closed, ESS share" in found.words
    assert "Nothing has been measured yet" in found.words
    assert "JSD" in found.words and "log Z" in found.words
    assert found.tags.count("img") == 5 and found.tags.count("svg") == 7


def test_no_prior(bare):
    found = read(bare)
    assert_self_contained(found)
    assert "There are no NCP samples" in found.words
    assert found.tags.count("img") == 4 and found.tags.count("svg") == 2


def test_a_nasty_name_is_escaped_and_quoted_for_the_shell(fitted):
    found = read(fitted)
    assert f"run {NASTY}" in found.words
    assert "<b>run" not in found.page
    assert "ncprior diagnose '<b>run & \"quote\" '\"'\"'$(x)'" in found.words


def test_verdict_and_warnings_are_told(copy):
    config = copy.path / "ncp" / "config.json"
    content = json.loads(config.read_text())
    group = content["record"]["groups"][0]
    group["warnings"] = ["The latents <have> collapsed."]
    config.write_text(json.dumps(content))
    jsd = Figure(group["jsd"] + 0.2, "nats", 200, 0, interval=(0.1, 0.3))
    copy.add_metrics(FIGURES | {"jsd": jsd})
    found = read(copy)
    assert "closes 75 % (± 5) of that gap" in found.words
    assert "The latents <have> collapsed." in found.words
    assert "measured for another prior" in found.words


def test_no_gap_gives_no_number(copy):
    copy.add_metrics(FIGURES | {"fd_base": Figure(0.21, "squared, pixels", 500, 0, 0.03)})
    found = read(copy)
    assert "no gap to close" in found.words and "75.0 %" not in found.words


def test_works_without_logs(copy):
    shutil.rmtree(copy.path / "logs")
    found = read(copy)
    assert_self_contained(found)
    assert "keeps no log of stage 1" in found.words and "keeps no log of stage 2" in found.words


def test_same_seed_same_images(fitted):
    first, again, other = read(fitted), read(fitted), read(fitted, seed=1)
    assert first.addresses[:4] == again.addresses[:4]
    assert all(a != b for a, b in zip(first.addresses[:4], other.addresses[:4], strict=True))


@pytest.mark.parametrize("options", [{"num": 0}, {"proposals": 0}])
def test_rejects_counts_below_one(fitted, options):
    with pytest.raises(ValueError, match="at least 1"):
        write_report(fitted, **options)


def test_needs_a_trained_vae(tmp_path):
    with pytest.raises(FileNotFoundError, match="no trained VAE"):
        write_report(Run.create(tmp_path / "empty", RECIPE))
