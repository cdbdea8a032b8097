"""What ImageNet-1k and ImageNet-21k would cost on 1, 8 and 64 GPUs: arithmetic on facts that name their source.

    python -m benchmarks.scale

Nothing is measured here. Prints the tables of docs/scale.md; tests/test_scale.py holds the two together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ensemble_kd.inference import batch_for
from ensemble_kd.teachers.layout import Layout

MEASURED, PUBLISHED, ASSUMED = "measured", "published", "**assumed**"
GPUS, VIEWS, TEACHERS = (1, 8, 64), (1, 4, 16), 2
SIDE = (224, 224)

CEILING = 780.7e12
EFFICIENCY = 0.40
STORING, STORING_MMACS = 115_089, 555 + 313
TRAINING, TRAINING_MMACS = 59_066, 555
DECODE = 1.05e-3
OPENING = 0.25e-3
CORES = 16
TEACHER_GMACS = 4.1 + 17.6
STUDENT_GMACS, BODY_PARAMETERS, WIDTH, NORMS = 1.82, 11_176_512, 512, 20
JPEG_BYTES = 25e3
PRICE = 3.0
PER_GPU = 128
LINK = {8: 200e9, 64: 40e9}
LATENCY = {8: 30e-6, 64: 60e-6}
HASHING = 1.0e9
DIGEST_BYTES = 74
PAGE = 4096

FACTS = (
    ("bf16 ceiling of a GPU", "781 TFLOP/s", MEASURED, "8192³ product, H200; benchmarks/results/gpu.json"),
    ("share of it that networks at 224 px reach", "40 %", ASSUMED, "the optimistic column; no run at 224 px"),
    ("storing small-stem resnet18 + vgg16_bn, 32 px", "115,089 images/s", MEASURED, "gpu.json; 868 MMAC an image"),
    ("training small-stem resnet18, 32 px, in a CUDA graph", "59,066 images/s", MEASURED, "gpu.json; 555 MMAC"),
    ("decoding and cutting 1,000 JPEGs of 224 px", "1.05 s of a core", MEASURED, "growth.json, another machine's core"),
    ("opening a folder", "0.25 s per 1,000 files", MEASURED, "growth.json: local disk, two cores"),
    ("CPU cores a GPU", "16", MEASURED, "what the machine of gpu.json had"),
    ("teachers resnet50 and ViT-B/16, forward", "4.1 and 17.6 GMAC", PUBLISHED, "their papers' counts, 224 px"),
    ("student resnet18, forward", "1.82 GMAC", PUBLISHED, "11.2 M weights and 512 for each class; 20 BatchNorms"),
    ("ImageNet-1k, ImageNet-21k", "1,281,167 and 14,197,122 images", PUBLISHED, "1,000 and 21,841 classes"),
    ("epochs", "90 and 30", ASSUMED, "1k and 21k"),
    ("images of a step", "128 a GPU", ASSUMED, "`--batch-size` is 128 times the GPUs"),
    ("a JPEG, resized to 224 px once before", "25 kB", ASSUMED, "originals are about 110 kB and slower to decode"),
    ("ring bandwidth of a GPU", "200 and 40 GB/s", ASSUMED, "8 GPUs in one machine; 64 in eight"),
    ("one small all-reduce", "30 and 60 µs", ASSUMED, "same"),
    ("SHA-256 of one core", "1 GB/s", ASSUMED, ""),
    ("price", "$3 a GPU-hour", ASSUMED, ""),
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A data set with how long a student trains on it."""

    name: str
    count: int
    classes: int
    epochs: int

    def row_bytes(self, top_k: int | None) -> int:
        """Bytes kept of one image, view and teacher."""
        temperatures = () if top_k is None else (1.0, 4.0)
        return Layout(self.count, self.classes, top_k, temperatures).row_bytes

    @property
    def gradient_bytes(self) -> int:
        """Of the student, in float32."""
        return 4 * (BODY_PARAMETERS + (WIDTH + 1) * self.classes)


SOURCES = (Source("ImageNet-1k", 1_281_167, 1_000, 90), Source("ImageNet-21k", 14_197_122, 21_841, 30))
FORMATS = ((SOURCES[0], None), (SOURCES[0], 32), (SOURCES[1], None), (SOURCES[1], 32))


