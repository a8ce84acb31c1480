"""A whole experiment, from raw data to reports, as one Snakemake workflow: on one machine or on a cluster.

`Snakefile` and `rules/` define the dependencies. Every rule calls a command of nnU-Net or of this package; `commands`
builds its arguments. `step` runs such a command under a lock, unless its work is already done, and writes a record.
Records are small files that contain only digests of contents. Snakemake uses them to decide what is out of date, and
`records` keeps them consistent with the actual files. `config` reads and checks the configuration, `resources` computes
the resources of a job, `status` reports the state of an experiment, and `launch` starts Snakemake.

This subpackage does not import PyTorch. It needs NumPy, pydantic and PyYAML, and Snakemake where it runs.
"""
