"""Challenge submissions: the program in a model's container, and the folder that the container is built from."""
