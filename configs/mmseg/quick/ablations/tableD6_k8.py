# Table D.6, k = 8 of the 3 x 3 window.
_base_ = "../dmt_jepa.py"

model = dict(msn=dict(k=8))