def reached(images: float, mmacs: float, passes: int) -> float:
    """Share of the ceiling that a measured rate is; training is three passes."""
    return images * 2e6 * mmacs * passes / CEILING


SHARES = {
    "40 %": (EFFICIENCY, EFFICIENCY),
    "as measured": (reached(STORING, STORING_MMACS, 1), reached(TRAINING, TRAINING_MMACS, 3)),
}
"""Of the ceiling: teachers' forward pass, student's training."""


def rates(share: str) -> dict[str, float]:
    """Images a second of one GPU by work, were images there at once."""
    teachers, student = (part * CEILING / 2e9 for part in SHARES[share])
    a_step, a_look = 3 * STUDENT_GMACS / student, TEACHER_GMACS / teachers
    return {"teachers": 1 / a_look, "student": 1 / a_step, "student, teachers live": 1 / (a_step + a_look)}


def decoded() -> float:
    """Images a second that the CPU cores of one GPU decode."""
    return CORES / DECODE


def gpu_hours(source: Source, views: int, share: str) -> tuple[float, float]:
    """Of teachers and of student; with `views` 0 the teachers are live, and all is the student's."""
    fed = {work: min(rate, decoded()) for work, rate in rates(share).items()}
    passes = source.count * source.epochs / 3600
    if not views:
        return 0.0, passes / fed["student, teachers live"]
    return source.count * views / 3600 / fed["teachers"], passes / fed["student"]


def title_of(source: Source, top_k: int | None) -> str:
    return f"{source.name}, {'dense' if top_k is None else f'top-{top_k}'}"


def facts_table() -> str:
    """Every number that goes in."""
    return table(
        ["", "value", "", "where it comes from, or what it stands for"], [list(row) for row in FACTS]
    )


def rates_table() -> str:
    """Images a second of one GPU, and the cores that would keep it fed."""
    rows = []
    for share, (looking, training) in SHARES.items():
        for work, rate in rates(share).items():
            cores = f"{rate * DECODE:.0f}"
            rows.append([f"{share} ({looking:.0%}, {training:.0%})", work, f"{rate:,.0f}", cores,
                         f"{min(rate, decoded()):,.0f}"])  # fmt: skip
    head = ["share of the ceiling (teachers, student)", "work", "images/s a GPU", "cores to decode for it",
            f"images/s with {CORES} cores"]  # fmt: skip
    return table(head, rows)


def store_table() -> str:
    """Sizes of stores of two teachers."""
    rows = []
    for source, top_k in FORMATS:
        row = source.row_bytes(top_k)
        sizes = [size_of(TEACHERS * source.count * row * views) for views in VIEWS]
        rows.append([title_of(source, top_k), f"{row:,}", *sizes])
    return table(["", "bytes a row", *(f"V = {views}" for views in VIEWS)], rows)


def cost_table() -> str:
    """GPU-hours, hours and money, were the work shared without loss."""
    rows = []
    for source in SOURCES:
        for views in (*VIEWS, 0):
            teachers, student = gpu_hours(source, views, "40 %")
            total, slower = teachers + student, sum(gpu_hours(source, views, "as measured"))
            hours = [f"{total / gpus:.2g}" for gpus in GPUS]
            money = [f"${PRICE * hours:,.0f}" for hours in (total, slower)]
            name = f"V = {views}" if views else "live (`--views 0`)"
            rows.append([f"{source.name}, {name}", f"{teachers:.2g}", f"{student:.2g}", *hours, *money])
    head = ["", "GPU-h of teachers", "GPU-h of student", *(f"hours on {gpus}" for gpus in GPUS), "cost",
            "cost at the measured share"]  # fmt: skip
    return table(head, rows)


def reading_table() -> str:
    """What a step reads: images and stored targets, of all GPUs together."""
    rows, rate = [], min(rates("40 %")["student"], decoded())
    for source, top_k in FORMATS:
        files = 1 if top_k is None else 3
        for gpus in GPUS:
            batch, seen = gpus * PER_GPU, gpus * rate
            row = TEACHERS * source.row_bytes(top_k)
            pages = TEACHERS * pages_of(source, top_k)
            rows.append([title_of(source, top_k), f"{gpus}", size_of(batch * JPEG_BYTES), size_of(batch * row),
                         size_of(seen * JPEG_BYTES), size_of(seen * row), f"{seen * TEACHERS * files:,.0f}",
                         size_of(seen * pages * PAGE)])  # fmt: skip
    head = ["", "GPUs", "JPEGs a step", "targets a step", "JPEGs a second", "targets a second",
            "reads of targets a second", "in pages of 4 kB a second"]  # fmt: skip
    return table(head, rows)


