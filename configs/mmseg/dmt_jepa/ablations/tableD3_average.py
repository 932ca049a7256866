# Table D.3, average pooling of the neighbours.
_base_ = "../vit_small16.py"

model = dict(lat=dict(type="parameter_free", target_attn="average", context="none"))
