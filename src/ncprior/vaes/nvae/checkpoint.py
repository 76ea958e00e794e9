"""Reading the checkpoints of the published NVAE program.

A checkpoint is a dict written by `torch.save`: weights in `state_dict`, every training argument in
`args` (an argparse.Namespace), and the table of cell types in `arch_instance`. Nothing in it is
executed.
"""

import argparse
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ncprior.vaes.nvae.cells import DecoderCell, EncoderCell
from ncprior.vaes.nvae.flows import Flow, FlowCell
from ncprior.vaes.nvae.model import NVAE

SUPPORTED = "res_mbconv"
CELL_TYPES = {
    **{
        f"{place}_{tower}": ["res_bnswish"] * 2
        for place in ("normal", "down")
        for tower in ("enc", "pre")
    },
    **{f"{place}_dec": ["mconv_e6k5g0"] for place in ("normal", "up")},
    **{f"{place}_post": ["mconv_e3k5g0"] for place in ("normal", "up")},
}
BINARY = ("mnist", "omniglot")  # 28 x 28, padded by 2 and cropped again; all others are in colour
DAMAGED = (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError, TypeError)
"""What `torch.load` raises for files that are cut short or changed, depending on where."""
SHOWN = 10
"""How many names an error lists."""


def load_published(path: str | Path) -> NVAE:
    """The model in a checkpoint of the published program, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, holds code, is no NVAE, has cells of another type than
            "res_mbconv", or its weights do not fit its own arguments.
    """
    path = Path(path)
    checkpoint = _read(path)
    state, args = checkpoint["state_dict"], vars(checkpoint["args"])
    _check_cells(checkpoint, path)
    options = arguments(args, state, path)
    try:
        with torch.random.fork_rng([]):  # the first weights are thrown away
            vae = NVAE(**options)
    except ValueError as error:
        raise ValueError(f"the arguments in {path} do not make an NVAE: {error}") from None
    names = published_names(vae)
    _check_weights(vae, names, state, path)
    vae.load_state_dict({ours: state[theirs] for ours, theirs in names.items()})
    return vae.eval()


