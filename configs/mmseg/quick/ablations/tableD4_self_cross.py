# Table D.4, self-attention in the context head, cross-attention in the target head.
_base_ = "../dmt_jepa.py"

model = dict(lat=dict(context_attn="self", target_attn="cross"))
