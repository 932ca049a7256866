#!/usr/bin/env python3
"""Both methods end to end on generated data: pre-train without labels, fine-tune, evaluate, compare.

Two arms fine-tune the same model with the same steps, data and seed: one from its initial weights, one from the
pre-training. Mask-JEPA meets Mask2Former in detectron2, DMT-JEPA a plain ViT in mmsegmentation's UPerNet. Every
stage is a command of this project, printed before it runs, so that it can be typed by hand.

    python tools/demo.py                  # minutes on two CPU cores
    python tools/demo.py --size smoke     # the plumbing alone, in under two minutes; its numbers mean nothing
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
# The arm without pre-training must land in these ranges (percent), or the comparison says nothing.
INFORMATIVE_MIOU, INFORMATIVE_PQ = (15.0, 70.0), 5.0
METRICS = {"PQ": "panoptic_seg/PQ", "AP": "segm/AP", "mIoU": "sem_seg/mIoU"}


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    train: int
    val: int
    unlabelled: int
    pretrain_steps: int
    finetune_steps: int
    vit_pretrain_steps: int
    vit_finetune_steps: int


SIZES = {
    "smoke": Size(16, 8, 16, pretrain_steps=3, finetune_steps=3, vit_pretrain_steps=3, vit_finetune_steps=3),
    "full": Size(
        300, 100, 2000, pretrain_steps=400, finetune_steps=300, vit_pretrain_steps=300, vit_finetune_steps=200
    ),
}


class Stages:
    """Runs the project's commands one after another, with their output in log files."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.seconds: dict[str, float] = {}
        self.environment = {**os.environ, "PYTHONWARNINGS": "ignore", "MPLBACKEND": "Agg"}

    def run(self, name: str, tool: str, *args: str) -> None:
        """One command; a failure ends the demo with the end of its log."""
        command = [sys.executable, str(TOOLS / tool), *args]
        log = self.out / f"{name}.log"
        print(
            f"\n[{len(self.seconds) + 1}] {name}\n    $ {shlex.join(['python', 'tools/' + tool, *args])}",
            flush=True,
        )
        start = time.monotonic()
        with log.open("w") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=self.environment)
            while process.poll() is None:
                time.sleep(0.5)
                self._progress(log, time.monotonic() - start)
        self.seconds[name] = time.monotonic() - start
        print(f"\r    done in {self.seconds[name]:.0f} s; log: {log}" + " " * 40, flush=True)
        if process.returncode:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            sys.exit(f"{tail}\nerror: the stage {name} failed; its whole log is {log}")

    @staticmethod
    def _progress(log: Path, seconds: float) -> None:
        if not sys.stdout.isatty():
            return
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - 4000, 0))
            lines = file.read().decode(errors="replace").splitlines()
        steps = [line.split("iter:")[1].split()[0] for line in lines if " iter: " in line]
        steps += [line.split("[")[1].split("/")[0].strip() for line in lines if "Iter(train) [" in line]
        done = f"step {steps[-1]}, " if steps else ""
        print(f"\r    {done}{seconds:.0f} s ", end="", flush=True)


def final_metrics(folder: Path) -> dict[str, float]:
    """The last evaluation in a run's metrics.json."""
    latest: dict[str, float] = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        latest.update(json.loads(line))
    return {short: latest[key] for short, key in METRICS.items()}


def table(without: dict[str, float], with_pretraining: dict[str, float]) -> str:
    """Both arms and what Mask-JEPA gained, in percent points."""
    lines = [f"{'':24}" + "".join(f"{name:>9}" for name in METRICS)]
    gain = {name: with_pretraining[name] - without[name] for name in METRICS}
    rows = {"without pre-training": without, "with Mask-JEPA": with_pretraining}
    lines += [f"{title:24}" + "".join(f"{values[m]:9.2f}" for m in METRICS) for title, values in rows.items()]
    return "\n".join([*lines, f"{'gain':24}" + "".join(f"{gain[m]:+9.2f}" for m in METRICS)])


