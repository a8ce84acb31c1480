# Test cases, ensembles, post-processing, reports, packages.


def trained(wildcards):
    return [RECORDS / "train" / wildcards.model / f"fold_{fold}.json" for fold in FOLDS]


def predicted(names):
    return [RECORDS / "predict" / name / f"part_{part}.json" for name in names for part in range(EXPERIMENT.parts)]


def postprocessed(names):
    return [RECORDS / "postprocess" / f"{name}.json" for name in names if EXPERIMENT.postprocess]


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


rule postprocess:
    input:
        trained,
        RECORDS / "options" / "postprocess.json",
    output:
        RECORDS / "postprocess" / "{model}.json",
    params:
        log=lambda wildcards: LOGS / "postprocess" / f"{wildcards.model}.log",
        command=lambda wildcards, threads: commands.as_text(
            commands.postprocess(EXPERIMENT, MODELS[wildcards.model], threads)
        ),
    threads: threads_of("postprocess")
    resources:
        **needs("postprocess"),
    shell:
        "{STEP} postprocess --record {output:q} --log {params.log:q} -- {params.command}"


rule compare_folds:
    input:
        [RECORDS / "train" / name / f"fold_{fold}.json" for name in MODELS for fold in FOLDS],
        postprocessed(MODELS),
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
        postprocessed(MODELS),
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


rule package:
    input:
        trained,
        lambda wildcards: postprocessed([wildcards.model]),
        RECORDS / "options" / "package.json",
    output:
        RECORDS / "package" / "{model}.json",
    params:
        log=lambda wildcards: LOGS / "package" / f"{wildcards.model}.log",
        command=lambda wildcards: commands.as_text(commands.package(EXPERIMENT, MODELS[wildcards.model])),
    threads: threads_of("package")
    resources:
        **needs("package"),
    shell:
        "{STEP} package --record {output:q} --log {params.log:q} -- {params.command}"
