"""What `make compare` compares: systems, what each tries as its learning rate, and the method's own ablations.

All have the backbone, pictures, number of images seen, batch and augmentation of compare.yaml; a system is what it
changes there.
"""

from __future__ import annotations

from dataclasses import dataclass

TEXT = (
    "text={vocab_size: 2048, end_token: 1, context: 16, width: 128, depth: 4, heads: 4, mlp_width: 512, embed_dim: 128}"
)
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
SEEDS = (0, 1, 2)
NUM_CENTERS = 256
STORED_LABELS = 32  # of which systems take the nearest ones
NCLIP = "{name: nclip, num_dims: 1024, head_width: 256}"
HEAD = "head={sample_rate: 0.5, init: centers}"


@dataclass(frozen=True)
class System:
    """Keys over those of compare.yaml, and what it learns from."""

    title: str
    keys: tuple[str, ...]
    is_labelled: bool = False  # by the teacher's clusters
    has_text: bool = False
    starts_from: str | None = None  # the system whose image tower it is given


def by_classes(title: str, objective: str, head: str = HEAD, *keys: str) -> System:
    """A loss over class centres."""
    return System(title, (f"objective={objective}", head, *keys), is_labelled=True)


def by_text(title: str, objective: str, *keys: str) -> System:
    """An objective over images and captions alone."""
    return System(title, (f"objective={objective}", "head={}", TEXT, *keys), has_text=True)


def mlcd(labels: int = 8, scale: float = 16, margin: float = 0.3) -> str:
    """The method's loss."""
    return f"{{name: mlcd, num_labels: {labels}, scale: {scale}, margin: {margin}}}"


SYSTEMS = {
    "unicom": by_classes("UNICOM", "{name: unicom, scale: 16, margin: 0.3, feature_rate: 0.5}"),
    "mlc": by_classes("MLC", "{name: mlc, num_labels: 8, scale: 16, margin: 0.3}"),
    "mlcd": by_classes("MLCD", mlcd()),
    "successor": by_classes(
        "averaged softmax",
        "{name: averaged_softmax, num_labels: 10, drawn_labels: 8, similarity_filter: 0.75, separate_samples: true, "
        "scale: 16, margin: 0.3}",
        "head={sample_rate: 0.5, sampling: partial_fc}",
    ),
    "clip": by_text("CLIP", "{name: clip}"),
    "protoclip": by_text("ProtoCLIP", "{name: protoclip, episode_samples: 3840, num_clusters: 128, head_hidden: 512}"),
    "nclip": by_text("nCLIP", NCLIP),
    "xclip": by_text("xCLIP", f"{{name: sum, parts: [{{objective: {{name: clip}}}}, {{objective: {NCLIP}}}]}}"),
    "lit": System(
        "MLCD + LiT",
        ("objective={name: clip}", "head={}", TEXT, "towers={image: frozen}"),
        has_text=True,
        starts_from="mlcd",
    ),
    "mlcd_clip": System(
        "MLCD + CLIP",
        (f"objective={{name: sum, parts: [{{objective: {mlcd()}}}, {{objective: {{name: clip}}}}]}}", HEAD, TEXT),
        is_labelled=True,
        has_text=True,
    ),
}


@dataclass(frozen=True)
class Ablation:
    """One key of MLCD, and the values that it takes; what the method has is among them."""

    title: str
    values: tuple[float, ...]
    default: float

    def system(self, value: float) -> System:
        """MLCD with this value."""
        made = {
            "l": lambda: by_classes("MLCD", mlcd(labels=int(value))),
            "r": lambda: by_classes("MLCD", mlcd(), f"head={{sample_rate: {value}, init: centers}}"),
            "k": lambda: by_classes("MLCD", mlcd()),
            "m": lambda: by_classes("MLCD", mlcd(margin=value)),
            "s": lambda: by_classes("MLCD", mlcd(scale=value)),
        }
        return made[self.key]()

    @property
    def key(self) -> str:
        """Its letter in the paper."""
        return self.title[0]


ABLATIONS = {
    ablation.key: ablation
    for ablation in (
        Ablation("l, labels an image", (1, 2, 4, 8, 16, 32), 8),
        Ablation("r, part of the classes sampled", (0.01, 0.1, 0.5, 1.0), 0.5),
        Ablation("k, clusters", (64, 128, 256, 512), NUM_CENTERS),
        Ablation("m, margin", (0.0, 0.15, 0.3, 0.45), 0.3),
        Ablation("s, scale", (8, 16, 32, 64), 16),
    )
}
