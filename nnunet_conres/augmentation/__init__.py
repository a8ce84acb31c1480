"""Augmentation: B-spline deformation, histogram matching, and nnU-Net's own pipeline on the training device."""
