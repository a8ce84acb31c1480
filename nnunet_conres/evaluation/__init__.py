"""What a person reads after a run: tables of nnU-Net's scores and pictures of its predictions."""
