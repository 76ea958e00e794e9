"""The commands, as a user types them; in a process of its own where start-up is the subject."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import ncprior
from ncprior import cli
from ncprior.training import combining

SMALL = """
[data]
source = "digits"

[vae]
preset = "digits"

[train]
steps = 60
evaluate_every = 20
checkpoint_every = 20
tensorboard = false
device = "cpu"

[fit]
steps = 40
evaluate_every = 20
log_z_draws = 2000
tensorboard = false
device = "cpu"
network_options = { width = 16, members = 2 }

[diagnose]
samples = 60
proposals = 20
"""


def run(capsys, *arguments):
    """(exit code, standard output, standard error) of a command."""
    old = sys.argv
    sys.argv = ["ncprior", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        sys.argv = old
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def process(*arguments, **options):
    command = [sys.executable, "-m", "ncprior.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    """A run that is trained and fitted."""
    from ncprior.pipeline import fit_run, train_run
    from ncprior.recipes import load_recipe

    out = tmp_path_factory.mktemp("runs") / "small"
    fit_run(train_run(load_recipe(recipe), out, progress=False), progress=False)
    return out


def test_help_is_quick():
    """Half a second is the promise; the best of three, since machines are noisy."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        found = process("--help")
        out, _ = found.communicate()
        seconds.append(time.perf_counter() - began)
    assert found.returncode == 0
    for command in ("demo", "train", "fit", "sample", "diagnose", "evaluate", "report", "convert"):
        assert command in out.decode()
    assert min(seconds) < 0.5


@pytest.mark.parametrize("more", [[], ["--reencode"]])
def test_the_whole_way(capsys, recipe, tmp_path, more):
    out = tmp_path / "run"
    code, text, _ = run(capsys, "train", recipe, "--out", out, "--json")
    assert code == 0 and json.loads(text)["step"] == 60
    code, text, _ = run(capsys, "fit", out, *more, "--json")
    assert code == 0 and 0 < json.loads(text)["nce_loss"] < 1.6
    code, text, _ = run(capsys, "diagnose", out, "--json")
    found = json.loads(text)
    assert code == 0
    advice = found["answers"][-1]["text"]
    assert f"ncprior sample {out}" in advice or f"ncprior fit {out}" in advice
    for name in ("gap_closed", "fd_base", "fd_ncp", "fd_reconstruction", "jsd", "ess_share"):
        assert name in found
    assert found["log_z_se"] > 0 and found["figures"]["fd_base"]["samples"] == 60
    code, text, _ = run(capsys, "evaluate", out, "--metrics", "nll", "--images", 5,
                        "--importance-samples", 3, "--log-z-draws", 100,
                        "--log-z-methods", "base,bridge", "--json")  # fmt: skip
    assert code == 0 and "nll_ncp" in json.loads(text)
    ways = {name for name in json.loads(text)["figures"] if name.startswith("log_z_")}
    assert ways == {"log_z_base", "log_z_bridge"}
    code, _, _ = run(capsys, "sample", out, "--sampler", "langevin", "--num", 3,
                     "--out", tmp_path / "some.npz")  # fmt: skip
    assert code == 0
    code, text, _ = run(capsys, "report", out, "--json")
    assert code == 0 and (out / "report.html").stat().st_size > 10_000
    splits = np.load(out / "splits.npz")
    rows = np.concatenate([splits[name] for name in ("train", "validation", "test")])
    assert sorted(rows) == list(range(1797))
    assert sorted([*splits["fit"], *splits["heldout"]]) == sorted(splits["train"])
    assert {"gap_closed", "nll_base"} <= json.loads((out / "metrics.json").read_text()).keys()


