"""The README's Python runs as printed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {"__name__": "readme"})


def test_commands_exist():
    """Each `ncprior ...` in the README names a command and options that exist."""
    from typer.main import get_command

    from ncprior.cli import app

    commands = get_command(app).commands
    text = "\n".join(
        re.findall(r"```(?:bash|console)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    )
    found = re.findall(r"^\s*(?:\$ )?ncprior (\w+)(.*)$", text, flags=re.MULTILINE)
    assert found
    for name, rest in found:
        options = {option for parameter in commands[name].params for option in parameter.opts}
        for option in re.findall(r"(--[\w-]+)", rest.split("#")[0]):
            assert option in options | {"--help"}, f"ncprior {name} {option}"
