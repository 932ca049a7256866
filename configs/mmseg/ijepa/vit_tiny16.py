# I-JEPA in the same recipe: neighbours and heads off, its published loss.
_base_ = "../dmt_jepa/vit_tiny16.py"

model = dict(msn=None, lat=None, loss="smooth_l1")
