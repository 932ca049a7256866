"""tools/doctor.py on simulated environments: what is missing, the repairing line, the exit code."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import doctor
import pytest

MODULES = (
    "torch torchvision timm numpy jepa_plugins detectron2 detectron2.engine scipy pycocotools panopticapi "
    "cv2 torch_ms_deform_attn mmengine mmcv mmcv._ext mmseg"
).split()
FORKS = {"onedl-mmengine": "0.10.12", "onedl-mmcv": "2.3.6", "onedl-mmsegmentation": "1.4.2"}


class Simulated(doctor.Probe):
    """An environment in which everything is installed but what a test takes away."""

    def __init__(
        self, missing: str = "", broken: dict[str, ImportError] | None = None, gpus: int = 0, **changes
    ):
        self.missing, self.broken, self.python = (
            missing.split(),
            broken or {},
            changes.get("python", (3, 11, 7)),
        )
        self.environ, self.versions = changes.get("environ", {}), changes.get("versions", FORKS)
        cuda = SimpleNamespace(
            is_available=lambda: gpus > 0,
            device_count=lambda: gpus,
            get_device_name=lambda index: f"GPU {index}",
        )
        library = SimpleNamespace(custom_op=None) if changes.get("new_torch", True) else SimpleNamespace()
        compiled = {"deform_conv_forward": None} if changes.get("compiled", True) else {}
        self.loaded = {name: SimpleNamespace(__version__="1.0") for name in MODULES}
        self.loaded["torch"] = SimpleNamespace(__version__="2.14.1", cuda=cuda, library=library)
        self.loaded["detectron2._C"] = SimpleNamespace(**compiled)

    def load(self, name):
        if name in self.broken:
            raise self.broken[name]
        top = name.split(".")[0]
        if top in self.missing or name in self.missing:
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)
        return self.loaded[name]

    def version(self, distribution):
        return self.versions.get(distribution)


def findings(probe: doctor.Probe) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine(probe)}


def blocking(probe: doctor.Probe, *toolkits: str) -> list[str]:
    return [name for name, finding in findings(probe).items() if finding.blocks(toolkits)]


def test_a_complete_environment_is_ready_for_both_toolkits() -> None:
    assert blocking(Simulated(), "d2", "mm") == []


@pytest.mark.parametrize("toolkit", ["d2", "mm"])
@pytest.mark.parametrize("module", ["torch", "torchvision", "timm", "numpy", "jepa_plugins"])
def test_what_both_toolkits_need_blocks_both(module: str, toolkit: str) -> None:
    probe = Simulated(missing=module)
    assert blocking(probe, toolkit) == [module]
    assert findings(probe)[module].detail == "not installed"


@pytest.mark.parametrize(
    ("module", "repair"),
    [
        ("detectron2", "tools/install_detectron2.py"),
        ("scipy", "-m pip install scipy"),
        ("pycocotools", "-m pip install pycocotools"),
        ("panopticapi", "-m pip install --no-deps panopticapi-lite"),
    ],
)
def test_what_detectron2_needs_blocks_it_alone(module: str, repair: str) -> None:
    probe = Simulated(missing=module)
    assert blocking(probe, "d2") == [module] and blocking(probe, "mm") == []
    assert findings(probe)[module].repair.endswith(repair)


def test_optional_packages_never_block_and_name_their_line() -> None:
    probe = Simulated(missing="cv2 torch_ms_deform_attn mmcv._ext", compiled=False)
    found = findings(probe)
    assert blocking(probe, "d2", "mm") == []
    assert found["cv2"].repair.endswith("opencv-python")
    assert "--no-build-isolation torch-ms-deform-attn==0.1.1" in found["deformable attention"].repair
    assert "not compiled" in found["detectron2 operators"].detail
    assert "git+https://github.com/facebookresearch/detectron2.git" in found["detectron2 operators"].repair
    assert "not compiled" in found["mmcv operators"].detail and not found["mmcv operators"].repair


def test_compiled_operators_are_reported() -> None:
    found = findings(Simulated())
    assert found["detectron2 operators"].detail == found["mmcv operators"].detail == "compiled"


def test_mmcv_line_is_told_and_never_mixed() -> None:
    assert findings(Simulated())["mmcv"].detail == "2.3.6 (fork)"
    originals = {"mmengine": "0.10.7", "mmcv": "2.1.0"}
    probe = Simulated(missing="mmseg", versions=originals)
    assert findings(probe)["mmcv"].detail == "2.1.0 (original)"
    assert findings(probe)["mmseg"].repair.endswith("pip install mmengine mmcv mmsegmentation")
    nothing = Simulated(missing="mmengine mmcv mmseg", versions={})
    assert findings(nothing)["mmcv"].repair.endswith("onedl-mmengine onedl-mmcv onedl-mmsegmentation")
    assert blocking(nothing, "mm") == ["mmengine", "mmcv", "mmseg"] and blocking(nothing, "d2") == []


def test_a_broken_package_names_what_it_lacks() -> None:
    lacks = ModuleNotFoundError("No module named 'hydra'", name="hydra")
    found = findings(Simulated(broken={"detectron2.engine": lacks}))["detectron2"]
    assert found.detail == "does not import: No module named 'hydra'"
    assert found.repair.endswith("pip install hydra-core")


def test_a_broken_build_is_installed_anew() -> None:
    broken = {
        "torch_ms_deform_attn": ImportError("undefined symbol"),
        "detectron2.engine": ImportError("no _C"),
    }
    found = findings(Simulated(broken=broken))
    assert "undefined symbol" in found["deformable attention"].detail
    assert "--force-reinstall" in found["deformable attention"].repair
    assert "uninstall -y detectron2 && " in found["detectron2"].repair


def test_any_exception_inside_a_package_counts_as_broken(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a_broken_package.py").write_text("raise RuntimeError('wrong CUDA')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = doctor.check_package(doctor.Probe(), "a_broken_package", "line")
    assert found.detail == "does not import: RuntimeError: wrong CUDA"


def test_old_python_and_old_torch_block() -> None:
    assert blocking(Simulated(python=(3, 9, 1)), "d2") == ["Python"]
    probe = Simulated(new_torch=False)
    assert blocking(probe, "d2") == ["torch"]
    assert "2.4 or newer" in findings(probe)["torch"].detail


def test_cuda_is_told_in_words() -> None:
    assert findings(Simulated(gpus=2))["CUDA"].detail == "GPU 0, GPU 1"
    assert "no GPU" in findings(Simulated())["CUDA"].detail
    assert "torch does not import" in findings(Simulated(missing="torch"))["CUDA"].detail


def test_data_folders_complete_partial_absent(tmp_path: Path) -> None:
    for folder in doctor.DATA_SETS["cityscapes"][0]:
        (tmp_path / "cityscapes" / folder).mkdir(parents=True)
    (tmp_path / "coco" / "train2017").mkdir(parents=True)
    found = findings(Simulated(environ={"DETECTRON2_DATASETS": str(tmp_path)}))
    assert not found["data cityscapes"].repair
    assert "lacks annotations, val2017" in found["data coco"].detail
    assert str(tmp_path) in found["data ADEChallengeData2016"].repair
    assert "{" not in "".join(finding.repair for finding in found.values())


def test_report_and_exit_code_agree(monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "Probe", lambda: Simulated(missing="scipy mmseg"))
    assert doctor.main([]) == doctor.main(["--toolkit", "all"]) == doctor.main(["--toolkit", "mm"]) == 1
    capsys.readouterr()
    monkeypatch.setattr(doctor, "Probe", lambda: Simulated(missing="mmseg"))
    assert doctor.main(["--toolkit", "d2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "Ready for d2."
    assert any(line.startswith("optional") and "mmseg" in line for line in lines)
    assert doctor.main(["--toolkit", "mm"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "Missing for mm: mmseg."
