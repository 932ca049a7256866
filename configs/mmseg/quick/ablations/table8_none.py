# Table 8, neither MSN nor LAT: I-JEPA with the paper's loss.
_base_ = "../dmt_jepa.py"

model = dict(msn=None, lat=None)
