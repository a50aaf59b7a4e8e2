"""Train a backbone by multi-label cluster discrimination.

  mlcd train --deepspeed_config ds_configs/zero1_fp32_cpu.json                       one process, the demo recipe
  deepspeed --num_gpus 8 mlcd_ds/train.py --deepspeed_config ds_configs/zero1_bf16.json \\
      --recipe vit_l_14 data.index=runs/laion/index data.labels=runs/laion/labels train.out=runs/vit_l_14
  sbatch slurm/train_vit_l.sh                                                        80 GPUs

What is learned stands in the recipe (mlcd_ds/recipes, or a YAML file of yours); any of its keys can be given as
key=value. The same command, run again, goes on from the last checkpoint. SIGTERM and SIGUSR1 save a checkpoint and end
the program with status 85, which means: start me again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mlcd_ds.artefacts.files import record_of, write_atomic
from mlcd_ds.artefacts.manifest import (
    MANIFEST_NAME,
    Manifest,
    library_versions,
    read_manifest,
    refuse_foreign_folder,
    write_manifest,
)
from mlcd_ds.artefacts.readers import check_record
from mlcd_ds.config import Recipe, changed_keys, dump_recipe, load_recipe, recipe_names, with_precision
from mlcd_ds.data.label_store import LabelStore
from mlcd_ds.data.loader import StreamSlice
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.ds_config import (
    check_filled_config,
    check_zero_section,
    fill_ds_config,
    read_ds_config,
    stated_precision,
    tensor_parallel_size,
)
from mlcd_ds.distributed.stopping import EXIT_REQUEUE, StopRequest
from mlcd_ds.engine.layout import Layout, plan_batches
from mlcd_ds.engine.tensor_parallel import autotp_section
from mlcd_ds.engine.trainer import Trainer
from mlcd_ds.engine.weights import (
    CHECKPOINT_NAME,
    CONFIG_NAME,
    checkpoint_folders,
    missing_file,
    read_checkpoint,
    read_run_recipe,
)
from mlcd_ds.errors import UserError
from mlcd_ds.heads.choose_exp_block import check_kernel
from mlcd_ds.heads.class_sampling import num_sampled
from mlcd_ds.heads.class_shards import class_range
from mlcd_ds.heads.groups import num_class_shards
from mlcd_ds.models.vit import ViT, flops_per_image, num_parameters
from mlcd_ds.stages import runner

# Keys that may change when a run goes on; any other change would make it another run.
FREE_KEYS = (
    "description",
    "data.clusters",
    "data.index",
    "data.labels",
    "data.knn_index",
    "data.knn_label_key",
    "data.num_threads",
    "head.parallel_size",
    "train.out",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.ema_decay",
    "train.knn_every",
    "train.log_every",
    "train.milestone_every",
    "train.profile_steps",
    "train.micro_batch_per_rank",
    "train.recompute",
    "train.compile",
)


class TrainManifest(Manifest):
    """Manifest of `mlcd train`; written when the last step is done."""

    step: int


def build_parser() -> runner.Parser:
    """The command line of `mlcd train`."""
    parser = runner.Parser(prog="mlcd train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys, such as train.steps=1000")
    parser.add_argument(
        "--recipe", default="demo", help=f"name or YAML file (default: demo; there are {', '.join(recipe_names())})"
    )
    parser.add_argument("--deepspeed_config", type=Path, required=True, help="DeepSpeed JSON (ours: ds_configs/)")
    parser.add_argument(
        "--init-from",
        metavar="FOLDER",
        help="start from this Hugging Face backbone (the same as train.init_from=FOLDER)",
    )
    parser.add_argument("--dry-run", action="store_true", help="build everything without memory, print it, exit")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it; the environment rules
    return parser


def read_layout(config: dict, path: Path, num_ranks: int) -> Layout:
    """How the DeepSpeed file spreads the backbone over the ranks."""
    return Layout(num_ranks, tensor_parallel_size(config, path), check_zero_section(config, path))


def resolve_ds_config(config: dict, path: Path, recipe: Recipe, layout: Layout, batch_slice: StreamSlice) -> dict:
    """The DeepSpeed config with everything that the recipe says filled in."""
    precision = recipe.train.precision
    source = f"train.precision={precision} in the recipe"
    if recipe.optimizer.name == "muon" and "grad_accum_dtype" in config.get("data_types", {}):
        raise UserError(f"{path}: data_types.grad_accum_dtype is not for optimizer.name muon: leave it out.")
    # In bf16 DeepSpeed's stage 0 has no fp32 copy of the weights, and small updates are lost: autocast keeps one.
    is_autocast = precision == "bf16" and layout.zero_stage == 0
    if is_autocast:
        source = "ZeRO stage 0, where bf16 is torch's autocast over fp32 weights,"
    values = {
        "train_batch_size": (recipe.train.global_batch, "train.global_batch in the recipe"),
        "train_micro_batch_size_per_gpu": (batch_slice.micro_batch, "train.micro_batch_per_rank in the recipe"),
        "gradient_accumulation_steps": (batch_slice.num_micro_batches, "train.global_batch over ranks and micro-batch"),
        # Muon's orthogonalised update would be clipped in place of its gradient.
        "gradient_clipping": (
            0.0 if recipe.optimizer.name == "muon" else recipe.optimizer.clip_norm,
            "optimizer.clip_norm in the recipe (0 with muon)",
        ),
        "bf16.enabled": (precision == "bf16" and not is_autocast, source),
        "fp16.enabled": (precision == "fp16", source),
    }
    config = fill_ds_config(config, path, values)
    config.setdefault("zero_optimization", {})["stage"] = layout.zero_stage
    if is_autocast:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if layout.tensor_parallel > 1:
        config["tensor_parallel"] = autotp_section(layout.tensor_parallel)
    config.setdefault("steps_per_print", 10**9)  # progress is ours to show
    return config


def open_data(recipe: Recipe, group: Group) -> tuple[ShardIndex, LabelStore]:
    """Open and cross-check index, labels and shards."""
    for key in ("index", "labels"):
        if getattr(recipe.data, key) is None:
            stage_name = {"index": "index", "labels": "assign"}[key]
            raise UserError(f"data.{key} is not given: add data.{key}=FOLDER, made by `mlcd {stage_name}`.")
    index = ShardIndex(recipe.data.index)
    labels = LabelStore(recipe.data.labels, index)
    index.check_shards(group.rank, group.size)
    if index.num_images < recipe.train.global_batch:
        raise UserError(f"train.global_batch {recipe.train.global_batch} is more than the {index.num_images} images.")
    return index, labels


def describe(
    recipe: Recipe, ds_config: dict, layout: Layout, batch_slice: StreamSlice, context: runner.Context
) -> None:
    """Say what would run: the resolved files, sizes and shares."""
    with torch.device("meta"):
        model = ViT(recipe.model)
    lines = [
        dump_recipe(recipe).rstrip(),
        f"# DeepSpeed: {ds_config}",
        f"# backbone: {num_parameters(model) / 1e6:.1f} M parameters, {flops_per_image(recipe.model) / 1e9:.1f} GFLOP "
        "an image forward",
        f"# batch: {recipe.train.global_batch} = {layout.data_parallel} data-parallel x "
        f"{batch_slice.num_micro_batches} x {batch_slice.micro_batch}, on {layout.num_ranks} ranks",
        f"# samples seen: {recipe.train.steps * recipe.train.global_batch / 1e6:.1f} M",
    ]
    if recipe.data.index is None or recipe.data.labels is None:
        lines.append("# data: data.index and data.labels are not given; a real run needs them")
    else:
        index, labels = open_data(recipe, context.group)
        shards = num_class_shards(layout.num_ranks, recipe.head.parallel_size, layout.tensor_parallel)
        local = class_range(labels.num_centers, shards, 0)
        lines.append(
            f"# data: {index.num_images} images, {labels.num_labels} labels each of {labels.num_centers} centres"
        )
        lines.append(
            f"# head: {len(local)} centres on rank 0, {num_sampled(local, recipe.head.sample_rate)} sampled a step"
        )
    runner.logger.info("\n".join(lines))


def claim_folder(recipe: Recipe, context: runner.Context) -> None:
    """Make the run's folder ours: write its config, or check that the one there is of the same run."""
    refuse_foreign_folder(recipe.train.out, "train", "train.out")
    path = recipe.train.out / CONFIG_NAME
    if path.exists():
        before = read_run_recipe(recipe.train.out)
        changed = [key for key in changed_keys(before, recipe) if key not in FREE_KEYS]
        if changed:
            raise UserError(f"{path} is of a run with another {', '.join(changed)}: choose another train.out.")
    context.group.barrier()
    if context.group.is_main:
        write_atomic(path, lambda file: file.write(dump_recipe(recipe).encode()))


