"""Export a training run for others: folders that transformers and open_clip load as they are, and a model card.

A run over images and texts becomes a whole `CLIPModel` with its tokenizer and processor; any other the image tower,
`CLIPVisionModel` (rotary: `MLCDVisionModel`), and beside it, because it is not part of that model,
projection.safetensors: the linear map [E, D] from the pooled output to the embedding that the loss saw. Where open_clip
has such a model, there is a folder for it too. It loads whole models only, so for an image tower alone a placeholder
stands there for the text tower: encode_text gives zeros.

  mlcd export --run runs/demo/train --out runs/demo/export --license apache-2.0
  python -c "import transformers; transformers.AutoModel.from_pretrained('runs/demo/export')"
  python -c "import open_clip; open_clip.create_model_and_transforms('local-dir:runs/demo/export/open_clip')"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field
from safetensors.torch import save
from torch import Tensor

from mlcd_ds.artefacts.files import FileRecord, remove_file, sha256_of, write_atomic, write_json
from mlcd_ds.artefacts.manifest import Manifest, library_versions, write_manifest
from mlcd_ds.artefacts.readers import decoding
from mlcd_ds.data.pixels import clip_pixels
from mlcd_ds.data.tokenizers import TOKENIZER_NAME, Tokenizer, clip_tokenizer, tokenizer_config
from mlcd_ds.encoders.preprocessor import open_clip_preprocessing, preprocessor_config
from mlcd_ds.encoders.run_tokenizer import run_tokenizer
from mlcd_ds.engine.weights import (
    Weights,
    checkpoint_recipe,
    load_backbone,
    load_scale,
    load_text_tower,
    newest_checkpoint,
    read_checkpoint,
    weights_checksum,
)
from mlcd_ds.errors import UserError
from mlcd_ds.models.convert import clip_config, clip_problem, to_clip_model, to_vision_model, vision_config
from mlcd_ds.models.open_clip import (
    BIAS,
    LOG_SCALE,
    NOTE,
    open_clip_config,
    open_clip_problem,
    placeholder_text_tower,
    to_open_clip,
)
from mlcd_ds.models.open_clip import CONFIG_NAME as OPEN_CLIP_CONFIG
from mlcd_ds.models.open_clip import WEIGHTS_NAME as OPEN_CLIP_MODEL
from mlcd_ds.models.text import TextTower
from mlcd_ds.models.vit import ViT
from mlcd_ds.stages import runner
from mlcd_ds.stages.model_card import CARD_NAME, REPORT_FIX, Card, model_card

PROJECTION_NAME, TOKENIZER_CONFIG = "projection.safetensors", "tokenizer_config.json"
OPTIONAL = (
    *(PROJECTION_NAME, TOKENIZER_NAME, TOKENIZER_CONFIG),
    *(f"open_clip/{name}" for name in (OPEN_CLIP_CONFIG, OPEN_CLIP_MODEL, TOKENIZER_NAME, TOKENIZER_CONFIG)),
)
"""Files that not every export has."""


class Options(runner.StageOptions):
    """Options of `mlcd export`."""

    run: Path = Field(description="folder of `mlcd train` (train.out)")
    weights: Weights = Field("last", description="of the newest checkpoint: its last, or their average (ema)")
    towers: Literal["all", "image"] = Field("all", description="image: leave a text tower out")
    license: str | None = Field(
        None, pattern="^[a-z0-9][a-z0-9.-]*$", description="of the weights, as Hugging Face names it: apache-2.0, other"
    )
    report: Path | None = Field(None, description="report.json of `mlcd evaluate`, whose figures the card shows")


class ExportManifest(Manifest):
    """Manifest of `mlcd export`; `step` is the checkpoint's."""

    step: int


@dataclass(frozen=True)
class Pair:
    """What a model of images and texts has besides its image tower."""

    text: TextTower
    tokenizer: Tokenizer
    log_scale: Tensor
    bias: float | None

    @classmethod
    def of_run(cls, run: Path, checkpoint: Path, weights: Weights) -> Pair:
        """As a run's checkpoint has it."""
        text = load_text_tower(checkpoint, weights)
        log_scale, bias = load_scale(checkpoint, weights)
        tokenizer = run_tokenizer(run, read_checkpoint(checkpoint), text.config)
        return cls(text, tokenizer, log_scale, None if bias is None else float(bias))


