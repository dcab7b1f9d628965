"""The configuration of one training run, and what of it may change when the run is resumed."""

from __future__ import annotations

from dataclasses import field, replace
from pathlib import Path
from typing import Any, Literal

from megaprior.config import configclass, dump_config
from megaprior.data.loader import DataConfig
from megaprior.data.weighting import WeightingConfig
from megaprior.errors import UsageError
from megaprior.files import digest_json
from megaprior.models.lm import ModelConfig
from megaprior.trackers import TrackerConfig
from megaprior.train.guards import GuardConfig
from megaprior.train.optim import OptimConfig, check_optim, learning_rate
from megaprior.train.profiling import ProfileConfig
from megaprior.train.zero3_config import resolve_extras, zero_stage

# These leave every loss and weight as it is, so a resumed run may have others. Data are compared by what they hold and not
# by their paths (`Loader.identity`).
_FREE = {
    "out",
    "data",
    "save_every",
    "save_background",
    "keep_last",
    "keep_every",
    "eval_every",
    "eval_batches",
    "eval_threshold",
    "log_every",
    "timeout_s",
    "zero",
    "tracker",
    "guards",  # they decide about steps to come: who resumes after a stop may turn them on
    "preflight",
    "profile",
    "peak_tflops",
}
LVLMS = ("ulvlm", "hlvlm")  # stages that train on weighted captions
_LENGTH = {"steps", "optim.decay_steps"}
_LATER = {"model.trains": "projector", "compile": False}  # what runs did whose record is older than the option


@configclass
class RunConfig:
    """One training run: `megaprior train FILE key=value ...`."""

    stage: Literal["textlm", "reference", "ulvlm", "hlvlm", "clip"]
    out: Path
    data: DataConfig
    steps: int
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # what of a layer is computed twice
    compile: bool = False  # every decoder layer through torch.compile
    engine: Literal["local", "zero3"] = "local"
    zero: dict[str, Any] | Path = field(default_factory=dict)  # DeepSpeed options beside the loop's own, or a JSON file
    save_every: int = 500
    save_background: bool = True  # False: training waits until a checkpoint is written
    keep_last: int = 0  # so many of the newest checkpoints stay; 0: all
    keep_every: int = 0  # and those after multiples of so many steps; 0: none beside the newest
    eval_every: int = 0  # 0: never
    eval_batches: int = 4  # batches of data.batch_size held-out samples per evaluation
    eval_threshold: float = 0.5  # on w = 1 - p_r
    log_every: int = 1
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    preflight: bool | None = None  # the longest rows before step 1; None: on a GPU and under zero3
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    peak_tflops: float | None = None  # of the device, for the MFU; None: by the GPU's name
    timeout_s: float = 1800.0  # a rank that makes no progress for so long ends the job