def informative_miou(miou: float) -> str:
    """Empty when a comparison with this mIoU can say something, else why it cannot."""
    low, high = INFORMATIVE_MIOU
    if low <= miou <= high:
        return ""
    return f"without pre-training the mIoU is {miou:.1f}, outside {low:.0f} to {high:.0f}"


def informative(without: dict[str, float]) -> str:
    """The same of Mask2Former's metrics."""
    if problem := informative_miou(without["mIoU"]):
        return problem
    if not without["PQ"] > INFORMATIVE_PQ:
        return f"without pre-training the PQ is {without['PQ']:.1f}, not above {INFORMATIVE_PQ:.0f}"
    return ""


def final_miou(folder: Path) -> float:
    """The last evaluation among the logs of mmengine's newest run in a folder."""
    newest = max(folder.glob("*/vis_data/scalars.json"), key=lambda path: path.stat().st_mtime)
    lines = map(json.loads, newest.read_text().splitlines())
    return [line["mIoU"] for line in lines if "mIoU" in line][-1]


def mask_jepa_part(stages: Stages, size: Size, data: Path) -> dict:
    """Mask-JEPA and Mask2Former: metrics of both arms and the pictures."""
    out = stages.out
    backbone = out / "efficientnet_lite0.safetensors"
    stages.run("backbone", "convert_backbone.py", "efficientnet-lite0", str(backbone))

    def train(name: str, config: str, steps: int, *opts: str) -> Path:
        folder = out / name
        # A new run: the last one's metrics must not be read as this one's.
        (folder / "metrics.json").unlink(missing_ok=True)
        fixed = ("OUTPUT_DIR", folder, "MODEL.TIMM.WEIGHTS", backbone, "SOLVER.MAX_ITER", steps)
        stages.run(
            name, "train_net.py", "--config-file", f"detectron2/quick/{config}", *map(str, fixed), *opts
        )
        return folder

    unlabelled = (
        *("DATASETS.UNLABELLED", f"('{data}/unlabelled',)"),
        *("DATASETS.UNLABELLED_TEST", f"('{data}/val2017',)"),
    )
    pretrained = train("pretrain", "mask_jepa.yaml", size.pretrain_steps, *unlabelled)
    exported = out / "mask_jepa.pth"
    stages.run("export", "export.py", str(pretrained / "model_final.pth"), str(exported))

    labelled = (
        *("DATASETS.TRAIN", f"('coco_panoptic@{data}@train2017',)"),
        *("DATASETS.TEST", f"('coco_panoptic@{data}@val2017',)"),
    )
    without = train("without", "panoptic.yaml", size.finetune_steps, *labelled)
    tuned = train("with", "panoptic.yaml", size.finetune_steps, *labelled, "MODEL.WEIGHTS", str(exported))

    pictures = [str(out / "predictions.png"), str(out / "kmeans.png")]
    opts = ("--opts", "MODEL.TIMM.WEIGHTS", str(backbone))
    stages.run(
        *("predictions", "figures.py", "predictions", "--config-file", "detectron2/quick/panoptic.yaml"),
        *("--weights", f"without={without / 'model_final.pth'}", f"with={tuned / 'model_final.pth'}"),
        *("--out", pictures[0], *opts, *labelled),
    )
    stages.run(
        *("kmeans", "figures.py", "kmeans", "--config-file", "detectron2/quick/mask_jepa.yaml"),
        *("--weights", str(pretrained / "model_final.pth"), "--images", f"{data}/val2017"),
        *("--out", pictures[1], *opts),
    )
    return {"without": final_metrics(without), "with": final_metrics(tuned), "pictures": pictures}


