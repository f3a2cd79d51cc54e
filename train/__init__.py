"""Training program for semi-supervised segmentation with a class-wise memory contrast: ``python -m train``."""
