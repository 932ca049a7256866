"""Twin of detectron2/mask_rcnn/vitl_100ep.yaml: ViT-L, with ViTDet-L's drop path and layer decay."""

from .mask_rcnn_vitb_100ep import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.net.update(
    embed_dim=1024,
    depth=24,
    num_heads=16,
    drop_path_rate=0.4,
    window_block_indexes=[i for i in range(24) if i % 6 != 5],
)
optimizer.params.layer_decay = 0.8
