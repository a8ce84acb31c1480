"""Image and label files, the same for every room: `content` their bytes, `nifti` NIfTI, `volumes` nnU-Net's readers."""
