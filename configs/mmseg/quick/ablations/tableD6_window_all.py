# Table D.6, neighbours from all patches.
_base_ = "../dmt_jepa.py"

model = dict(msn=dict(window="all"))
