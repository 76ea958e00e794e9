import argparse
import io
import zipfile
from pathlib import Path

import pytest
import torch

import ncprior
from ncprior.pipeline import convert_nvae
from ncprior.storage import fingerprint
from ncprior.vaes import NVAE
from ncprior.vaes.nvae.checkpoint import aliases, load_published, published_names

DATA = Path(__file__).parent / "data"

ARGS = {
    "dataset": "celeba_64",
    "arch_instance": "res_mbconv",
    "num_nf": 2,
    "num_x_bits": 5,
    "num_latent_scales": 3,
    "num_groups_per_scale": 4,
    "num_latent_per_group": 3,
    "ada_groups": True,
    "min_groups_per_scale": 2,
    "num_channels_enc": 4,
    "num_preprocess_blocks": 1,
    "num_preprocess_cells": 1,
    "num_cell_per_cond_enc": 1,
    "num_channels_dec": 6,
    "num_postprocess_blocks": 1,
    "num_postprocess_cells": 2,
    "num_cell_per_cond_dec": 1,
    "num_mixture_dec": 1,
    "use_se": False,
    "res_dist": False,
}


def write(directory, vae, args, **changes):
    """A checkpoint as the published program would write it of our model."""
    ours = vae.state_dict()
    state = {theirs: ours[name].clone() for name, theirs in published_names(vae).items()}
    state |= {name: state[name.removesuffix("_normalized")] for name in aliases(vae)}
    content = {"epoch": 1, "state_dict": state, "args": argparse.Namespace(**args)} | changes
    file = directory / "checkpoint.pt"
    torch.save(content, file)
    return file


