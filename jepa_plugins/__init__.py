"""Self-supervised pre-training (Mask-JEPA, DMT-JEPA) as plugins for segmentation toolkits.

Importing this package or ``jepa_plugins.core`` needs no toolkit; ``import jepa_plugins.d2`` registers the
detectron2 models.
"""

__version__ = "0.1.0"
