"""Configuration keys, and every configuration that is shipped."""

import math

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import get_cfg  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from prepare_data import make_synthetic  # noqa: E402
from tiny import BACKBONE, losses_of, tiny_config, train  # noqa: E402

from jepa_plugins.config_files import list_configs  # noqa: E402
from jepa_plugins.core.settings import MaskJEPASettings  # noqa: E402
from jepa_plugins.d2 import add_jepa_config, get_config  # noqa: E402
from jepa_plugins.d2.config import SETTING_KEYS, mask_jepa_settings  # noqa: E402

CONFIGS = [name for name in list_configs() if name.startswith("detectron2/") and name.endswith(".yaml")]
QUICK = [name.split("/")[-1][:-5] for name in CONFIGS if "/quick/" in name and not name.endswith("base.yaml")]


def on_meta(name: str, *overrides):
    """The model of a configuration, without memory for its weights."""
    with torch.device("meta"):
        return build_model(get_config(name, ["MODEL.DEVICE", "meta", *overrides]))


# --- keys


def test_the_methods_keys_have_the_papers_values() -> None:
    cfg = get_cfg()
    add_jepa_config(cfg)
    assert mask_jepa_settings(cfg) == MaskJEPASettings()
    assert (cfg.MODEL.MASK_JEPA.EMA.START, cfg.MODEL.MASK_JEPA.EMA.END) == (0.996, 1.0)
    assert cfg.MODEL.MASK_JEPA.FREEZE_BACKBONE is True


def test_each_key_reaches_the_method() -> None:
    node = "MODEL.MASK_JEPA."
    keys = {
        "NOISE.SIGMA": ("noise_sigma", 0.3),
        "MASK.RATIO": ("mask_ratio", 0.6),
        "MASK.PATCH": ("mask_patch", 6),
        "RECON_STRIDE": ("recon_stride", 16),
        "SELF_ATTN.M": ("self_attention_blocks", 5),
        "READOUT": ("readout", "masked_queries"),
        "DENOISE.TARGET": ("denoise_target", "image"),
        "LOSS.RECON_WEIGHT": ("recon_weight", 0.7),
        "LOSS.DENOISE_WEIGHT": ("denoise_weight", 0.2),
        "LOSS.REDUCTION": ("recon_reduction", "norm"),
        "NOISE.SPACE": ("noise_space", "symmetric"),
        "MASK.SAMPLING": ("mask_sampling", "bernoulli"),
        "LEVELS": ("levels", "round_robin"),
        "POS_ON_VALUE": ("pos_on_value", True),
        "READOUT_NORM": ("readout_norm", False),
        "SELF_ATTN.PLACEMENT": ("placement", "image"),
        "DENOISE.FEATURE": ("denoise_feature", "stride4"),
        "DENOISE.DOWNSAMPLE": ("denoise_downsample", "bilinear"),
    }
    assert keys.keys() == SETTING_KEYS.keys() - {"DENOISE.NOISE_SCALE"}  # of the other denoise target
    overrides = [item for key, (_, value) in keys.items() for item in (node + key, value)]
    got = mask_jepa_settings(get_config("detectron2/mask_jepa/R50_in1k.yaml", overrides))
    assert got == MaskJEPASettings(**dict(keys.values()))
    unit = get_config("detectron2/mask_jepa/R50_in1k.yaml", [node + "DENOISE.NOISE_SCALE", "unit"])
    assert mask_jepa_settings(unit) == MaskJEPASettings(denoise_noise_scale="unit")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["MODEL.MASK_JEPA.READ_OUT", "x"], "MODEL.MASK_JEPA.READ_OUT.*did you mean MODEL.MASK_JEPA.READOUT"),
        (["SOLVER.MAXITER", "5"], "SOLVER.MAXITER.*did you mean SOLVER.MAX_ITER"),
        (["NOTHING.LIKE.IT", "5"], "NOTHING.LIKE.IT, which is no configuration key; see"),
    ],
)
def test_an_unknown_key_is_named_with_close_ones(overrides, sentence) -> None:
    with pytest.raises(KeyError, match=sentence):
        get_config("detectron2/quick/mask_jepa.yaml", overrides)


