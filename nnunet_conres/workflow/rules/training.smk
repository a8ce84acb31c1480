# Memory estimates, and the training of every fold of every model.


def prepared(wildcards, kind):
    model = MODELS[wildcards.model]
    return RECORDS / kind / f"{model.plans}__{model.configuration}.json"


def trainer_of(wildcards):
    return RECORDS / "trainers" / f"{MODELS[wildcards.model].trainer}.json"


def needs_training(name):
    """Return a function that looks up a resource of one training when its job starts: by then more may be measured.

    Snakemake omits a resource whose value is an empty string.
    """

    def look_up(wildcards):
        return resources.of_training(EXPERIMENT, MODELS[wildcards.model], int(wildcards.fold)).get(name, "")

    return look_up


rule memory:
    input:
        lambda wildcards: prepared(wildcards, "plans"),
    output:
        RECORDS / "memory" / "{model}.json",
    priority: 10
    threads: threads_of("memory")
    resources:
        **needs("memory"),
    shell:
        "{STEP} memory --record {output:q}"


rule train:
    input:
        lambda wildcards: prepared(wildcards, "preprocessed"),
        trainer_of,
        RECORDS / "splits" / "fold_{fold}.json",
        # only needed for the resources
        memory=ancient(RECORDS / "memory" / "{model}.json"),
    output:
        RECORDS / "train" / "{model}" / "fold_{fold}.json",
    threads: needs_training("threads")
    retries: resources.training_retries(EXPERIMENT)
    resources:
        **{name: needs_training(name) for name in resources.names_of_training(EXPERIMENT)},
    shell:
        "{STEP} train --model {wildcards.model} --fold {wildcards.fold} --gpus {resources.gpu} --record {output:q}"
