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
    shell:
        "{STEP} test_cases --record {output:q}"


rule predict:
    input:
        trained,
        RECORDS / "options" / "predict.json",
        RECORDS / "test.json",
    output:
        RECORDS / "predict" / "{model}" / "part_{part}.json",
    threads: threads_of("predict")
    retries: EXPERIMENT.retries
    resources:
        **needs("predict"),
    shell:
        "{STEP} predict --model {wildcards.model} --part {wildcards.part} --gpus {resources.gpu} --record {output:q} "
        "--threads {threads}"


rule ensemble:
    input:
        lambda wildcards: predicted(ENSEMBLES[wildcards.ensemble]),
    output:
        RECORDS / "ensemble" / "{ensemble}.json",
    threads: threads_of("ensemble")
    resources:
        **needs("ensemble"),
    shell:
        "{STEP} ensemble --record {output:q} --threads {threads}"


rule postprocess:
    input:
        trained,
        RECORDS / "options" / "postprocess.json",
    output:
        RECORDS / "postprocess" / "{model}.json",
    threads: threads_of("postprocess")
    resources:
        **needs("postprocess"),
    shell:
        "{STEP} postprocess --record {output:q} --threads {threads}"


rule compare_folds:
    input:
        [RECORDS / "train" / name / f"fold_{fold}.json" for name in MODELS for fold in FOLDS],
        postprocessed(MODELS),
        RECORDS / "options" / "compare.json",
    output:
        RECORDS / "compare" / "folds.json",
    threads: threads_of("compare")
    resources:
        **needs("compare"),
    shell:
        "{STEP} compare --record {output:q} --threads {threads}"


rule compare_test:
    input:
        predicted(MODELS),
        [RECORDS / "ensemble" / f"{name}.json" for name in ENSEMBLES],
        postprocessed(MODELS),
        RECORDS / "options" / "compare.json",
    output:
        RECORDS / "compare" / "test.json",
    threads: threads_of("compare")
    resources:
        **needs("compare"),
    shell:
        "{STEP} compare --record {output:q} --threads {threads}"


rule package:
    input:
        trained,
        lambda wildcards: postprocessed([wildcards.model]),
        RECORDS / "options" / "package.json",
    output:
        RECORDS / "package" / "{model}.json",
    threads: threads_of("package")
    resources:
        **needs("package"),
    shell:
        "{STEP} package --record {output:q}"
