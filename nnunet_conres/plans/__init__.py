"""The only adapter between nnU-Net's plans and our networks, including the entries that trainings write into plans."""
