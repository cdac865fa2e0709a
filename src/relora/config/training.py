"""Settings that pretraining and fine-tuning share."""

from pydantic import model_validator

from relora.config.distributed import DistributedSettings
from relora.config.sections import (
    BatchSettings,
    CheckpointSettings,
    EvaluateSettings,
    LogSettings,
    LowRankSettings,
    MemorySettings,
    ModelSettings,
    NonFiniteSettings,
    OptimizerSettings,
    PrecisionSettings,
    RestartSettings,
)
from relora.config.values import Place, Seed, Settings, Text


class TrainingConfig(Settings):
    """Base class of a run's configuration; the subclasses declare data, methods and schedule."""

    output_dir: Place
    """Run folder, relative to the current folder."""
    seed: Seed = 0
    """Seed of every random draw: weights, factors, data order, dropout, samples."""
    device: Text = "auto"
    """Device: auto (the first CUDA GPU, else MPS, else the CPU), cpu, cuda, cuda:N or mps."""
    model: ModelSettings
    data: Settings
    method: Text
    """Training method, one of those of the subclass."""
    lowrank: LowRankSettings = LowRankSettings()
    restart: RestartSettings = RestartSettings()
    schedule: Settings
    optimizer: OptimizerSettings = OptimizerSettings()
    batch: BatchSettings = BatchSettings()
    precision: PrecisionSettings = PrecisionSettings()
    memory: MemorySettings = MemorySettings()
    deterministic: bool = True
    """Take every sum on a GPU in the same order each time, so that a continued run ends in the same bits. `false` is
    somewhat faster; a CPU does so anyway."""
    compile: bool = False
    """Compile the repeated blocks with torch.compile; on a CPU this needs a C++ compiler."""
    distributed: DistributedSettings = DistributedSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    non_finite: NonFiniteSettings = NonFiniteSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    log: LogSettings = LogSettings()
    samples: Settings

    @property
    def lowrank_lr(self) -> float:
        """Peak learning rate of lora_A; unless given, twice that of the blocks' matrices at full rank."""
        optimizer = self.optimizer
        return optimizer.lowrank_lr or 2 * (optimizer.matrix_lr or optimizer.lr)

    @property
    def measured_restarts(self) -> int:
        """n, where the held-out loss is measured around every n-th restart: not oftener than twice as often as else."""
        return max(1, -(-self.evaluate.every_steps // (2 * self.restart.every_steps)))  # rounded up

    @model_validator(mode="after")
    def _check_optimizer(self) -> "TrainingConfig":
        """Refuse an optimizer with low-rank moments, except with `method: full`."""
        name = self.optimizer.name
        if not name.startswith("adamw") and self.method != "full":
            raise ValueError(f"optimizer.name: {name} trains at full rank; set `method: full`, or take `adamw`")
        for key in ("factors", "matrices"):
            if getattr(self.optimizer, key) == "muon" and name != "adamw":
                raise ValueError(
                    f"optimizer.{key}: muon stands beside adamw, not beside {name}; set `optimizer.name: adamw`"
                )
        return self

    @model_validator(mode="after")
    def _check_restarts(self) -> "TrainingConfig":
        """Refuse restarts that the optimizer or the trained scales cannot have, or that come too close."""
        restart = self.restart
        if self.optimizer.name == "adamw-8bit" and (
            restart.optimizer not in ("zero", "keep") or (restart.stagger == "ranks" and restart.optimizer == "zero")
        ):
            raise ValueError(
                f"restart.optimizer: {restart.optimizer} cannot work on the codes of adamw-8bit; set `zero` or `keep`"
            )
        if restart.stagger == "ranks" and self.lowrank.trainable_scaling:
            raise ValueError("restart.stagger: ranks would begin anew beside a trained scale; set `layers` or `none`")
        if restart.stagger != "none" and restart.every_steps < restart.turns:
            raise ValueError(
                f"restart.turns ({restart.turns}) must not exceed restart.every_steps ({restart.every_steps})"
            )
        if self.method == "relora" and restart.retain and int(restart.retain * self.lowrank.r) == 0:
            raise ValueError(
                f"restart.retain ({restart.retain:g}) of lowrank.r ({self.lowrank.r}) is no whole rank; raise it, or "
                "set `retain: 0`"
            )
        if self.method == "relora" and restart.warmup_steps >= restart.every_steps:
            raise ValueError(
                f"restart.warmup_steps ({restart.warmup_steps}) must be shorter than "
                f"restart.every_steps ({restart.every_steps})"
            )
        return self