def arguments(args: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The keyword arguments of `NVAE` for the training arguments of a checkpoint."""
    args = {"ada_groups": False, "min_groups_per_scale": 1, "num_mixture_dec": 10} | dict(args)
    try:
        blocks = args["num_preprocess_blocks"]
        if args["num_postprocess_blocks"] != blocks:
            raise ValueError(
                f"{path} has {blocks} pre-process but {args['num_postprocess_blocks']} "
                "post-process blocks, so that images would change their size"
            )
        groups = [args["num_groups_per_scale"]]
        for _ in range(args["num_latent_scales"] - 1):
            fewer = max(groups[-1] // 2, args["min_groups_per_scale"])
            groups.append(fewer if args["ada_groups"] else groups[-1])
        binary = args["dataset"] in BINARY
        padding = 2 if binary else 0
        shape = [
            side * 2 ** (blocks + len(groups) - 1) - 2 * padding
            for side in _tensor(state, "prior_ftr0", 3, path).shape[1:]
        ]
        mixtures = args["num_mixture_dec"]
        colour = "normal" if mixtures == 1 else "discretized_logistic_mixture"
        return {
            "image_shape": [_tensor(state, "stem.weight", 4, path).shape[1], *shape],
            "groups_per_scale": groups,
            "latent_channels": args["num_latent_per_group"],
            "encoder_channels": args["num_channels_enc"],
            "decoder_channels": args["num_channels_dec"],
            "num_blocks": blocks,
            "pre_cells": args["num_preprocess_cells"],
            "post_cells": args["num_postprocess_cells"],
            "encoder_cells": args["num_cell_per_cond_enc"],
            "decoder_cells": args["num_cell_per_cond_dec"],
            "squeeze_excitation": args["use_se"],
            "residual_posterior": args["res_dist"],
            "num_flows": args["num_nf"],
            "likelihood": "bernoulli" if binary else colour,
            "num_mixtures": mixtures,
            "num_bits": args["num_x_bits"],
            "padding": padding,
        }
    except KeyError as error:
        raise ValueError(f"{path} is no NVAE checkpoint: its args lack {error}") from None


def published_names(vae: NVAE) -> dict[str, str]:
    """Our name of every tensor of `vae.state_dict()`, and what the published program calls it."""
    modules = {"stem": "stem", "top": "enc0.1", "image_head": "image_conditional.1"}
    for i in range(len(vae.pre)):
        modules[f"pre.{i}"] = f"pre_process.{i}"
    for i in range(len(vae.post)):
        modules[f"post.{i}"] = f"post_process.{i}"
    for k in range(vae.num_groups):
        modules[f"posterior_heads.{k}"] = f"enc_sampler.{k}"
    for k in range(vae.num_groups - 1):
        modules[f"prior_heads.{k}"] = f"dec_sampler.{k}.1"
    for ours, theirs in (("encoder", "enc_tower"), ("decoder", "dec_tower")):
        parts = [
            f"{ours}.{i}.{part}"
            for i, group in enumerate(getattr(vae, ours))
            for part in _parts(group)
        ]
        for i, part in enumerate(parts):
            modules[part] = f"{theirs}.{i}.conv" if part.endswith("combine") else f"{theirs}.{i}"
    for k, flow in enumerate(vae.flows):
        assert isinstance(flow, Flow)
        for j in range(len(flow.cells)):
            pair = k * len(flow.cells) // 2 + j // 2
            modules[f"flows.{k}.cells.{j}"] = f"nf_cells.{pair}.cell{1 + j % 2}"
    known = dict(vae.named_modules())
    names = {"prior_features": "prior_ftr0"}
    for ours, theirs in modules.items():
        for inner, outer in _within(known[ours]):
            for tensor in known[f"{ours}{inner}"].state_dict():
                names[f"{ours}{inner}.{tensor}"] = f"{theirs}{outer}.{tensor}"
    return {name: names[name] for name in vae.state_dict()}


def aliases(vae: NVAE) -> set[str]:
    """Published names of the weights that checkpoints hold twice, or in old files once."""
    known = dict(vae.named_modules())
    return {
        f"{theirs}_normalized"
        for ours, theirs in published_names(vae).items()
        if type(known[ours.rpartition(".")[0] or "stem"]) is nn.Conv2d
    }


def _parts(group: nn.Module) -> Iterator[str]:
    """The modules of a group that the published program numbers one by one, in its order."""
    for edge in ("down", "up"):
        if getattr(group, edge, None) is not None:
            yield edge
    cells = group.cells
    assert isinstance(cells, nn.ModuleList)
    yield from (f"cells.{i}" for i in range(len(cells)))
    if group.combine is not None:
        yield "combine"


def _within(module: nn.Module) -> list[tuple[str, str]]:
    """Paths of the layers within a module: ours and the published program's."""
    se = [(".se.squeeze", ".se.se.0"), (".se.excite", ".se.se.2")]
    if isinstance(module, EncoderCell):
        skip = [(f".skip.convs.{i}", f".skip.conv_{i + 1}") for i in range(4)]
        pairs = [
            (f".{ours}{i + 1}", f"._ops.{i}.{theirs}")
            for i in range(2)
            for ours, theirs in (("norm", "bn_act"), ("conv", "conv_0"))
        ]
        return (skip if module.skip else []) + pairs + (se if module.se else [])
    if isinstance(module, DecoderCell):
        shift = 1 if module.skip else 0  # the published list then starts with the upsampling
        ops = ["{}.bn", "{}.conv.0", "{}.conv.1", "{}.conv.0", "{}.conv.1", "{}", "{}.bn"]
        ours = ["norm", "expand", "expand_norm", "depthwise", "depthwise_norm", "project"]
        ours.append("project_norm")
        places = [0, 1, 1, 2, 2, 3, 4]
        pairs = [
            (f".{name}", "._ops.0.conv." + op.format(place + shift))
            for name, op, place in zip(ours, ops, places, strict=True)
        ]
        skip = [(".skip.conv", ".skip.1")] if module.skip else []
        return skip + pairs + (se if module.se else [])
    if isinstance(module, FlowCell):
        return [
            (".conv1", ".conv.convz.0"),
            (".conv2", ".conv.convz.2"),
            (".shift", ".mu.conv_0"),
        ]
    return [("", "")]


def _read(path: Path) -> dict[str, Any]:
    """The content of the file, if it is that of an NVAE."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"checkpoint {path} does not exist") from None
    except IsADirectoryError:
        raise ValueError(f"checkpoint {path} is a directory; name the file in it") from None
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+) was not|(?:class|function) (\S+)", str(error))
        if named is None:
            raise ValueError(f"checkpoint {path} is damaged or no torch file") from None
        raise ValueError(
            f"checkpoint {path} was not loaded, since it holds pickled code: "
            f"{named.group(1) or named.group(2)}"
        ) from None
    except PermissionError:
        raise
    except DAMAGED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint {path} is damaged or cut short ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no NVAE checkpoint: it holds a {type(content).__name__}")
    lacking = {"state_dict", "args"} - content.keys()
    if lacking:
        raise ValueError(
            f"{path} is no NVAE checkpoint: it lacks {_listed(lacking)} and holds "
            f"{_listed(map(str, content)) or 'nothing'}"
        )
    if not isinstance(content["args"], argparse.Namespace):
        kind = type(content["args"]).__name__
        raise ValueError(f"{path} is no NVAE checkpoint: its args are a {kind}, not a Namespace")
    state = content["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{path} is no NVAE checkpoint: its state_dict is none of tensors")
    return content


def _check_cells(checkpoint: dict[str, Any], path: Path) -> None:
    """See that the cells are of the one type that is supported."""
    name = getattr(checkpoint["args"], "arch_instance", SUPPORTED)
    table = checkpoint.get("arch_instance") or CELL_TYPES
    other = {key: cells for key, cells in CELL_TYPES.items() if table.get(key, cells) != cells}
    if name != SUPPORTED or other:
        found = f" ({', '.join(f'{key} = {table[key]}' for key in other)})" if other else ""
        raise ValueError(
            f"{path} has cells of type {name!r}{found}; only {SUPPORTED!r} is supported"
        )


def _check_weights(
    vae: NVAE, names: dict[str, str], state: Mapping[str, Tensor], path: Path
) -> None:
    """See that the checkpoint's tensors are those of the model: names, shapes, finite values."""
    wanted = set(names.values())
    missing = wanted - state.keys()
    extra = {name for name in state if not name.endswith(".weight_normalized")} - wanted
    if missing or extra:
        raise ValueError(
            f"the weights in {path} are not those of the NVAE that its args describe: "
            f"{len(missing)} missing ({_listed(missing) or 'none'}), "
            f"{len(extra)} unexpected ({_listed(extra) or 'none'})"
        )
    misfits = [
        f"{theirs} is {tuple(state[theirs].shape)} instead of {tuple(tensor.shape)}"
        for (ours, tensor), theirs in zip(vae.state_dict().items(), names.values(), strict=True)
        if state[theirs].shape != tensor.shape
    ]
    if misfits:
        raise ValueError(
            f"{len(misfits)} shapes in {path} are not those that its args describe: "
            f"{_listed(misfits)}"
        )
    broken = [name for name in wanted if not state[name].isfinite().all()]
    if broken:
        raise ValueError(f"{len(broken)} tensors in {path} are not finite: {_listed(broken)}")


def _tensor(state: Mapping[str, Tensor], name: str, axes: int, path: Path) -> Tensor:
    if name not in state:
        raise ValueError(f"{path} is no NVAE checkpoint: its state_dict lacks {name}")
    if state[name].ndim != axes:
        shape = tuple(state[name].shape)
        raise ValueError(f"{path}: {name} must have {axes} axes, got shape {shape}")
    return state[name]


def _listed(names: Iterable[str]) -> str:
    """Names in order, the first few of them."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + rest
