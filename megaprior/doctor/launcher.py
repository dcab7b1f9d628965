"""The launcher's environment: complete, and not in contradiction with itself."""

from __future__ import annotations

from collections.abc import Mapping

from megaprior.distributed import Place, place
from megaprior.doctor.finding import Finding, green, red, yellow
from megaprior.errors import UsageError

# launcher, its variables for RANK, WORLD_SIZE and LOCAL_RANK, and how they become ours
_SCHEDULERS = (
    ("srun", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")),
    ("mpirun", ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")),
    ("mpiexec", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")),
)
_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def read(environment: Mapping[str, str]) -> tuple[Place | None, list[Finding]]:
    """This process's place, None where the environment is wrong, and what is to be said about it."""
    env = environment
    try:
        here = place(env)
    except UsageError as error:
        return None, [
            red(
                "launcher",
                str(error),
                "the ranks would not find each other, or would overwrite each other's output",
                _remedy(env),
            )
        ]
    found = [*_contradictions(env, here), *_addresses(env, here)]
    if not found:
        who = _who(env)
        if here.world > 1:
            found = [
                green("launcher", f"rank {here.rank} of {here.world}, local rank {here.local_rank}, started by {who}")
            ]
        else:
            found = [_alone(env)]
    return here, found


def _alone(env: Mapping[str, str]) -> Finding:
    nodes = env.get("SLURM_JOB_NUM_NODES", "1")
    if nodes.isdigit() and int(nodes) > 1:
        return yellow(
            "launcher",
            f"one process in a Slurm allocation of {nodes} nodes",
            "only this machine was looked at",
            f"start the doctor as the training is started, on every node: {_srun('megaprior doctor')}",
        )
    return green("launcher", "one process, no launcher's variables are set")


def _who(env: Mapping[str, str]) -> str:
    if "TORCHELASTIC_RUN_ID" in env:
        return "torchrun"
    for name, (rank, _, _) in _SCHEDULERS:
        if rank in env:
            return name
    return "deepspeed or by hand"


def _contradictions(env: Mapping[str, str], here: Place) -> list[Finding]:
    if "TORCHELASTIC_RUN_ID" in env:  # srun starts one torchrun per node, which starts the ranks
        return []
    for name, variables in _SCHEDULERS:
        theirs = [env.get(variable, "") for variable in variables]
        if not all(value.isdigit() for value in theirs) or int(theirs[1]) <= 1:
            continue
        ours = (here.rank, here.world, here.local_rank)
        for variable, value, own, number in zip(variables, theirs, _OURS, ours, strict=True):
            if int(value) != number:
                return [
                    red(
                        "launcher",
                        f"{own}={number} but {variable}={value}",
                        f"{name} started the processes, so that {own} was set by something else, often once for all of them",
                        _remedy(env),
                    )
                ]
    return []


def _addresses(env: Mapping[str, str], here: Place) -> list[Finding]:
    local = env.get("LOCAL_WORLD_SIZE", "")
    several = local.isdigit() and here.world > int(local)
    if several and env.get("MASTER_ADDR") in ("localhost", "127.0.0.1", "::1"):
        return [
            red(
                "launcher",
                f"MASTER_ADDR={env['MASTER_ADDR']} with {here.world} ranks, {local} of them on this machine",
                "the ranks of other machines would look for rank 0 on themselves, and wait",
                "set MASTER_ADDR to the first node's name or address (Slurm: scontrol show hostnames | head -1)",
            )
        ]
    return []


def _srun(command: str) -> str:
    return f"srun bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID exec {command}'"


def _remedy(env: Mapping[str, str]) -> str:
    if "OMPI_COMM_WORLD_RANK" in env or "OMPI_COMM_WORLD_SIZE" in env:
        return (
            "mpirun ... bash -c 'RANK=$OMPI_COMM_WORLD_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE "
            "LOCAL_RANK=$OMPI_COMM_WORLD_LOCAL_RANK exec megaprior ...', with MASTER_ADDR and MASTER_PORT exported"
        )
    if "SLURM_PROCID" in env or "SLURM_STEP_NUM_TASKS" in env:
        return f"{_srun('megaprior ...')}, with MASTER_ADDR and MASTER_PORT exported"
    return "start through `deepspeed` or `torchrun`, which set all of them, or unset RANK, WORLD_SIZE and LOCAL_RANK to run alone"
