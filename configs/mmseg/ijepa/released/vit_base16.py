_base_ = "../../dmt_jepa/released/vit_base16.py"

model = dict(msn=None, lat=None)
