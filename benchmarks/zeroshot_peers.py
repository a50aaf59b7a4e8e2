"""Zero-shot and retrieval of one model by CLIP_benchmark's and open_clip's own code, and by `mlcd evaluate`.

A small open_clip model learns a little from the pairs in demo/shards/train and is written as a Hugging Face folder. The
test images are laid out as CLIP_benchmark's data sets. It reads them with its own code (images by Pillow, texts by
open_clip's tokenizer, its metrics), we index the same folder and evaluate the Hugging Face folder. Exits with 1 unless
the hits are as many, and each image's class is the same.

  pip install open_clip_torch clip_benchmark torchvision 'numpy<2.4'   (into an environment of their own)
  python benchmarks/zeroshot_peers.py --out runs/peers --json benchmarks/results/zeroshot_peers.json
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
SIZE = 128  # of the demo's images: nothing is resized, so both sides see the same pixels
WIDTH, HEADS, LAYERS, EMBED = 64, 2, 2, 48


def samples(split: str) -> list[dict[str, bytes]]:
    """Members by extension of each sample in demo/shards."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted((ROOT / "demo/shards" / split).glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                found.setdefault(f"{path.stem}-{key}", {})[extension] = archive.extractfile(member).read()
    return list(found.values())


def lay_out(folder: Path, templates: list[str], kind: str) -> None:
    """The test images as a data set of CLIP_benchmark: of classes (.cls), or of captions, some images with two.

    Images whose caption another has too are left out of those: which of the two is first, rounding decides.
    """
    seen: set[str] = set()
    (folder / "test").mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "test" / "0.tar", "w") as archive:
        for number, sample in enumerate(samples("test")):
            metadata = json.loads(sample["json"])
            caption = sample["txt"].decode().strip()
            captions = [caption] + ([f"a drawing of {', '.join(metadata['tags'][:3])}"] if number % 3 == 0 else [])
            if kind == "txt" and seen & set(captions):
                continue
            seen.update(captions)
            text = {"cls": str(metadata["label"]), "txt": "\n".join(captions)}[kind]
            for extension, content in (("jpg", sample["jpg"]), (kind, text.encode())):
                info = tarfile.TarInfo(f"s{number:07d}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    (folder / "test" / "nshards.txt").write_text("1\n")
    if kind == "txt":
        (folder / "dataset_type.txt").write_text("retrieval\n")
    else:
        names = json.loads((ROOT / "demo/shards/classes.json").read_text())
        (folder / "classnames.txt").write_text("\n".join(names) + "\n")
        lines = [template.replace("{}", "{c}") for template in templates]
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(lines) + "\n")


