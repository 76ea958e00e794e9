"""The table of ranks in the design, held by reading every import, nested ones included."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "ncprior"

RANKS = {
    0: {"walk", "normal", "numerics", "storage", "figures", "groups", "tail", "products"}
    | {"terminal"},
    1: {"ratios", "samplers", "vaes", "metrics", "data", "priors"},
    2: {"training", "recipes", "runs", "shares", "adapters"},
    3: {"readjustment", "generation", "evaluation", "diagnosis", "sources", "comparison"}
    | {"candidates"}
    | {"scoreboard", "quality_figures", "feature_training", "vaebm"}
    | {"nll_figures", "nll_words"}
    | {"latent_figures", "answers"}
    | {"group_samples", "group_figures", "group_findings", "group_witness"},
    4: {"pipeline", "report", "app"},
    5: {"cli", "__main__"},
}
RANK_OF = {part: rank for rank, parts in RANKS.items() for part in parts}

# Stricter than the ranks: what these may import of ours beside their own folder.
ONLY = {
    "figures": set(),
    "terminal": set(),
    "groups": set(),
    "numerics": {"tail"},
    "tail": set(),
    "storage": set(),
    "products": set(),
    "normal": set(),
    "walk": {"normal"},
    "samplers": set(),
    "data": {"numerics"},
    "priors": RANKS[0] | {"ratios"},
    "training": RANKS[0] | RANKS[1],
}
# Looser, and only within that function: recipes read the signatures of what they feed.
WITHIN = {("recipes", "known_keys", "diagnosis"), ("recipes", "known_keys", "vaebm")}
# `runs` writes the version into config.toml.
VERSION = {("runs", "__init__"), ("cli", "__init__"), ("report", "__init__")}


def allowed(part):
    if part in ONLY:
        return ONLY[part] | {part}
    rank = RANK_OF[part]
    below = set().union(*(RANKS[r] for r in range(rank)))
    return below | ({part} if rank == 1 else RANKS[rank])


def imports(file):
    """(function around it or "", part of ncprior) for each import of ours in a file."""
    relative = file.relative_to(SOURCE)
    package = ("ncprior", *relative.parts[:-1])

    def visit(node, function):
        if isinstance(node, ast.Import):
            yield from ((function, alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            path = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield function, [*path, alias.name]
        elif isinstance(node, ast.Call) and "import_module" in ast.dump(node.func):
            yield function, ["ncprior", "<dynamic>"]
        inner = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    for function, path in visit(ast.parse(file.read_text()), ""):
        if path[0] == "ncprior":
            part = path[1] if len(path) > 1 else "__init__"
            yield function, part if part in RANK_OF or part == "<dynamic>" else "__init__"


FILES = sorted(file for file in SOURCE.rglob("*.py") if file != SOURCE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_respect_the_ranks(file):
    part = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert part in RANK_OF, f"{part} has no rank yet; add it to the table here and in the design"
    for function, imported in imports(file):
        if (part, function, imported) in WITHIN or (part, imported) in VERSION:
            continue
        assert imported in allowed(part), f"{file} imports {imported} of ncprior"


def test_the_table_is_read():
    """The reader sees plain, relative, nested and lazy imports."""
    assert ("", "walk") in set(imports(SOURCE / "generation.py"))
    assert ("known_keys", "diagnosis") in set(imports(SOURCE / "recipes.py"))
    assert ("", "data") in set(imports(SOURCE / "data" / "load.py"))


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


@pytest.mark.parametrize("module", ["ncprior", "ncprior.cli"])
def test_import_is_light(module):
    """Torch and whatever else is slow to import come when they are used."""
    heavy = ("torch", "numpy", "sklearn", "lightning_fabric", "matplotlib", "huggingface_hub")
    found = run(f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])")
    assert found.stdout.strip() == "[]"


def test_public_names_change_no_global_state():
    code = """
import logging, warnings, torch, numpy
def state():
    return (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
            torch.initial_seed(), torch.get_rng_state().tolist(), torch.get_num_threads(),
            torch.get_float32_matmul_precision(), list(logging.getLogger().handlers),
            logging.getLogger().level, list(warnings.filters),
            numpy.random.get_state()[1].tolist())
before = state()
import ncprior
for name in ncprior.__all__:
    getattr(ncprior, name)
for old, new in zip(before, state()):
    assert old == new, (old, new)
"""
    run(code)


def test_unknown_public_name():
    import ncprior

    assert set(dir(ncprior)) == set(ncprior.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        ncprior.no_such_name  # noqa: B018