def test_other_priors_beside_the_base_of_an_ncp(capsys, trained, tmp_path):
    """What compare fitted is found whatever the NCP stands on, and whether that is asked for."""
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    for command in (
        ("fit", out, "--base", "mixture-2", "--overwrite"),
        ("compare", out, "--priors", "mixture-2", "--seeds", 1, "--metrics", "fd", "--samples", 40),
    ):
        assert run(capsys, *command)[0] == 0
    found = []
    for priors in ("base,mixture-2", "base,ncp,mixture-2"):
        code, text, _ = run(capsys, "evaluate", out, "--priors", priors, "--metrics", "nll",
                            "--images", 5, "--importance-samples", 3, "--log-z-draws", 100,
                            "--log-z-methods", "base", "--json")  # fmt: skip
        assert code == 0
        found.append(json.loads(text))
    for name in ("nll_base", "nll_mixture-2"):
        assert found[0][name] == pytest.approx(found[1][name])
    assert {"nll_vae_prior", "nll_ncp"} <= found[1].keys() - found[0].keys()
    images = []
    for prior in ("mixture-2", "base"):  # two fits of as many components, of other images
        code, _, _ = run(
            capsys, "sample", out, "--prior", prior, "--out", tmp_path / f"{prior}.npz"
        )
        assert code == 0
        images.append(np.load(tmp_path / f"{prior}.npz")["images"])
    assert images[0].shape == (64, 1, 8, 8) and (images[0] != images[1]).any()


def test_combine(capsys, trained, tmp_path, monkeypatch):
    """The run's own NCP, a mixture that compare fitted, and the NCP of another run of its VAE."""
    monkeypatch.setattr(combining, "DRAWS", 2000)
    monkeypatch.setattr(combining, "LOG_Z_DRAWS", 2000)
    one, other, out = tmp_path / "one", tmp_path / "other", tmp_path / "both"
    shutil.copytree(trained, one)
    shutil.copytree(trained, other)
    code, _, _ = run(capsys, "fit", other, "--seed", 1, "--overwrite")
    assert code == 0
    code, _, _ = run(capsys, "compare", one, "--priors", "mixture-2", "--seeds", 1, "--metrics",
                     "fd", "--samples", 40)  # fmt: skip
    assert code == 0
    names = ["ncp", "mixture-2", str(other)]
    code, text, _ = run(capsys, "combine", one, *names, "--out", out, "--json")
    found = json.loads(text)
    assert code == 0 and [part["name"] for part in found["combined"]] == names
    assert found["bound"]["value"] >= max(part["value"] for part in found["combined"]) - 0.05
    code, text, err = run(capsys, "combine", one, *names, "--out", out)
    assert code == 2 and "already holds a run; pass --overwrite" in err
    code, text, _ = run(capsys, "combine", one, *names, "--out", out, "--overwrite", "--mean",
                        "geometric")  # fmt: skip
    assert code == 0 and "Together they win" in text and f"Next: ncprior diagnose {out}" in text
    code, text, _ = run(capsys, "diagnose", out, "--json")
    assert code == 0 and json.loads(text)["fd_ncp"] > 0
    code, text, _ = run(capsys, "evaluate", out, "--metrics", "nll", "--images", 5,
                        "--importance-samples", 3, "--log-z-draws", 100,
                        "--log-z-methods", "base", "--json")  # fmt: skip
    assert code == 0 and "nll_ncp" in json.loads(text)
    base = json.loads(text)["nll_base"]
    code, text, _ = run(capsys, "evaluate", out, "--metrics", "nll", "--images", 5, "--priors",
                        "base", "--importance-samples", 3, "--json")  # fmt: skip
    assert code == 0 and json.loads(text)["nll_base"] == pytest.approx(base)
    code, _, _ = run(capsys, "report", out)
    assert code == 0 and "more than the best alone" in (out / "report.html").read_text()
    for wrong, said in (
        (["ncp", "nope"], "priors must be some of ncp, run directories of the same VAE, gaussian"),
        (["ncp", "base"], "A+B, got base"),
        (["ncp", "mixture-3"], f"fit it with 'ncprior compare {one} --priors mixture-3 --seeds 1'"),
        (["ncp"], "at least two to combine, got 1"),
    ):
        code, _, err = run(capsys, "combine", one, *wrong, "--out", tmp_path / "no")
        assert code == 2 and said in err and not (tmp_path / "no").exists()
    for taken in (one, other):  # which would be lost
        code, _, err = run(capsys, "combine", one, "ncp", other, "--out", taken, "--overwrite")
        assert code == 2 and "another directory than those combined" in err
        assert (taken / "ncp" / "config.json").exists()
    vae = load_file(other / "vae" / "model.safetensors")
    name = next(iter(vae))
    save_file(vae | {name: vae[name] + 1}, other / "vae" / "model.safetensors")
    code, _, err = run(capsys, "combine", one, "ncp", other, "--out", tmp_path / "no")
    assert code == 2 and "holds another VAE than" in err


