#!/usr/bin/env python
"""Install detectron2's Python part where its source repository cannot be reached.

detectron2 has no release on PyPI; users build it from its repository (INSTALL_FROM_SOURCE below). The source
distribution ``pb1-detectron2==0.6`` holds the Python files of the official tag v0.6 and no C++ files. This
script downloads it with pip, checks its hash, makes it work with current torch, numpy, Pillow and setuptools,
and installs it as an ordinary wheel: ``pip list`` shows ``detectron2 0.6`` and ``pip uninstall detectron2``
removes it. A detectron2 that is already there is left alone.

The four changes, all in CHANGES and COMPILED_MODULE below:
  1. ``Image.LINEAR``, gone from Pillow, becomes ``Image.BILINEAR``;
  2. ``np.bool``, ``np.int``, ``np.float``, ``np.object`` and ``np.str`` become the builtins they were;
  3. ``detectron2._C``, the compiled module, exists; using an operator raises a sentence that says what is
     missing, and COCO evaluation takes pycocotools instead of its compiled version;
  4. ``pkg_resources``, gone from setuptools, becomes ``importlib.resources``.

Usage: python tools/install_detectron2.py [--archive pb1-detectron2-0.6.tar.gz]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

REQUIREMENT = "pb1-detectron2==0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
INSTALL_FROM_SOURCE = (
    "python -m pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
)
DEPENDENCIES = [
    "Pillow>=7.1",
    "black",
    "cloudpickle",
    "fvcore>=0.1.5,<0.1.6",
    "hydra-core>=1.1",
    "iopath>=0.1.7",
    "matplotlib",
    "omegaconf>=2.1",
    "pycocotools>=2.0.2",
    "pydot",
    "tabulate",
    "tensorboard",
    "termcolor>=1.1",
    "tqdm>4.29.0",
    "yacs>=0.1.8",
]
PROJECTS = {
    "point_rend": "projects/PointRend/point_rend",
    "deeplab": "projects/DeepLab/deeplab",
    "panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
}


class Change(NamedTuple):
    """Replace every match of ``pattern`` in ``file``; a file without a match is an error."""

    file: str
    pattern: str
    replacement: str


NUMPY_ALIAS = r"\bnp\.(bool|int|float|object|str)\b"
FILES_WITH_NUMPY_ALIASES = [
    "detectron2/data/build.py",
    "detectron2/data/datasets/pascal_voc.py",
    "detectron2/evaluation/pascal_voc_evaluation.py",
    "detectron2/evaluation/sem_seg_evaluation.py",
    "detectron2/structures/masks.py",
    "detectron2/utils/video_visualizer.py",
    "detectron2/utils/visualizer.py",
]
CHANGES = [
    Change("detectron2/data/transforms/transform.py", r"\bImage\.LINEAR\b", "Image.BILINEAR"),
    *(Change(file, NUMPY_ALIAS, r"\1") for file in FILES_WITH_NUMPY_ALIASES),
    Change(
        "detectron2/evaluation/fast_eval_api.py",
        r"(?m)^from detectron2 import _C\n",
        "from detectron2 import _C\n\n"
        'if not hasattr(_C, "COCOevalEvaluateImages"):\n'
        '    raise ImportError("The fast COCO evaluation needs the compiled operators of detectron2")\n',
    ),
    Change(
        "detectron2/evaluation/coco_evaluation.py",
        r"(?m)^from detectron2\.evaluation\.fast_eval_api import COCOeval_opt\n",
        "try:\n    from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
        "except ImportError:\n    COCOeval_opt = COCOeval\n",
    ),
    Change(
        "detectron2/model_zoo/model_zoo.py", r"(?m)^import pkg_resources\n", "import importlib.resources\n"
    ),
    Change(
        "detectron2/model_zoo/model_zoo.py",
        r'pkg_resources\.resource_filename\(\s*"detectron2\.model_zoo",\s*'
        r'os\.path\.join\("configs", config_path\)\s*\)',
        'str(importlib.resources.files("detectron2.model_zoo") / "configs" / config_path)',
    ),
]
COMPILED_MODULE = f'''"""Stands in for detectron2's compiled operators, which this installation lacks."""

_ABSENT = "none: installed without compiled operators"


def get_compiler_version():
    return _ABSENT


def get_cuda_version():
    return _ABSENT


def has_cuda():
    return False


def __getattr__(name):
    raise AttributeError(
        f"detectron2._C.{{name}} is missing, because this detectron2 was installed without its compiled "
        "operators (deformable convolution, rotated boxes, fast COCO evaluation); to have them, uninstall it "
        "and build it with a C++ compiler: {INSTALL_FROM_SOURCE}"
    )
