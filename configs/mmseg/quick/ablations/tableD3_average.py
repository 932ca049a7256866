# Table D.3, average pooling of the neighbours.
_base_ = "../dmt_jepa.py"

model = dict(lat=dict(type="parameter_free", target_attn="average", context="none"))