@pytest.mark.parametrize("prior", ["base", "ncp", "reconstruction"])
def test_sample(capsys, trained, tmp_path, prior):
    file = tmp_path / "some.npz"
    arguments = ["sample", trained, "--prior", prior, "--num", 9, "--seed", 3, "--out", file]
    code, text, _ = run(capsys, *arguments, "--proposals", 50, "--json")
    assert code == 0 and json.loads(text)["num"] == 9
    arrays = np.load(file, allow_pickle=False)
    assert arrays["images"].shape == (9, 1, 8, 8) and arrays["latents"].shape == (9, 16)
    assert arrays["images"].min() >= 0 and arrays["images"].max() <= 1
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_samples_are_not_lost(capsys, trained, tmp_path):
    arguments = ["sample", trained, "--prior", "base", "--num", 2, "--out", tmp_path / "x.npz"]
    for there in ("x.npz", "x.png"):
        (tmp_path / there).write_bytes(b"mine")
        code, _, err = run(capsys, *arguments)
        assert code == 2 and f"{there} is already there; pass --overwrite" in err
        assert (tmp_path / there).read_bytes() == b"mine"
        assert run(capsys, *arguments, "--overwrite")[0] == 0
        assert len(np.load(tmp_path / "x.npz")["images"]) == 2
        (tmp_path / "x.npz").unlink()


def test_langevin_sample(capsys, trained, tmp_path):
    file = tmp_path / "some.npz"
    assert (
        run(capsys, "sample", trained, "--sampler", "langevin", "--num", 3, "--out", file)[0] == 0
    )


NVAE = Path(__file__).parent / "vaes" / "nvae" / "data"


def test_convert(capsys, recipe, tmp_path):
    out = tmp_path / "run"
    arguments = ["convert", "nvae", NVAE / "mnist-tiny.pt", "--out", out]
    code, text, _ = run(capsys, *arguments, "--json")
    found = json.loads(text)
    assert code == 0 and found["num_groups"] == 4 and found["image_shape"] == [1, 28, 28]
    assert ncprior.load_vae(out).num_groups == 4
    code, _, err = run(capsys, "fit", out)  # no data are known
    assert code == 2 and "[data]" in err and "config.toml" in err and err.count("\n") == 1
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "--overwrite" in err
    code, text, _ = run(capsys, *arguments, "--overwrite", "--recipe", recipe)
    assert code == 0 and f"Next: ncprior fit {out}" in text
    assert 'source = "digits"' in (out / "config.toml").read_text()
    code, _, err = run(capsys, "fit", out, "--steps", 1)  # digits are no MNIST
    assert code == 2 and "(1, 28, 28)" in err and err.count("\n") == 1


