"""Equality with the published program, from numbers that it gave for random weights.

`data/NAME.json` says what each array is, how errors are measured and which tolerances hold. What
belongs to training (balanced KL, spectral and batch-norm losses) is tested beside the trainer.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ncprior.normal import Normal
from ncprior.vaes.nvae.checkpoint import load_published, published_names
from ncprior.vaes.nvae.layers import MaskedConv2d

DATA = Path(__file__).parent / "data"
NAMES = ("mnist-tiny", "cifar-tiny")
OF_TRAINING = re.compile(r"alpha_|balanced_|bn_loss|spectral|train_loss")
GIVEN = re.compile(r"x$|.*_eps$|pixel_u_")


class Recorded:
    """A checkpoint, the arrays recorded of it, and the same arrays from our model."""

    def __init__(self, name, dtype):
        self.facts = json.loads((DATA / f"{name}.json").read_text())
        with np.load(DATA / f"{name}.npz", allow_pickle=False) as arrays:
            self.arrays = {key: torch.from_numpy(arrays[key]).to(dtype) for key in arrays.files}
        self.vae = load_published(DATA / f"{name}.pt").to(dtype)
        self.found = {}
        with torch.no_grad():
            self.posterior_pass()
            for temperature in (1.0, 0.7):
                self.generative_pass(temperature)

    def posterior_pass(self):
        vae, given, found = self.vae, self.arrays, self.found
        x = given["x"]
        hooks = [self.keep(vae.stem, "feat_stem"), self.keep(vae.pre[-1], "feat_pre_process")]
        hooks.append(self.keep(vae.encoder[-1].cells[-1], "feat_enc_tower"))
        evidence = vae.encode(x)
        found["feat_enc0"] = evidence[0]
        state, kls = vae.start(len(x)), []
        for k in range(vae.num_groups):
            group, n = vae.group(state, evidence), f"group{k:02d}_"
            prior, flow = group.prior, vae.flows[k] if vae.flows else None
            base = group.posterior.base if flow else group.posterior
            z0 = base.loc + base.scale * given[n + "eps"]
            z = flow(z0) if flow else z0
            found |= {n + "q_mu": base.loc, n + "q_sigma": base.scale, n + "z0": z0, n + "z": z}
            found |= {n + "p_mu": prior.loc, n + "p_sigma": prior.scale}
            log_q, log_p = base.log_prob(z0), prior.log_prob(z)
            # The same per channel: its pixels as the event.
            q, p = (Normal(d.loc, d.scale, event_dim=2) for d in (base, prior))
            by_channel = q.log_prob(z0) - p.log_prob(z) if flow else q.kl(p)
            kls.append(log_q - log_p if flow else base.kl(prior))
            found |= {n + "log_q": log_q, n + "log_p": log_p, n + "kl": kls[-1]}
            found |= {n + "kl_analytic": base.kl(prior), n + "kl_diag": by_channel.mean(0)}
            state = vae.advance(state, z)
        hooks.append(self.keep(vae.post[-1], "feat_post_process"))
        hooks.append(self.keep(vae.image_head, "logits"))
        found["feat_dec_tower"] = state.features
        emission = vae.emit(state)
        for hook in hooks:
            hook.remove()
        c, h, w = vae.image_shape
        inside = x[:, :, vae.padding : vae.padding + h, vae.padding : vae.padding + w]
        assert inside.shape == (len(x), c, h, w)
        # Each pixel as an image of its own.
        logits, shape = found["logits"], given["log_px_map"].shape
        pixels, values = (t.movedim(1, -1).flatten(0, 2)[..., None, None] for t in (logits, x))
        found["log_px_map"] = vae.likelihood(pixels).log_prob(values).view(shape)
        found["log_px"] = emission.log_prob(inside)
        found["decoder_mean"] = vae.likelihood(logits).mean
        for name in ("log_q", "log_p"):
            of_all = [found[f"group{k:02d}_{name}"] for k in range(vae.num_groups)]
            found[name] = torch.stack(of_all).sum(0)
        found["recon_loss"] = -found["log_px"]
        found["kl_all"] = torch.stack(kls, 1)
        found["nelbo"] = found["recon_loss"] + found["kl_all"].sum(1)
        found["log_iw"] = found["log_px"] + found["log_p"] - found["log_q"]

    def generative_pass(self, temperature):
        vae, given, found = self.vae, self.arrays, self.found
        n = f"sample_t{round(100 * temperature):03d}_"
        state = vae.start(len(given[n + "group00_eps"]))
        for k in range(vae.num_groups):
            prior, group = vae.group(state).prior.tempered(temperature), f"{n}group{k:02d}_"
            z = prior.loc + prior.scale * given[group + "eps"]
            found |= {group + "mu": prior.loc, group + "sigma": prior.scale, group + "z": z}
            state = vae.advance(state, z)
        hook = self.keep(vae.image_head, n + "logits")
        vae.emit(state)
        hook.remove()
        emission = vae.likelihood(found[n + "logits"])
        found[n + "mean"] = emission.mean
        if "pixel_u_mixture" in given:
            noise = given["pixel_u_mixture"], given["pixel_u_logistic"]
            found[n + "image"] = emission.draw(*noise, temperature=temperature)
            if temperature != 1:
                found[n + "image_pixel_t1"] = emission.draw(*noise)

    def keep(self, module, name):
        def hook(_, __, output):
            self.found[name] = output

        return module.register_forward_hook(hook)


@pytest.fixture(scope="module", params=NAMES)
def recorded(request):
    return Recorded(request.param, torch.float32)


def check(recorded):
    """Compare in the order of computation, so that the first failure names the culprit."""
    tolerances = recorded.facts["tolerance"]
    for name, ours in recorded.found.items():
        theirs = recorded.arrays[name]
        assert ours.shape == theirs.shape, name
        error = ((ours - theirs).abs() / theirs.abs().clamp_min(1)).max().item()
        assert error <= tolerances.get(name, tolerances["default"]), (name, error)


def test_single_precision(recorded):
    check(recorded)


@pytest.mark.parametrize("name", NAMES)
def test_double_precision(name):
    check(Recorded(name, torch.float64))


def test_every_recorded_array_is_compared(recorded):
    names = {name for name in recorded.arrays if not (OF_TRAINING.match(name) or GIVEN.match(name))}
    assert names == recorded.found.keys()
    assert names <= recorded.facts["arrays"].keys()


def test_facts_of_the_checkpoint(recorded):
    facts, vae = recorded.facts, recorded.vae
    told = facts["checkpoint"]
    assert sum(p.numel() for p in vae.parameters()) == told["parameters"]
    assert len(vae.convolution_weights()) == told["convolutions"]
    assert len(vae.batch_norms()) == told["batch_norm_layers"]
    keys = told["state_dict_keys"] - told["weight_normalized_aliases"]
    assert len(published_names(vae)) == keys
    assert list(vae.groups_per_scale) == facts["groups_per_scale_finest_first"]
    assert vae.num_groups == facts["num_groups"]


def test_convolutions_stand_in_the_published_order(recorded):
    """The spectral losses group them by shape; within a shape the order is that of the file."""
    vae = recorded.vae
    convs = [name for name, m in vae.named_modules() if isinstance(m, torch.nn.Conv2d)]
    published = [published_names(vae)[f"{name}.weight"].removesuffix(".weight") for name in convs]
    shapes = [list(w.flatten(1).shape) for w in vae.convolution_weights()]
    for group in recorded.facts["spectral_groups"]:
        same = [
            n for n, shape in zip(published, shapes, strict=True) if group["matrix_shape"] == shape
        ]
        assert same == group["layers"]


def test_effective_weights(recorded):
    """The sum of their exact norms was recorded."""
    weights = recorded.vae.convolution_weights()
    total = sum(torch.linalg.matrix_norm(w.detach().double().flatten(1), 2) for w in weights)
    assert float(total) == pytest.approx(float(recorded.arrays["spectral_loss_exact"]), rel=1e-6)


def test_flows_are_recorded_only_where_there_are_some():
    vae = load_published(DATA / "cifar-tiny.pt")
    masked = [module for module in vae.modules() if isinstance(module, MaskedConv2d)]
    assert len(masked) == 3 * 2 * vae.num_groups
