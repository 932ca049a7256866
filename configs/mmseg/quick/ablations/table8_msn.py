# Table 8, MSN without LAT (the same as table D.3, average): the mean of the four neighbours.
_base_ = "../dmt_jepa.py"

model = dict(lat=dict(type="parameter_free", target_attn="average", context="none"))