@pytest.fixture(scope="module")
def other():
    """A model with what the two recorded ones lack."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NVAE(
            (3, 16, 24),
            groups_per_scale=(4, 2, 2),
            latent_channels=3,
            encoder_channels=4,
            decoder_channels=6,
            pre_cells=1,
            encoder_cells=1,
            decoder_cells=1,
            squeeze_excitation=False,
            residual_posterior=False,
            num_flows=2,
            likelihood="normal",
            num_mixtures=1,
            num_bits=5,
        )


def test_round_trip(other, tmp_path):
    before = torch.get_rng_state()
    found = load_published(write(tmp_path, other, ARGS))
    assert found.config == other.config and not found.training
    assert fingerprint(found) == fingerprint(other)
    assert torch.equal(torch.get_rng_state(), before)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_arguments_that_old_files_lack(tmp_path):
    sizes = {"groups_per_scale": (2, 2), "encoder_channels": 2, "decoder_channels": 2, "padding": 2}
    with torch.random.fork_rng():
        vae = NVAE((1, 28, 28), latent_channels=2, **sizes)
    args = ARGS | {"dataset": "omniglot", "num_latent_scales": 2, "num_groups_per_scale": 2}
    args |= {"num_nf": 0, "use_se": True, "res_dist": True, "num_x_bits": 8}
    twos = ("num_channels_enc", "num_channels_dec", "num_latent_per_group", "num_preprocess_cells")
    twos += ("num_cell_per_cond_enc", "num_cell_per_cond_dec")
    args |= dict.fromkeys(twos, 2)
    for name in ("ada_groups", "min_groups_per_scale", "num_mixture_dec"):
        del args[name]
    file = write(tmp_path, vae, args)
    content = torch.load(file, weights_only=False)
    content["state_dict"] = {
        k: v for k, v in content["state_dict"].items() if not k.endswith("_normalized")
    }
    torch.save(content, file)
    assert load_published(file).config == vae.config


@pytest.mark.parametrize("name", ["mnist-tiny", "cifar-tiny"])
def test_conversion_to_a_run(name, tmp_path):
    published = load_published(DATA / f"{name}.pt")
    recipe = {"data": {"source": "digits"}, "train": {"steps": 3}, "vae": {"preset": "digits"}}
    run = convert_nvae(DATA / f"{name}.pt", tmp_path / "run", recipe=recipe)
    assert run.section("data") == {"source": "digits"} and not run.section("train")
    found = ncprior.load_vae(tmp_path / "run")
    assert isinstance(found, NVAE) and found.config == published.config
    assert fingerprint(found) == fingerprint(published)
    assert ncprior.build_vae(found.image_shape, **run.section("vae")).config == found.config


def test_a_run_without_data_says_so(tmp_path):
    run = convert_nvae(DATA / "mnist-tiny.pt", tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"does not say which images .* section \[data\] to .*toml"
    ):
        run.load_data()
    with pytest.raises(ValueError, match="already holds a run; pass --overwrite, or another"):
        convert_nvae(DATA / "mnist-tiny.pt", tmp_path / "run")
    convert_nvae(DATA / "mnist-tiny.pt", tmp_path / "run", overwrite=True)


def saved(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    return tmp_path / "x.pt"


class Attack:
    def __reduce__(self):
        return print, ("pickled code was run",)


def test_code_is_refused(tmp_path, capsys):
    file = saved(tmp_path, {"state_dict": {}, "args": Attack()})
    with pytest.raises(ValueError, match=r"holds pickled code: (\w+\.)?print$"):
        load_published(file)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "is no NVAE checkpoint: it holds a Tensor"),
        ({}, "lacks args, state_dict and holds nothing"),
        ({"model": 1, "step": 2}, "lacks args, state_dict and holds model, step"),
        ({"args": {"a": 1}, "state_dict": {}}, "its args are a dict, not a Namespace"),
        ({"args": argparse.Namespace(), "state_dict": [1]}, "its state_dict is none of tensors"),
        ({"args": argparse.Namespace(), "state_dict": {}}, "its args lack 'num_pre"),
        ({"args": argparse.Namespace(**ARGS), "state_dict": {}}, "state_dict lacks prior_ftr0"),
        (
            {"args": argparse.Namespace(**ARGS), "state_dict": {"prior_ftr0": torch.zeros(2)}},
            r"prior_ftr0 must have 3 axes, got shape \(2,\)",
        ),
        (
            {"args": argparse.Namespace(**ARGS | {"arch_instance": "res_wnelu"}), "state_dict": {}},
            "cells of type 'res_wnelu'; only 'res_mbconv' is supported",
        ),
        (
            {
                "args": argparse.Namespace(**ARGS),
                "state_dict": {},
                "arch_instance": {"normal_enc": ["res_elu"]},
            },
            r"\(normal_enc = \['res_elu'\]\); only 'res_mbconv' is supported",
        ),
        (
            {"args": argparse.Namespace(**ARGS | {"num_postprocess_blocks": 2}), "state_dict": {}},
            "1 pre-process but 2 post-process blocks",
        ),
    ],
)
def test_what_is_no_checkpoint(content, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        load_published(saved(tmp_path, content))
    assert "x.pt" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 10, 5000, -200])
def test_damaged_file(keep, tmp_path):
    content = (DATA / "mnist-tiny.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"x\.pt is damaged"):
        load_published(tmp_path / "x.pt")


def test_files_of_another_kind(tmp_path):
    (tmp_path / "x.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="damaged or no torch file"):
        load_published(tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as file:
        file.writestr("readme.txt", "none")
    with pytest.raises(ValueError, match=r"y\.pt is damaged"):
        load_published(tmp_path / "y.pt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_published(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="is a directory"):
        load_published(tmp_path)


def changed(change, tmp_path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(DATA / "mnist-tiny.pt", weights_only=True)
    change(content["state_dict"], content["args"])
    return saved(tmp_path, content)


def test_weights_that_do_not_fit(tmp_path):
    def many(state, _):
        for name in [name for name in state if "bn_act.bias" in name]:
            state[f"x.{name}"] = state.pop(name)

    with pytest.raises(ValueError, match=r"30 missing \(.*and 20 more\), 30 unexpected \(.*and 20"):
        load_published(changed(many, tmp_path))

    def shape(state, _):
        state["stem.bias"] = torch.zeros(5)

    with pytest.raises(ValueError, match=r"1 shapes .*stem.bias is \(5,\) instead of \(4,\)"):
        load_published(changed(shape, tmp_path))

    def nan(state, _):
        state["stem.bias"][0] = torch.nan

    with pytest.raises(ValueError, match=r"1 tensors .* are not finite: stem\.bias"):
        load_published(changed(nan, tmp_path))

    def size(_, args):
        args.num_latent_per_group = 0

    with pytest.raises(ValueError, match="do not make an NVAE: latent_channels must be"):
        load_published(changed(size, tmp_path))


def test_the_legacy_format_is_read(tmp_path):
    """Files of before torch 1.6, which are no zip archives."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(DATA / "mnist-tiny.pt", weights_only=True)
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=False)
    (tmp_path / "x.pt").write_bytes(stream.getvalue())
    assert fingerprint(load_published(tmp_path / "x.pt")) == fingerprint(
        load_published(DATA / "mnist-tiny.pt")
    )
