_base_ = "../../dmt_jepa/released/vit_huge14.py"

model = dict(msn=None, lat=None)
