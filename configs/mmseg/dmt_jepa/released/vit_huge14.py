_base_ = "../../_base_/released.py"

model = dict(arch="huge", patch_size=14, predictor=dict(width=384, depth=12))
train_dataloader = dict(batch_size=128)
train_cfg = dict(epochs=300, recipe=dict(steps=187500))
