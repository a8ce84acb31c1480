"""Data sets: BraTS into nnU-Net's raw format, and made-up tumour cases to try everything on."""
