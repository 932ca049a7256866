# Table D.4, self-attention in both heads.
_base_ = "../vit_small16.py"

model = dict(lat=dict(context_attn="self", target_attn="self"))
