"""ProtoCLIP (arXiv 2206.10996): CLIP's loss, and prototypes of the clusters of the other modality.

Training goes in episodes (data/episodes.py). At the beginning of one, its samples are embedded by the model as it is,
clustered in each modality, and made into prototypes (episode.py), which stay as they are to its end. In it

    L = L_clip + w (L_{I->T} + L_{T->I}) / 2 + w_x (L_{I->X} + L_{T->X}) / 2

where L_{I->T} (prototype_loss.py) has a projected image find its caption's cluster among texts, and X is an external
teacher. The first episodes have L_clip alone; so have the last, in which the image tower stays as it is.

B images on this rank, G of all ranks, P projection, E embedding, N samples of an episode.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mlcd_ds.artefacts.manifest import read_manifest
from mlcd_ds.clustering.embedding_store import EmbeddingManifest
from mlcd_ds.data.episodes import EpisodeOrder
from mlcd_ds.data.fields import TrainingData
from mlcd_ds.distributed.groups import ParallelGroups
from mlcd_ds.errors import UserError
from mlcd_ds.objectives.base import APART, Embed, Given, Need, OwnOutputs, PlannedRun, engine_memory
from mlcd_ds.objectives.clip import clip_loss
from mlcd_ds.objectives.episode import FILE_NAME, STUDENTS, Clusterer, Episode, load_state, save_state
from mlcd_ds.objectives.episode_plan import EpisodePlan, ProtoClipConfig, protoclip_config
from mlcd_ds.objectives.episode_reader import EpisodeReader, open_external
from mlcd_ds.objectives.pair_objective import FP32, PairObjective, Scale
from mlcd_ds.objectives.projection_heads import HeadParameters, head_names
from mlcd_ds.objectives.prototype_loss import BLOCK_ELEMENTS
from mlcd_ds.objectives.prototype_terms import PrototypeTerms
from mlcd_ds.recipes.sections import Sections


class ProtoClip(PairObjective):
    """Prototypes and their loss outside the engine; projection heads and both scales in it."""

    config_type = ProtoClipConfig
    num_products = 4
    output_names = ("scale", "proto_scale", *(name for tower in STUDENTS for name in head_names(tower)))
    has_own_order = True
    own_files = FILE_NAME

    def __init__(self, recipe: Sections, data: TrainingData, groups: ParallelGroups, device: torch.device) -> None:
        super().__init__(recipe, data, groups, device)
        self.config = config = protoclip_config(recipe)
        self.plan = EpisodePlan.of(recipe)
        self._world, self._device = groups.world, device
        external = open_external(config.teacher, groups) if config.teacher else None
        fingerprint = external.manifest.fingerprint if external else ""
        self._teacher = torch.tensor(list(bytes.fromhex(fingerprint)), dtype=torch.uint8)
        order = self.sample_order(recipe, data.counts)
        self.reader = EpisodeReader(recipe, data, order, external, groups, device)
        self.clusterer = Clusterer(
            config.num_clusters,
            config.num_iterations,
            config.num_restarts,
            config.back_translation,
            recipe.train.seed,
            groups.data,
            groups.tensor,
        )
        self.terms = PrototypeTerms(config, groups.data, self.matmul, device)
        self.episode: Episode | None = None
        self._number = 0

    # Before anything is built.

    @classmethod
    def check(cls, recipe: Sections) -> None:
        super().check(recipe)
        config = protoclip_config(recipe)
        if frozen := [name for name in cls.towers if recipe.is_frozen(name)]:
            raise ValueError(
                f"towers.{frozen[0]} is frozen, and protoclip clusters what both towers learn: train both (for the "
                "last episodes objective.frozen_episodes keeps the image tower as it is)"
            )
        if config.with_replacement and recipe.data.captions == "lines":
            raise ValueError(
                "objective.with_replacement takes a sample twice, and data.captions=lines would give it two captions, "
                "which may be in two clusters: set objective.with_replacement=false, or data.captions=whole"
            )
        EpisodePlan.of(recipe)
        if config.num_clusters > config.episode_samples:
            raise ValueError(
                f"objective.num_clusters {config.num_clusters} is more than objective.episode_samples "
                f"{config.episode_samples}: lower it (paper: a tenth)"
            )
        if config.teacher and not config.back_translation:
            raise ValueError(
                "objective.teacher's clusters have no centres in the students' space without back translation: set "
                "objective.back_translation=true, or leave objective.teacher out"
            )

    @classmethod
    def check_data(cls, recipe: Sections, data: TrainingData) -> None:
        config = protoclip_config(recipe)
        if not config.with_replacement and config.episode_samples > data.num_samples:
            raise UserError(
                f"objective.episode_samples {config.episode_samples} is more than the {data.num_samples} samples: "
                "lower it (to a multiple of train.global_batch), or set objective.with_replacement=true."
            )
        if config.teacher:
            manifest = read_manifest(config.teacher, EmbeddingManifest, "embed")
            if manifest.inputs["index"] != data.index.manifest.fingerprint:
                raise UserError(
                    f"objective.teacher {config.teacher} was made of another index than data.index "
                    f"{data.index.folder}: run `mlcd embed` on this one."
                )
            if manifest.dim < config.teacher_dim:
                raise UserError(
                    f"objective.teacher {config.teacher} has embeddings of {manifest.dim}, objective.teacher_dim is "
                    f"{config.teacher_dim}: lower it."
                )

    @classmethod
    def step_kind(cls, recipe: Sections, step: int) -> tuple[bool, bool]:
        """Whether it has prototypes, and whether the image tower stays as it is."""
        plan = EpisodePlan.of(recipe)
        number = plan.episode_of(step)
        return plan.has_prototypes(number), plan.is_still(number)

    @classmethod
    def describe(cls, recipe: Sections, data: TrainingData, num_ranks: int, tensor_parallel: int) -> list[str]:
        config, plan = protoclip_config(recipe), EpisodePlan.of(recipe)
        drawn = "with" if config.with_replacement else "without"
        teacher = f"; external teacher {config.teacher}" if config.teacher else ""
        return [
            f"episodes: {plan.num_episodes} of {plan.steps} steps, {config.episode_samples} samples drawn {drawn} "
            f"replacement; CLIP's loss alone in the first {plan.infonce_episodes} and the last {plan.frozen_episodes}",
            f"prototypes: {config.num_clusters} clusters of each modality, {config.targets} targets{teacher}",
        ]

    @classmethod
    def need(cls, recipe: Sections, run: PlannedRun) -> Need:
        """Of a step; what the beginning of an episode computes is not in it."""
        config, clip = protoclip_config(recipe), super().need(recipe, run)
        batch = run.per_rank(recipe)
        num_directions = 2 + 2 * bool(config.teacher)
        head = recipe.model.embed_dim * config.head_hidden + config.head_hidden * config.head_dim
        # Prototypes of each direction, and the centres of the two teachers.
        kept = (num_directions + 2) * config.num_clusters * config.head_dim * FP32
        block = min(BLOCK_ELEMENTS["cuda"], batch * config.num_clusters)
        held = 2 * batch * (4 * config.head_hidden + 3 * config.head_dim) * FP32 + 4 * block * FP32
        memory = {**engine_memory(2 * head, run), "prototypes": kept, **clip.memory}
        memory["loss: during a step"] += held
        products = 2 * num_directions + 2 * (config.targets == "soft")
        flops = clip.flops + 2 * 6 * batch * head + products * 2 * batch * config.num_clusters * config.head_dim
        return Need(memory, clip.sent, "the losses and the projection heads", flops)

    @classmethod
    def engine_module(cls, recipe: Sections) -> nn.Module:
        return ProtoClipModule(recipe)

    @classmethod
    def sample_order(cls, recipe: Sections, counts_S: np.ndarray) -> EpisodeOrder:
        config = protoclip_config(recipe)
        streams, seed = recipe.data.num_streams, recipe.train.seed
        return EpisodeOrder(counts_S, streams, config.episode_samples, config.with_replacement, seed)

    # While a run trains.

    def begin_phase(self, step: int, embed: Embed, own_outputs: OwnOutputs) -> bool:
        """Collectives: those of `embed`, of `own_outputs`, and of `Clusterer.make`."""
        self._number = number = self.plan.episode_of(step)
        if not self.plan.has_prototypes(number):
            self.episode = None
            return False
        if self.episode and self.episode.number == number:  # made already, perhaps before the run was stopped
            return False
        features = self.features(number, embed, own_outputs)
        self._check_finite(features)
        external = self.reader.external(number, self.config.teacher_dim)
        self.episode = self.clusterer.make(number, self.reader.ids(number), features, external)
        return True

    def features(self, number: int, embed: Embed, own_outputs: OwnOutputs) -> dict[str, Tensor]:
        """This rank's share of an episode's samples as the model projects them now, unit rows [n, P] by tower."""
        outputs = own_outputs()

        def encode(tower: str, given: Tensor) -> Tensor:
            return self.terms.project(tower, embed(tower, given, is_projected=True), outputs)

        return self.reader.features(number, encode)

    def _check_finite(self, features: Mapping[str, Tensor]) -> None:
        """All ranks raise the same UserError, or none does. Collective."""
        is_bad = torch.stack([~rows_NP.isfinite().all() for rows_NP in features.values()]).any().float()
        if self._world.all_reduce_max(is_bad).item():
            raise UserError(
                f"the model's embeddings are not finite at the beginning of episode {self._number}: lower optimizer.lr."
            )

    def still_towers(self, step: int) -> tuple[str, ...]:
        return ("image",) if self.plan.is_still(self.plan.episode_of(step)) else ()

    @torch.no_grad()
    def __call__(self, outputs: Mapping[str, Tensor], fields: Mapping[str, Tensor], weight: float = 1.0) -> Given:
        """Collectives: those of CLIP's loss and of `PrototypeTerms`."""
        pairs = self.pairs(outputs, outputs["scale"].detach())
        halves, gradients = clip_loss(pairs)
        terms, more = self.terms(outputs, fields["ids"], pairs.num_pairs, self.episode)
        self._measures |= self._phase_measures() | {"proto_scale": outputs["proto_scale"].detach()}
        parts = {"clip": halves.sum(), **{name: term * self.terms.weights[name] for name, term in terms.items()}}
        return Given(torch.stack(list(parts.values())).sum(), parts, gradients | more)

    def _phase_measures(self) -> dict[str, Tensor]:
        """Of the episode: its number, and of each clustering what it reached."""
        told = {"prototypes/episode": torch.tensor(float(self._number))}
        if self.episode:
            told |= {f"prototypes/distance_{name}": value for name, value in self.episode.objectives.items()}
            told |= {f"prototypes/empty_{name}": value for name, value in self.episode.empty.items()}
        return told

    @property
    def is_finite(self) -> bool:
        return all(bool(tensor.isfinite().all()) for tensor in self._kept().values())

    def note(self) -> dict[str, int]:
        return {"episode": self._number}

    def _kept(self) -> dict[str, Tensor]:
        """All that `save` writes."""
        running = {f"running.{tower}.mean": moments.mean_H for tower, moments in self.terms.running.items()}
        running |= {f"running.{tower}.variance": moments.variance_H for tower, moments in self.terms.running.items()}
        return {"teacher": self._teacher, **running, **(self.episode.tensors() if self.episode else {})}

    def save(self, folder: Path) -> None:
        """All ranks have the same; the first writes."""
        if self._world.is_main:
            save_state(folder, self._kept())

    def load(self, folder: Path) -> None:
        tensors = load_state(folder)
        self._load_moments(tensors, folder)
        if not torch.equal(tensors["teacher"], self._teacher):
            raise UserError(
                f"{folder} was trained with another external teacher than objective.teacher {self.config.teacher} now: "
                "put that one back, or choose another train.out."
            )
        self.episode = None
        if "number" in tensors:
            self.episode = Episode.of_tensors(tensors, self.reader.ids, str(folder))

    def start_from(self, folder: Path) -> list[str]:
        self._load_moments(load_state(folder), folder)
        return ["the heads' running moments"]

    def _load_moments(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        for tower, moments in self.terms.running.items():
            for name, target in (("mean", moments.mean_H), ("variance", moments.variance_H)):
                found = tensors.get(f"running.{tower}.{name}")
                if found is None or found.shape != target.shape:
                    raise UserError(
                        f"{folder} holds no running.{tower}.{name} of {len(target)}: objective.head_hidden is another."
                    )
                target.copy_(found)


class ProtoClipModule(nn.Module):
    """Both learned factors on cosines, and the heads' parameters: outputs `scale`, `proto_scale` and `head_names`."""

    def __init__(self, recipe: Sections) -> None:
        super().__init__()
        config = protoclip_config(recipe)
        first, bounds = 1 / config.temperature, (1.0, config.max_scale)
        self.clip_scale, self.proto_scale = Scale(first, bounds), Scale(first, bounds)
        self.heads = HeadParameters(
            recipe.model.embed_dim, config.head_hidden, config.head_dim, recipe.train.seed + APART
        )

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is added to the towers' outputs."""
        proto_scale = self.proto_scale({})["scale"]
        return {**self.clip_scale({}), "proto_scale": proto_scale, **self.heads({})}