def run(args: argparse.Namespace, context: runner.Context) -> int:
    """Check everything, then train. Returns the exit status."""
    given = [f"train.init_from={args.init_from}"] if args.init_from else []
    recipe = load_recipe(args.recipe, (*args.overrides, *given))
    given_config = read_ds_config(args.deepspeed_config)
    recipe = with_precision(recipe, stated_precision(given_config, args.deepspeed_config))
    check_kernel(recipe.head.kernel, context.device.type)
    layout = read_layout(given_config, args.deepspeed_config, context.group.size)
    batch_slice = plan_batches(recipe, layout, context.group.rank)
    ds_config = resolve_ds_config(given_config, args.deepspeed_config, recipe, layout, batch_slice)
    check_filled_config(ds_config, args.deepspeed_config)
    if args.dry_run:
        describe(recipe, ds_config, layout, batch_slice, context)
        return 0
    with StopRequest() as stop:
        return train(recipe, ds_config, layout, context, stop)


def train(recipe: Recipe, ds_config: dict, layout: Layout, context: runner.Context, stop: StopRequest) -> int:
    """Open the data, claim the run's folder, train to the end or to a stop. Returns the exit status."""
    index, labels = open_data(recipe, context.group)
    claim_folder(recipe, context)
    out = recipe.train.out
    if is_done(recipe, index, labels):
        runner.logger.info("train: done already, nothing to do (%s)", out)
        return 0
    runner.logger.info(
        "train: %d steps of %d images on %d ranks -> %s (watch: tensorboard --logdir %s)",
        recipe.train.steps,
        recipe.train.global_batch,
        context.group.size,
        out,
        out,
    )
    if not Trainer(recipe, ds_config, layout, index, labels, context.group, context.device).fit(stop):
        runner.logger.info("train: asked to stop; a checkpoint is saved. Start again to go on.")
        return EXIT_REQUEUE
    if context.group.is_main:
        write_train_manifest(recipe, index, labels)
    runner.logger.info("train: done")
    return 0


