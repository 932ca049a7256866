"""An installed copy, used from another folder, finds every config that the clone has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jepa_plugins.config_files import (
    SUFFIXES,
    config_root,
    default_work_dir,
    find_config,
    list_configs,
)

COPIED = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "jepa_plugins", "configs")


@pytest.fixture(scope="module")
def clone(tmp_path_factory, repository: Path) -> Path:
    """A copy of what is packaged, with one more chain of configs: building leaves files behind."""
    folder = tmp_path_factory.mktemp("clone")
    for name in COPIED:
        source = repository / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy(source, folder / name)
    chain = folder / "configs" / "chain" / "deeper"
    chain.mkdir(parents=True)
    (folder / "configs" / "chain" / "Base.yaml").write_text("VERSION: 2\n")
    (chain / "leaf.yaml").write_text("_BASE_: ../Base.yaml\n")
    (chain / "lazy.py").write_text("model = None\n")
    return folder


@pytest.fixture(scope="module")
def installed(clone: Path, tmp_path_factory) -> Path:
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--target", str(site), str(clone)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return site


def ask(site: Path, folder: Path, expression: str) -> object:
    """Evaluate an expression over the installed copy, in a new process that runs elsewhere."""
    script = f"import json; from jepa_plugins.config_files import *; print(json.dumps({expression}))"
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return json.loads(subprocess.check_output(command, cwd=folder, env=environment, text=True))


def test_every_config_is_found_from_another_folder(clone: Path, installed: Path, tmp_path: Path) -> None:
    files = [path for path in (clone / "configs").rglob("*") if path.is_file()]
    expected = sorted(
        path.relative_to(clone / "configs").as_posix() for path in files if path.suffix in SUFFIXES
    )
    found = ask(installed, tmp_path, "{name: find_config('configs/' + name) for name in list_configs()}")
    assert sorted(found) == expected and len(expected) >= 3
    for name, path in found.items():
        assert path.startswith(str(installed))
        assert Path(path).read_bytes() == (clone / "configs" / name).read_bytes()


def test_relative_bases_stay_intact(installed: Path, tmp_path: Path) -> None:
    leaf = Path(ask(installed, tmp_path, "find_config('chain/deeper/leaf.yaml')"))
    assert (leaf.parent / "../Base.yaml").read_text() == "VERSION: 2\n"


def test_version_is_the_packages_own(installed: Path) -> None:
    from jepa_plugins import __version__

    assert (installed / f"jepa_plugins-{__version__}.dist-info").is_dir()
    assert (installed / "jepa_plugins" / "core" / "__init__.py").is_file()
    assert not (installed / "tests").exists() and not (installed / "configs").exists()


def test_names_resolve_with_and_without_the_leading_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_root().name == "configs"
    name = list_configs()[0]
    assert find_config(name) == find_config(f"configs/{name}") == str(config_root() / name)
    own = tmp_path / "own.yaml"
    own.write_text("VERSION: 2\n")
    assert find_config(own) == str(own)


def test_a_work_folder_is_named_like_its_config(tmp_path: Path, monkeypatch) -> None:
    name = next(name for name in list_configs() if name.count("/") > 2)
    want = str(Path("work_dirs", *Path(name).with_suffix("").parts[1:]))
    assert default_work_dir(name) == default_work_dir(config_root() / name) == want
    monkeypatch.chdir(config_root().parent)
    assert default_work_dir(f"configs/{name}") == default_work_dir(f"./configs/{name}") == want
    own = tmp_path / "folder" / "own.yaml"
    own.parent.mkdir()
    own.write_text("VERSION: 2\n")
    assert default_work_dir(own) == str(Path("work_dirs", "own"))


def test_a_missing_config_is_named_with_close_matches() -> None:
    name = list_configs()[0]
    with pytest.raises(FileNotFoundError) as caught:
        find_config(name.replace(".", "x.", 1))
    message = str(caught.value)
    assert name.replace(".", "x.", 1) in message and name in message and "\n" not in message
    with pytest.raises(FileNotFoundError, match="close matches: .*" + name.split("/")[-1]):
        find_config("elsewhere/" + name.split("/")[-1])
    with pytest.raises(FileNotFoundError, match="list_configs"):
        find_config("###")


@pytest.mark.parametrize("name", [".", "", "configs", "/"])
def test_a_folder_is_no_config(name: str) -> None:
    with pytest.raises(FileNotFoundError):
        find_config(name)
