"""Tile sizes for each family of GPUs, and matrices as kernels read them by tiles.

D is cut into chunks of W columns and one narrower TAIL, each a power of two: D = 192 costs 128 + 64, not 256. A matrix
is read through pointers or, on sm_90 and sm_100, through tensor descriptors, whose copies no thread has to address.

float32 matrices are split into bfloat16 parts, x = x1 + x2 + x3 to its last bit, side by side in one matrix. Tensor
cores have no float32, and six products of parts (without those beyond 2^-24) take a fraction of the time of one on the
plain arithmetic units.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vito_kernels._core.lazy_triton import arch, cdiv, interpreting, jit, on_device, rows_contiguous, shared_limit

if TYPE_CHECKING:
    import triton.language as tl


@dataclass(frozen=True)
class Tile:
    """How a program works.

    Args:
        block_m: rows that it owns.
        block_n: rows of the other matrix that it takes at a time.
        block_d: widest chunk of columns.
        warps, stages: Triton's ``num_warps`` and ``num_stages``.
        lanes: partial sums kept for each row in the loop: 8 where a thread holds whole groups of 8 columns, 0 for all.
        out_columns: columns of output that it keeps in registers or tensor memory; a wider output takes more launches.
    """

    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int
    lanes: int = 0
    out_columns: int = 512


# Beyond D = 512 the rows that a program owns fill most of the shared memory. Tiles are small, and each launch of 256
# columns computes the logits again (at D = 1024, 10 M N D flops and not 4). ``large_dim`` does most of the work
# at such widths; float32 in one part, the mean of float16, and repeated blocks remain.
WIDE = {
    80: {1024: Tile(32, 32, 128, 4, 2, out_columns=256)},
    89: {512: Tile(32, 32, 128, 4, 2, out_columns=256), 1024: Tile(32, 16, 128, 4, 2, out_columns=256)},
    90: {1024: Tile(64, 16, 256, 4, 2, 8, out_columns=256)},
    100: {1024: Tile(64, 16, 256, 8, 2, out_columns=256)},
}

# All 512 columns of the mean fit the registers of sm_80 only while nothing is masked and nothing rescaled. They would
# be all of sm_100's tensor memory, which the logits need as well: two launches.
MASKED_80 = {
    64: Tile(128, 64, 64, 8, 2, 8),
    128: Tile(128, 64, 128, 8, 3, 8),
    192: Tile(64, 32, 64, 8, 3),
    256: Tile(64, 64, 128, 8, 3),
    512: Tile(64, 64, 128, 8, 2, out_columns=256),
    **WIDE[80],
}

# Pinned, so that every rank adds in the same order; chosen by registers, spills, shared memory and instruction counts
# of the compiled kernels. Keys are family of GPUs and pass, then the largest D of a tile. "mean" and "lse" are the
# forward pass with and without the keys' mean. The online variant, or the fixed one with masks anywhere ("masked"), has
# a row of its own if it needs another tile; it has the same chunks. So have the kinds "labels", with three sums of
# a row, and "sigmoid".
TILES: dict[tuple[int, str], dict[int, Tile]] = {
    (80, "mean"): {
        64: Tile(128, 64, 64, 8, 2, 8),
        128: Tile(128, 64, 128, 8, 3, 8),
        192: Tile(64, 32, 64, 8, 3),
        256: Tile(64, 64, 128, 8, 3),
        512: Tile(64, 64, 128, 8, 2),
        **WIDE[80],
    },
    (80, "mean masked"): MASKED_80,
    (80, "mean online"): MASKED_80 | {64: Tile(128, 64, 64, 8, 2)},
    (80, "lse"): {256: Tile(128, 64, 256, 8, 3), 512: Tile(128, 16, 256, 8, 3), 1024: Tile(64, 16, 128, 8, 2)},
    # Of two branches, one for each side.
    (80, "lse summed"): {
        128: Tile(128, 64, 256, 8, 3),
        192: Tile(128, 32, 256, 8, 3),
        256: Tile(128, 64, 256, 8, 3),
        512: Tile(128, 16, 256, 8, 3),
        1024: Tile(64, 16, 128, 8, 2),
    },
    (80, "lse labels"): {
        128: Tile(64, 64, 128, 8, 3),
        192: Tile(128, 32, 128, 8, 3),
        256: Tile(64, 64, 256, 8, 3),
        512: Tile(128, 16, 256, 8, 3),
        1024: Tile(64, 16, 128, 8, 2),
    },
    (80, "mean sigmoid"): MASKED_80 | {192: Tile(64, 16, 64, 8, 3)},
    (80, "gradient"): {
        128: Tile(128, 64, 128, 8, 3),
        192: Tile(64, 32, 64, 8, 3),
        256: Tile(64, 64, 128, 8, 3),
        512: Tile(64, 64, 128, 8, 2),
        **WIDE[80],
    },
    (80, "two_sided"): {256: Tile(128, 64, 256, 8, 3), 512: Tile(64, 64, 256, 8, 2), **WIDE[80]},
    # 99 KB a block. Of the tiles that fit and do not spill, those whose warps compute no product twice, as eight warps
    # do with 64 x 32. Beyond D = 256 none is left, and float16's mean, SupCon and repeated blocks make do. On sm_120
    # descriptors spill where pointers do not.
    (89, "mean"): {
        64: Tile(128, 64, 64, 8, 2, 8),
        128: Tile(128, 64, 128, 8, 2, 8),
        192: Tile(64, 32, 64, 4, 2, 8),
        256: Tile(64, 64, 128, 8, 2),
        **WIDE[89],
    },
    (89, "lse"): {
        128: Tile(128, 64, 128, 8, 3),
        192: Tile(128, 64, 64, 8, 2),
        256: Tile(128, 64, 256, 8, 2),
        **WIDE[89],
        512: Tile(64, 16, 256, 8, 3),
    },
    (89, "lse labels"): {
        128: Tile(64, 64, 128, 8, 2),
        192: Tile(128, 32, 128, 8, 2),
        256: Tile(64, 64, 256, 8, 2),
        **WIDE[89],
        512: Tile(64, 16, 256, 8, 3),
    },
    (89, "gradient"): {
        128: Tile(128, 64, 128, 8, 2),
        192: Tile(64, 32, 64, 4, 2),
        256: Tile(64, 64, 128, 8, 2),
        **WIDE[89],
    },
    (89, "two_sided"): {128: Tile(128, 64, 128, 8, 3), 256: Tile(128, 64, 256, 8, 2), **WIDE[89]},
    (90, "mean"): {
        128: Tile(64, 128, 128, 4, 3, 8),
        256: Tile(64, 64, 256, 4, 2, 8),
        512: Tile(64, 64, 256, 8, 2, 8),
        **WIDE[90],
    },
    (90, "lse"): {
        128: Tile(64, 128, 128, 4, 3, 8),
        256: Tile(64, 64, 256, 4, 2, 8),
        512: Tile(128, 32, 256, 8, 3, 8),
        **WIDE[90],
    },
    (90, "lse labels"): {
        128: Tile(64, 64, 128, 4, 3, 8),
        256: Tile(64, 64, 256, 4, 2, 8),
        512: Tile(128, 32, 256, 8, 2, 8),
        **WIDE[90],
    },
    (90, "gradient"): {
        128: Tile(64, 128, 128, 4, 2),
        256: Tile(64, 64, 256, 4, 2),
        512: Tile(64, 64, 256, 8, 2),
        **WIDE[90],
    },
    (90, "two_sided"): {
        128: Tile(64, 128, 128, 4, 3),
        256: Tile(128, 128, 256, 8, 2),
        512: Tile(64, 64, 256, 4, 2),
        **WIDE[90],
    },
    (100, "mean"): {
        128: Tile(128, 64, 128, 8, 3),
        256: Tile(128, 64, 256, 8, 3),
        512: Tile(128, 32, 256, 8, 2, out_columns=256),
        **WIDE[100],
    },
    (100, "mean online"): {
        128: Tile(128, 64, 128, 8, 3, 8),
        256: Tile(128, 32, 256, 8, 3, 8),
        512: Tile(128, 32, 256, 8, 2, out_columns=256),
        1024: Tile(
            64, 16, 256, 8, 1, out_columns=256
        ),  # two stages spill 20 B; nearly all of it is done by ``large_dim``
    },
    (100, "lse"): {
        128: Tile(128, 128, 256, 8, 2),
        192: Tile(128, 64, 256, 8, 2),
        256: Tile(128, 128, 256, 8, 2),
        512: Tile(128, 32, 256, 8, 2),
        **WIDE[100],
    },
    (100, "lse labels"): {512: Tile(128, 32, 256, 8, 2), **WIDE[100]},
    (100, "gradient"): {
        128: Tile(128, 64, 128, 8, 3),
        256: Tile(128, 64, 256, 8, 3),
        512: Tile(128, 32, 256, 8, 2, out_columns=256),
        **WIDE[100],
    },
    (100, "two_sided"): {256: Tile(128, 64, 256, 8, 2), 512: Tile(64, 64, 256, 4, 2), **WIDE[100]},
    # Float32 in parts, of every pass. The rows of a wider matrix do not fit, nor do Triton's values in sm_100's tensor
    # memory for each of six products. Exact products then run on the plain arithmetic units.
    (80, "float32"): {128: Tile(32, 32, 128, 8, 2)},
    (80, "float32 gradient"): {64: Tile(32, 32, 128, 4, 2), 128: Tile(32, 32, 128, 8, 2)},
    (89, "float32"): {64: Tile(64, 32, 64, 4, 2), 128: Tile(32, 32, 128, 4, 2)},
    (89, "float32 lse"): {128: Tile(64, 16, 128, 4, 2, 8)},
    (89, "float32 two_sided"): {128: Tile(64, 16, 128, 4, 2)},
    (90, "float32"): {128: Tile(64, 64, 128, 4, 2, 8), 256: Tile(64, 32, 256, 8, 2, 8)},
    (90, "float32 gradient"): {128: Tile(64, 64, 128, 4, 2), 256: Tile(64, 32, 128, 8, 2)},
    (90, "float32 two_sided"): {128: Tile(64, 64, 128, 4, 2), 256: Tile(64, 32, 256, 4, 2)},
}
EXACT = {512: Tile(32, 32, 32, 8, 2, out_columns=256), 1024: Tile(16, 16, 32, 4, 2, out_columns=256)}
EXACT_89 = {512: Tile(16, 32, 32, 4, 2, out_columns=256), 1024: Tile(8, 16, 32, 4, 2, out_columns=256)}
EXACT_100 = EXACT | {256: Tile(32, 32, 64, 8, 2), 512: Tile(32, 32, 16, 8, 2, out_columns=256)}
MAX_WIDTH = max(EXACT)  # of embeddings
INTERPRETER = Tile(16, 16, 32, 4, 2, out_columns=64)  # small, so that small matrices take every path


def choose_tile(kernel: str, D: int, dtype: torch.dtype) -> Tile:
    """The pinned tile of a pass at this width: "mean fixed", "lse online", "gradient both", "two_sided"."""
    return INTERPRETER if interpreting() else _pinned(arch(), kernel, D, precision(dtype, D))


@cache
def _pinned(capability: int, kernel: str, D: int, precision: str) -> Tile:
    family, kind = _family(capability), kernel.split()[0]
    keys = (kernel, kind) if precision == "native" else (f"float32 {kind}", "float32")
    exact = {89: EXACT_89, 100: EXACT_100}.get(family, EXACT)
    table = exact if precision == "ieee" else next(TILES[family, key] for key in keys if (family, key) in TILES)
    return table[min((width for width in table if width >= D), default=max(table))]


SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}  # bytes a block, that a family's tiles may take
ALIKE = {86: 89, 87: 80, 103: 100, 110: 100, 120: 89, 121: 89}  # no tensor memory on sm_120, nor products of sm_90


def family() -> int:
    """The family of GPUs whose tiles this one takes: 80, 89, 90 or 100; 0 in the interpreter."""
    return 0 if interpreting() else _family(arch())


@cache
def _family(capability: int) -> int:
    """Of a GPU that is not known, the newest generation that is not newer, if it has as much shared memory."""
    if capability in SHARED:
        return capability
    if capability in ALIKE:
        return ALIKE[capability]
    nearest = 89 if capability > 120 else max((known for known in SHARED if known <= capability), default=80)
    return nearest if shared_limit() >= SHARED[nearest] else 89


PARTS = {"bf16x6": 3, "bf16x3": 2, "native": 1}


def matmul_precision() -> str:
    """PyTorch's precision of float32 products: "highest", "high" or "medium"."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was chosen by PyTorch's later way, of which the earlier has no name
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def precision(dtype: torch.dtype, D: int) -> str:
    """How products are taken: "native", "bf16x6", "bf16x3", "ieee", or "widened" in the interpreter.

    float32 follows ``torch.get_float32_matmul_precision``: "highest" takes three bfloat16 parts (six products, float32
    to its last bit), "high" (or ``torch.backends.cuda.matmul.fp32_precision = "tf32"``) two (three products, 16 bits),
    "medium" one.
    """
    if interpreting():
        return "widened"
    if dtype != torch.float32:
        return "native"
    wanted = {"highest": "bf16x6", "high": "bf16x3", "medium": "native"}[matmul_precision()]
    return wanted if wanted == "native" or max(TILES.get((family(), "float32"), [0])) >= D else "ieee"


