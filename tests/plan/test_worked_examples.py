"""The README's worked examples: each command runs, and prints the lines that are shown of it.

`python -m tests.plan.test_worked_examples` puts the lines that are printed now in the place of those most like them.
"""

import contextlib
import difflib
import io
import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

import pytest

import hypershard.plan
from hypershard.cli.main import main

README = Path(hypershard.plan.__file__).parent / "README.md"
LEFT_OUT = "…"


def examples() -> list[list[tuple[str, list[str]]]]:
    """Of each block of the section: its commands, each with the lines shown of its output."""
    section = README.read_text().partition("\n## Worked examples\n")[2].partition("\n## ")[0]
    found = []
    for block in re.findall(r"^```console\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL):
        commands = []
        for text in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *lines = text.replace("\\\n", "").splitlines()
            commands.append((command, [line for line in lines if line not in ("", LEFT_OUT)]))
        found.append(commands)
    return found


def test_there_are_five() -> None:
    assert len(examples()) == 5
    shown = [lines for block in examples() for command, lines in block if command.startswith("hypershard")]
    assert len(shown) >= 12 and all(shown)


@pytest.mark.parametrize("block", examples(), ids=[f"system {number}" for number in range(1, 6)])
def test_the_commands_print_what_is_shown(
    block: list[tuple[str, list[str]]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))  # no calibrations of this machine's
    for command, shown in block:
        if not command.startswith("hypershard "):
            subprocess.run(["bash", "-ec", command], check=True, cwd=tmp_path)
            continue
        code = main(shlex.split(command)[1:])
        printed, complaint = capsys.readouterr()
        assert code in (0, 1), complaint  # 1: of --check, something does not hold
        missing = [line for line in shown if line not in printed.splitlines()]
        assert not missing, f"{command}\ndoes not print\n{chr(10).join(missing)}\nbut\n{printed}"


def rewrite() -> None:
    """Run every command and write the README anew, line for line."""
    text = README.read_text()
    for block in re.findall(r"^```console\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        renewed = block
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *lines = part.replace("\\\n", "").splitlines()
            printed = _printed(command)
            for line in lines:
                alike = [one for one in printed if one[:12].strip() == line[:12].strip()] or printed
                if line not in ("", LEFT_OUT, *printed) and (near := difflib.get_close_matches(line, alike, 1, 0.3)):
                    renewed = renewed.replace(f"\n{line}\n", f"\n{near[0]}\n", 1)
        text = text.replace(block, renewed)
    README.write_text(text)


def _printed(command: str) -> list[str]:
    if not command.startswith("hypershard "):
        subprocess.run(["bash", "-ec", command], check=True)
        return []
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(shlex.split(command)[1:])
    return out.getvalue().splitlines()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.environ["XDG_CONFIG_HOME"] = folder
        rewrite()
