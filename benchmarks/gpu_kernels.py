"""The parts of gpu.py that need no data: products, kernels, head, search, backbone."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import head as head_benchmark
import torch
import torch.nn.functional as F
from head_references import MARGIN, SCALE
from torch import Tensor, nn

from mlcd_ds.clustering.blockwise import BlockwiseAssigner
from mlcd_ds.clustering.choose_assigner import choose_assigner
from mlcd_ds.clustering.kmeans import lloyd_step
from mlcd_ds.clustering.row_sampling import Sample
from mlcd_ds.config import load_recipe
from mlcd_ds.distributed.launch import detect_launch, process_group
from mlcd_ds.engine.hardware import peak_tflops
from mlcd_ds.models.convert import vision_config
from mlcd_ds.models.noise import TrainingNoise
from mlcd_ds.models.vit import ViT, flops_per_image

ROOT = Path(__file__).resolve().parents[1]
DEVICE = head_benchmark.DEVICE
IS_GPU = DEVICE.type == "cuda"
ROUNDS = 7 if IS_GPU else 1
GIB = 2**30
# Off a GPU the parts run at sizes that only show that they work.
HEAD = head_benchmark.Sizes(32_768, 768, 1_000_000, 0.1) if IS_GPU else head_benchmark.Sizes(64, 64, 2_000, 0.1)
ROWS, CENTERS, DIM = (65_536, 1_000_000, 768) if IS_GPU else (512, 3_000, 64)
LLOYD_ROWS, LLOYD_CENTERS = (524_288, 100_000) if IS_GPU else (2_048, 500)
PRODUCT = 8192 if IS_GPU else 256
VIT_OVERRIDES = () if IS_GPU else ("model.width=64", "model.depth=2", "model.heads=2", "model.mlp_width=128")
VIT_BATCH = 128 if IS_GPU else 2
KERNELS = ("torch", "triton") if IS_GPU else ("torch",)
PRECISION = "bf16" if IS_GPU else "fp32"
DS_CONFIG = "ds_configs/zero1_bf16.json" if IS_GPU else "ds_configs/zero1_fp32_cpu.json"
found: dict[str, float] = {}  # ceilings of this run


def seconds(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median over rounds, after one to warm up."""
    work()
    return median(head_benchmark.seconds(work) for _ in range(rounds))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """By the Frobenius norm."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def rates(flops: float, time_s: float) -> dict[str, float]:
    """Seconds, TFLOP/s, and what part of the ceilings that is."""
    tflops, sheet = flops / time_s / 1e12, peak_tflops(DEVICE)
    figures = {"seconds": time_s, "tflops": tflops}
    if "product_tflops" in found:
        figures["of_peak"] = tflops / found["product_tflops"]
    return figures | ({"of_sheet": tflops / sheet} if sheet else {})


def ceilings() -> dict[str, float]:
    """Bytes read and written in a copy of 2 GiB, and a product of random matrices."""
    source = torch.randn(2**29 if IS_GPU else 2**20, device=DEVICE)
    target = torch.empty_like(source)
    copy_s = seconds(lambda: target.copy_(source))
    left, right = (torch.randn(PRODUCT, PRODUCT, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product_s = seconds(lambda: left @ right)
    found["product_tflops"] = 2 * PRODUCT**3 / product_s / 1e12
    return {"copy_gb_per_s": 2 * source.nbytes / copy_s / 1e9, "product_tflops": found["product_tflops"]}


def kernels() -> dict[str, object]:
    """Errors of every kernel against float64, and whether the twins were found out."""
    with alone() as group:
        result: dict[str, object] = {"head": head_benchmark.measure_errors(group)}
    generator = torch.Generator(DEVICE).manual_seed(0)
    # Sizes that no tile divides. Centres near the rows, so that near misses are common.
    rows_BE = F.normalize(torch.randn(1_027, 200, device=DEVICE, generator=generator), dim=1)
    centers_CE = F.normalize(torch.randn(5_003, 200, device=DEVICE, generator=generator), dim=1)
    scores_BC = rows_BE.double() @ centers_CE.double().T
    best_Bk = scores_BC.topk(8, dim=1)
    for metric in ("cosine", "euclidean"):
        for kernel in KERNELS:
            for is_bf16 in (False, True):
                assigner = choose_assigner(kernel, metric, DEVICE, is_bf16)
                assigner.set_centers(centers_CE)
                scores_Bk, nearest_Bk = assigner.search(rows_BE, 8)
                if metric == "euclidean":
                    scores_Bk = scores_Bk + centers_CE.square().sum(dim=1)[nearest_Bk] / 2
                result[f"nearest {metric}, {kernel}, {'bf16' if is_bf16 else 'fp32'}"] = {
                    "same_nearest": float((nearest_Bk[:, 0] == best_Bk.indices[:, 0]).double().mean()),
                    "same_8": float(
                        (nearest_Bk.sort(dim=1).values == best_Bk.indices.sort(dim=1).values).double().mean()
                    ),
                    "score_error": relative_error(scores_Bk, scores_BC.gather(1, nearest_Bk)),
                    "score_lost": float((best_Bk.values[:, 0] - scores_BC.gather(1, nearest_Bk[:, :1])[:, 0]).max()),
                }
    assigner = choose_assigner(KERNELS[-1], "cosine", DEVICE, True)
    assigner.set_centers(centers_CE.roll(1, dims=0))
    twin = float((assigner.search(rows_BE, 1)[1][:, 0] == best_Bk.indices[:, 0]).double().mean())
    return {**result, "same_nearest_twin": twin}


def agreement(got_Bk: Tensor, wanted_Bk: Tensor) -> dict[str, float]:
    """Shares of rows with the same nearest, and of the same k nearest."""
    is_same_Bk = got_Bk.sort(dim=1).values == wanted_Bk.sort(dim=1).values
    return {
        "same_nearest": float((got_Bk[:, 0] == wanted_Bk[:, 0]).double().mean()),
        "same_k": float(is_same_Bk.all(dim=1).double().mean()),
    }


@contextlib.contextmanager
def alone() -> Iterator[head_benchmark.Group]:
    """A group of this process."""
    with process_group(detect_launch({})) as group:
        yield group


def head() -> dict[str, object]:
    """A step at the size of the paper's job on one GPU, and what it is made of."""
    flops = 8 * HEAD.batch * HEAD.classes * HEAD.rate * HEAD.dim  # four products
    result: dict[str, object] = {}
    with alone() as group:
        batch = head_benchmark.make_batch(HEAD, group)
        for kernel in KERNELS:
            ours = head_benchmark.OurHead(HEAD, group, "bf16", kernel)
            ours.step(*batch)
            memory: dict[str, float] = {}
            with head_benchmark.peak_memory(memory):
                ours.step(*batch)
            figures = rates(flops, seconds(lambda ours=ours: ours.step(*batch)))
            both_s = seconds(lambda ours=ours: ours.head(*batch))
            figures |= {"passes": rates(flops, both_s), "peak_gib_above_state": memory["peak_mib"] / 1024}
            result[kernel] = figures
            del ours
        emb_GE = torch.randn(HEAD.batch, HEAD.dim, device=DEVICE, dtype=torch.bfloat16)
        unit_SE = torch.randn(round(HEAD.classes * HEAD.rate), HEAD.dim, device=DEVICE, dtype=torch.bfloat16)
        block = 4_096 if IS_GPU else 16

        def bare() -> None:
            """The four products of a step, by blocks of images, with nothing between."""
            for begin in range(0, HEAD.batch, block):
                part = emb_GE[begin : begin + block]
                for _ in range(2):
                    logits = part @ unit_SE.T
                logits @ unit_SE
                logits.T @ part

        result["bare_products"] = rates(flops, seconds(bare))
        few = emb_GE[: HEAD.batch // 8].float().requires_grad_()
        weight_SE = unit_SE.float().requires_grad_()
        target = torch.randint(len(unit_SE), (len(few),), device=DEVICE)

        def stored() -> None:
            """One softmax over stored logits under autocast, for an eighth of the batch."""
            with torch.autocast(DEVICE.type, torch.bfloat16):
                logits = few @ weight_SE.T
            F.cross_entropy(SCALE * (logits.float() - MARGIN), target).backward()

        memory = {}
        stored()
        with head_benchmark.peak_memory(memory):
            stored()
        figures = rates(flops / 8 * 3 / 4, seconds(stored))
        result["stored_softmax_of_an_eighth"] = {**figures, "peak_gib": memory["peak_mib"] / 1024}
    return result


def host_waits() -> dict[str, object]:
    """Whether the host waits anywhere in a step of head and optimizer (an error there would end this part)."""
    sizes = head_benchmark.Sizes(512, 64, 20_000, 0.1)
    result: dict[str, object] = {}
    with alone() as group:
        batch = head_benchmark.make_batch(sizes, group)
        for kernel in KERNELS:
            ours = head_benchmark.OurHead(sizes, group, "bf16", kernel)
            for _ in range(2):
                ours.step(*batch)
            torch.cuda.set_sync_debug_mode("error")
            try:
                ours.step(*batch)
                result[kernel] = 0
            except RuntimeError as error:
                result[kernel] = f"waits: {error}: {traceback.format_exc().splitlines()[-4].strip()}"
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.set_sync_debug_mode("error")
        try:
            float(batch[0].sum())
            result["twin_found"] = False
        except RuntimeError:
            result["twin_found"] = True
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return result


def assign() -> dict[str, object]:
    """Nearest centres in bf16; the faster one's are compared with fp32's."""
    rows_BE = F.normalize(torch.randn(ROWS, DIM, device=DEVICE), dim=1)
    centers_CE = F.normalize(torch.randn(CENTERS, DIM, device=DEVICE), dim=1)
    result: dict[str, object] = {}
    for kernel in KERNELS:
        assigner = choose_assigner(kernel, "cosine", DEVICE, True)
        assigner.set_centers(centers_CE)
        for k in (1, 8):
            memory: dict[str, float] = {}
            with head_benchmark.peak_memory(memory):
                assigner.search(rows_BE, k)
            time_s = seconds(lambda k=k, assigner=assigner: assigner.search(rows_BE, k), 3)
            figures = rates(2 * ROWS * CENTERS * DIM, time_s)
            result[f"{kernel}, {k} nearest"] = {**figures, "peak_gib": memory["peak_mib"] / 1024}
        few_BE = rows_BE[:2_048]
        got_Bk = assigner.search(few_BE, 8)[1]
        exact = BlockwiseAssigner("cosine", False, DEVICE)
        exact.set_centers(centers_CE)
        wanted_Bk = exact.search(few_BE, 8)[1]
        result[f"{kernel}, beside fp32"] = agreement(got_Bk, wanted_Bk)
    return result


class HostRows:
    """fp16 rows in host memory, as `mlcd embed` leaves them."""

    def __init__(self, rows_NE: Tensor) -> None:
        self.rows_NE = rows_NE
        self.num_rows, self.dim = rows_NE.shape

    def blocks(self, block_rows: int, sample: Sample | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        numbers_N = torch.arange(self.num_rows)
        yield from zip(numbers_N.split(block_rows), self.rows_NE.split(block_rows), strict=True)

    def place(self, number: int) -> str:
        return f"row {number}"


def lloyd() -> dict[str, object]:
    """An iteration: reading, assigning, adding up, averaging."""
    rows = HostRows(F.normalize(torch.randn(LLOYD_ROWS, DIM, dtype=torch.float32), dim=1).half())
    centers_CE = F.normalize(torch.randn(LLOYD_CENTERS, DIM, device=DEVICE), dim=1)
    assigner = choose_assigner(KERNELS[-1], "cosine", DEVICE, True)
    with alone() as group:
        time_s = seconds(lambda: lloyd_step(rows, group, assigner, centers_CE, "cosine", None), 3)  # type: ignore[arg-type]
    on_device = rows.rows_NE[:ROWS].to(DEVICE).float()
    search_s = seconds(lambda: assigner.search(on_device, 1), 3) * LLOYD_ROWS / len(on_device)
    figures = rates(2 * LLOYD_ROWS * LLOYD_CENTERS * DIM, time_s)
    return {**figures, "rows_per_s": LLOYD_ROWS / time_s, "time_over_bare_search": time_s / search_s}


def backbone() -> dict[str, object]:
    """Training steps of the same backbone, and how much of the peak they reach."""
    config = load_recipe("vit_l_14", VIT_OVERRIDES).model
    images = torch.randn(VIT_BATCH, 3, config.image_size, config.image_size, device=DEVICE, dtype=torch.bfloat16)
    keys = torch.arange(VIT_BATCH, device=DEVICE)
    flops = 3 * VIT_BATCH * flops_per_image(config)

    def ours() -> ViT:
        model = ViT(config)
        model.init_weights(torch.Generator().manual_seed(0))
        return model.to(DEVICE, torch.bfloat16)

    def compiled() -> ViT:
        model = ours()
        for block in model.encoder.layers:
            block.compile()
        return model

    def transformers_clip() -> nn.Module:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        return CLIPVisionModel(CLIPVisionConfig(**vision_config(config))).to(DEVICE, torch.bfloat16)

    def timm_vit() -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        shape = {"img_size": config.image_size, "patch_size": config.patch_size, "embed_dim": config.width}
        shape |= {"depth": config.depth, "num_heads": config.heads, "num_classes": 0, "pre_norm": True}
        return VisionTransformer(**shape).to(DEVICE, torch.bfloat16)

    half = TrainingNoise(keys, 0.0, 0.5)
    runs: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], float]] = {
        "ours": (ours, lambda m: m.forward_features(images), 1.0),
        "ours compiled": (compiled, lambda m: m.forward_features(images), 1.0),
        "ours, half of the patches": (ours, lambda m: m.forward_features(images, half), 0.5),
        "transformers": (transformers_clip, lambda m: m(images).pooler_output, 1.0),
        "timm": (timm_vit, lambda m: m(images), 1.0),
    }
    result: dict[str, object] = {}
    for name, (make, run, share) in runs.items():
        try:
            model = make()
        except ImportError:
            continue
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step(model: nn.Module = model, run: Callable = run, optimizer: torch.optim.AdamW = optimizer) -> None:
            run(model).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        memory: dict[str, float] = {}
        step()
        with head_benchmark.peak_memory(memory):
            step()
        time_s = seconds(step, 5 if IS_GPU else 1)
        result[name] = {**rates(flops * share, time_s), "images_per_s": VIT_BATCH / time_s}
        result[name]["peak_gib_above_state"] = memory["peak_mib"] / 1024
        del model, optimizer, step
        release()
    return result


def release() -> None:
    """Give back what torch's allocator keeps."""
    if IS_GPU:
        torch.cuda.empty_cache()
