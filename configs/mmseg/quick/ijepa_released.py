# I-JEPA with the release's choices at the quick size.
_base_ = "./dmt_jepa_released.py"

model = dict(msn=None, lat=None)