MISTAKES = [
    (["fit", "{none}"], "does not exist"),
    (["fit", "{empty}"], "not a run directory"),
    (["fit", "{run}"], "--overwrite"),
    (["fit", "{run}", "--steps", "0"], "--steps"),
    (["fit", "{run}", "--preset", "huge"], "small"),
    (["sample", "{run}", "--out", "{empty}/x.npz", "--num", "0"], "--num"),
    (["sample", "{run}", "--out", "{empty}/x.npz", "--proposals", "0"], "--proposals"),
    (["sample", "{run}", "--out", "{empty}/x.npz", "--temperature", "-1"], "temperature"),
    (["sample", "{run}", "--out", "{empty}/x.jpg"], ".npz"),
    (["sample", "{run}", "--out", "{empty}/x.npz", "--prior", "nope"], "reconstruction"),
    (["diagnose", "{run}", "--samples", "3"], "--samples"),
    (["evaluate", "{run}", "--metrics", "fid"], "must be some of nll, fd"),
    (["evaluate", "{run}", "--priors", "base,vampp"], "got vampp (did you mean 'vamp'?)"),
    (["evaluate", "{run}", "--priors", "vamp"], "no prior 'vamp' of this VAE; fit it"),
    (["compare", "{run}", "--priors", "ncp-mixtur"], "(did you mean 'ncp-mixture'?)"),
    (["train", "{none}.toml", "--out", "{empty}/r"], "does not exist"),
    (["train", "{recipe}", "--out", "{run}"], "--resume"),
    (["train", "{recipe}"], "--out"),
    (["convert", "nvae", "{none}", "--out", "{empty}/r"], "does not exist"),
    (["convert", "nvae", "{recipe}", "--out", "{empty}/r"], "no torch file"),
    (["convert", "nvae", "{recipe}"], "--out"),
    (["trian"], "train"),
    (["fit", "{run}", "--overwrit"], "--overwrite"),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES)
