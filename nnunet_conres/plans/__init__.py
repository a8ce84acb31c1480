"""From nnU-Net's plans to our networks, and what trainings write into them: the only adapter between the two."""