def run_inputs(index: ShardIndex, labels: LabelStore) -> dict[str, str]:
    """Fingerprints of what a run is trained on."""
    return {"index": index.manifest.fingerprint, "labels": labels.manifest.fingerprint}


def is_done(recipe: Recipe, index: ShardIndex, labels: LabelStore) -> bool:
    """Whether the run is finished, on the same inputs. Its recipe was compared by `claim_folder`.

    UserError when its last checkpoint is gone: checkpoint.json is compared by checksum, its files by size.
    """
    out = recipe.train.out
    if not (out / MANIFEST_NAME).exists():
        return False
    manifest = read_manifest(out, TrainManifest, "train")
    if manifest.inputs != run_inputs(index, labels):
        return False
    fix = f"Put it back, or remove {out / MANIFEST_NAME} to train again from the newest checkpoint."
    for name, record in manifest.files.items():
        check_record(out / name, record, fix)
        folder = (out / name).parent
        if missing := missing_file(folder, read_checkpoint(folder)):
            raise UserError(f"{missing} is missing or was cut, though the run is finished. {fix}")
    return True


def write_train_manifest(recipe: Recipe, index: ShardIndex, labels: LabelStore) -> None:
    """The last thing of a run: it is finished, and this is its final checkpoint."""
    last = checkpoint_folders(recipe.train.out)[-1] / CHECKPOINT_NAME
    manifest = TrainManifest(
        stage="train",
        parameters=recipe.model_dump(mode="json"),
        inputs=run_inputs(index, labels),
        files={str(last.relative_to(recipe.train.out)): record_of(last)},
        versions=library_versions(),
        step=recipe.train.steps,
    )
    write_manifest(recipe.train.out, manifest)


def main(argv: list[str] | None = None) -> int:
    """Entry of `mlcd train` and `deepspeed mlcd_ds/train.py`."""
    args = build_parser().parse_intermixed_args(argv)
    return runner.guarded(lambda context: run(args, context))
