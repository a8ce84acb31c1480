# Every fold of every model.


def prepared(wildcards, kind):
    model = MODELS[wildcards.model]
    return RECORDS / kind / f"{model.plans}__{model.configuration}.json"


def trainer_of(wildcards):
    return RECORDS / "trainers" / f"{MODELS[wildcards.model].trainer}.json"


def needs_training(name):
    """A resource of one training, looked up when the job is about to start: by then more may have been measured."""

    def look_up(wildcards):
        return resources.of_training(EXPERIMENT, MODELS[wildcards.model], int(wildcards.fold)).get(name, "")

    return look_up


rule memory:
    input:
        lambda wildcards: prepared(wildcards, "plans"),
    output:
        RECORDS / "memory" / "{model}.json",
    params:
        log=lambda wildcards: LOGS / "memory" / f"{wildcards.model}.log",
        command=lambda wildcards: commands.as_text(commands.memory(EXPERIMENT, MODELS[wildcards.model])),
    priority: 10
    threads: threads_of("memory")
    resources:
        mem_mb=needs("memory", "mem_mb"),
        runtime=needs("memory", "runtime"),
    shell:
        "{STEP} memory --record {output} --log {params.log} -- {params.command}"


rule train:
    input:
        lambda wildcards: prepared(wildcards, "preprocessed"),
        trainer_of,
        RECORDS / "splits" / "fold_{fold}.json",
        # for the resources alone
        memory=ancient(RECORDS / "memory" / "{model}.json"),
    output:
        RECORDS / "train" / "{model}" / "fold_{fold}.json",
    params:
        log=lambda wildcards: LOGS / "train" / f"{wildcards.model}" / f"fold_{wildcards.fold}.log",
        command=lambda wildcards: commands.as_text(
            commands.train(EXPERIMENT, MODELS[wildcards.model], int(wildcards.fold))
        ),
    threads: needs_training("threads")
    retries: resources.training_retries(EXPERIMENT)
    resources:
        mem_mb=needs_training("mem_mb"),
        runtime=needs_training("runtime"),
        gpu=needs_training("gpu"),
        gpu_memory_gb=needs_training("gpu_memory_gb"),
        gpu_model=needs_training("gpu_model"),
        slurm_extra=needs_training("slurm_extra"),
        slurm_partition=needs_training("slurm_partition"),
    shell:
        "{STEP} train --model {wildcards.model} --fold {wildcards.fold} --gpus {resources.gpu} --record {output} "
        "--log {params.log} -- {params.command}"
