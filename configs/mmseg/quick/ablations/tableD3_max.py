# Table D.3, max pooling of the neighbours.
_base_ = "../dmt_jepa.py"

model = dict(lat=dict(type="parameter_free", target_attn="max", context="none"))
