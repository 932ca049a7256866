"""Ours beside the published Mask2Former itself, as PyPI has it, with a stub for its compiled operator.

Registries are global, so each order of imports has a process of its own.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("detectron2")
pytest.importorskip("pycocotools")

HERE = Path(__file__).parent / "published"
REQUIREMENT = (
    "maskformer2==0.1 --hash=sha256:d934e3378e86cc326129eeda18ca1097cf32d9c248dc8e957a14899d9241602a\n"
)
AFTER_OURS = ["names", "keys", "pretraining"]
AFTER_THEIRS = [
    "names",
    "keys",
    "pretraining",
    "training",
    "mixed_precision",
    "memory",
    "checkpoints",
    "old_checkpoints",
    "exports",
    "relatives",
]


def install(folder: Path) -> None:
    """Put the published Python files into `folder`, whole or not at all; skips without an index."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        requirement, target = Path(scratch, "requirement.txt"), Path(scratch, "site")
        requirement.write_text(REQUIREMENT)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        pip += ["--no-build-isolation", "--retries", "0", "--timeout", "20", "--target", str(target)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # it would compile for a GPU
        done = subprocess.run(
            [*pip, "--requirement", str(requirement)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=180,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            pytest.skip(f"the published Mask2Former could not be installed from an index: {reason}")
        shutil.rmtree(target / "mask2former_video", ignore_errors=True)
        os.replace(target, folder)


@pytest.fixture(scope="session")
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the package `mask2former`, kept in pytest's cache from run to run."""
    cache = getattr(request.config, "cache", None)
    folder = (cache.mkdir if cache else tmp_path_factory.mktemp)("published") / "maskformer2-0.1"
    if not (folder / "mask2former").is_dir():
        install(folder)
    return folder


@pytest.fixture(scope="session")
def results(published: Path):
    """Results of the checks by what was imported first; each process runs once."""
    known: dict[str, dict[str, str]] = {}

    def of(first: str) -> dict[str, str]:
        if first not in known:
            path = os.pathsep.join(map(str, (HERE, published)))
            names = AFTER_OURS if first == "ours" else AFTER_THEIRS
            done = subprocess.run(
                [sys.executable, "-W", "ignore", str(HERE / "checks.py"), first, *names],
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
            assert done.returncode == 0, done.stderr
            known[first] = json.loads(done.stdout.splitlines()[-1])
        return known[first]

    return of


@pytest.mark.parametrize(
    ("first", "name"), [("theirs", n) for n in AFTER_THEIRS] + [("ours", n) for n in AFTER_OURS]
)
def test_beside_the_published_package(results, first, name) -> None:
    found = results(first)[name]
    assert not found, found
