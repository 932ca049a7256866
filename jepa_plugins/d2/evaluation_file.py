"""evaluation.json of detectron2's runs; see `core.evaluation_file`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from jepa_plugins.core.evaluation_file import write_evaluation


def record(
    folder: str,
    results: Mapping[str, Any] | None,
    *,
    checkpoint: str | None,
    config: str | None,
    images: int | None,
) -> None:
    """Write an evaluator's results on the main process, under their names in metrics.json (sem_seg/mIoU)."""
    if results and comm.is_main_process():
        metrics = flatten_results_dict(results)
        write_evaluation(folder, metrics, checkpoint=checkpoint, config=config, images=images)


def written(folder: str, trainer: Any) -> str | None:
    """The checkpoint of the iteration that a trainer has just done, if there is one."""
    for name in ("model_final.pth", f"model_{trainer.iter:07d}.pth"):
        path = os.path.join(folder, name)
        if os.path.isfile(path) and (trainer.iter + 1 >= trainer.max_iter or name != "model_final.pth"):
            return path
    return None


def test_images(cfg: CfgNode) -> int | None:
    """Images of DATASETS.TEST; None for other sources."""
    names = [] if cfg.MODEL.META_ARCHITECTURE == "MaskJEPA" else cfg.DATASETS.TEST
    return sum(len(DatasetCatalog.get(name)) for name in names) or None


class EvaluationFileHook(HookBase):
    """Writes the results of each evaluation while training, after the hook that evaluates."""

    def __init__(self) -> None:
        self.seen: Any = None

    def after_step(self) -> None:
        """Of an evaluation after this step."""
        results = getattr(self.trainer, "_last_eval_results", None)
        if results is self.seen:
            return
        self.seen, cfg = results, self.trainer.cfg
        if results and comm.is_main_process():
            checkpoint = written(cfg.OUTPUT_DIR, self.trainer)
            images = test_images(cfg)
            record(cfg.OUTPUT_DIR, results, checkpoint=checkpoint, config=self.trainer.config, images=images)

    def after_train(self) -> None:
        """Of the evaluation at the end."""
        self.after_step()
