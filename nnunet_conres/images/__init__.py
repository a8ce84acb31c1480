"""Image and label files: `content` checks their bytes, `nifti` reads NIfTI, `volumes` uses nnU-Net's readers."""
