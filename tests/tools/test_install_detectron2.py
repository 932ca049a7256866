"""tools/install_detectron2.py: its four changes on small stand-ins, and what an installation does."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import install_detectron2 as installer
import pytest
import torch

BEFORE = {
    "detectron2/__init__.py": '__version__ = "0.6"\n',
    "detectron2/projects/__init__.py": "",
    "detectron2/data/transforms/transform.py": "interp = Image.LINEAR\nother = Image.NEAREST\n",
    "detectron2/data/build.py": "a = np.zeros((3,), dtype=np.int)\nb = np.int32, np.floating\n",
    "detectron2/data/datasets/pascal_voc.py": "ids = np.loadtxt(f, dtype=np.str)\n",
    "detectron2/evaluation/pascal_voc_evaluation.py": "x = y.astype(np.bool)\n",
    "detectron2/evaluation/sem_seg_evaluation.py": "x = np.array(o, dtype=np.int)\ny = z.astype(np.float)\n",
    "detectron2/structures/masks.py": "x = y.astype(np.bool)\n",
    "detectron2/utils/video_visualizer.py": "x = np.zeros((1,), dtype=np.bool)\n",
    "detectron2/utils/visualizer.py": "x = y.astype(np.bool)\n",
    "detectron2/evaluation/fast_eval_api.py": "from detectron2 import _C\n\nFAST = True\n",
    "detectron2/evaluation/coco_evaluation.py": (
        "COCOeval = object\nfrom detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
    ),
    "detectron2/evaluation/__init__.py": "",
    "detectron2/model_zoo/__init__.py": "",
    "detectron2/model_zoo/model_zoo.py": (
        "import os\nimport pkg_resources\n\n\ndef get_config_file(config_path):\n"
        "    cfg_file = pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", config_path)\n    )\n    return cfg_file\n'
    ),
    "detectron2/model_zoo/configs/quick/base.yaml": "VERSION: 2\n",
    **{f"{folder}/__init__.py": f"NAME = '{name}'\n" for name, folder in installer.PROJECTS.items()},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small tree with the lines that the installer looks for."""
    root = tmp_path / "pb1-detectron2-0.6"
    for name, text in BEFORE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_changes_replace_what_they_name_and_nothing_else(source: Path) -> None:
    installer.apply_changes(source)
    package = source / "detectron2"
    assert (
        package / "data/transforms/transform.py"
    ).read_text() == "interp = Image.BILINEAR\nother = Image.NEAREST\n"
    assert (
        package / "data/build.py"
    ).read_text() == "a = np.zeros((3,), dtype=int)\nb = np.int32, np.floating\n"
    assert (package / "evaluation/sem_seg_evaluation.py").read_text().count("np.") == 1
    zoo = (package / "model_zoo/model_zoo.py").read_text()
    assert "pkg_resources" not in zoo and "importlib.resources" in zoo


@pytest.mark.parametrize("file", sorted({change.file for change in installer.CHANGES}))
def test_a_file_that_does_not_look_as_expected_is_named(source: Path, file: str) -> None:
    (source / file).write_text("nothing = 1\n")
    with pytest.raises(installer.InstallError, match=file.replace(".", r"\.")):
        installer.apply_changes(source)


def test_an_alias_in_another_file_is_named(source: Path) -> None:
    (source / "detectron2" / "extra.py").write_text("x = np.object\n")
    with pytest.raises(installer.InstallError, match=r"detectron2/extra\.py"):
        installer.apply_changes(source)


def test_a_wrong_archive_is_refused_by_hash(tmp_path: Path) -> None:
    archive = tmp_path / "pb1-detectron2-0.6.tar.gz"
    archive.write_bytes(b"something else")
    with pytest.raises(installer.InstallError, match="sha256"):
        installer.check_hash(archive)
    with pytest.raises(installer.InstallError, match="does not exist"):
        installer.check_hash(tmp_path / "absent.tar.gz")


def test_failure_is_one_sentence_and_exit_code_1(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(installer, "installed_detectron2", lambda: None)
    assert installer.main(["--archive", str(tmp_path / "absent.tar.gz")]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "absent.tar.gz does not exist" in message


def test_missing_torch_is_named_with_its_remedy(monkeypatch) -> None:
    monkeypatch.setattr(
        installer.importlib.util, "find_spec", lambda name: None if name == "torch" else object()
    )
    with pytest.raises(installer.InstallError, match="pip install torch$"):
        installer.check_prerequisites()


def test_an_existing_detectron2_is_left_alone(tmp_path: Path) -> None:
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text("")
    script = Path(installer.__file__)
    result = subprocess.run(
        [sys.executable, str(script)], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert result.returncode == 0
    assert f"already installed in {package}" in result.stdout


def test_the_result_is_an_ordinary_wheel(source: Path, tmp_path: Path) -> None:
    """Built and installed for real, into a folder of its own; what it then does is asked in a new process."""
    installer.apply_changes(source)
    installer.arrange(source)
    wheel = installer.build_wheel(source, tmp_path / "wheel")
    target = tmp_path / "site"
    installer.pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    assert "Name: detectron2\n" in (target / "detectron2-0.6.dist-info" / "METADATA").read_text()
    assert "detectron2/_C.py" in (target / "detectron2-0.6.dist-info" / "RECORD").read_text()
    script = """
import detectron2.projects.point_rend, detectron2.projects.deeplab, detectron2.projects.panoptic_deeplab
from detectron2.evaluation import coco_evaluation
print(coco_evaluation.COCOeval_opt is coco_evaluation.COCOeval)
from detectron2.model_zoo.model_zoo import get_config_file
print(open(get_config_file("quick/base.yaml")).read().strip())
from detectron2 import _C
print(hasattr(_C, "deform_conv_forward"), _C.get_compiler_version())
try:
    _C.deform_conv_forward(1)
except AttributeError as error:
    print(error)
"""
    environment = {"PYTHONPATH": str(target)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    fallback, config, features, sentence = result.stdout.splitlines()
    assert (fallback, config) == ("True", "VERSION: 2")
    assert features.startswith("False none")
    assert "detectron2._C.deform_conv_forward is missing" in sentence and "git+https" in sentence


def test_the_installed_detectron2_has_what_we_use() -> None:
    """From this installer or built from source: what the project takes from detectron2 is there and runs."""
    pytest.importorskip("detectron2")
    for name in (
        "engine",
        "evaluation",
        "projects.point_rend",
        "projects.deeplab",
        "projects.panoptic_deeplab",
    ):
        assert importlib.import_module(f"detectron2.{name}")
    from detectron2 import model_zoo
    from detectron2.modeling import build_model
    from detectron2.utils.collect_env import collect_env_info

    assert "PyTorch" in collect_env_info()
    cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    model = build_model(cfg).eval()
    image = torch.zeros(3, 64, 96)
    instances = model([{"image": image, "height": 64, "width": 96}])[0]["instances"]
    assert instances.image_size == (64, 96)
