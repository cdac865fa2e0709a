"""What every run that trains reads: the settings that pretraining and fine-tuning share."""

from pydantic import model_validator

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
    """A run; what it trains on is said by those that stand on this."""

    output_dir: Place
    """The run folder."""
    seed: Seed = 0
    device: Text = "auto"
    """auto (a GPU if there is one, else the CPU), cpu, cuda, cuda:N or mps."""
    model: ModelSettings
    data: Settings
    method: Text
    lowrank: LowRankSettings = LowRankSettings()
    restart: RestartSettings = RestartSettings()
    schedule: Settings
    optimizer: OptimizerSettings = OptimizerSettings()
    batch: BatchSettings = BatchSettings()
    precision: PrecisionSettings = PrecisionSettings()
    memory: MemorySettings = MemorySettings()
    deterministic: bool = True
    """On a GPU, take every sum in the same order each time, so that a continued run ends in the same bits."""
    compile: bool = False
    """Compile the repeated blocks (torch.compile); needs a C++ compiler on a CPU."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    non_finite: NonFiniteSettings = NonFiniteSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    log: LogSettings = LogSettings()
    samples: Settings

    @property
    def lowrank_lr(self) -> float:
        """Learning rate of lora_A; unless given, twice that of the matrices which the factors stand for."""
        optimizer = self.optimizer
        return optimizer.lowrank_lr or 2 * (optimizer.matrix_lr or optimizer.lr)

    @model_validator(mode="after")
    def _projects_at_full_rank(self) -> "TrainingConfig":
        name = self.optimizer.name
        if not name.startswith("adamw") and self.method != "full":
            raise ValueError(f"optimizer.name: {name} trains at full rank; set `method: full`, or take `adamw`")
        return self

    @model_validator(mode="after")
    def _restarts_fit(self) -> "TrainingConfig":
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
        if self.method == "relora" and restart.warmup_steps >= restart.every_steps:
            raise ValueError(
                f"restart.warmup_steps ({restart.warmup_steps}) must be shorter than "
                f"restart.every_steps ({restart.every_steps})"
            )
        return self