def trained_model(steps: int) -> nn.Module:
    """open_clip's CLIP after some steps of its own loss."""
    from open_clip import CLIP, get_tokenizer, image_transform
    from open_clip.loss import ClipLoss

    torch.manual_seed(0)
    vision = dict(image_size=SIZE, patch_size=32, width=WIDTH, layers=LAYERS, head_width=WIDTH // HEADS)
    text = dict(context_length=77, vocab_size=49408, width=WIDTH, heads=HEADS, layers=LAYERS)
    model, tokenizer = CLIP(EMBED, vision, text), get_tokenizer("ViT-B-32")
    prepare = image_transform(SIZE, is_train=False)
    pairs = samples("train")
    images = torch.stack([prepare(Image.open(io.BytesIO(pair["jpg"]))) for pair in pairs])
    texts = tokenizer([", ".join([pair["txt"].decode(), *json.loads(pair["json"])["tags"][:4]]) for pair in pairs])
    optimizer, generator = torch.optim.AdamW(model.parameters(), 1e-3), torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(pairs), (128,), generator=generator)
        loss = ClipLoss()(*model(images[batch], texts[batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names and layout of weights to transformers'."""
    plain = {
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final": "text_model.final_layer_norm",
        "logit_scale": "logit_scale",
    }
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    parts["attn.out_proj"] = "self_attn.out_proj"
    found = {}
    for name, value in state.items():
        if name == "visual.proj":
            found["visual_projection.weight"] = value.T
        elif name == "text_projection":
            found["text_projection.weight"] = value.T
        elif "resblocks" in name:
            tower = "vision_model" if name.startswith("visual") else "text_model"
            layer, _, rest = name.partition("resblocks.")[2].partition(".")
            stem = f"{tower}.encoder.layers.{layer}."
            if rest.startswith("attn.in_proj_"):
                for kind, rows in zip("qkv", value.chunk(3), strict=True):
                    found[f"{stem}self_attn.{kind}_proj.{rest.removeprefix('attn.in_proj_')}"] = rows
            else:
                part, _, kind = rest.rpartition(".")
                found[f"{stem}{parts[part]}.{kind}"] = value
        elif name in plain:
            found[plain[name]] = value
        elif name.rpartition(".")[0] in plain:
            found[f"{plain[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}"] = value
        else:
            raise KeyError(name)
    return {name: value.contiguous() for name, value in found.items()}


def write_folder(model: nn.Module, folder: Path) -> None:
    """A Hugging Face folder with open_clip's vocabulary."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPConfig, CLIPModel

    shape = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    shape |= dict(hidden_act="gelu", projection_dim=EMBED)
    text = shape | dict(vocab_size=49408, max_position_embeddings=77)
    text |= dict(bos_token_id=49406, eos_token_id=49407, pad_token_id=49407)
    vision = shape | dict(image_size=SIZE, patch_size=32)
    theirs = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=EMBED))
    theirs.load_state_dict(to_hugging_face(model.state_dict()))
    theirs.save_pretrained(folder)
    tokenizer = SimpleTokenizer()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # transformers' names
    vocabulary = {special.get(token, token): number for token, number in tokenizer.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(pair) for pair, _ in sorted(tokenizer.bpe_ranks.items(), key=lambda item: item[1])]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))


def theirs(model: nn.Module, out: Path) -> tuple[dict[str, float], Tensor]:
    """Metrics by CLIP_benchmark, and the class that it takes each image for."""
    from clip_benchmark.datasets.builder import build_dataset
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
    from open_clip import get_tokenizer, image_transform
    from torch.utils.data import DataLoader

    prepare, tokenizer = image_transform(SIZE, is_train=False), get_tokenizer("ViT-B-32")

    def loader(folder: str, task: str) -> DataLoader:
        data = build_dataset("wds/demo", root=str(out / folder), transform=prepare, split="test", task=task)
        return DataLoader(data.batched(64), batch_size=None)  # as its command line makes them

    classes = loader("wds", "zeroshot_classification")
    metrics = zeroshot_classification.evaluate(
        model, classes, tokenizer, classes.dataset.classes, classes.dataset.templates, "cpu", amp=False
    )
    weights = zeroshot_classification.zero_shot_classifier(
        model, tokenizer, classes.dataset.classes, classes.dataset.templates, "cpu", amp=False
    )
    logits, _ = zeroshot_classification.run_classification(model, weights, classes, "cpu", amp=False)
    captions = loader("wds-retrieval", "zeroshot_retrieval")
    metrics |= zeroshot_retrieval.evaluate(model, captions, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    return metrics, logits.argmax(1)


def mlcd(python: str, *arguments: object) -> None:
    subprocess.run([python, "-m", "mlcd_ds", *map(str, arguments)], cwd=ROOT, check=True)


def ours(out: Path, python: str) -> tuple[dict[str, float], Tensor]:
    """Metrics by `mlcd evaluate`, and the class that it takes each image for."""
    for name in ("wds", "wds-retrieval"):
        mlcd(python, "index", "--shards", out / name / "test", "--out", out / "index" / name, "--overwrite")
    texts = ("--classes", out / "wds/classnames.txt")
    texts += ("--templates", out / "wds/zeroshot_classification_templates.txt")
    common = ("evaluate", "--model", out / "clip", "--overwrite")
    mlcd(
        python, *common, "--protocols", "zeroshot", *texts, "--test-index", out / "index/wds", "--out", out / "zeroshot"
    )
    mlcd(
        python,
        *common,
        "--protocols",
        "retrieval",
        "--test-index",
        out / "index/wds-retrieval",
        "--out",
        out / "retrieval",
    )
    metrics: dict[str, float] = {}
    for task in ("zeroshot/clip_benchmark/zeroshot_classification", "retrieval/clip_benchmark/zeroshot_retrieval"):
        metrics |= json.loads((out / f"{task}.json").read_text())["metrics"]

    from mlcd_ds.encoders.registry import load_pair_encoder
    from mlcd_ds.evaluation.prompts import read_names, read_templates
    from mlcd_ds.evaluation.zeroshot import class_embeddings, zeroshot_hits

    images = torch.from_numpy(np.load(out / "zeroshot/features/images/0.npy"))
    labels = torch.from_numpy(np.load(out / "zeroshot/features/images/0.labels.npy"))
    with torch.inference_mode():
        classes = class_embeddings(
            load_pair_encoder(str(out / "clip")).text.encode, read_names(texts[1]), read_templates(str(texts[3]))
        )
    return metrics, zeroshot_hits(images, labels, classes).predictions_N


def main() -> int:
    """Make the data, evaluate twice, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--python", default=sys.executable, help="one that has mlcd_ds, where this one lacks it")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    from mlcd_ds.evaluation.prompts import read_templates

    lay_out(out / "wds", read_templates("clip_80"), "cls")
    lay_out(out / "wds-retrieval", [], "txt")
    model = trained_model(arguments.steps)
    write_folder(model, out / "clip")
    (their_metrics, their_classes), (our_metrics, our_classes) = theirs(model, out), ours(out, arguments.python)
    retrieval = json.loads((out / "retrieval/report.json").read_text())["retrieval"]
    counts = {"image": retrieval["num_texts"], "text": retrieval["num_images"]}  # of queries
    rows = {}
    for name, value in their_metrics.items():
        count = counts.get(name.partition("_")[0], len(our_classes))
        hits = [round(metrics[name] * count) for metrics in (their_metrics, our_metrics)]
        rows[name] = {"clip_benchmark": value, "mlcd": our_metrics[name]}
        if "mean" not in name:
            rows[name] |= {"hits_clip_benchmark": hits[0], "hits_mlcd": hits[1], "of": count}
    differing = int((their_classes != our_classes).sum())
    result = {"metrics": rows, "images_taken_for_another_class": differing, "num_images": len(our_classes)}
    text = json.dumps(result, indent=1)
    sys.stdout.write(text + "\n")
    if arguments.json:
        arguments.json.write_text(text + "\n")
    is_same = not differing and all(row.get("hits_mlcd") == row.get("hits_clip_benchmark") for row in rows.values())
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