class Matrix:
    """A matrix with contiguous rows, and the bfloat16 parts of float32 once a launch asks for them."""

    def __init__(self, x: Tensor):
        self.tensor = rows_contiguous(x)
        self._parts: Tensor | None = None

    def parts(self, width: int, count: int) -> Tensor:
        """``split``, done once for all launches."""
        if self._parts is None or self._parts.shape[1] != count * width:
            self._parts = split(self.tensor, width, count)
        return self._parts


def matrices(x: Tensor, y: Tensor) -> tuple[Matrix, Matrix]:
    first = Matrix(x)
    return first, first if y is x else Matrix(y)


class Operand:
    """A matrix as one kernel reads it: column chunks, parts, and pointers or descriptors."""

    def __init__(self, source: Matrix, rows: int, tile: Tile):
        x, D = source.tensor, source.tensor.shape[1]
        self.chunk = chunk_width(D, tile)
        remainder = D % self.chunk
        self.tail = max(16, 1 << (remainder - 1).bit_length()) if remainder else 0
        self.precision = precision(x.dtype, D)
        if x.dtype == torch.float32 and self.precision in PARTS:
            x = source.parts(D - remainder + self.tail, PARTS[self.precision])
        self.matrix, self.stride = x, x.stride(0)
        aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0 and x.stride(0) >= x.shape[1]
        # Beside descriptors, float32 products (no tensor cores) come to 32 registers a thread and spill tens of KB.
        self.tma = family() >= 90 and aligned and x.dtype != torch.float32
        self.source = self._descriptor(x, rows, self.chunk) if self.tma and self.chunk <= D else x
        self.tail_source = self._descriptor(x, rows, self.tail) if self.tma and self.tail else None

    @staticmethod
    def _descriptor(x: Tensor, rows: int, columns: int) -> Any:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