def run(options: Options, context: runner.Context) -> None:
    """Convert and write; rank 0 alone has work."""
    checkpoint = newest_checkpoint(options.run)
    manifest, recipe = read_checkpoint(checkpoint), checkpoint_recipe(checkpoint)
    image = load_backbone(checkpoint, options.weights)
    if image.config.num_registers:
        raise UserError(
            f"{checkpoint}: the model has {image.config.num_registers} registers, which Hugging Face's CLIP and MLCD "
            f"and open_clip do not know: evaluate it with --model {options.run}, or train with model.num_registers=0."
        )
    pair = None
    if recipe.text and options.towers == "all":
        if problem := clip_problem(image.config, recipe.text):
            raise UserError(f"{checkpoint}: {problem}. Take the image tower alone: --towers image.")
        pair = Pair.of_run(options.run, checkpoint, options.weights)
    wanted = ExportManifest(
        stage="export",
        parameters={"step": manifest.step, **options.model_dump(include={"weights", "towers", "license"})},
        inputs=inputs_of(options, checkpoint, pair),
        files={},
        versions=library_versions(),
        step=manifest.step,
    )
    if runner.already_done(options, context, ExportManifest, wanted):
        return
    problem = open_clip_problem(image.config, pair.text.config if pair else None)
    card = Card(
        name=options.out.resolve().name,
        checkpoint=manifest,
        recipe=recipe,
        image=image,
        text=pair.text if pair else None,
        bias=pair.bias if pair else None,
        weights=options.weights,
        license=options.license,
        report=options.report,
        open_clip_problem=problem,
    )
    content = model_card(card).encode()  # now, as the report may be damaged
    runner.logger.info("export: %s -> %s", checkpoint, options.out)
    if problem:
        runner.logger.info("export: no folder for open_clip: %s", problem)
    if options.dry_run or not context.group.is_main:
        return
    files = write_hugging_face(options.out, image, pair)
    if not problem:
        files |= write_open_clip(options.out, image, pair)
    write_atomic(options.out / CARD_NAME, lambda file: file.write(content))  # not in the manifest: others edit it
    for name in OPTIONAL:
        if name not in files:  # of another export that was here
            remove_file(options.out / name)
    write_manifest(options.out, wanted.model_copy(update={"files": files}))


def inputs_of(options: Options, checkpoint: Path, pair: Pair | None) -> dict[str, str]:
    """Checksums of all that an export is made of."""
    inputs = {"backbone": weights_checksum(checkpoint, options.weights)}
    if pair:
        inputs |= {name: weights_checksum(checkpoint, options.weights, name) for name in ("text", "objective")}
        inputs["tokenizer"] = pair.tokenizer.fingerprint
    if options.report:
        with decoding(options.report, REPORT_FIX):
            inputs["report"] = sha256_of(options.report)
    return inputs


def write_hugging_face(out: Path, image: ViT, pair: Pair | None) -> dict[str, FileRecord]:
    """A folder that transformers loads."""
    state, files = image.state_dict(), dict[str, FileRecord]()
    if pair:
        weights = to_clip_model(state, pair.text.state_dict(), pair.log_scale)
        config = clip_config(image.config, pair.text.config, pair.tokenizer.start_token, pair.bias)
        files |= write_tokenizer(out, "", pair)
    else:
        weights, config = to_vision_model(state), vision_config(image.config)
        projection = {"projection.weight": state["projection.weight"].contiguous()}
        files[PROJECTION_NAME] = write_tensors(out / PROJECTION_NAME, projection)
    files["model.safetensors"] = write_tensors(out / "model.safetensors", weights)
    processor = preprocessor_config(clip_pixels(image.config.image_size))
    files["preprocessor_config.json"] = write_json(out / "preprocessor_config.json", processor)
    files["config.json"] = write_json(out / "config.json", config)
    return files


def write_open_clip(out: Path, image: ViT, pair: Pair | None) -> dict[str, FileRecord]:
    """The folder open_clip in it."""
    folder, files = out / "open_clip", dict[str, FileRecord]()
    weights, note = to_open_clip(image.state_dict(), image.config), {}
    if pair:
        weights |= to_open_clip(pair.text.state_dict(), pair.text.config) | {LOG_SCALE: pair.log_scale}
        if pair.bias is not None:
            weights[BIAS] = pair.log_scale.new_tensor(pair.bias)
        config = open_clip_config(image.config, pair.text.config, pair.bias)
        if pair.tokenizer.fingerprint != clip_tokenizer().fingerprint:  # which open_clip has itself
            config["text_cfg"]["hf_tokenizer_name"] = "."  # with local-dir: always the folder itself
            files |= write_tokenizer(out, "open_clip/", pair)
    else:
        weights |= placeholder_text_tower(image.config.embed_dim)
        config, note = open_clip_config(image.config), {"note": NOTE}
    preprocessing = open_clip_preprocessing(clip_pixels(image.config.image_size))
    description = {**note, "model_cfg": config, "preprocess_cfg": preprocessing}
    files[f"open_clip/{OPEN_CLIP_CONFIG}"] = write_json(folder / OPEN_CLIP_CONFIG, description)
    files[f"open_clip/{OPEN_CLIP_MODEL}"] = write_tensors(folder / OPEN_CLIP_MODEL, weights, note)
    return files


def write_tokenizer(out: Path, folder: str, pair: Pair) -> dict[str, FileRecord]:
    """The files of which `transformers.AutoTokenizer` makes the tokenizer."""
    content = pair.tokenizer.to_json().encode()
    config = tokenizer_config(pair.tokenizer) | {"model_max_length": pair.text.config.context, "padding_side": "right"}
    return {
        folder + TOKENIZER_NAME: write_atomic(out / folder / TOKENIZER_NAME, lambda file: file.write(content)),
        folder + TOKENIZER_CONFIG: write_json(out / folder / TOKENIZER_CONFIG, config),
    }


def write_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, str] | None = None) -> FileRecord:
    """A safetensors file as transformers wants it."""
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt", **(note or {})})
    return write_atomic(path, lambda file: file.write(content))


def main(argv: list[str] | None = None) -> int:
    """Entry of `mlcd export`."""
    return runner.main("export", Options, run, __doc__, argv)
