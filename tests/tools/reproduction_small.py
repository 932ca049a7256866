"""A small manifest and stand-ins of the tools that it calls, for the tests of the reproduction package."""

from __future__ import annotations

from pathlib import Path

from jepa_plugins.reproduction.manifest import Experiment, Family, Manifest, Pretraining, Row, Weights

# A tool that leaves what the real ones leave: a checkpoint, an evaluation, and a line for each call.
TRAINER = """
import json, os, sys
from pathlib import Path
args = sys.argv[1:]
with open(os.environ["CALLS"], "a") as file:
    file.write(" ".join([Path(sys.argv[0]).name, *args]) + "\\n")
if "--work-dir" in args:
    folder = Path(args[args.index("--work-dir") + 1])
else:
    folder = Path(args[args.index("OUTPUT_DIR") + 1])
folder.mkdir(parents=True, exist_ok=True)
if os.environ.get("FAIL") and os.environ["FAIL"] in str(folder):
    sys.exit("error: it rains")
if Path(sys.argv[0]).name == "train.py":
    (folder / "iter_2.pth").write_text("weights")
    (folder / "last_checkpoint").write_text(str(folder / "iter_2.pth"))
elif Path(sys.argv[0]).name == "test.py":
    assert Path(args[1]).is_file()
else:
    (folder / "model_final.pth").write_text("weights")
seed = next(int(part.split("=")[-1]) for part in [*args, "0"] if part.split("=")[-1].isdigit())
if "experiments" in str(folder):
    last = str(folder / os.environ.get("EVALUATED", "iter_2.pth"))
    if Path(sys.argv[0]).name == "test.py":
        last, seed = args[1], 50
    content = {"metrics": {"sem_seg/mIoU": 40.0 + seed}, "checkpoint": last}
    (folder / "evaluation.json").write_text(json.dumps(content))
"""
EXPORTER = """
import os, sys
from pathlib import Path
with open(os.environ["CALLS"], "a") as file:
    file.write(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
assert Path(sys.argv[1]).is_file()
Path(sys.argv[2]).write_text("exported")
"""


def project(root: Path) -> Path:
    """A folder with stand-ins of the tools."""
    (root / "tools").mkdir(parents=True)
    for name in ("train.py", "train_net.py", "test.py"):
        (root / "tools" / name).write_text(TRAINER)
    for name in ("export.py", "prepare_data.py"):
        (root / "tools" / name).write_text(EXPORTER if name == "export.py" else TRAINER)
    return root


FAMILIES = [
    Family(
        "mask_jepa",
        ("detectron2/mask_jepa/*",),
        "train_net",
        "SEED",
        pretrains=True,
        weights_key="MODEL.WEIGHTS",
        batch_keys={"SOLVER.ACCUMULATION": "{accumulation}"},
        images_per_gpu=4,
        smoke={"SOLVER.MAX_ITER": 2, "MODEL.WEIGHTS": ""},
        quick={"DATASETS.UNLABELLED": "('{data}/x',)"},
        quick_config="detectron2/quick/mask_jepa.yaml",
    ),
    Family(
        "mask2former",
        ("detectron2/mask2former/*",),
        "train_net",
        "SEED",
        weights_key="MODEL.WEIGHTS",
        export=("tools/export.py", "{checkpoint}", "{out}"),
        smoke={"MODEL.WEIGHTS": "", "SOLVER.MAX_ITER": 2},
    ),
    Family(
        "dmt_jepa",
        ("mmseg/dmt_jepa/*", "mmseg/ijepa/*"),
        "train",
        "randomness.seed",
        pretrains=True,
        data_keys={"train_dataloader.dataset.source": "{data}/imagenet/train"},
        batch_keys={
            "train_dataloader.batch_size": "{local}",
            "optim_wrapper.accumulative_counts": "{accumulation}",
        },
        images_per_gpu=256,
        smoke={"train_cfg.steps": 2},
    ),
    Family(
        "upernet",
        ("mmseg/upernet/*",),
        "train",
        "randomness.seed",
        weights_key="model.backbone.init_cfg.checkpoint",
        smoke={"model.neck.rescales": [4, 2]},
    ),
]
PRETRAININGS = [
    Pretraining(
        "mask_jepa",
        "detectron2/mask_jepa/R50_in1k.yaml",
        data=("imagenet",),
        weights="r50",
        gpu_hours=100.0,
        hours_source="table 8",
        batch=32,
    ),
    Pretraining("dmt_jepa", "mmseg/dmt_jepa/vit_base16.py", data=("imagenet",), batch=2048),
]
SEMANTIC = "detectron2/mask2former/ade20k/semantic_R50"
EXPERIMENTS = [
    Experiment("base", f"{SEMANTIC}.yaml", weights="r50", metrics={"sem_seg/mIoU": 46.6}, tables=("MJ T1",)),
    Experiment(
        "tuned",
        f"{SEMANTIC}_mask_jepa.yaml",
        pretraining="mask_jepa",
        metrics={"sem_seg/mIoU": 48.3},
        tables=("MJ T1",),
        baseline="base",
    ),
    Experiment(
        "no_decoder",
        f"{SEMANTIC}_mask_jepa.yaml",
        pretraining="mask_jepa",
        export_options=("--drop", "predictor"),
        metrics={"sem_seg/mIoU": 47.3},
    ),
    Experiment("zoo", f"{SEMANTIC}.yaml", weights="r50", finished=True, metrics={"sem_seg/mIoU": 47.2}),
    Experiment(
        "upernet",
        "mmseg/upernet/vit_base16_ade20k_512x512_160k.py",
        pretraining="dmt_jepa",
        metrics={"mIoU": 49.0},
        spread={"mIoU": 0.12},
    ),
]
ROWS = [
    Row(1, "headline", "run", ("mask_jepa",), pretrainings=("mask_jepa",), toolkits=("detectron2",)),
    Row(2, "ADE20K", "run", ("mask_jepa",), experiments=("base", "tuned"), where=("MJ T1",)),
    Row(3, "without decoder", "run", ("mask_jepa",), experiments=("no_decoder",)),
    Row(4, "UPerNet", "run", ("dmt_jepa",), experiments=("upernet",), toolkits=("mmengine",)),
    Row(5, "noise", "component", ("mask_jepa",), tests=("tests/core/test_masking.py",)),
    Row(6, "bars", "figure", ("mask_jepa",), commands=("python tools/figures.py kmeans",)),
    Row(9, "cost", "run", ("mask_jepa",), costs=("detectron2/mask_jepa/R50_in1k.yaml",)),
    Row(8, "public model", "run", ("mask_jepa",), experiments=("zoo",)),
    Row(7, "view level", "run", ("dmt_jepa",), pretrainings=("dmt_jepa",), waits_for="the view-level loss"),
]


def small_manifest() -> Manifest:
    """Two pre-trainings, experiments of both toolkits, and a row of every kind."""
    return Manifest(
        families={family.name: family for family in FAMILIES},
        data={"imagenet": {"how": "unpack it", "needs": ["imagenet/train"]}},
        weights={"r50": Weights("r50", "R-50.pkl", "download it")},
        pretrainings={run.name: run for run in PRETRAININGS},
        experiments={run.name: run for run in EXPERIMENTS},
        rows={row.number: row for row in ROWS},
        notes={},
        scale_data={
            "smoke": {"commands": {"stand_ins": "tools/prepare_data.py stand-ins OUTPUT_DIR {data}"}},
            "quick": {"only": ["mask_jepa"]},
        },
    )
