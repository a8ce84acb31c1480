"""Augmentation: batchgeneratorsv2 transforms for B-spline deformation and histogram matching."""
