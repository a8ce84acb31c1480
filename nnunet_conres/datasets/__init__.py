"""Data sets: BraTS into nnU-Net's raw format, and synthetic tumour cases to try everything on."""
