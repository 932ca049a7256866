#!/usr/bin/env python3
"""What a training costs: parameters, peak memory, time of a step, GPU-hours; of any configuration of either toolkit.

    python benchmarks/cost.py detectron2/mask_jepa/R50_in1k.yaml mmseg/dmt_jepa/vit_base16.py --parameters-only
    python benchmarks/cost.py mmseg/quick/dmt_jepa.py --reference mmseg/quick/ijepa.py --out costs.json
    python benchmarks/cost.py detectron2/mask_jepa/R50_in1k.yaml --gpus 8 MODEL.MASK_JEPA.READOUT=masked_queries

Parameters are counted on the meta device, so any size takes seconds and no memory. A step is forward, backward and
optimiser (and moving average) on made-up images and labels of the configuration's size and batch; reading data and
talking to other processes are not in it. With --reference the two take turns in one process and their ratio is the
median over pairs: on a busy machine, or on a CPU, only the ratio means something. Peak memory is that of a process
of its own: on CUDA what torch allocated; on a CPU resident memory above what the process held before it built the
model.

The file of --out holds, beside "schema" (1), "commit", "threads", "versions" and "hardware", a list "runs" with an
entry for each configuration:

    config, toolkit         as given; detectron2 or mmengine
    error                   the sentence why it does not build (--keep-going), and then nothing else
    parameters              of everything that is built; parameters_trained: that take a gradient;
                            parameters_without_targets: without the moving averages
    parts                   parameters by part: backbone, pixel_decoder, pretraining_only, targets and others
    steps, recipe_batch     of the whole run: optimiser steps (null where the configuration counts epochs of data
                            that are not here), images a step; devices: that share the batch
    images_per_device       of one forward; accumulation: forwards a step; image_size: [height, width]
  and, unless --parameters-only:
    scale                   quick when at most 2 images were measured, for a few steps; else full
    device, precision       cpu or cuda; of the forward: float32, bfloat16, float16
    measured_images         of a forward as measured; measured_steps
    seconds_per_step        median; seconds_per_step_low, _high: quartiles
    images_per_second       of one device
    peak_memory_gib, peak_memory_of   and what was measured
    gpu_hours or cpu_hours  seconds_per_step x steps x devices / 3600; measured on fewer images than the recipe's,
                            the time is scaled up in proportion, and hours_scaled says by how much
    reference, ratio_to_reference, ratio_low, ratio_high   the other configuration; median and quartiles
"""

from __future__ import annotations

import abc
import argparse
import contextlib
import gc
import itertools
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # A clone works without being installed.

from jepa_plugins.config_files import find_config  # noqa: E402
from jepa_plugins.core.cli import one_sentence, sentence_of  # noqa: E402
from jepa_plugins.reproduction.results import commit_of, hardware, versions, write_json  # noqa: E402

GIB = 2**30
WARM_UP = 2  # steps; the first also measures RankMe, which happens every hundredth step
OBJECTS = 8  # in a made-up picture
# Beginning of a parameter's name -> part of the model; the first that fits.
PARTS = (
    ("target_", "targets"),
    ("backbone.", "backbone"),
    ("encoder.", "backbone"),
    ("sem_seg_head.pixel_decoder.", "pixel_decoder"),
    ("sem_seg_head.predictor.", "transformer_decoder"),
    ("jepa.", "pretraining_only"),
    ("predictor.", "pretraining_only"),
    ("context_head.", "pretraining_only"),
    ("proposal_generator.", "region_proposals"),
    ("roi_heads.", "box_and_mask_heads"),
    ("neck.", "neck"),
    ("decode_head.", "decode_head"),
    ("auxiliary_head.", "auxiliary_head"),
)


# --- configurations


@dataclass(frozen=True)
class Recipe:
    """Length of a run, if it is known, and how a step's images are shared: images x accumulation x devices."""

    steps: int | None
    images: int
    accumulation: int
    devices: int

    @property
    def batch(self) -> int:
        """Images of an optimiser step."""
        return self.images * self.accumulation * self.devices


def devices_of(config: str, gpus: int | None) -> int:
    """Processes that share a batch where a configuration does not say: one if it is a quick one, else eight."""
    return gpus or (1 if "quick" in Path(config).parts else 8)


