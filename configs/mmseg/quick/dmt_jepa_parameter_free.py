# Equation 4 without weights.
_base_ = "./base.py"

model = dict(lat=dict(type="parameter_free"))