'''
SETUP_FILE = f"""from pathlib import Path

from setuptools import find_packages, setup

zoo = Path("detectron2/model_zoo")
setup(
    name="detectron2",
    version="0.6",
    description="detectron2 v0.6, Python files only, adapted to current torch, numpy and Pillow",
    url="https://github.com/facebookresearch/detectron2",
    license="Apache-2.0",
    packages=find_packages(include=["detectron2", "detectron2.*"]),
    package_data={{
        "detectron2.model_zoo": [str(p.relative_to(zoo)) for p in zoo.glob("configs/**/*") if p.is_file()]
    }},
    python_requires=">=3.7",
    install_requires={DEPENDENCIES!r},
)
"""


class InstallError(Exception):
    """One sentence that says what is wrong and what to do."""


def pip(*arguments: str, path: Path | None = None) -> None:
    """Run this interpreter's pip, or the one in ``path``; its own output appears only when it fails."""
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    environment = {**os.environ, "PYTHONPATH": str(path)} if path else None
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        sys.stderr.write(result.stdout + result.stderr)
        raise InstallError(f"pip {arguments[0]} failed (its output is above): {' '.join(arguments)}")


def check_prerequisites() -> None:
    """The archive's own setup.py imports torch and setuptools while pip reads its metadata."""
    missing = [name for name in ("torch", "setuptools", "wheel") if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise InstallError(
            f"{names} must be installed before detectron2: {sys.executable} -m pip install {names}"
        )


def download(folder: Path) -> Path:
    """Fetch the source distribution; pip compares the hash before it runs anything out of it."""
    hashed = folder / "requirement.txt"
    hashed.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    # Current pip refuses the archive for an optional dependency that names a repository. An older pip, put
    # into the temporary folder alone, downloads it from wherever the user's pip is set up to look.
    older = folder / "pip"
    pip("install", "--no-cache-dir", "--target", str(older), "pip<26")
    target = folder / "download"
    options = ["--no-cache-dir", "--no-deps", "--dest", str(target), "--requirement", str(hashed)]
    # The archive's metadata can be read only where torch is: hence no build isolation.
    pip("download", "--no-build-isolation", *options, path=older)
    return next(target.iterdir())


def check_hash(archive: Path) -> None:
    if not archive.is_file():
        raise InstallError(f"{archive} does not exist: pass the downloaded archive of {REQUIREMENT}")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise InstallError(
            f"{archive} is not {REQUIREMENT} (its sha256 is {found}, not {SHA256}): download it again"
        )


def apply_changes(source: Path) -> None:
    """Edit the unpacked source in place; raises when a file does not look as expected."""
    for change in CHANGES:
        file = source / change.file
        text, count = re.subn(change.pattern, change.replacement, file.read_text() if file.is_file() else "")
        if not count:
            raise InstallError(
                f"{change.file} of {REQUIREMENT} does not look as expected: no {change.pattern!r}"
            )
        file.write_text(text)
    for file in sorted((source / "detectron2").rglob("*.py")):
        if re.search(NUMPY_ALIAS, file.read_text()):
            raise InstallError(
                f"{file.relative_to(source)} of {REQUIREMENT} does not look as expected: old alias"
            )
    (source / "detectron2" / "_C.py").write_text(COMPILED_MODULE)


def arrange(source: Path) -> None:
    """Move the projects to where ``detectron2.projects.*`` finds them and write the new setup.py."""
    for name, folder in PROJECTS.items():
        if not (source / folder / "__init__.py").is_file():
            raise InstallError(f"{folder} of {REQUIREMENT} does not look as expected: no __init__.py")
        shutil.move(source / folder, source / "detectron2" / "projects" / name)
    (source / "setup.py").write_text(SETUP_FILE)


def build_wheel(source: Path, folder: Path) -> Path:
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    return next(folder.glob("detectron2-0.6-*.whl"))


def install(archive: Path | None) -> None:
    check_prerequisites()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if archive is None:
            print(f"Downloading {REQUIREMENT} ...", flush=True)
            archive = download(folder)
        check_hash(archive)
        shutil.unpack_archive(str(archive), folder / "unpacked")
        source = next((folder / "unpacked").iterdir())
        apply_changes(source)
        arrange(source)
        print("Building and installing detectron2 0.6 without compiled operators ...", flush=True)
        wheel = build_wheel(source, folder / "wheel")
        pip("install", *DEPENDENCIES)
        # Found by name in a folder, so that `pip freeze` says detectron2==0.6 and not a path that is gone.
        pip("install", "--no-deps", "--no-index", "--find-links", str(wheel.parent), "detectron2==0.6")


def installed_detectron2() -> str | None:
    """Folder of the detectron2 that Python would import; a bare folder of that name does not count."""
    spec = importlib.util.find_spec("detectron2")
    return str(Path(spec.origin).parent) if spec and spec.origin else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--archive", type=Path, help=f"archive of {REQUIREMENT} on disk, instead of a download"
    )
    options = parser.parse_args(arguments)
    existing = installed_detectron2()
    if existing:
        print(f"detectron2 is already installed in {existing}; left as it is.")
        return 0
    try:
        install(options.archive)
    except InstallError as error:
        print(f"detectron2 was not installed: {error}.", file=sys.stderr)
        return 1
    print("Installed detectron2 0.6 without compiled operators.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