class Detectron2(abc.ABC):
    """What yaml files and LazyConfigs share; see `Yaml` and `Lazy` for what each says itself."""

    toolkit = "detectron2"
    size: tuple[int, int]
    recipe: Recipe
    micro_batches: int  # that the loop accumulates
    moves_targets: bool  # whether the loop must do it

    @abc.abstractmethod
    def build(self, device: str) -> torch.nn.Module:
        """The model with random weights."""

    @abc.abstractmethod
    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """The configured one."""

    @abc.abstractmethod
    def precision(self, device: str) -> torch.dtype | None:
        """Of autocast, None for float32."""

    def stepper(self, device: str, images: int) -> Callable[[], None]:
        """A function that makes one optimiser step on `images` images a forward."""
        from detectron2.utils.events import EventStorage

        from jepa_plugins.d2.engine import Loop

        model = self.build(device).train()
        loop = Loop(
            model,
            itertools.repeat(pictures(model, self.size, images)),
            self.optimizer(model),
            accumulation=self.micro_batches,
            dtype=self.precision(device),
            seed=0,
        )
        moves = self.moves_targets and hasattr(model, "update_target")
        if moves:
            model.ema_by_hook = True

        def step() -> None:
            with EventStorage(loop.iter):
                for _ in range(self.recipe.accumulation // self.micro_batches):
                    loop.run_step()
                if moves:
                    model.update_target()
            loop.iter += 1

        return step


class Yaml(Detectron2):
    """A yaml configuration."""

    def __init__(self, config: str, overrides: Sequence[str], gpus: int | None) -> None:
        from jepa_plugins.d2 import get_config

        self.cfg = get_config(config, [part for pair in overrides for part in pair.split("=", 1)])
        given, parts = self.cfg.SOLVER, self.cfg.SOLVER.ACCUMULATION
        devices = devices_of(config, gpus)
        images = divided(given.IMS_PER_BATCH, devices * parts, "SOLVER.IMS_PER_BATCH")
        self.recipe = Recipe(given.MAX_ITER, images, parts, devices)
        self.micro_batches, self.moves_targets = parts, True
        inputs = self.cfg.INPUT
        if self.cfg.MODEL.META_ARCHITECTURE == "MaskJEPA":
            self.size = tuple(inputs.PRETRAIN_CROP_SIZE)
        elif inputs.DATASET_MAPPER_NAME.endswith("_lsj"):
            self.size = (inputs.IMAGE_SIZE, inputs.IMAGE_SIZE)
        else:
            self.size = tuple(inputs.CROP.SIZE)

    def build(self, device: str) -> torch.nn.Module:
        from jepa_plugins.d2.registration import build_model

        self.cfg.MODEL.DEVICE = device
        with torch.device(device):
            return build_model(self.cfg)

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        from jepa_plugins.d2.solver import build_optimizer

        return build_optimizer(self.cfg, model)

    def precision(self, device: str) -> torch.dtype | None:
        from jepa_plugins.d2.engine import amp_dtype

        self.cfg.MODEL.DEVICE = device
        return amp_dtype(self.cfg)


class Lazy(Detectron2):
    """A LazyConfig, whose optimiser accumulates and moves the targets; an iteration is a batch, not a step."""

    def __init__(self, config: str, overrides: Sequence[str], gpus: int | None) -> None:
        from detectron2.config import LazyConfig

        import jepa_plugins.d2  # noqa: F401  registers our models

        self.cfg = LazyConfig.apply_overrides(LazyConfig.load(find_config(config)), list(overrides))
        loader, parts = self.cfg.dataloader.train, self.cfg.optimizer.get("accumulation", 1)
        devices = devices_of(config, gpus)
        images = divided(loader.total_batch_size, devices, "dataloader.train.total_batch_size")
        self.recipe = Recipe(self.cfg.train.max_iter // parts, images, parts, devices)
        self.micro_batches, self.moves_targets = 1, False
        mapper = loader.get("mapper", loader)
        if "image_size" in mapper:
            self.size = (mapper.image_size, mapper.image_size)
        else:
            self.size = tuple(mapper.crop_size)
        if "metadata" in self.cfg.model:
            self.cfg.model.metadata = None  # for results only, and its data set need not be there

    def build(self, device: str) -> torch.nn.Module:
        from detectron2.config import instantiate

        with torch.device(device):
            return instantiate(self.cfg.model).to(device)

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        from detectron2.config import instantiate

        self.cfg.optimizer.params.model = model
        return instantiate(self.cfg.optimizer)

    def precision(self, device: str) -> torch.dtype | None:
        if not self.cfg.train.amp.enabled:
            return None
        return torch.float16 if device.startswith("cuda") else torch.bfloat16


class Mmengine:
    """A configuration of mmengine: DMT-JEPA's or I-JEPA's pre-training, or a segmentor of mmsegmentation."""

    toolkit = "mmengine"

    def __init__(self, config: str, overrides: Sequence[str], gpus: int | None) -> None:
        from mmengine.config import Config, DictAction

        import jepa_plugins.mm  # noqa: F401  registers our models

        self.cfg = Config.fromfile(find_config(config))
        parser = argparse.ArgumentParser()
        parser.add_argument("changes", nargs="*", action=DictAction)
        self.cfg.merge_from_dict(parser.parse_args(list(overrides)).changes or {})
        train, loader = self.cfg.get("train_cfg") or {}, self.cfg.train_dataloader
        parts = self.cfg.optim_wrapper.get("accumulative_counts", 1)
        recipe = train.get("recipe") or {}
        devices = devices_of(config, gpus)
        if "batch" in recipe and gpus is None:
            devices = divided(recipe.batch, loader.batch_size * parts, "train_cfg.recipe.batch")
        images = loader.batch_size
        if "batch" in recipe:
            images = divided(recipe.batch, devices * parts, "train_cfg.recipe.batch")
        self.recipe = Recipe(run_length(train, recipe, parts), images, parts, devices)
        given = self.cfg.model.get("img_size") or self.cfg.get("crop_size")
        self.size = (given, given) if isinstance(given, int) else tuple(given) if given else None

    def build(self, device: str) -> torch.nn.Module:
        """The model with random weights; init_cfg of a checkpoint is not followed."""
        from mmengine.model import revert_sync_batchnorm
        from mmengine.registry import MODELS, init_default_scope

        init_default_scope(self.cfg.get("default_scope") or "mmengine")
        with torch.device(device):
            model = MODELS.build(self.cfg.model)
        return model if device == "meta" else revert_sync_batchnorm(model)  # one process alone

    def precision(self, device: str) -> torch.dtype | None:
        """Of autocast, None for float32."""
        wrapper = self.cfg.optim_wrapper
        kind, default = wrapper.get("type", "OptimWrapper"), "float32"
        if kind == "AmpOptimWrapper":
            default = "float16" if device.startswith("cuda") else "bfloat16"
        name = wrapper.get("dtype") or default
        return None if name == "float32" else getattr(torch, name)

    def stepper(self, device: str, images: int) -> Callable[[], None]:
        """A function that makes one optimiser step on `images` images a forward."""
        from mmengine.optim import build_optim_wrapper

        model = self.build(device).to(device).train()
        wrapper = build_optim_wrapper(model, self.cfg.optim_wrapper)
        wrapper.initialize_count_status(model, 0, 10**9)
        pretrains = hasattr(model, "update_target")
        if pretrains:
            model.ema_by_hook = True
        data = self._crops(images) if pretrains else self._labelled(images, model)

        def step() -> None:
            for _ in range(self.recipe.accumulation):
                model.train_step(next(data), wrapper)
            if pretrains:
                model.update_target()

        return step

    def _pictures(self, images: int) -> torch.Tensor:
        if self.size is None:
            raise ValueError(
                "the configuration says neither model.img_size nor crop_size: add crop_size=(H, W)"
            )
        return torch.randint(0, 256, (images, 3, *self.size), dtype=torch.uint8)

    def _crops(self, images: int) -> Iterator[dict[str, Any]]:
        """Batches of the first process, each in a global batch of the recipe's size."""
        from jepa_plugins.mm.data import BatchPlace

        total, inputs = max(self.recipe.batch, images), self._pictures(images)
        for start in itertools.count(0, total):
            yield {
                "inputs": inputs,
                "place": BatchPlace(0, tuple(range(start, start + images)), start, total),
            }

    def _labelled(self, images: int, model: Any) -> Iterator[dict[str, Any]]:
        """The same batch with labels again and again."""
        if not hasattr(model, "decode_head"):
            raise ValueError(
                f"{type(model).__name__} trains with labels that this benchmark cannot make up: --parameters-only"
            )
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        samples, inputs, classes = [], self._pictures(images), model.decode_head.num_classes
        for _ in range(images):
            coarse = torch.randint(0, classes, (1, 1, 4, 4)).float()
            labels = torch.nn.functional.interpolate(coarse, self.size)[0].long()
            shape = {"img_shape": self.size, "ori_shape": self.size, "pad_shape": self.size}
            samples.append(SegDataSample(metainfo=shape, gt_sem_seg=PixelData(data=labels)))
        return itertools.repeat({"inputs": list(inputs), "data_samples": samples})


Arm = Yaml | Lazy | Mmengine


def run_length(train: Mapping[str, Any], recipe: Mapping[str, int], accumulation: int) -> int | None:
    """Optimiser steps of a configuration of mmengine; None of one that counts epochs of data it does not know."""
    if train.get("max_iters"):
        return train["max_iters"] // accumulation
    return train.get("steps") or recipe.get("steps")


def divided(batch: int, parts: int, key: str) -> int:
    """Images of a device and forward; ValueError unless the batch divides."""
    if batch % parts:
        raise ValueError(
            f"{key} is {batch}, which {parts} devices x accumulated forwards cannot share: set --gpus"
        )
    return batch // parts


def open_config(config: str, overrides: Sequence[str], gpus: int | None) -> Arm:
    """The configuration of a path or a name, by its kind."""
    path = Path(find_config(config))
    if path.suffix in (".yaml", ".yml"):
        return Yaml(config, overrides, gpus)
    lazy = "lazy" in path.parts or "LazyCall" in path.read_text(encoding="utf-8")
    return (Lazy if lazy else Mmengine)(config, overrides, gpus)


def pictures(model: Any, size: tuple[int, int], images: int) -> list[dict[str, Any]]:
    """Made-up inputs of detectron2's models: noise, and boxes for objects where a model trains with labels."""
    channels = len(model.pixel_mean)
    entries: list[dict[str, Any]] = [
        {"image": torch.randint(0, 256, (channels, *size), dtype=torch.uint8), "sample_index": i}
        for i in range(images)
    ]
    if hasattr(model, "jepa"):
        return entries
    from detectron2.structures import Boxes, Instances

    heads = model.roi_heads if hasattr(model, "roi_heads") else model.sem_seg_head
    for entry in entries:
        rows, columns = (
            torch.stack([start, start + side // 4], dim=1)
            for side, start in ((side, torch.randint(0, side - side // 4, (OBJECTS,))) for side in size)
        )
        instances = Instances(size)
        instances.gt_classes = torch.randint(0, heads.num_classes, (OBJECTS,))
        inside = [
            (torch.arange(side) >= span[:, :1]) & (torch.arange(side) < span[:, 1:])
            for side, span in zip(size, (rows, columns), strict=True)
        ]
        instances.gt_masks = inside[0][:, :, None] & inside[1][:, None]
        instances.gt_boxes = Boxes(
            torch.stack([columns[:, 0], rows[:, 0], columns[:, 1], rows[:, 1]], 1).float()
        )
        entry["instances"] = instances
    return entries


# --- measurements


def parameters_of(arm: Arm) -> dict[str, Any]:
    """Counts of a configuration's model, built without memory."""
    counted = trained = 0
    parts: dict[str, int] = {}
    for name, parameter in arm.build("meta").named_parameters():
        size = parameter.numel()
        part = next((part for start, part in PARTS if name.startswith(start)), "other")
        parts[part] = parts.get(part, 0) + size
        counted += size
        trained += size * parameter.requires_grad
    return {
        "parameters": counted,
        "parameters_trained": trained,
        "parameters_without_targets": counted - parts.get("targets", 0),
        "parts": parts,
    }


def synchronised_time() -> float:
    """Now, when the GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(steppers: Sequence[Callable[[], None]], steps: int) -> list[list[float]]:
    """Seconds of each function's calls, which take turns, after a few that warm up."""
    times: list[list[float]] = [[] for _ in steppers]
    for number in range(WARM_UP + steps):
        for step, kept in zip(steppers, times, strict=True):
            start = synchronised_time()
            step()
            if number >= WARM_UP:
                kept.append(synchronised_time() - start)
            else:
                synchronised_time()
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of a single value, that."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def resident_peak() -> int:
    """Most bytes that this process has held in memory."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):  # unlike getrusage's, of this program alone
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory(arm: Arm, device: str, images: int) -> int:
    """Bytes that two steps need at most, in a process that has done nothing before."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of imports, no longer counts
    before = resident_peak()
    step = arm.stepper(device, images)
    for _ in range(2):
        step()
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else resident_peak() - before


def peak_memory_apart(config: str, args: argparse.Namespace, images: int) -> int:
    """`peak_memory` of a fresh process."""
    command = [sys.executable, __file__, config, "--measure-memory", "--device", args.device]
    command += ["--batch", str(images), *args.overrides]
    if args.gpus:
        command += ["--gpus", str(args.gpus)]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what this process no longer needs, the other may
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(
            f"measuring the memory of {config} failed: {(done.stderr.strip() or '?').splitlines()[-1]}"
        )
    return int(done.stdout.strip().splitlines()[-1])


# --- runs


class Measured:
    """One configuration in this run of the benchmark."""

    def __init__(self, config: str, args: argparse.Namespace) -> None:
        self.config, self.args = config, args
        self.arm = open_config(config, args.overrides, args.gpus)
        recipe = self.arm.recipe
        self.images = args.batch or (min(recipe.images, 2) if args.scale == "quick" else recipe.images)
        self.entry: dict[str, Any] = {
            "config": config,
            "toolkit": self.arm.toolkit,
            **parameters_of(self.arm),
            "steps": recipe.steps,
            "recipe_batch": recipe.batch,
            "devices": recipe.devices,
            "images_per_device": recipe.images,
            "accumulation": recipe.accumulation,
            "image_size": list(self.arm.size or ()),
        }

    def stepper(self) -> Callable[[], None]:
        """See the arms'; weights and data are the same in every run."""
        torch.manual_seed(0)
        return self.arm.stepper(self.args.device, self.images)

    def take(self, times: Sequence[float]) -> None:
        """Enter what follows from the times of its steps, and its memory."""
        device, recipe = self.args.device, self.arm.recipe
        low, middle, high = quartiles(times)
        precision = self.arm.precision(device)
        memory = peak_memory_apart(self.config, self.args, self.images)
        scaled = recipe.images / self.images
        on_gpu = device.startswith("cuda")
        hours = middle * scaled * recipe.steps * recipe.devices / 3600 if recipe.steps else None
        self.entry |= {
            "scale": self.args.scale,
            "device": device,
            "precision": str(precision or torch.float32).removeprefix("torch."),
            "measured_images": self.images,
            "measured_steps": len(times),
            "seconds_per_step": middle,
            "seconds_per_step_low": low,
            "seconds_per_step_high": high,
            "images_per_second": self.images * recipe.accumulation / middle,
            "peak_memory_gib": memory / GIB,
            "peak_memory_of": "CUDA allocator" if on_gpu else "resident memory above the start's",
            "gpu_hours" if on_gpu else "cpu_hours": hours,
            **({} if scaled == 1 else {"hours_scaled": scaled}),
        }

    def compare(self, reference: str, pairs: Iterator[float]) -> None:
        """Enter the ratio to the reference."""
        low, middle, high = quartiles(list(pairs))
        ratios = {"ratio_to_reference": middle, "ratio_low": low, "ratio_high": high}
        self.entry |= {"reference": reference, **ratios}

    def lines(self) -> str:
        """For people."""
        entry = self.entry
        parts = ", ".join(f"{name.replace('_', ' ')} {n / 1e6:.2f}M" for name, n in entry["parts"].items())
        counts = (
            f"{entry['parameters'] / 1e6:.2f}M parameters, {entry['parameters_trained'] / 1e6:.2f}M trained"
        )
        out = [
            f"{self.config}: {counts}",
            f"  {parts}",
            f"  {entry['steps']:,} steps of {entry['recipe_batch']:,} images on {entry['devices']} devices"
            if entry["steps"]
            else f"  steps of {entry['recipe_batch']:,} images on {entry['devices']} devices",
        ]
        if "seconds_per_step" in entry:
            height, width = entry["image_size"]
            unit = "GPU" if "gpu_hours" in entry else "CPU"
            hours = entry.get("gpu_hours", entry.get("cpu_hours")) or float("nan")
            times = [1000 * entry[f"seconds_per_step{end}"] for end in ("", "_low", "_high")]
            out += [
                f"  {entry['measured_images']} images of {height} x {width}, {entry['precision']}, "
                f"{entry['device']}: {times[0]:,.1f} ms a step ({times[1]:,.1f} to {times[2]:,.1f}), without reading "
                f"data; {entry['images_per_second']:,.1f} images/s",
                f"  {entry['peak_memory_gib']:.2f} GiB ({entry['peak_memory_of']}); {hours:,.3g} {unit}-hours",
            ]
        if "reference" in entry:
            ratios = (entry[name] for name in ("ratio_to_reference", "ratio_low", "ratio_high"))
            out.append("  {:.3f} ({:.3f} to {:.3f}) of the time of {}".format(*ratios, entry["reference"]))
        return "\n".join(out)


def measure(config: str, reference: Measured | None, args: argparse.Namespace) -> Measured:
    """A configuration; its times in turn with the reference's, whose first times are the reference's own."""
    one = Measured(config, args)
    if args.parameters_only:
        return one
    arms = [one] if reference is None else [one, reference]
    times = alternate([arm.stepper() for arm in arms], args.steps)
    one.take(times[0])
    if reference is not None:
        one.compare(reference.config, (a / b for a, b in zip(*times, strict=True)))
        if "seconds_per_step" not in reference.entry:
            reference.take(times[1])
    return one


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Entries of all configurations, the reference's last."""
    reference = Measured(args.reference, args) if args.reference else None
    entries = []
    for config in args.configs:
        try:
            one = measure(config, reference, args)
        except Exception as error:
            if not args.keep_going:
                raise
            entries.append({"config": config, "error": sentence_of(error)})
            print(f"{config}: {sentence_of(error)}", file=sys.stderr, flush=True)
            continue
        entries.append(one.entry)
        print(one.lines(), flush=True)
    if reference is not None:
        entries.append(reference.entry)
        print(reference.lines())
    return entries


def parsed() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "given", nargs="+", metavar="CONFIG | KEY=VALUE", help="configurations; overrides for all"
    )
    parser.add_argument("--scale", choices=["full", "quick"], default="full", help="quick: 2 images, 2 steps")
    parser.add_argument("--steps", type=int, help="measured after the warm-up; 10, or 2 if quick")
    parser.add_argument("--batch", type=int, help="images of a device and forward, instead of the recipe's")
    parser.add_argument(
        "--gpus", type=int, help="that share the batch, where the configuration does not say (8)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--reference", metavar="CONFIG", help="to compare with, step by step")
    parser.add_argument("--parameters-only", action="store_true", help="measure nothing")
    parser.add_argument("--keep-going", action="store_true", help="after a configuration that does not build")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON")
    parser.add_argument("--measure-memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    args.overrides = [text for text in args.given if "=" in text]
    args.configs = [text for text in args.given if "=" not in text]
    if not args.configs:
        parser.error("name a configuration")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.steps is None:
        args.steps = 2 if args.scale == "quick" else 10
    if any(value is not None and value < 1 for value in (args.steps, args.batch, args.gpus, args.threads)):
        parser.error("--steps, --batch, --gpus and --threads are at least 1")
    return args


@one_sentence
def main() -> None:
    """Command line."""
    args = parsed()
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes that measure memory
    if args.measure_memory:
        torch.manual_seed(0)
        arm = open_config(args.configs[0], args.overrides, args.gpus)
        print(peak_memory(arm, args.device, args.batch))
        return
    entries = measure_all(args)
    if args.out:
        facts = {"schema": 1, "commit": commit_of(ROOT), "threads": torch.get_num_threads()}
        write_json(args.out, {**facts, "versions": versions(), "hardware": hardware(), "runs": entries})
    if any("error" in entry for entry in entries):
        sys.exit(1)


if __name__ == "__main__":
    main()
