"""ProtoCLIP's settings, and when its episodes begin and end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from mlcd_ds.artefacts.typed import FilePath
from mlcd_ds.objectives.pair_objective import PairConfig
from mlcd_ds.recipes.sections import Sections


class ProtoClipConfig(PairConfig):
    """The paper's constants and those of its public code."""

    name: Literal["protoclip"] = "protoclip"
    temperature: float = Field(0.07, gt=0, le=1, description="1 / both factors on cosines, at the start (paper: 0.07)")
    episode_samples: int = Field(
        200_000, ge=1, le=2**30, description="of an episode; a multiple of train.global_batch (paper: 200,000)"
    )
    with_replacement: bool = Field(True, description="a sample may come twice in an episode (public code: true)")
    num_clusters: int = Field(20_000, ge=2, description="of each modality in an episode (paper: 20,000)")
    num_iterations: int = Field(20, ge=1, le=10**4, description="of k-means (public code: 20)")
    num_restarts: int = Field(3, ge=1, le=100, description="of k-means; the best is taken (public code: 3)")
    back_translation: bool = Field(
        True, description="prototypes are means of the student's rows in the teacher's clusters; or the teacher's own"
    )
    targets: Literal["soft", "hard"] = Field("soft", description="by the distances of the teacher's centres, or one")
    teacher_temperature: float = Field(0.01, gt=0, le=10, description="of soft targets (paper: 0.01)")
    head_hidden: int = Field(2048, ge=1, le=2**16, description="hidden width of the projection heads (paper: 2,048)")
    head_dim: int = Field(128, ge=2, le=2**14, description="of the space that is clustered (paper: 128)")
    weight: float = Field(1.0, gt=0, le=1e4, description="factor on the loss of prototypes (paper: 1)")
    teacher: FilePath | None = Field(
        None, description="folder of `mlcd embed` on the same index: an external teacher, such as a language model"
    )
    teacher_dim: int = Field(64, ge=1, le=2**14, description="principal components of its embeddings (paper: 64)")
    teacher_weight: float = Field(1.0, gt=0, le=1e4, description="factor on the loss of its prototypes (paper: 1)")
    infonce_episodes: int = Field(1, ge=0, description="first episodes with CLIP's loss alone (paper: 1)")
    frozen_episodes: int = Field(
        2, ge=0, description="last episodes with CLIP's loss alone, the image tower left as it is (public code: 2)"
    )


def protoclip_config(recipe: Sections) -> ProtoClipConfig:
    """A recipe's `objective:` section, where it is of this objective."""
    assert isinstance(recipe.objective, ProtoClipConfig)
    return recipe.objective


@dataclass(frozen=True)
class EpisodePlan:
    """What each step of a run belongs to."""

    steps: int  # of an episode
    num_episodes: int
    infonce_episodes: int
    frozen_episodes: int

    @classmethod
    def of(cls, recipe: Sections) -> EpisodePlan:
        """Raises ValueError naming keys whose numbers do not fit together, and a number that does."""
        config, train = protoclip_config(recipe), recipe.train
        if config.episode_samples % train.global_batch:
            fits = max(1, round(config.episode_samples / train.global_batch)) * train.global_batch
            raise ValueError(
                f"objective.episode_samples {config.episode_samples} is not a multiple of train.global_batch "
                f"{train.global_batch}: set objective.episode_samples={fits}"
            )
        steps = config.episode_samples // train.global_batch
        if train.steps % steps:
            fits = max(1, round(train.steps / steps)) * steps
            raise ValueError(
                f"train.steps {train.steps} is not a multiple of the {steps} steps of an episode "
                f"(objective.episode_samples over train.global_batch): set train.steps={fits}"
            )
        plan = cls(steps, train.steps // steps, config.infonce_episodes, config.frozen_episodes)
        if plan.infonce_episodes + plan.frozen_episodes >= plan.num_episodes:
            raise ValueError(
                f"objective.infonce_episodes {plan.infonce_episodes} and objective.frozen_episodes "
                f"{plan.frozen_episodes} leave none of the {plan.num_episodes} episodes of train.steps {train.steps} "
                "for prototypes: lower one of them, or raise train.steps"
            )
        return plan

    def episode_of(self, step: int) -> int:
        """The episode of a step; both are counted from 0."""
        return step // self.steps

    def has_prototypes(self, episode: int) -> bool:
        """Whether it is neither one of the first nor of the last, which have CLIP's loss alone."""
        return self.infonce_episodes <= episode < self.num_episodes - self.frozen_episodes

    def is_still(self, episode: int) -> bool:
        """Whether the image tower stays as it is."""
        return episode >= self.num_episodes - self.frozen_episodes
