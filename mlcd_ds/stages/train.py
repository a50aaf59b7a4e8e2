"""Train a backbone by multi-label cluster discrimination.

  mlcd train --deepspeed_config ds_configs/zero1_fp32_cpu.json                       one process, the demo recipe
  deepspeed --num_gpus 8 mlcd_ds/train.py --deepspeed_config ds_configs/zero1_bf16.json \\
      --recipe vit_l_14 data.index=runs/laion/index data.labels=runs/laion/labels train.out=runs/vit_l_14
  sbatch slurm/train_vit_l.sh                                                        80 GPUs

The recipe says what is learned (mlcd_ds/recipes, or a YAML file of yours); any of its keys can be given as
key=value. The same command, run again, goes on from the last checkpoint. SIGTERM and SIGUSR1 save a checkpoint and end
the program with status 85, which means: start me again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mlcd_ds.artefacts.files import write_atomic
from mlcd_ds.config import Recipe, dump_recipe, load_recipe, recipe_names
from mlcd_ds.data.loader import StreamSlice
from mlcd_ds.data.tokenizers import TOKENIZER_NAME
from mlcd_ds.distributed.ds_config import check_filled_config, read_ds_config
from mlcd_ds.distributed.stopping import EXIT_REQUEUE, StopRequest
from mlcd_ds.engine.engine_config import read_layout, resolve_ds_config
from mlcd_ds.engine.init_from import find_start
from mlcd_ds.engine.layout import Layout, plan_batches
from mlcd_ds.engine.phases import phase_at
from mlcd_ds.engine.planned_towers import planned_towers
from mlcd_ds.engine.precision import decide_precision
from mlcd_ds.engine.run_folder import claim_folder, write_train_manifest
from mlcd_ds.engine.trainer import Trainer
from mlcd_ds.engine.training_data import missing_keys, open_data
from mlcd_ds.kernels.device import check_bf16
from mlcd_ds.objectives.registry import kind_of
from mlcd_ds.stages import runner


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
        help="start from this run (its newest checkpoint, or RUN/checkpoints/step_N), backbone and head; or from this "
        "Hugging Face backbone (the same as train.init_from=FOLDER)",
    )
    parser.add_argument("--dry-run", action="store_true", help="build everything without memory, print it, exit")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it; the environment rules
    return parser


def describe(
    recipe: Recipe, ds_config: dict, layout: Layout, batch_slice: StreamSlice, context: runner.Context
) -> None:
    """Say what would run: the resolved files, sizes and shares."""
    towers = planned_towers(recipe, phase_at(recipe, recipe.train.steps - 1))
    lines = [
        dump_recipe(recipe).rstrip(),
        f"# DeepSpeed: {ds_config}",
        *(
            f"# {tower.label}: {tower.num_parameters / 1e6:.1f} M parameters, {tower.forward_flops / 1e9:.1f} GFLOP a "
            f"sample forward{', frozen' if tower.is_frozen else ''}"
            for tower in towers
        ),
        f"# batch: {recipe.train.global_batch} = {layout.data_parallel} data-parallel x "
        f"{batch_slice.num_micro_batches} x {batch_slice.micro_batch}, on {layout.num_ranks} ranks",
        f"# samples seen: {recipe.train.steps * recipe.train.global_batch / 1e6:.1f} M",
    ]
    if missing := missing_keys(recipe):
        keys = " and ".join(f"data.{key}" for key in missing)
        lines.append(f"# data: a real run needs {keys}, not given here")
    else:
        data, kind = open_data(recipe, context.group), kind_of(recipe.objective)
        lines.append(f"# data: {data.num_samples} samples of {data.index.num_images} images")
        lines += [f"# {line}" for line in kind.describe(recipe, data, layout.num_ranks, layout.tensor_parallel)]
        if start := find_start(recipe, data, context.group):
            lines.append(
                f"# starts from: {start.folder}, {'backbone and head' if start.has_state_for(recipe) else 'backbone'}"
            )
    runner.logger.info("\n".join(lines))


def run(args: argparse.Namespace, context: runner.Context) -> int:
    """Check everything, then train. Returns the exit status."""
    given = [f"train.init_from={args.init_from}"] if args.init_from else []
    recipe = load_recipe(args.recipe, (*args.overrides, *given))
    given_config = read_ds_config(args.deepspeed_config)
    recipe = decide_precision(recipe, given_config, args.deepspeed_config)
    if recipe.train.precision == "bf16":
        check_bf16(context.device, "train.precision bf16", "train in fp16, with ds_configs/zero1_fp16.json")
    kind_of(recipe.objective).check_device(recipe, context.device)
    layout = read_layout(given_config, args.deepspeed_config, context.group.size)
    batch_slice = plan_batches(recipe, layout, context.group.rank)
    ds_config = resolve_ds_config(given_config, args.deepspeed_config, recipe, layout, batch_slice)
    check_filled_config(ds_config, args.deepspeed_config)
    if args.dry_run:
        describe(recipe, ds_config, layout, batch_slice, context)
        return 0
    with StopRequest() as stop:
        return train(recipe, given_config, ds_config, layout, context, stop)


def train(
    recipe: Recipe, given_config: dict, ds_config: dict, layout: Layout, context: runner.Context, stop: StopRequest
) -> int:
    """Open the data, claim the run's folder, train to the end or to a stop. Returns the exit status.

    `given_config` is the DeepSpeed file, `ds_config` the same with everything filled in.
    """
    data = open_data(recipe, context.group)
    find_start(recipe, data, context.group)  # what does not fit is refused before the folder is claimed
    inputs, out = data.inputs, recipe.train.out
    if claim_folder(recipe, given_config, inputs, context.group):
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
    if context.group.is_main and data.tokenizer:  # export and evaluation read it here
        content = data.tokenizer.to_json().encode()
        write_atomic(out / TOKENIZER_NAME, lambda file: file.write(content))
    if not Trainer(recipe, ds_config, layout, data, context.group, context.device).fit(stop):
        runner.logger.info("train: asked to stop; a checkpoint is saved. Start again to go on.")
        return EXIT_REQUEUE
    if context.group.is_main:
        write_train_manifest(recipe, inputs)
    runner.logger.info("train: done")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry of `mlcd train` and `deepspeed mlcd_ds/train.py`."""
    args = build_parser().parse_intermixed_args(argv)
    return runner.guarded(lambda context: run(args, context))
