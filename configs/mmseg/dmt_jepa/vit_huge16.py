_base_ = "./vit_huge14.py"

model = dict(patch_size=16)
