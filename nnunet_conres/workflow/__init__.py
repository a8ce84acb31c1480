"""A whole experiment, from raw data to reports, as one Snakemake workflow: on one machine or on a cluster.

`Snakefile` and `rules/` say what follows from what; every rule calls a command of nnU-Net's or of this package, which
`commands` spells. `step` runs such a command: under a lock, unless its work is done already, and leaves a record.
Records are small files that hold digests of contents and nothing else: Snakemake decides by them what is out of date,
and `records` keeps them true to what is really there. `config` reads and checks the configuration, `resources` says
what a job needs, `status` where an experiment stands, `launch` starts Snakemake.

Only standard library and PyYAML are needed in here, and Snakemake where it runs.
"""