def test_a_mistake_is_one_line(capsys, trained, recipe, tmp_path, arguments, said):
    names = {"run": trained, "none": tmp_path / "none", "empty": tmp_path, "recipe": recipe}
    code, out, err = run(capsys, *(a.format(**names) for a in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("ncprior: ") and err.count("\n") == 1 and said in err


RECIPES = [
    ('[data]\nsorce = "digits"', "'source'"),
    ('[vea]\npreset = "digits"', "'vae'"),
    ('[data]\nsource = "digit"', "digits"),
    ('[data]\nsource = "digits"\n[vae]\npreset = "digitz"', "digits"),
    ('[data]\nsource = "digits"\n[train]\nbatch_size = 5000', "batch_size"),
    ('[data]\nsource = "digits"\n[train]\nsteps = 0', "steps"),
    ('[data]\nsource = "digits"\n[train]\noptimizer = "sgd"', "optimizer"),
    ('[data]\nsource = "digits"\n[train]\nlearning_rate = -1.0', "learning_rate"),
    ('[data]\nsource = "array"\npath = "nowhere.npy"', "nowhere.npy"),
    ("[data", "not valid TOML"),
]


@pytest.mark.parametrize(("text", "said"), RECIPES)
def test_a_wrong_recipe_is_one_line(capsys, tmp_path, text, said):
    (tmp_path / "wrong.toml").write_text(text)
    code, out, err = run(capsys, "train", tmp_path / "wrong.toml", "--out", tmp_path / "r")
    assert (code, out) == (2, "") and err.count("\n") == 1 and said in err
    assert not (tmp_path / "r").exists()  # so that the next try finds its way free


def test_a_wrong_recipe_costs_no_run(capsys, trained, tmp_path):
    """Not even one that it was to replace."""
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "wrong.toml").write_text(SMALL.replace("steps = 60", "steps = -5"))
    before = sorted((tmp_path / "run").rglob("*"))
    code, _, err = run(capsys, "train", tmp_path / "wrong.toml", "--out", tmp_path / "run",
                       "--overwrite")  # fmt: skip
    assert code == 2 and "steps must be positive" in err
    assert sorted((tmp_path / "run").rglob("*")) == before


@pytest.mark.parametrize("command", [["fit", "--overwrite"], ["energy"], ["combine", "ncp", "ncp"]])
def test_a_device_that_is_not_there(capsys, monkeypatch, trained, tmp_path, command):
    """It is found out before any data are read."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("ncprior.runs.load_data", None)
    out = ["--out", tmp_path / "r"] if command[0] == "combine" else []
    code, text, err = run(capsys, command[0], trained, *command[1:], *out, "--device", "cuda")
    assert (code, text) == (2, "") and err.count("\n") == 1
    assert "device must be auto or cpu" in err and list(tmp_path.iterdir()) == []


IMAGES = {
    "one": np.zeros((1, 8, 8), np.uint8),
    "wide": np.full((40, 8, 8), 3.0, np.float32),
    "nan": np.full((40, 8, 8), np.nan, np.float32),
    "flat": np.zeros((40, 64), np.uint8),
    "complex": np.zeros((40, 8, 8), np.complex64),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_wrong_images_are_one_line(capsys, tmp_path, kind):
    np.save(tmp_path / "x.npy", IMAGES[kind])
    path = (tmp_path / "x.npy").as_posix()
    (tmp_path / "r.toml").write_text(f'[data]\nsource = "array"\npath = "{path}"')
    code, out, err = run(capsys, "train", tmp_path / "r.toml", "--out", tmp_path / "r")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "x.npy" in err or (kind == "one" and "at least 5 images" in err)


def test_a_diverging_loss_says_what_to_try(capsys, tmp_path):
    text = SMALL.replace("[train]", "[train]\nlearning_rate = 1e30\nretries = 0")
    (tmp_path / "r.toml").write_text(text)
    code, _, err = run(capsys, "train", tmp_path / "r.toml", "--out", tmp_path / "r", "--json")
    assert code == 1 and "at step" in err and "learning_rate" in err and err.count("\n") == 1


def test_another_version_is_refused(capsys, trained, tmp_path):
    (tmp_path / "config.toml").write_text('format = 99\nversion = "9.9"\n')
    code, _, err = run(capsys, "fit", tmp_path)
    assert code == 2 and "9.9" in err and "99" in err


def test_weights_cut_short(capsys, trained, tmp_path):
    import shutil

    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / "vae" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    code, _, err = run(capsys, "diagnose", tmp_path / "run")
    assert code == 2 and "model.safetensors" in err and err.count("\n") == 1


def _limit_files():
    """Files may not grow beyond 20 kB, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk_loses_nothing(trained, tmp_path):
    file = tmp_path / "x.npz"
    arguments = ("sample", trained, "--prior", "base", "--num", 600, "--out", file)
    _, err = (found := process(*arguments, preexec_fn=_limit_files)).communicate()
    assert found.returncode == 2 and err.decode().strip().splitlines()[-1].startswith("ncprior: ")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_then_resume_ends_the_same(recipe, trained, tmp_path):
    out, env = tmp_path / "run", os.environ | {"OMP_NUM_THREADS": "1"}
    recipe_text = SMALL.replace("steps = 60", "steps = 1000").replace("every = 20", "every = 100")
    (tmp_path / "long.toml").write_text(recipe_text)
    whole = tmp_path / "whole"
    assert process("train", tmp_path / "long.toml", "--out", whole, env=env).wait() == 0

    stopped = process("train", tmp_path / "long.toml", "--out", out, env=env)
    while not (out / "vae-checkpoint.pt").exists():
        time.sleep(0.02)
    stopped.send_signal(signal.SIGINT)
    _, err = stopped.communicate()
    assert stopped.returncode == 130 and "--resume" in err.decode()
    again = process("train", tmp_path / "long.toml", "--out", out, "--resume", env=env)
    assert again.wait() == 0
    name = "vae/model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("command", [[], ["convert"], ["features"]])
def test_no_command_is_a_call_for_help(capsys, command):
    code, out, err = run(capsys, *command)
    assert (code, err) == (0, "") and "Commands:\n" in out
    assert out == run(capsys, *command, "--help")[1]


@pytest.mark.parametrize("arguments", [[], ["fit", "--help"]])
def test_a_reader_that_goes_away_is_no_error(arguments):
    """As in 'ncprior | head -1', and already gone."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "ncprior", *arguments]
    with os.fdopen(writing, "w") as nobody:
        done = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, text=True)
    assert done.returncode in (1, 141) and done.stderr == ""


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"ncprior {ncprior.__version__}\n", "")


def test_public_names_and_version():
    for name in ncprior.__all__:
        assert getattr(ncprior, name) is not None
    assert set(ncprior.__all__) <= set(dir(ncprior))
