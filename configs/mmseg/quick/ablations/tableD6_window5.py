# Table D.6, neighbours from 5 x 5 patches.
_base_ = "../dmt_jepa.py"

model = dict(msn=dict(window=5))
