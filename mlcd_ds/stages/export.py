"""Export the backbone of a training run as a Hugging Face folder (`CLIPVisionModel`; rotary: `MLCDVisionModel`).

Writes config.json, model.safetensors, preprocessor_config.json and, beside them because it is not part of that model,
projection.safetensors: the linear map [E, D] from the pooled output to the embedding that the loss saw. Where positions
are learned, a folder for open_clip too. open_clip loads whole models only, so a placeholder stands there for the text
tower: encode_text gives zeros.

  mlcd export --run runs/demo/train --out runs/demo/export
  python -c "import transformers; transformers.CLIPVisionModel.from_pretrained('runs/demo/export')"
  python -c "import open_clip; open_clip.create_model_and_transforms('local-dir:runs/demo/export/open_clip')"
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from safetensors.torch import save

from mlcd_ds.artefacts.files import write_atomic, write_json
from mlcd_ds.artefacts.manifest import Manifest, library_versions, write_manifest
from mlcd_ds.data.pixels import clip_pixels
from mlcd_ds.encoders.preprocessor import open_clip_preprocessing, preprocessor_config
from mlcd_ds.engine.weights import Weights, backbone_checksum, load_backbone, newest_checkpoint, read_checkpoint
from mlcd_ds.errors import UserError
from mlcd_ds.models.convert import to_vision_model, vision_config
from mlcd_ds.models.open_clip import NOTE, open_clip_config, placeholder_text_tower, to_open_clip
from mlcd_ds.stages import runner

OPEN_CLIP_CONFIG, OPEN_CLIP_MODEL = "open_clip_config.json", "open_clip_model.safetensors"  # the names it looks for


class Options(runner.StageOptions):
    """Options of `mlcd export`."""

    run: Path = Field(description="folder of `mlcd train` (train.out)")
    weights: Weights = Field("last", description="of the newest checkpoint: its last, or their average (ema)")


class ExportManifest(Manifest):
    """Manifest of `mlcd export`; `step` is the checkpoint's."""

    step: int


def run(options: Options, context: runner.Context) -> None:
    """Convert and write; rank 0 alone has work."""
    folder = newest_checkpoint(options.run)
    model = load_backbone(folder, options.weights)
    checkpoint = read_checkpoint(folder)
    if model.config.num_registers:
        raise UserError(
            f"{folder}: the model has {model.config.num_registers} registers, which Hugging Face's CLIP and MLCD and "
            f"open_clip do not know: evaluate it with --model {options.run}, or train with model.num_registers=0."
        )
    wanted = ExportManifest(
        stage="export",
        parameters={"step": checkpoint.step, "weights": options.weights},
        inputs={"backbone": backbone_checksum(folder, options.weights)},
        files={},
        versions=library_versions(),
        step=checkpoint.step,
    )
    if runner.already_done(options, context, ExportManifest, wanted):
        return
    runner.logger.info("export: %s -> %s", folder, options.out)
    if options.dry_run or not context.group.is_main:
        return
    state, pixels = model.state_dict(), clip_pixels(model.config.image_size)
    weights = save({name: value.contiguous() for name, value in to_vision_model(state).items()}, {"format": "pt"})
    projection = save({"projection.weight": state["projection.weight"].contiguous()}, {"format": "pt"})
    files = {
        "model.safetensors": write_atomic(options.out / "model.safetensors", lambda file: file.write(weights)),
        "projection.safetensors": write_atomic(
            options.out / "projection.safetensors", lambda file: file.write(projection)
        ),
        "preprocessor_config.json": write_json(options.out / "preprocessor_config.json", preprocessor_config(pixels)),
        "config.json": write_json(options.out / "config.json", vision_config(model.config)),
    }
    if model.config.positions == "learned":
        whole = to_open_clip(state, model.config) | placeholder_text_tower(model.config.embed_dim)
        content = save(whole, {"format": "pt", "note": NOTE})
        description = {
            "note": NOTE,
            "model_cfg": open_clip_config(model.config),
            "preprocess_cfg": open_clip_preprocessing(pixels),
        }
        folder = options.out / "open_clip"
        files |= {
            f"open_clip/{OPEN_CLIP_CONFIG}": write_json(folder / OPEN_CLIP_CONFIG, description),
            f"open_clip/{OPEN_CLIP_MODEL}": write_atomic(folder / OPEN_CLIP_MODEL, lambda file: file.write(content)),
        }
    write_manifest(options.out, wanted.model_copy(update={"files": files}))


def main(argv: list[str] | None = None) -> int:
    """Entry of `mlcd export`."""
    return runner.main("export", Options, run, __doc__, argv)
