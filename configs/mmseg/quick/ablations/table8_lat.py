# Table 8, LAT without MSN: attention over all patches of the image.
_base_ = "../dmt_jepa.py"

model = dict(msn=None)
