# Table 8, MSN without LAT (the same as table D.3, average): the mean of the four neighbours.
_base_ = "../vit_small16.py"

model = dict(lat=dict(type="parameter_free", target_attn="average", context="none"))