def check_run(cfg: RunConfig, *, world: int) -> None:
    """Refuse what cannot work before anything is touched.

    Raises:
        UsageError: names the key and the remedy.
    """
    check_optim(cfg.optim, steps=cfg.steps)
    for key in ("steps", "save_every", "log_every", "eval_batches"):
        if getattr(cfg, key) < 1:
            raise UsageError(f"{key} is {getattr(cfg, key)}; it must be at least 1")
    for key in ("keep_last", "keep_every"):
        if getattr(cfg, key) < 0:
            raise UsageError(f"{key} is {getattr(cfg, key)}; a number of checkpoints or steps, or 0")
    if cfg.keep_every and not cfg.keep_last:
        raise UsageError(f"keep_every is {cfg.keep_every} but keep_last=0 keeps every checkpoint: set keep_last too")
    if cfg.eval_every and cfg.data.heldout is None:
        raise UsageError(f"eval_every is {cfg.eval_every} but data.heldout names no shards; set it, or eval_every=0")
    if cfg.engine == "local" and world > 1:
        raise UsageError(f"engine=local trains on one process, {world} were started; use engine=zero3")
    if cfg.engine == "local" and cfg.model.dtype != "float32":
        raise UsageError(
            f"model.dtype is {cfg.model.dtype}: engine=local would round every update to it; "
            "leave float32 and set precision=bf16, which computes in bf16 over fp32 weights"
        )
    if cfg.stage not in LVLMS and (cfg.weighting.kind != "ntp" or cfg.data.text):
        what = "compares images with captions" if cfg.stage == "clip" else "trains on text alone"
        raise UsageError(f"stage={cfg.stage} {what}: weighting.kind must be ntp and data.text empty")
    if cfg.stage == "hlvlm" and cfg.model.init is None:
        raise UsageError("stage=hlvlm trains an MLP onto a language model: name its folder or run with model.init")
    if cfg.stage != "hlvlm" and cfg.model.trains != "projector":
        raise UsageError(
            f"model.trains={cfg.model.trains} is for stage=hlvlm; stage={cfg.stage} trains its whole model anyway: remove it"
        )
    if cfg.engine == "zero3":
        stage = zero_stage(resolve_extras(cfg.zero))
        if cfg.model.frozen == "partitioned" and stage < 3:
            raise UsageError(
                f"model.frozen=partitioned but zero.zero_optimization.stage is {stage}, which partitions no parameters: use "
                "stage 3, or model.frozen=replicated"
            )
    if cfg.compile:
        _check_compile(cfg)
    if cfg.engine == "local" and cfg.model.frozen == "partitioned":
        raise UsageError(
            "model.frozen=partitioned spreads over the ranks of engine=zero3; one process holds all: use replicated"
        )


def _check_compile(cfg: RunConfig) -> None:
    """Refuse to compile where torch cannot, or would without a word compile nothing."""
    if cfg.stage == "clip":
        raise UsageError("compile=true is for the decoder layers of a language model, stage=clip has none: remove it")
    if cfg.activation_checkpointing == "selective":
        raise UsageError(
            "compile=true with activation_checkpointing=selective: the products that it keeps cannot be told inside a compiled "
            "layer; use full or none"
        )
    outside = cfg.stage == "hlvlm" and cfg.model.frozen == "replicated" and cfg.model.trains == "projector"
    if cfg.engine == "zero3" and zero_stage(resolve_extras(cfg.zero)) == 3 and not outside:
        raise UsageError(
            "compile=true under ZeRO-3: torch would trace into the hooks that gather each layer's weights, and again for every "
            "layer; use zero.zero_optimization.stage 1 or 2, or compile=false"
        )


def trajectory(cfg: RunConfig) -> dict[str, Any]:
    """The part of the configuration that losses and weights depend on, flat: {"optim.lr": 0.001, ...}."""
    return _flat({key: value for key, value in dump_config(cfg).items() if key not in _FREE})


def agreed_digest(cfg: RunConfig) -> str:
    """What all ranks of a run must agree on, or they would wait for each other: all but where their data lie."""
    return digest_json({key: value for key, value in dump_config(cfg).items() if key != "data"})


def refuse_other_run(cfg: RunConfig, recorded: dict[str, Any], *, done: int, where: Path) -> None:
    """Refuse to resume a run under a configuration that would have made another one of its `done` steps.

    A run may be made longer or shorter when its learning rates so far would have been the same (constant, or wsd before its
    decay). `recorded` is its `trajectory`.

    Raises:
        UsageError: names the first key that differs, both values and the remedy.
    """
    now, recorded = trajectory(cfg), {**_LATER, **recorded}
    differing = [key for key in sorted({*now, *recorded}) if now.get(key) != recorded.get(key)]
    if set(differing) <= _LENGTH:
        before = replace(cfg.optim, decay_steps=recorded["optim.decay_steps"])
        rates = [
            (learning_rate(cfg.optim, s, steps=cfg.steps), learning_rate(before, s, steps=recorded["steps"]))
            for s in range(1, done + 1)
        ]
        if all(one == other for one, other in rates):
            return
    for key in differing:
        raise UsageError(
            f"{where}: this run was begun with {key}={recorded.get(key)!r}, the command says {now.get(key)!r}; "
            "repeat the original command to resume it, or choose another `out`"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
