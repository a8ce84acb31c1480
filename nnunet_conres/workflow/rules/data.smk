# From raw data to what can be trained on. It goes before trainings that could start, so that all soon can.


rule convert:
    input:
        RECORDS / "options" / "data.json",
    output:
        RECORDS / "raw.json",
    params:
        log=LOGS / "convert.log",
        command=as_it_is(commands.convert(EXPERIMENT, threads_of("convert")) if EXPERIMENT.brats else []),
    threads: threads_of("convert")
    resources:
        **needs("convert"),
    shell:
        "{STEP} convert --record {output:q} --log {params.log:q} -- {params.command}"


rule fingerprint:
    input:
        RECORDS / "raw.json",
    output:
        RECORDS / "fingerprint.json",
    params:
        log=LOGS / "fingerprint.log",
        command=as_it_is(commands.fingerprint(EXPERIMENT, threads_of("fingerprint"))),
    threads: threads_of("fingerprint")
    resources:
        **needs("fingerprint"),
    shell:
        "{STEP} fingerprint --record {output:q} --log {params.log:q} -- {params.command}"


# Before any fold starts: nnU-Net's trainings would all try to write the file.
rule split:
    input:
        RECORDS / "raw.json",
        RECORDS / "options" / "splits.json",
    output:
        [RECORDS / "splits" / f"fold_{fold}.json" for fold in FOLDS],
    params:
        log=LOGS / "split.log",
        command=as_it_is(commands.split(EXPERIMENT, threads_of("split"))),
    threads: threads_of("split")
    resources:
        **needs("split"),
    shell:
        "{STEP} split --record {output[0]:q} --log {params.log:q} -- {params.command}"


def stock_plans(wildcards):
    """This package's planners share preprocessed data with nnU-Net's own plans, once those are there."""
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
    params:
        log=lambda wildcards: LOGS / "plan" / f"{wildcards.plans}__{wildcards.configuration}.log",
        command=lambda wildcards: commands.as_text(commands.plan(EXPERIMENT, wildcards.plans)),
    priority: 10
    threads: threads_of("plan")
    resources:
        **needs("plan"),
    shell:
        "{STEP} plan --plans {wildcards.plans} --configuration {wildcards.configuration} --record {output:q} "
        "--log {params.log:q} -- {params.command}"


rule preprocess:
    input:
        RECORDS / "raw.json",
        RECORDS / "plans" / "{plans}__{configuration}.json",
    output:
        RECORDS / "preprocessed" / "{plans}__{configuration}.json",
    params:
        log=lambda wildcards: LOGS / "preprocess" / f"{wildcards.plans}__{wildcards.configuration}.log",
        command=lambda wildcards, threads: commands.as_text(
            commands.preprocess(EXPERIMENT, wildcards.plans, wildcards.configuration, threads)
        ),
    priority: 10
    threads: threads_of("preprocess")
    resources:
        **needs("preprocess"),
    shell:
        "{STEP} preprocess --plans {wildcards.plans} --configuration {wildcards.configuration} --record {output:q} "
        "--log {params.log:q} -- {params.command}"
