# Equation 4 without weights in both branches (table 6's memory).
_base_ = "../vit_small16.py"

model = dict(lat=dict(type="parameter_free"))