def pages_of(source: Source, top_k: int | None) -> float:
    """Pages that a random row touches, on average, in all files of one teacher."""
    widths = [2 * source.classes] if top_k is None else [2 * top_k, 2 * top_k, 4 * 2]
    return sum(1 + (width - 2) / PAGE for width in widths)


def network_table() -> str:
    """What a step of the student sends, and how long that takes beside its computing."""
    rows, a_step = [], PER_GPU / min(rates("40 %")["student"], decoded())
    for source in SOURCES:
        for gpus in GPUS[1:]:
            sent = 2 * (gpus - 1) / gpus * source.gradient_bytes
            small = 4 * NORMS  # two sums a BatchNorm, forward and back
            rows.append([f"{source.name}, {gpus} GPUs", size_of(source.gradient_bytes), size_of(sent),
                         f"{1000 * sent / LINK[gpus]:.1f}", f"{small}", f"{1000 * small * LATENCY[gpus]:.1f}",
                         f"{1000 * a_step:.1f}"])  # fmt: skip
    head = ["", "gradients", "sent by a GPU a step", "ms for it", "all-reduces of BatchNorm a step", "ms for them",
            f"ms to compute {PER_GPU} images"]  # fmt: skip
    return table(head, rows)


def gathering_table() -> str:
    """What storing one view gathers: each process receives every teacher's float32 outputs for all images."""
    rows, at_once = [], batch_for(SIDE, torch.device("cuda"))
    for source in SOURCES:
        shard = Layout(source.count, source.classes).shard_rows
        for gpus in GPUS:
            chunk = min(gpus * at_once, shard)
            outputs = TEACHERS * source.classes * 4 * (gpus > 1)
            rate = gpus * min(rates("40 %")["teachers"], decoded())
            rows.append([f"{source.name}, {gpus} GPU{'s' * (gpus > 1)}", f"{chunk:,}", f"{chunk / gpus:.0f}",
                         size_of(chunk * outputs), size_of(rate * outputs), size_of(source.count * outputs)])  # fmt: skip
    head = [
        "",
        "images at a time",
        "of a GPU",
        "received at a time",
        "received a second",
        "received for a view",
    ]
    return table(head, rows)


def limits_table() -> str:
    """What grows past use first: one process' share of opening, checking and noting."""
    rows = []
    for source, top_k in FORMATS:
        shards = math.ceil(source.count / Layout(source.count, source.classes).shard_rows)
        notes = [DIGEST_BYTES * (views * shards) * (views * shards + 1) / 2 for views in (1, 16)]
        held = TEACHERS * source.count * source.row_bytes(top_k) * 16
        rows.append([title_of(source, top_k), f"{source.count * OPENING / 60:,.0f}",
                     f"{source.count * max(GPUS) / 1e6:,.0f} M", f"{shards:,}", *map(size_of, notes),
                     f"{held / HASHING / 60:,.0f}", size_of(held * max(GPUS))])  # fmt: skip
    head = ["", "min to open the folder", f"files opened by {max(GPUS)} processes", "shards a view and teacher",
            "store.json written, V = 1", "V = 16", "min to check V = 16 at a start, two teachers",
            f"read for it by {max(GPUS)} processes"]  # fmt: skip
    return table(head, rows)


def size_of(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.3g} {unit}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


TABLES = {
    "Facts and assumptions": facts_table,
    "What one GPU does": rates_table,
    "Sizes of stores, two teachers": store_table,
    "Time and money": cost_table,
    "Reading": reading_table,
    "The student's network traffic": network_table,
    "Storing targets": gathering_table,
    "Where it breaks": limits_table,
}

if __name__ == "__main__":
    for title, make in TABLES.items():
        print(f"### {title}\n\n{make()}\n")