def test_an_unknown_key_in_a_file_names_the_file(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("MODEL:\n  MASK_JEPA:\n    MASK:\n      PATCHES: 4\n")
    with pytest.raises(
        KeyError, match=r"mine.yaml.*MODEL.MASK_JEPA.MASK.PATCHES.*MODEL.MASK_JEPA.MASK.PATCH"
    ):
        get_config(str(path))


def test_a_key_without_a_value_and_a_value_of_another_kind() -> None:
    with pytest.raises(ValueError, match="pairs KEY VALUE, got SOLVER.MAX_ITER"):
        get_config("detectron2/quick/mask_jepa.yaml", ["SOLVER.MAX_ITER"])
    with pytest.raises(ValueError, match="SOLVER.MAX_ITER"):
        get_config("detectron2/quick/mask_jepa.yaml", ["SOLVER.MAX_ITER", "many"])


def test_a_missing_file_is_named_with_close_ones() -> None:
    with pytest.raises(FileNotFoundError, match="R50_in1.yaml.*detectron2/mask_jepa/R50_in1k.yaml"):
        get_config("detectron2/mask_jepa/R50_in1.yaml")


def test_values_that_make_no_sense_are_one_sentence() -> None:
    with pytest.raises(ValueError, match="the readout is one of"):
        on_meta("detectron2/quick/mask_jepa.yaml", "MODEL.MASK_JEPA.READOUT", "all")


# --- shipped configurations


def test_there_are_configurations() -> None:
    assert {"mask_jepa", "mask_jepa_scratch", "semantic", "instance", "panoptic"} <= set(QUICK)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_builds(name) -> None:
    model = on_meta(name)
    cfg = get_config(name)
    assert type(model).__name__.endswith(cfg.MODEL.META_ARCHITECTURE)
    assert any(parameter.requires_grad for parameter in model.parameters())
    if cfg.MODEL.META_ARCHITECTURE == "MaskJEPA":
        assert not cfg.DATASETS.TRAIN and cfg.DATASETS.UNLABELLED
        frozen = not any(p.requires_grad for p in model.backbone.parameters())
        assert frozen == cfg.MODEL.MASK_JEPA.FREEZE_BACKBONE == (model.target_backbone is None)
    else:
        assert not any(p.device.type != "meta" for p in model.parameters())


def test_sizes_are_the_papers() -> None:
    """Mask2Former R50, and about 2.7 million more for the parts of the pre-training (M = 2)."""
    former = sum(p.numel() for p in on_meta("detectron2/mask2former/ade20k/semantic_R50.yaml").parameters())
    assert former == 43_988_247
    model = on_meta("detectron2/mask_jepa/R50_in1k.yaml", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 150)
    online = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("target"))
    assert 2.6e6 < online - former < 2.8e6


def test_the_headline_recipe() -> None:
    cfg = get_config("detectron2/mask_jepa/R50_in1k.yaml")
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.RECIPE_IMS_PER_BATCH, cfg.SOLVER.MAX_ITER) == (
        32,
        32,
        187_500,
    )
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.OPTIMIZER) == (1e-4, 0.05, "ADAMW")
    assert (cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.WARMUP_ITERS) == ("WarmupPolyLR", 0)
    assert (cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE) == ("full_model", 0.01)
    assert tuple(cfg.INPUT.PRETRAIN_CROP_SIZE) == (512, 512)
    assert tuple(cfg.INPUT.PRETRAIN_CROP_SCALE) == (0.3, 1.0)
    assert mask_jepa_settings(cfg) == MaskJEPASettings()


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("data") / "synthetic"
    make_synthetic(root, 3, 2, 3, 64, 0, 1, False)
    return str(root)


@pytest.mark.parametrize("name", QUICK)
def test_every_quick_configuration_trains_two_steps(name, synthetic, tmp_path) -> None:
    """Shrunk, and on three generated pictures, in the layout that the configuration names."""
    written = get_config(f"detectron2/quick/{name}.yaml")
    moved = {
        f"DATASETS.{key}": tuple(source.replace("datasets/synthetic", synthetic) for source in sources)
        for key in ("TRAIN", "TEST", "UNLABELLED", "UNLABELLED_TEST")
        if (sources := written.DATASETS[key])
    }
    assert moved
    small = {"SOLVER.MAX_ITER": 2, "OUTPUT_DIR": str(tmp_path), **moved}
    own = written.MODEL.BACKBONE.NAME != "TimmBackbone"
    trainer = train(tiny_config(name, small, backbone={} if own else BACKBONE))
    losses = losses_of(trainer)
    assert sorted(losses) == [0, 1] and all(math.isfinite(loss) for loss in losses.values())
    if written.DATASETS.TEST:
        assert trainer._last_eval_results
