# Table D.6, neighbours from 5 x 5 patches.
_base_ = "../vit_small16.py"

model = dict(msn=dict(window=5))