def dmt_jepa_part(stages: Stages, size: Size, data: Path) -> dict:
    """DMT-JEPA and UPerNet: mIoU of both arms and the pictures."""
    out = stages.out

    def train(name: str, config: str, *options: str) -> Path:
        stages.run(
            *(name, "train.py", f"mmseg/quick/{config}", "--work-dir", str(out / name)),
            *("--cfg-options", *options),
        )
        return out / name

    steps, tuning = size.vit_pretrain_steps, size.vit_finetune_steps
    pretrained = train(
        *("dmt_jepa", "dmt_jepa.py", f"train_dataloader.dataset.source={data}/unlabelled"),
        *(f"train_cfg.steps={steps}", f"param_scheduler.0.warmup_steps={max(steps // 10, 1)}"),
        f"default_hooks.checkpoint.interval={steps}",
        f"default_hooks.held_out.source={data}/val2017",
    )
    checkpoint = pretrained / f"iter_{steps}.pth"
    warmup = max(tuning // 10, 1)
    common = (
        *(f"{kind}_dataloader.dataset.data_root={data}" for kind in ("train", "val", "test")),
        *(f"train_cfg.max_iters={tuning}", f"train_cfg.val_interval={tuning}"),
        *(f"param_scheduler.0.end={warmup}", f"param_scheduler.1.begin={warmup}"),
        *(f"param_scheduler.1.end={tuning}", f"default_hooks.checkpoint.interval={tuning}"),
    )
    scratch = train("upernet_scratch", "upernet_scratch.py", *common)
    tuned = train("upernet", "upernet.py", *common, f"model.backbone.init_cfg.checkpoint={checkpoint}")
    pictures = [str(out / "attention.png"), str(out / "similarity.png")]
    stages.run(
        *("vit_figures", "vit_figures.py", "mmseg/quick/dmt_jepa.py", "--weights", str(checkpoint)),
        *("--images", f"{data}/val2017", "--out", *pictures),
    )
    return {"scratch": final_miou(scratch), "dmt_jepa": final_miou(tuned), "vit_pictures": pictures}


def run(size: Size, out: Path) -> dict:
    """All stages; returns what demo.json holds."""
    stages = Stages(out)
    # Data of other counts are other data: one folder for each size.
    data = out / f"data_{size.train}_{size.val}_{size.unlabelled}"
    counts = ("--train", size.train, "--val", size.val, "--unlabelled", size.unlabelled)
    stages.run("data", "prepare_data.py", "synthetic", "--out", str(data), "--size", "128", *map(str, counts))
    result = {**mask_jepa_part(stages, size, data), **dmt_jepa_part(stages, size, data)}
    return {**result, "seconds": {name: round(s, 1) for name, s in stages.seconds.items()}}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--out", type=Path, default=Path("output/demo"), help="folder of everything it makes")
    args = parser.parse_args()
    out = args.out / args.size
    out.mkdir(parents=True, exist_ok=True)
    result = run(SIZES[args.size], out)
    problem, vit_problem = informative(result["without"]), informative_miou(result["scratch"])
    result.update(size=args.size, informative=not problem, vit_informative=not vit_problem)
    (out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")

    print(
        f"\nFine-tuned on {SIZES[args.size].train} labelled images, "
        f"{SIZES[args.size].finetune_steps} steps, one seed (%):"
    )
    print(table(result["without"], result["with"]))
    print(
        f"\nUPerNet on a tiny ViT, {SIZES[args.size].vit_finetune_steps} steps, mIoU (%): from scratch "
        f"{result['scratch']:.2f}, from DMT-JEPA {result['dmt_jepa']:.2f}"
    )
    if vit_problem and args.size != "smoke":
        print(f"This comparison is uninformative: {vit_problem}.")
    print("\nPictures:\n" + "\n".join(f"  {path}" for path in result["pictures"] + result["vit_pictures"]))
    print(f"Numbers: {out / 'demo.json'}; {sum(result['seconds'].values()):.0f} s in all.")
    if args.size == "smoke":
        print("This was the smallest size: it shows that every stage runs, and its numbers mean nothing.")
    elif problem:
        sys.exit(f"error: this comparison is uninformative: {problem}.")


if __name__ == "__main__":
    main()
