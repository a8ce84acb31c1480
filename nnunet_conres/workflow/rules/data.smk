# From raw data to preprocessed data. Planning and preprocessing have priority over trainings that are ready, so that
# all trainings can start soon.


rule convert:
    input:
        RECORDS / "options" / "data.json",
    output:
        RECORDS / "raw.json",
    threads: threads_of("convert")
    resources:
        **needs("convert"),
    shell:
        "{STEP} convert --record {output:q} --threads {threads}"


rule fingerprint:
    input:
        RECORDS / "raw.json",
    output:
        RECORDS / "fingerprint.json",
    threads: threads_of("fingerprint")
    resources:
        **needs("fingerprint"),
    shell:
        "{STEP} fingerprint --record {output:q} --threads {threads}"


# Runs before any fold starts: otherwise all of nnU-Net's trainings would try to write the file.
rule split:
    input:
        RECORDS / "raw.json",
        RECORDS / "options" / "splits.json",
    output:
        [RECORDS / "splits" / f"fold_{fold}.json" for fold in FOLDS],
    threads: threads_of("split")
    resources:
        **needs("split"),
    shell:
        "{STEP} split --record {output[0]:q} --threads {threads}"


def stock_plans(wildcards):
    """Return records of nnU-Net's own plans. They must exist first: this package's planners share their data."""
    if wildcards.plans not in OWN_PLANNERS and not EXPERIMENT.plans[wildcards.plans].is_own:
        return []
    stock = {(model.plans, model.configuration) for model in MODELS.values() if not EXPERIMENT.plans[model.plans].is_own}
    return [RECORDS / "plans" / f"{plans}__{configuration}.json" for plans, configuration in sorted(stock)]


rule plan:
    input:
        RECORDS / "fingerprint.json",
        RECORDS / "options" / "plans_{plans}.json",
        order_only=ancient(stock_plans),
    output:
        RECORDS / "plans" / "{plans}__{configuration}.json",
    priority: 10
    threads: threads_of("plan")
    resources:
        **needs("plan"),
    shell:
        "{STEP} plan --plans {wildcards.plans} --configuration {wildcards.configuration} --record {output:q}"


rule preprocess:
    input:
        RECORDS / "raw.json",
        RECORDS / "plans" / "{plans}__{configuration}.json",
    output:
        RECORDS / "preprocessed" / "{plans}__{configuration}.json",
    priority: 10
    threads: threads_of("preprocess")
    resources:
        **needs("preprocess"),
    shell:
        "{STEP} preprocess --plans {wildcards.plans} --configuration {wildcards.configuration} --record {output:q} "
        "--threads {threads}"
