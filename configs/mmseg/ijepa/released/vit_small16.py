_base_ = "../../dmt_jepa/released/vit_small16.py"

model = dict(msn=None, lat=None)