@jit
def split_bf16_kernel(x, out, stride, D, WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """One row. Beyond 2^67, products of the small parts alone could overflow: there is only the first part."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    rest = tl.load(x + row * stride + column, mask=column < D, other=0.0)
    small = tl.abs(rest) < 147573952589676412928.0
    for part in tl.static_range(PARTS):
        rounded = rest.to(tl.bfloat16)
        tl.store(out + (row * PARTS + part) * WIDTH + column, rounded, mask=column < WIDTH)
        rest = tl.where(small, rest - rounded.to(tl.float32), 0.0)


def split(x: Tensor, width: int, parts: int) -> Tensor:
    """float32 x (rows, D) as bfloat16 (rows, parts * width): x to 8, 16 or 24 bits in each row, zeros beyond D."""
    out = torch.empty(x.shape[0], parts * width, dtype=torch.bfloat16, device=x.device)
    with on_device(x):
        split_bf16_kernel[(x.shape[0],)](
            x, out, x.stride(0), x.shape[1], width, parts, 1 << (width - 1).bit_length(), num_warps=1
        )
    return out


def chunk_width(D: int, tile: Tile) -> int:
    """The largest power of two within D and the tile."""
    return min(tile.block_d, max(16, 1 << (D.bit_length() - 1)))


def products(dtype: torch.dtype, D: int) -> int:
    """Products of parts for each product of numbers."""
    parts = PARTS.get(precision(dtype, D), 1) if dtype == torch.float32 else 1
    return parts * (parts + 1) // 2


def on_tensor_cores(dtype: torch.dtype, D: int) -> bool:
    """Whether products run on the tensor cores."""
    return precision(dtype, D) != "ieee"


def output_chunks(D: int, tile: Tile) -> list[tuple[int, int]]:
    """(first, last) column chunks of the output of each launch."""
    chunk = chunk_width(D, tile)
    chunks, step = cdiv(D, chunk), max(1, tile.out_columns // chunk)
    return [(first, min(first + step, chunks)) for first in range(0, chunks, step)]
