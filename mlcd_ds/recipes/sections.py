"""The sections of a recipe, as every part of a run may read them: which objectives there are is not known here.

Each component's settings are defined beside the component.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mlcd_ds.artefacts.typed import MAX_THREADS, FilePath, Frozen, free_field
from mlcd_ds.data.captions import CaptionForm
from mlcd_ds.data.loader import AugmentConfig
from mlcd_ds.heads.partial_fc import HeadConfig
from mlcd_ds.models.text import TextConfig
from mlcd_ds.models.vit import ViTConfig

Decay = Annotated[float, Field(ge=0, lt=1)]


class DataConfig(Frozen):
    """Where images, labels and texts come from, and in which order."""

    index: FilePath | None = free_field(None, description="folder of `mlcd index`")
    labels: FilePath | None = free_field(None, description="folder of `mlcd assign`")
    clusters: FilePath | None = free_field(None, description="folder of `mlcd cluster`; head.init=centers reads it")
    tokenizer: str = free_field(
        "clip", description="of texts: clip, or a folder with a tokenizer.json (`mlcd tokenizer`, Hugging Face)"
    )
    captions: CaptionForm = Field(
        "whole", description="a sample's .txt is one caption; or lines: one each, of which a step takes one at random"
    )
    augment: AugmentConfig = AugmentConfig()
    knn_index: FilePath | None = free_field(
        None, description="folder of `mlcd index` with labelled images, for train.knn_every and train.zeroshot_every"
    )
    knn_label_key: str = free_field("label", description="key of the whole number in their .json; null is no label")
    classes: FilePath | None = free_field(None, description="file of the labels' names, for train.zeroshot_every")
    templates: str = free_field(
        "clip_7", description="of texts about them: clip_7, clip_80, or a file with a text a line, {} for the name"
    )
    num_streams: int = Field(4, ge=1, description="equal parts of the global batch; ranks must divide it")
    shuffle_window: int = Field(
        8192, ge=1, le=10**8, description="samples of a stream that are shuffled among each other"
    )
    num_threads: int = free_field(2, ge=1, le=MAX_THREADS, description="decoding threads of a rank")


class OptimizerConfig(Frozen):
    """AdamW for the backbone; its numbers and its schedule also for the head."""

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: orthogonalised momentum for the blocks' matrices, AdamW for the rest; not clipped"
    )
    muon_lr_scale: float = Field(20.0, gt=0, description="factor on lr for Muon's matrices")
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="of Muon")
    lr: float = Field(gt=0, description="peak learning rate")
    weight_decay: float = Field(0.2, ge=0, description="on matrices only (paper: 0.2)")
    betas: tuple[Decay, Decay] = Field((0.9, 0.98), description="AdamW's decay rates (not published)")
    eps: float = Field(1e-6, gt=0, description="AdamW's epsilon (not published)")
    warmup_steps: int = Field(2000, ge=0, description="linear warm-up (paper: 2,000)")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up (not published)")
    cooldown_steps: int = free_field(
        0, when="rates", ge=0, description="of schedule constant: the last steps, in which lr falls linearly"
    )
    final_lr: float = Field(0.0, ge=0, le=1, description="part of lr at the end (not published)")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor on lr from a block to the one before it, for fine-tuning; 1: none"
    )
    clip_norm: float = Field(5.0, gt=0, description="largest gradient norm of the backbone (team code: 5)")
    head_clip_norm: float = Field(5.0, gt=0, description="largest gradient norm of the head, all shards (team code: 5)")
    head_lr_scale: float = Field(1.0, gt=0, description="factor on lr for the head")


class PhaseConfig(Frozen):
    """A first part of a run with other images. A null value inherits the run's."""

    until: int = Field(ge=1, description="the phase ends after this many steps of the run")
    image_size: int | None = Field(
        None, ge=1, le=4096, description="pixels; model.image_size comes after the last phase"
    )
    token_drop: float | None = Field(None, ge=0, lt=1, description="part of the patches left out")


class TrainConfig(Frozen):
    """Length, batch, precision and book-keeping of a run."""

    out: FilePath = free_field(Path("runs/train"), description="folder of the run")
    init_from: FilePath | None = Field(
        None,
        description="what the run starts from: another run, or a checkpoint of one, towers and head; or a folder of "
        "Hugging Face or open_clip (CLIP, MLCD, or `mlcd export`'s): the towers that it has",
    )
    steps: int = free_field(when="rates", ge=1, le=10**9, description="optimizer steps")
    global_batch: int = Field(ge=1, le=2**20, description="images a step, over all ranks")
    micro_batch_per_rank: int | None = free_field(None, ge=1, description="images a forward pass; null: all of a rank")
    drop_path: float = Field(0.0, ge=0, lt=1, description="chance that an image skips a branch of the last block")
    token_drop: float = Field(0.0, ge=0, lt=1, description="part of an image's patches left out, drawn each time")
    phases: tuple[PhaseConfig, ...] = Field((), description="what comes before the settings above: low resolution, say")
    recompute: Literal["none", "mlp", "block"] = free_field(
        "none", description="activation checkpointing: of each block's MLP branch, or of each whole block"
    )
    compile: bool = free_field(
        False, description="torch.compile each block (needs a C++ compiler; slow at the first steps)"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "bf16", description="of the backbone; auto: as the DeepSpeed file says"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="of weights, order, crops and sampled classes")
    checkpoint_every: int = free_field(1000, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = free_field(2, ge=1, description="newest checkpoints that stay on disk")
    milestone_every: int | None = free_field(None, ge=1, description="steps between checkpoints that stay for good")
    ema_decay: float | None = free_field(
        None, gt=0, lt=1, description="of a moving average of the backbone's weights, kept beside them; null: none"
    )
    knn_every: int | None = free_field(None, ge=1, description="steps between kNN accuracies on data.knn_index")
    zeroshot_every: int | None = free_field(
        None, ge=1, description="steps between zero-shot accuracies on data.knn_index, of a model with a text tower"
    )
    profile_steps: tuple[int, int] | None = free_field(
        None, description="first and last step, counted from 1, of a trace by torch.profiler in the run's folder"
    )
    log_every: int = free_field(10, ge=1, description="steps between log entries; the host waits for the device then")


class TowersConfig(Frozen):
    """Which towers are trained. A frozen one is the one that train.init_from names, to the bit; it has no gradients and
    no optimizer's states, and is not in checkpoints, which name it by its checksum."""

    image: Literal["trained", "frozen"] = "trained"
    text: Literal["trained", "frozen"] = "trained"


class ObjectiveConfig(Frozen):
    """Base of every objective's own settings, which stand beside it (mlcd_ds/objectives)."""

    name: str = Field(description="the objective")


class Sections(Frozen):
    """All of a recipe. `mlcd_ds.config.Recipe` knows the objectives, and checks what belongs together."""

    description: str = free_field(min_length=1, description="what the run is, and what is to be expected of it")
    model: ViTConfig
    text: TextConfig | None = None
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig
    head: HeadConfig = HeadConfig()
    towers: TowersConfig = TowersConfig()
    optimizer: OptimizerConfig
    train: TrainConfig

    def is_frozen(self, tower: str) -> bool:
        """Whether a tower is kept as it is."""
        return getattr(self.towers, tower) == "frozen"
