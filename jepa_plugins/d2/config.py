"""All configuration keys of the detectron2 adapter, and the one way to read a configuration file."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from detectron2.config import CfgNode, get_cfg
from detectron2.config import CfgNode as CN

from jepa_plugins.config_files import find_config
from jepa_plugins.core.settings import MaskJEPASettings
from jepa_plugins.d2.data import add_data_config
from jepa_plugins.d2.yaml_files import read_yaml

logger = logging.getLogger(__name__)


def add_mask2former_config(cfg: CfgNode) -> None:
    """The keys of the published Mask2Former with the published defaults, and one width that it fixes in
    code."""
    from detectron2.projects.deeplab import add_deeplab_config

    add_deeplab_config(cfg)
    cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.0
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1

    node = cfg.MODEL.MASK_FORMER = CN()
    node.DEEP_SUPERVISION = True
    node.NO_OBJECT_WEIGHT = 0.1
    node.CLASS_WEIGHT = 1.0
    node.DICE_WEIGHT = 1.0
    node.MASK_WEIGHT = 20.0
    node.NHEADS = 8
    node.DROPOUT = 0.1
    node.DIM_FEEDFORWARD = 2048
    node.ENC_LAYERS = 0  # published and read by nothing, here and there
    node.DEC_LAYERS = 6
    node.PRE_NORM = False
    node.HIDDEN_DIM = 256
    node.NUM_OBJECT_QUERIES = 100
    node.TRANSFORMER_IN_FEATURE = "res5"
    node.ENFORCE_INPUT_PROJ = False
    node.SIZE_DIVISIBILITY = 32
    node.TRANSFORMER_DECODER_NAME = "MultiScaleMaskedTransformerDecoder"
    node.TRAIN_NUM_POINTS = 112 * 112
    node.OVERSAMPLE_RATIO = 3.0
    node.IMPORTANCE_SAMPLE_RATIO = 0.75
    node.TEST = CN()
    node.TEST.SEMANTIC_ON = True
    node.TEST.INSTANCE_ON = False
    node.TEST.PANOPTIC_ON = False
    node.TEST.OBJECT_MASK_THRESHOLD = 0.0
    node.TEST.OVERLAP_THRESHOLD = 0.0
    node.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE = False

    head = cfg.MODEL.SEM_SEG_HEAD
    head.MASK_DIM = 256
    head.TRANSFORMER_ENC_LAYERS = 0
    head.TRANSFORMER_ENC_DIM_FEEDFORWARD = 1024  # ours: the published code fixes it
    head.PIXEL_DECODER_NAME = "BasePixelDecoder"
    head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = ["res3", "res4", "res5"]
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS = 4
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS = 8  # published; the pixel decoder takes MASK_FORMER.NHEADS

    _add_swin_config(cfg)


def _add_swin_config(cfg: CfgNode) -> None:
    swin = cfg.MODEL.SWIN = CN()
    swin.PRETRAIN_IMG_SIZE = 224
    swin.PATCH_SIZE = 4
    swin.EMBED_DIM = 96
    swin.DEPTHS = [2, 2, 6, 2]
    swin.NUM_HEADS = [3, 6, 12, 24]
    swin.WINDOW_SIZE = 7
    swin.MLP_RATIO = 4.0
    swin.QKV_BIAS = True
    swin.QK_SCALE = None
    swin.DROP_RATE = 0.0
    swin.ATTN_DROP_RATE = 0.0
    swin.DROP_PATH_RATE = 0.3
    swin.APE = False
    swin.PATCH_NORM = True
    swin.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    swin.USE_CHECKPOINT = False


# Keys below MODEL.MASK_JEPA, and the names that core's settings give them.
SETTING_KEYS = {
    "READOUT": "readout",
    "READOUT_NORM": "readout_norm",
    "RECON_STRIDE": "recon_stride",
    "LEVELS": "levels",
    "POS_ON_VALUE": "pos_on_value",
    "NOISE.SIGMA": "noise_sigma",
    "NOISE.SPACE": "noise_space",
    "MASK.RATIO": "mask_ratio",
    "MASK.PATCH": "mask_patch",
    "MASK.SAMPLING": "mask_sampling",
    "SELF_ATTN.M": "self_attention_blocks",
    "SELF_ATTN.PLACEMENT": "placement",
    "DENOISE.TARGET": "denoise_target",
    "DENOISE.FEATURE": "denoise_feature",
    "DENOISE.NOISE_SCALE": "denoise_noise_scale",
    "DENOISE.DOWNSAMPLE": "denoise_downsample",
    "LOSS.REDUCTION": "recon_reduction",
    "LOSS.RECON_WEIGHT": "recon_weight",
    "LOSS.DENOISE_WEIGHT": "denoise_weight",
}


def add_mask_jepa_config(cfg: CfgNode) -> None:
    """`MODEL.MASK_JEPA`: the method's options with the paper's values (sections 3 and 4.1)."""
    defaults = MaskJEPASettings()
    node = cfg.MODEL.MASK_JEPA = CN()
    node.FREEZE_BACKBONE = True
    for key, name in SETTING_KEYS.items():
        place, parts = node, key.split(".")
        for part in parts[:-1]:
            place = place.setdefault(part, CN())
        place[parts[-1]] = getattr(defaults, name)
    node.EMA = CN()
    node.EMA.START = 0.996
    node.EMA.END = 1.0
    node.RANK_PERIOD = 100  # steps between two measurements of RankMe
    # Held-out images for the explained variance, given as DATASETS.UNLABELLED is.
    cfg.DATASETS.UNLABELLED_TEST = ()


def add_timm_config(cfg: CfgNode) -> None:
    """`MODEL.TIMM`: any timm `features_only` model as backbone."""
    node = cfg.MODEL.TIMM = CN()
    node.NAME = "resnet18"
    node.WEIGHTS = ""  # a file with timm's names; "" starts from random weights
    node.FREEZE = False  # no gradient, and normalisation in eval mode
    node.KWARGS = CN(new_allowed=True)  # further arguments of timm.create_model


def add_vit_config(cfg: CfgNode) -> None:
    """`MODEL.VIT`: the plain ViT of `build_jepa_vit_sfp_backbone`, with ViTDet-B's values; see `core.vitdet`.

    The pyramid's channels and norm are detectron2's MODEL.FPN.OUT_CHANNELS and MODEL.FPN.NORM ("LN" or "").
    """
    node = cfg.MODEL.VIT = CN()
    node.IMG_SIZE = 1024  # pixels that the relative positions of whole-map attention are made for
    node.PATCH_SIZE = 16
    node.EMBED_DIM = 768
    node.DEPTH = 12
    node.NUM_HEADS = 12
    node.MLP_RATIO = 4.0
    node.QKV_BIAS = True
    node.DROP_PATH_RATE = 0.1
    node.USE_REL_POS = True
    node.REL_POS_ZERO_INIT = True
    node.WINDOW_SIZE = 14  # tokens
    node.WINDOW_BLOCK_INDEXES = [0, 1, 3, 4, 6, 7, 9, 10]  # the others attend across the whole map
    node.PRETRAIN_IMG_SIZE = (
        224,
        224,
    )  # (height, width) in pixels of the pre-training: the position table's grid
    node.PRETRAIN_USE_CLS_TOKEN = (
        False  # True keeps an unused row for a class token, as published ViTDet models
    )
    node.USE_CHECKPOINT = False  # recompute the blocks' activations in the backward pass
    node.SCALE_FACTORS = [4.0, 2.0, 1.0, 0.5]  # sizes of the pyramid's levels over the ViT's map
    node.SQUARE_PAD = (
        1024  # images up to this many pixels a side are padded to a square of it; 0 to whole cells
    )
    cfg.SOLVER.LAYER_DECAY = 1.0  # of the learning rate, from each of a ViT's layers to the one before


def add_solver_config(cfg: CfgNode) -> None:
    """Keys of our training loop."""
    # Prefixes of names in MODEL.WEIGHTS that are not loaded, such as the class head when the classes differ.
    cfg.MODEL.WEIGHTS_LEAVE_OUT = ()
    cfg.SOLVER.ACCUMULATION = 1  # micro-batches an iteration; SOLVER.IMS_PER_BATCH counts all of them
    cfg.SOLVER.RECIPE_IMS_PER_BATCH = 0  # the recipe's effective batch; 0 accepts any
    cfg.SOLVER.AMP.DTYPE = "auto"  # float16 with a gradient scaler on CUDA, bfloat16 on the CPU


def add_monitor_config(cfg: CfgNode) -> None:
    """`TEST.PROBE`: probes of the features while MaskJEPA trains. (Pictures come every detectron2's VIS_PERIOD.)"""
    node = cfg.TEST.PROBE = CN()
    node.PERIOD = 0  # steps between two measurements; 0 never
    node.TRAIN = ""  # semantic data sets, by name: fitted on one, scored on the other
    node.VAL = ""
    node.SIZE = ()  # (height, width) of the resized images, multiples of 32; empty: INPUT.PRETRAIN_CROP_SIZE
    node.FEATURES = ("stride8", "stride4")
    node.WHICH = ("online",)  # and "ema"
    node.KINDS = ("linear", "knn", "kmeans")
    node.CELLS = 10000  # of each set at most so many, evenly spread
    node.IMAGES = 100  # likewise; 0 takes all


def add_jepa_config(cfg: CfgNode) -> None:
    """Add every key of ours to detectron2's configuration, in place; a second time changes nothing."""
    if "MASK_JEPA" in cfg.MODEL:  # known already, under DETECTRON2_ENV_MODULE
        return
    add_mask2former_config(cfg)
    add_mask_jepa_config(cfg)
    add_timm_config(cfg)
    add_vit_config(cfg)
    add_solver_config(cfg)
    add_monitor_config(cfg)
    add_data_config(cfg)


def add_panoptic_deeplab_config(cfg: CfgNode) -> None:
    """The keys of detectron2's project Panoptic-DeepLab, whose import registers its model; see `get_config`.

    Its own mapper is the default, and PQ, AP and mIoU are measured.

    Raises:
        ImportError: panopticapi, which the project needs, is not installed.
    """
    try:
        from detectron2.projects import panoptic_deeplab
    except ImportError as error:
        raise ImportError(
            f"PanopticDeepLab needs detectron2's project and panopticapi ({error}): pip install -r "
            "requirements/panoptic.txt"
        ) from error
    panoptic_deeplab.add_panoptic_deeplab_config(cfg)
    cfg.INPUT.DATASET_MAPPER_NAME = "panoptic_deeplab"
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    test = cfg.MODEL.MASK_FORMER.TEST
    test.SEMANTIC_ON = test.INSTANCE_ON = test.PANOPTIC_ON = True


def mask_jepa_settings(cfg: CfgNode) -> MaskJEPASettings:
    """The method's options as core takes them."""
    values = {}
    for key, name in SETTING_KEYS.items():
        place = cfg.MODEL.MASK_JEPA
        for part in key.split("."):
            place = place[part]
        values[name] = place
    return MaskJEPASettings(**values)


def get_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Read a yaml file, found as a path or among our configurations, with overrides KEY VALUE KEY VALUE.

    Raises:
        FileNotFoundError: no such file. KeyError: an unknown key, named with the nearest known ones.
        ValueError: a key without a value, a value of another type, or a file that is no plain yaml.
    """
    if len(opts) % 2:
        raise ValueError(f"overrides are pairs KEY VALUE, got {' '.join(map(str, opts))}")
    cfg = get_cfg()
    add_jepa_config(cfg)
    path = find_config(config_file)
    values = CN(read_yaml(path))
    if values.get("MODEL", CN()).get("META_ARCHITECTURE") == "PanopticDeepLab":
        add_panoptic_deeplab_config(cfg)
    try:
        cfg.merge_from_other_cfg(values)
        cfg.merge_from_list(list(opts))
    except (KeyError, ValueError, AssertionError) as error:
        message = str(error.args[0] if error.args else error)
        if "on-existent" not in message:
            raise ValueError(f"{path} or the command line: {message}") from error
        raise unknown_key(cfg, message, path) from error
    return cfg


def _all_keys(node: CfgNode, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, value in node.items():
        keys.append(prefix + name)
        if isinstance(value, CfgNode):
            keys.extend(_all_keys(value, f"{prefix}{name}."))
    return keys


def unknown_key(cfg: CfgNode, message: str, path: str) -> KeyError:
    """One sentence for a key that does not exist."""
    import difflib

    key = message.rsplit(": ", 1)[-1].strip().strip("'\"")
    keys = _all_keys(cfg)
    close = difflib.get_close_matches(key, keys, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(close)}?"
        if close
        else "see jepa_plugins/d2/config.py for the keys there are"
    )
    return KeyError(f"{path} or the command line sets {key}, which is no configuration key; {hint}")
