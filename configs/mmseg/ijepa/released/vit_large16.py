_base_ = "../../dmt_jepa/released/vit_large16.py"

model = dict(msn=None, lat=None)
