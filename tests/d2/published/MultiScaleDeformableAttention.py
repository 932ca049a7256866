"""Stands in for the compiled operator that the published Mask2Former imports; counts its calls."""

import torch

from jepa_plugins.core.deformable_attention import deformable_attention_pytorch

calls = {"forward": 0, "backward": 0}


def ms_deform_attn_forward(value, shapes, starts, locations, weights, step):
    calls["forward"] += 1
    return deformable_attention_pytorch(value, [tuple(size) for size in shapes.tolist()], locations, weights)


def ms_deform_attn_backward(value, shapes, starts, locations, weights, gradient, step):
    calls["backward"] += 1
    inputs = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
    with torch.enable_grad():
        sizes = [tuple(size) for size in shapes.tolist()]
        out = deformable_attention_pytorch(inputs[0], sizes, *inputs[1:])
    return torch.autograd.grad(out, inputs, gradient)
