#!/usr/bin/env python3
"""Pre-train Mask-JEPA, fine-tune or evaluate the Mask2Former family, in detectron2's command-line style.

python tools/train_net.py --config-file detectron2/mask_jepa/R50_in1k.yaml --num-gpus 8 DATASETS.UNLABELLED
"('imagenet/train',)"
python tools/train_net.py --config-file detectron2/mask2former/ade20k/semantic_R50.yaml --num-gpus 8
MODEL.WEIGHTS exported.pth
python tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
python tools/train_net.py --config-file ... --resume
torchrun --nproc-per-node 8 tools/train_net.py --config-file ...
srun --ntasks-per-node 8 --gpus-per-node 8 python tools/train_net.py --config-file ...

The figures of the last evaluation go to OUTPUT_DIR/evaluation.json, too.
"""

from __future__ import annotations

from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

import jepa_plugins.d2  # noqa: F401  registers our models
from jepa_plugins.config_files import find_config
from jepa_plugins.core.cli import one_sentence
from jepa_plugins.d2.checkpoint import Checkpointer
from jepa_plugins.d2.cli import configuration
from jepa_plugins.d2.distributed import run
from jepa_plugins.d2.engine import Trainer, prepare_data
from jepa_plugins.d2.evaluation_file import record, test_images


def setup(args):
    """The frozen configuration; without a GPU it runs on the CPU."""
    args.config, args.config_file = args.config_file, find_config(args.config_file)
    cfg = configuration(args.config_file, args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(output=cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="jepa_plugins")
    return cfg


@one_sentence
def main(args):
    """Train, or evaluate with --eval-only."""
    cfg = setup(args)
    if args.eval_only:
        prepare_data(cfg)
        if not (cfg.MODEL.WEIGHTS or args.resume):
            raise ValueError(
                "--eval-only needs a checkpoint: set MODEL.WEIGHTS, or --resume for the last one"
            )
        if cfg.MODEL.META_ARCHITECTURE == "MaskJEPA" and not cfg.DATASETS.UNLABELLED_TEST:
            raise ValueError(
                "DATASETS.UNLABELLED_TEST is empty: name held-out images to evaluate MaskJEPA on"
            )
        model = Trainer.build_model(cfg)
        checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, required=[""], trust=args.trust)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        source = cfg.MODEL.WEIGHTS
        if args.resume and checkpointer.has_checkpoint():
            source = checkpointer.get_checkpoint_file()
        record(cfg.OUTPUT_DIR, results, checkpoint=source, config=args.config, images=test_images(cfg))
        return results
    trainer = Trainer(cfg, trust=args.trust, config=args.config)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def build_parser():
    """detectron2's options and ours."""
    parser = default_argument_parser(__doc__)
    parser.set_defaults(dist_url="auto")  # a free port, where all processes are on one machine
    parser.add_argument(
        "--trust", action="append", default=[], metavar="FILE", help="a checkpoint that may run code"
    )
    return parser


if __name__ == "__main__":
    run(main, build_parser().parse_args())
