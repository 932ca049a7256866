# Table D.6, neighbours from all patches.
_base_ = "../vit_small16.py"

model = dict(msn=dict(window="all"))
