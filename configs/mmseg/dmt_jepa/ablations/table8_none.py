# Table 8, neither MSN nor LAT: I-JEPA with the paper's loss.
_base_ = "../vit_small16.py"

model = dict(msn=None, lat=None)
