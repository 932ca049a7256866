# Table D.4, self-attention in both heads.
_base_ = "../dmt_jepa.py"

model = dict(lat=dict(context_attn="self", target_attn="self"))
