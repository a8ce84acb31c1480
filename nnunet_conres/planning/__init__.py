"""What the networks are made from: from nnU-Net's plans to the arguments of ours."""
