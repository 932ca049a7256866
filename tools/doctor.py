#!/usr/bin/env python
"""Report what this environment has and print the exact line that repairs each thing that is missing.

Usage: python tools/doctor.py [--toolkit d2|mm|all]

The exit code is 1 when something that the chosen toolkit requires is missing, else 0. Needs the standard
library alone, so that it runs where nothing else does.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parents[1]
TOOLKITS = ("d2", "mm")
PIP = f"{sys.executable} -m pip install"
DETECTRON2_FROM_SOURCE = (
    f"{PIP} --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
)
DEFORMABLE_OPERATOR = (
    f"{PIP} setuptools wheel ninja packaging && {PIP} --no-build-isolation torch-ms-deform-attn==0.1.1"
)
DETECTRON2_INSTALLER = f"{sys.executable} {REPOSITORY / 'tools' / 'install_detectron2.py'}"
# Import names that differ from what pip calls the package.
DISTRIBUTIONS = {
    "PIL": "Pillow",
    "cv2": "opencv-python",
    "hydra": "hydra-core",
    "panopticapi": "panopticapi-lite",
    "yaml": "PyYAML",
}
COCO_ARCHIVES = ("zips/train2017", "zips/val2017", "annotations/annotations_trainval2017")
# Folders that detectron2's built-in data sets look for, and a line that makes them ({root} is filled in).
DATA_SETS: dict[str, tuple[tuple[str, ...], str]] = {
    "ADEChallengeData2016": (
        (
            *("images/training", "images/validation"),
            *("annotations_detectron2/training", "annotations_detectron2/validation"),
        ),
        "curl -LO http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
        " && unzip -n ADEChallengeData2016.zip -d {root}"
        " && python tools/prepare_data.py ade20k --out {root}/ADEChallengeData2016",
    ),
    "cityscapes": (
        ("leftImg8bit/train", "leftImg8bit/val", "gtFine/train", "gtFine/val"),
        f"{PIP} cityscapesScripts && csDownload -d {{root}}/cityscapes leftImg8bit_trainvaltest.zip"
        " gtFine_trainvaltest.zip && (cd {root}/cityscapes && unzip -n '*.zip')",
    ),
    "coco": (
        ("annotations", "train2017", "val2017"),
        f"mkdir -p {{root}}/coco && cd {{root}}/coco && for f in {' '.join(COCO_ARCHIVES)};"
        " do curl -LO http://images.cocodataset.org/$f.zip; done && unzip -n '*.zip'",
    ),
}


class Probe:
    """What the checks ask of the environment; tests put a simulated one in its place."""

    python: tuple[int, ...] = tuple(sys.version_info[:3])
    environ: dict[str, str] = dict(os.environ)

    def load(self, name: str) -> ModuleType:
        """Import a module; whatever goes wrong inside a broken package counts as ImportError."""
        try:
            return importlib.import_module(name)
        except ImportError:
            raise
        except Exception as error:
            raise ImportError(f"{type(error).__name__}: {error}", name=None) from error

    def version(self, distribution: str) -> str | None:
        """Version of an installed distribution, None when there is none."""
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``repair`` is empty when nothing needs to be done."""

    name: str
    detail: str
    repair: str = ""
    required_by: tuple[str, ...] = ()

    def blocks(self, toolkits: Iterable[str]) -> bool:
        return bool(self.repair) and any(toolkit in self.required_by for toolkit in toolkits)


def install_line(module: str) -> str:
    """The line that installs the package of a module."""
    # panopticapi-lite asks for numpy < 2 without need and would take numpy and OpenCV back by years.
    options = "--no-deps " if module == "panopticapi" else ""
    return f"{PIP} {options}{DISTRIBUTIONS.get(module, module)}"


def check_python(probe: Probe) -> Finding:
    found = ".".join(map(str, probe.python))
    repair = "" if probe.python >= (3, 10) else "make clean && make setup PYTHON=python3.11"
    return Finding("Python", found if not repair else f"{found}, needs 3.10 or newer", repair, TOOLKITS)


def check_package(
    probe: Probe,
    module: str,
    install: str,
    required_by: tuple[str, ...] = TOOLKITS,
    *,
    distribution: str = "",
    imports: str = "",
) -> Finding:
    """A package is sound when it imports; one that is there and fails is told apart from an absent one.

    Args:
        install: the line that installs an absent package.
        distribution: its name for pip, where that is not the module's.
        imports: the submodule to import, where the package itself imports too little to prove anything.
    """
    distribution = distribution or module
    try:
        probe.load(imports or module)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == module
        detail = "not installed" if absent else f"does not import: {_one_line(error)}"
        return Finding(
            module, detail, install if absent else _repair(error, module, distribution), required_by
        )
    version = probe.version(distribution) or getattr(probe.load(module), "__version__", "unknown version")
    return Finding(module, str(version), "", required_by)


def _repair(error: ImportError, module: str, distribution: str) -> str:
    """A broken package most often lacks another one, which the error names; else it is installed anew."""
    wanted = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and wanted and wanted != module:
        return install_line(wanted)
    if module == "detectron2":
        return f"{sys.executable} -m pip uninstall -y detectron2 && {DETECTRON2_INSTALLER}"
    return f"{PIP} --force-reinstall --no-deps --no-build-isolation {distribution}"


def check_torch(probe: Probe) -> Finding:
    pinned = REPOSITORY / "requirements" / "torch.txt"
    repair = f"{PIP} -r {pinned}" if pinned.is_file() else f"{PIP} 'torch>=2.4' torchvision"
    finding = check_package(probe, "torch", repair)
    if finding.repair:
        return finding
    # A feature of 2.4 and later, so that development builds with odd version strings pass too.
    if not hasattr(probe.load("torch").library, "custom_op"):
        return Finding("torch", f"{finding.detail}, needs 2.4 or newer", repair, TOOLKITS)
    return finding


