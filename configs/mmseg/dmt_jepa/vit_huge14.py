# 300 epochs, 128 images x 16 processes; the predictor's depth is the release's, the paper does not give it.
_base_ = "../_base_/paper.py"

model = dict(arch="huge", patch_size=14, predictor=dict(width=384, depth=12))
train_dataloader = dict(batch_size=128)
train_cfg = dict(epochs=300, recipe=dict(steps=187800))
