"""The mathematics of Mask-JEPA and DMT-JEPA in plain PyTorch; imports neither detectron2 nor mm*."""