def check_cuda(probe: Probe) -> Finding:
    try:
        cuda = probe.load("torch").cuda
    except ImportError:
        return Finding("CUDA", "unknown, since torch does not import")
    if not cuda.is_available():
        return Finding("CUDA", "no GPU is visible; everything runs on the CPU (MODEL.DEVICE cpu)")
    names = ", ".join(cuda.get_device_name(index) for index in range(cuda.device_count()))
    return Finding("CUDA", names)


def check_detectron2(probe: Probe) -> list[Finding]:
    """The package and, apart from it, its compiled operators, which no model of this project needs."""
    finding = check_package(probe, "detectron2", DETECTRON2_INSTALLER, ("d2",), imports="detectron2.engine")
    if finding.repair:
        return [finding]
    try:
        # A Python-only installation may have a stand-in of that name: ask for an operator.
        compiled = hasattr(probe.load("detectron2._C"), "deform_conv_forward")
    except ImportError:
        compiled = False
    if compiled:
        return [finding, Finding("detectron2 operators", "compiled")]
    rebuild = f"{sys.executable} -m pip uninstall -y detectron2 && {DETECTRON2_FROM_SOURCE}"
    absent = "not compiled; only deformable convolution, rotated boxes and the fast COCO evaluation use them"
    return [finding, Finding("detectron2 operators", absent, rebuild)]


def check_deformable_attention(probe: Probe) -> Finding:
    package = "torch-ms-deform-attn"
    finding = check_package(probe, "torch_ms_deform_attn", DEFORMABLE_OPERATOR, (), distribution=package)
    name = "deformable attention"
    if not finding.repair:
        return Finding(name, f"operator of {package} {finding.detail}")
    cost = "the PyTorch version runs instead, slower on a GPU and about 2 times slower on the CPU"
    return Finding(name, f"operator {finding.detail}; {cost}", finding.repair)


def check_mmcv(probe: Probe) -> list[Finding]:
    """mmengine, mmcv and mmseg exist as originals and as forks, which share import names and never mix."""
    originals = {"mmengine": "mmengine", "mmcv": "mmcv", "mmseg": "mmsegmentation"}
    has_originals = any(probe.version(name) for name in originals.values())
    line, prefix = ("original", "") if has_originals else ("fork", "onedl-")
    install = f"{PIP} {' '.join(prefix + name for name in originals.values())}"
    findings = []
    for module, original in originals.items():
        finding = check_package(probe, module, install, ("mm",), distribution=prefix + original)
        if finding.repair:
            findings.append(finding)
            continue
        findings.append(Finding(module, f"{finding.detail} ({line})", "", ("mm",)))
        if module == "mmcv":
            findings.append(_check_mmcv_operators(probe))
    return findings


def _check_mmcv_operators(probe: Probe) -> Finding:
    try:
        probe.load("mmcv._ext")
    except ImportError:
        return Finding("mmcv operators", "not compiled; no model of this project uses them")
    return Finding("mmcv operators", "compiled")


def check_data(probe: Probe) -> list[Finding]:
    """Folders of the public data sets below $DETECTRON2_DATASETS, by default ./datasets."""
    root = Path(probe.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    findings = []
    for name, (folders, repair) in DATA_SETS.items():
        missing = [folder for folder in folders if not (root / name / folder).is_dir()]
        if not missing:
            findings.append(Finding(f"data {name}", f"in {root / name}"))
        elif len(missing) == len(folders):
            findings.append(Finding(f"data {name}", f"not in {root}", repair.format(root=root)))
        else:
            detail = f"{root / name} lacks {', '.join(missing)}"
            findings.append(Finding(f"data {name}", detail, repair.format(root=root)))
    return findings


def examine(probe: Probe) -> list[Finding]:
    """All findings, in the order of the report."""
    findings = [check_python(probe), check_torch(probe), check_cuda(probe)]
    findings += [
        check_package(probe, module, install_line(module)) for module in ("torchvision", "timm", "numpy")
    ]
    findings.append(check_package(probe, "jepa_plugins", f"{PIP} -e {REPOSITORY}"))
    findings += check_detectron2(probe)
    for module in ("scipy", "pycocotools", "panopticapi", "cv2"):
        required_by = () if module == "cv2" else ("d2",)
        name = DISTRIBUTIONS.get(module, module)
        findings.append(check_package(probe, module, install_line(module), required_by, distribution=name))
    findings.append(check_deformable_attention(probe))
    return findings + check_mmcv(probe) + check_data(probe)


def report(findings: list[Finding], toolkits: Iterable[str], write: Callable[[str], object] = print) -> bool:
    """Write the findings; returns whether everything that the toolkits require is there."""
    toolkits = tuple(toolkits)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        state = "MISSING" if finding.blocks(toolkits) else "optional" if finding.repair else "ok"
        write(f"{state:8}  {finding.name:{width}}  {finding.detail}")
        if finding.repair:
            write(f"{'':8}  {'':{width}}  repair: {finding.repair}")
    blocking = [finding.name for finding in findings if finding.blocks(toolkits)]
    chosen = " and ".join(toolkits)
    write(f"Missing for {chosen}: {', '.join(blocking)}." if blocking else f"Ready for {chosen}.")
    return not blocking


def _one_line(error: BaseException, limit: int = 200) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Report what is installed and how to repair what is missing."
    )
    parser.add_argument("--toolkit", choices=[*TOOLKITS, "all"], default="d2", help="what must be complete")
    toolkit = parser.parse_args(arguments).toolkit
    sound = report(examine(Probe()), TOOLKITS if toolkit == "all" else (toolkit,))
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
