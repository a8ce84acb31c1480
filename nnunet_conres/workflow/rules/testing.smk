# Test cases, ensembles, reports.


def trained(wildcards):
    return [RECORDS / "train" / wildcards.model / f"fold_{fold}.json" for fold in FOLDS]


def predicted(names):
    return [RECORDS / "predict" / name / f"part_{part}.json" for name in names for part in range(EXPERIMENT.parts)]


rule test_cases:
    localrule: True
    input:
        RECORDS / "raw.json",
    output:
        RECORDS / "test.json",
    params:
        log=LOGS / "test_cases.log",
    shell:
        "{STEP} test_cases --record {output:q} --log {params.log:q}"


rule predict:
    input:
        trained,
        RECORDS / "options" / "predict.json",
        RECORDS / "test.json",
    output:
        RECORDS / "predict" / "{model}" / "part_{part}.json",
    params:
        log=lambda wildcards: LOGS / "predict" / f"{wildcards.model}" / f"part_{wildcards.part}.log",
        command=lambda wildcards: commands.as_text(
            commands.predict(
                EXPERIMENT,
                MODELS[wildcards.model],
                int(wildcards.part),
                str(EXPERIMENT.predictions(f".{wildcards.model}_part_{wildcards.part}")),
                max(1, (threads_of("predict") - 1) // 2),
            )
        ),
    threads: threads_of("predict")
    retries: EXPERIMENT.retries
    resources:
        **needs("predict"),
    shell:
        "{STEP} predict --model {wildcards.model} --part {wildcards.part} --gpus {resources.gpu} --record {output:q} "
        "--log {params.log:q} -- {params.command}"


rule ensemble:
    input:
        lambda wildcards: predicted(ENSEMBLES[wildcards.ensemble]),
    output:
        RECORDS / "ensemble" / "{ensemble}.json",
    params:
        log=lambda wildcards: LOGS / "ensemble" / f"{wildcards.ensemble}.log",
        command=lambda wildcards, threads: commands.as_text(
            commands.ensemble(
                EXPERIMENT,
                ENSEMBLES[wildcards.ensemble],
                str(EXPERIMENT.predictions(f".{wildcards.ensemble}")),
                threads,
            )
        ),
    threads: threads_of("ensemble")
    resources:
        **needs("ensemble"),
    shell:
        "{STEP} ensemble --record {output:q} --log {params.log:q} -- {params.command}"


rule compare_folds:
    input:
        [RECORDS / "train" / name / f"fold_{fold}.json" for name in MODELS for fold in FOLDS],
        RECORDS / "options" / "compare.json",
    output:
        RECORDS / "compare" / "folds.json",
    params:
        log=LOGS / "compare_folds.log",
        command=as_it_is(
            commands.compare_folds(EXPERIMENT, str(EXPERIMENT.work / "report" / "folds"), threads_of("compare"))
        ),
    threads: threads_of("compare")
    resources:
        **needs("compare"),
    shell:
        "{STEP} compare --record {output:q} --log {params.log:q} -- {params.command}"


rule compare_test:
    input:
        predicted(MODELS),
        [RECORDS / "ensemble" / f"{name}.json" for name in ENSEMBLES],
        RECORDS / "options" / "compare.json",
    output:
        RECORDS / "compare" / "test.json",
    params:
        log=LOGS / "compare_test.log",
        command=as_it_is(
            commands.compare_test(EXPERIMENT, str(EXPERIMENT.work / "report" / "test"), threads_of("compare"))
        ),
    threads: threads_of("compare")
    resources:
        **needs("compare"),
    shell:
        "{STEP} compare --record {output:q} --log {params.log:q} -- {params.command}"
