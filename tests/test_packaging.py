"""The wheel: what is in it, and that it works where there is no clone."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from helpers.pictures import write_images

from vpns_hf.version import __version__

CLONE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what a build reads, so that nothing is left in the clone."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CLONE / name, folder)
    shutil.copytree(CLONE / "vpns_hf", folder / "vpns_hf", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    built = subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = (folder / "dist").glob("*.whl")
    return path


def test_the_wheel_holds_every_file_of_the_package(wheel):
    ours = {
        str(path.relative_to(CLONE))
        for path in (CLONE / "vpns_hf").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == ours
    assert {"vpns_hf/py.typed", "vpns_hf/card_templates/template.md", "vpns_hf/cli/__main__.py"} <= packed


def test_a_plain_install_brings_all_that_the_commands_need():
    """No command asks for an extra, but for channels, ONNX exports, runtimes of a benchmark, DeepSpeed and the app."""
    project = tomllib.loads((CLONE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {"benchmark", "channels", "deepspeed", "docs", "onnx", "quality", "space", "test", "test-recipes"}
    assert set(project["optional-dependencies"]) == extras
    names = {requirement.partition(">")[0] for requirement in project["dependencies"]}
    assert {"datasets", "evaluate", "jinja2", "matplotlib", "rich", "scikit-learn", "scipy", "timm"} <= names


@pytest.mark.slow
def test_the_wheel_works_in_a_fresh_environment(wheel, task):
    folder = task / "elsewhere"
    folder.mkdir()
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv/bin/python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = [python, "-m", "pip", "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True, env=environment)
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    # The dependencies are those of this interpreter, so that nothing is downloaded; the package is that of the wheel.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    def run(*command):
        command = [python.with_name(command[0]), *command[1:]]
        ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert "prune" in run("vpns-hf", "--help")
    every_module = """
import pkgutil, vpns_hf
names = [module.name for module in pkgutil.walk_packages(vpns_hf.__path__, "vpns_hf.")]
for name in names:
    __import__(name)
print(vpns_hf.__file__, len(names))
"""
    place, count = run("python", "-c", every_module).split()
    assert Path(place).is_relative_to(site)
    sources = list((CLONE / "vpns_hf").rglob("*.py"))
    assert int(count) == len(sources) - 1  # all but that of vpns_hf itself

    write_images(folder / "pictures", 30)
    arguments = ("--model_name_or_path", task / "backbone", "--dataset_name", folder / "pictures")
    steps = ("--max_steps", "5", "--head_warm_up_epochs", "0")
    options = ("--new_head", "true", "--prompt_size", "4", "--references", "none", "--use_cpu", "--report_to", "none")
    run("vpns-hf", "prune", *map(str, (*arguments, *steps, *options, "--output_dir", "out", "--sparsity", "0.8")))
    stages = json.loads((folder / "out/stages.json").read_text())["finished"]
    assert [(stage["name"], stage["steps"]) for stage in stages] == [("warm_up", 0), ("joint", 5)]
    assert {"README.md", "model.safetensors", "recipe.yaml", "figures"} <= set(os.listdir(folder / "out"))
    assert json.loads(run("vpns-hf", "inspect", "out", "--json"))["state"] == "frozen"


def test_one_version_everywhere():
    citation = yaml.safe_load((CLONE / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["preferred-citation"]["title"].startswith("Visual Prompting Upgrades Neural Network")
    assert f"version = {{{__version__}}}" in (CLONE / "README.md").read_text(encoding="utf-8")
    assert f"## [{__version__}]" in (CLONE / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((CLONE / ".github/workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflows_may_do_little_and_run_what_is_pinned(path):
    """Only the job that publishes may ask for an identity, and it runs no code of the repository."""
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] in ({}, {"contents": "read"})
    for name, job in workflow["jobs"].items():
        permissions = job.get("permissions", {"contents": "read"})
        assert permissions == ({"id-token": "write"} if name == "publish" else {"contents": "read"})
        assert name != "publish" or not any("run" in step for step in job["steps"])
    actions = re.findall(r"uses: (\S+)", text)
    assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) for action in actions)
    assert not re.search(r"run: .*\$\{\{", text)  # a name of a branch or tag must not become a command
