# Table 8, MSN and LAT (the default, also in tables D.3, D.4 and D.6).
_base_ = "../dmt_jepa.py"

model = dict(msn=dict(window=3, k=4), lat=dict(type="learned"))
