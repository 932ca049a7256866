# Table 8, LAT without MSN: attention over all patches of the image.
_base_ = "../vit_small16.py"

model = dict(msn=None)
