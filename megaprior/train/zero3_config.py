"""What of DeepSpeed's JSON is the user's, and what has its one home in our own configuration.

DeepSpeed ignores an unknown key at the top without a word, and several known ones would change the batch, the precision or the
update behind the loop's back. So the file may hold the keys of `_THEIRS` and nothing else.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, Literal

from megaprior.errors import UsageError

Stage = Literal[1, 2, 3]

# Laid over the user's options, always.
_OURS = {
    "gradient_accumulation_steps": 1,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
# Everything else that may stand at the top of the file.
_THEIRS = (
    "zero_optimization",
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "aio",
    "checkpoint",
    "comms_logger",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "tensorboard",
    "wall_clock_breakdown",
)
# Key of DeepSpeed's -> what to set instead.
_HOMES = {
    "train_batch_size": "set data.batch_size (pairs per step over all ranks)",
    "train_micro_batch_size_per_gpu": "set data.max_tokens (tokens of a row; a micro-step is one row)",
    "gradient_accumulation_steps": "set data.batch_size and data.max_tokens: a step has as many micro-steps as it needs rows",
    "gradient_clipping": "set optim.clip",
    "optimizer": "set optim.lr, optim.betas, optim.eps and optim.weight_decay",
    "scheduler": "set optim.schedule, optim.warmup_steps, optim.decay_steps and optim.min_lr_ratio",
    "fp16": "set precision=bf16 (fp16 is not trained in)",
    "bf16": "set precision",
    "amp": "set precision",
    "torch_autocast": "set precision",
    "data_types": "set precision; gradients always accumulate in fp32",
    "activation_checkpointing": "set activation_checkpointing=none, selective or full",
    "compile": "set compile",
    "curriculum_learning": "the order of samples is data's alone",
    "data_efficiency": "the order of samples is data's alone",
    "elasticity": "data.batch_size is the same on any number of ranks",
    "autotuning": "use `megaprior plan`",
    "prescale_gradients": "the loss is divided by the tokens of the global batch, once",
    "gradient_predivide_factor": "the loss is divided by the tokens of the global batch, once",
    "sparse_gradients": "gradients are dense",
    "managed_gradient_accumulation": "the training loop says where a step ends",
    "zero_allow_untested_optimizer": "the engine sets it",
    "zero_force_ds_cpu_optimizer": "the engine sets it",
    "pipeline": "ranks are data-parallel only",
    "tensor_parallel": "ranks are data-parallel only",
    "autotp_size": "ranks are data-parallel only",
    "sequence_parallel_size": "ranks are data-parallel only",
    "wandb": "set tracker",
    "comet": "set tracker",
}
# Options of stage 3, and the value that means off.
_STAGE_3 = {
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
}


def resolve_extras(zero: dict[str, Any] | Path) -> dict[str, Any]:
    """The configuration's `zero`: DeepSpeed options as they stand there, or a JSON file of them; checked.

    Raises:
        UsageError: the file is missing or no JSON object, or an option has its home elsewhere or cannot work.
    """
    extras = read_extras(zero) if isinstance(zero, Path) else zero
    check_extras(extras)
    return extras


def read_extras(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON file, for example one of launch/deepspeed/.

    Raises:
        UsageError: it is missing or no JSON object.
    """
    try:
        extras = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not a DeepSpeed configuration ({error})") from None
    if not isinstance(extras, dict):
        raise UsageError(f"{path}: a DeepSpeed configuration is a JSON object")
    return extras


def check_extras(extras: dict[str, Any]) -> None:
    """Refuse what would contradict the loop, be ignored in silence, or fail in DeepSpeed later and less clearly.

    Raises:
        UsageError: names the key, its value and the remedy.
    """
    for key, value in extras.items():
        if key in _HOMES:
            raise UsageError(f"zero.{key} is {value!r}, which is not set here: remove it; {_HOMES[key]}")
        if key not in _THEIRS:
            near = difflib.get_close_matches(key, [*_THEIRS, *_HOMES], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(_THEIRS)}"
            raise UsageError(f"zero.{key} is {value!r}: not an option of this engine, remove it" + hint)
    if "load_universal" in extras.get("checkpoint", {}):
        raise UsageError("zero.checkpoint.load_universal is not set here: remove it; a resume finds out by itself")
    _check_zero(extras.get("zero_optimization", {}))


def _check_zero(zero: dict[str, Any]) -> None:
    where, stage = "zero.zero_optimization", zero.get("stage", 3)
    if stage not in (1, 2, 3) or isinstance(stage, bool):
        raise UsageError(f"{where}.stage is {stage!r}; it must be 1, 2 or 3 (one process without: engine=local)")
    for key in ("zenflow", "elastic_checkpoint", "legacy_stage1"):
        if zero.get(key):
            raise UsageError(f"{where}.{key} is {zero[key]!r}: this engine cannot train with it; remove it")
    for key in ("offload_optimizer", "offload_param"):
        offload = zero.get(key) or {}
        if offload.get("device", "none") not in ("none", "cpu"):
            raise UsageError(f"{where}.{key}.device is {offload['device']!r}; this engine offloads to 'cpu' only")
        if offload.get("super_offload"):
            raise UsageError(f"{where}.{key}.super_offload: this engine cannot train with it; remove it")
    if stage == 3:
        return
    for key, off in _STAGE_3.items():
        if zero.get(key, off) != off:
            raise UsageError(f"{where}.{key} is {zero[key]!r} but stage is {stage}: it needs stage 3")
    if (zero.get("offload_param") or {}).get("device", "none") != "none":
        raise UsageError(f"{where}.offload_param needs stage 3, stage is {stage}: parameters are whole on every rank")
    if offload_ratio(zero) not in (0.0, 1.0):
        raise UsageError(
            f"{where}.offload_optimizer.ratio is {offload_ratio(zero)}: stage {stage} moves all or nothing"
        )


def zero_stage(extras: dict[str, Any]) -> Stage:
    """What is partitioned: optimizer state (1), gradients too (2), parameters too (3)."""
    return extras.get("zero_optimization", {}).get("stage", 3)


def offload_ratio(zero: dict[str, Any]) -> float:
    """The share of the optimizer's state that lies in host memory, of a `zero_optimization` section."""
    offload = zero.get("offload_optimizer") or {}
    return float(offload.get("ratio", 1.0)) if offload.get("device", "none") != "none" else 0.0


def deepspeed_config(
    extras: dict[str, Any], *, precision: Literal["fp32", "bf16"], world: int, universal: bool
) -> dict[str, Any]:
    """`extras`, which `check_extras` has passed, with what the loop's contract fixes laid over them."""
    fixed = {**_OURS, "train_batch_size": world, "bf16": {"enabled": precision == "bf16"}}
    zero = {**extras.get("zero_optimization", {}), "stage": zero_stage(extras)}
    merged = {"steps_per_print": 1 << 62, **extras, **fixed, "zero_optimization": zero}
    if universal:
        merged["checkpoint"] = {**extras.get("checkpoint", {}), "load_universal": True}
    return merged
