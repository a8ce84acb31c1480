"""From a trained model to a challenge's container: what runs in it, and the folder that it is built from."""
