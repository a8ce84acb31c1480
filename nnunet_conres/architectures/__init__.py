"""Networks as plain ``nn.Module``s; they know nothing of nnU-Net's trainers, of losses or of files."""
