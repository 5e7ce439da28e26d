"""The inspection's reading of machine code, and a small part of it run for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from vito_kernels._core import lazy_triton
from vito_kernels._core.lazy_triton import jit, use_triton
from vito_kernels.contrastive import backward, forward, large_dim, tile_configs, two_sided_forward
from vito_kernels.inspect import compiled as inspect
from vito_kernels.inspect import sass
from vito_kernels.inspect.launch_specs import Spec, all_specs, lse_spec, two_sided_spec

if TYPE_CHECKING:
    import triton.language as tl

LISTING = """
        .text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_3:
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0040*/                   MUFU.EX2 R9, R9 ;
        /*0050*/                   FFMA R5, R4, R4, R5 ;
        /*0060*/                   STL.64 [R1+0x8], R4 ;
        /*0070*/                   SHFL.BFLY PT, R7, R5, 0x1, 0x1f ;
        /*0080*/                   IADD3 R2, P0, R2, 0x10, RZ ;
        /*0090*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00a0*/               @P1 BRA `(.L_x_3) ;
        /*00b0*/                   ISETP.NE.AND P0, PT, R2, RZ, PT ;
        /*00c0*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*00d0*/                   LDL R6, [R1+0x8] ;
        /*00e0*/                   STG.E desc[UR4][R2.64], R6 ;
        /*00f0*/                   EXIT ;
.L_x_2:
        /*0100*/                   BRA `(.L_x_2);
"""


def test_main_loop_and_spills_of_a_listing():
    code = sass.parse(LISTING)
    assert len(code) == 17
    body = sass._main_loop(code)
    assert [i.name for i in body][:2] == ["HGMMA.64x64x16.F32.BF16", "MUFU.EX2"]
    assert len(body) == 8, "the smallest loop with all tensor-core instructions"
    counts = sass._count(body)
    assert counts["mma"] == counts["exp2"] == counts["float"] == counts["shuffle"] == counts["barrier"] == 1
    assert sass._spilled(code) == 12
    assert sass._spilled(body) == 8


OUT_OF_LINE = """
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*0020*/              @!P0 BRA `(.L_x_5) ;
.L_x_1:
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0040*/                   MUFU.EX2 R9, R9 ;
        /*0050*/                   FADD R5, R5, R9 ;
        /*0060*/                   IADD3 R2, P0, R2, 0x10, RZ ;
        /*0070*/                   ISETP.NE.AND P1, PT, R2, RZ, PT ;
        /*0080*/               @P1 BRA `(.L_x_0) ;
        /*0090*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*00a0*/                   STL [R1], R9 ;
        /*00b0*/                   STG.E desc[UR4][R2.64], R6 ;
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*00d0*/              @!P0 BRA `(.L_x_6) ;
.L_x_2:
        /*00e0*/                   EXIT ;
.L_x_5:
        /*00f0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*0100*/              @!P0 BRA `(.L_x_5) ;
        /*0110*/                   BRA `(.L_x_1) ;
.L_x_6:
        /*0120*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*0130*/              @!P0 BRA `(.L_x_6) ;
        /*0140*/                   BRA `(.L_x_2) ;
"""


def test_a_jump_back_from_code_out_of_line_is_no_loop():
    """From the repeated wait at the end to the loop and beyond lies a second product, which the loop does not hold; nor
    does it hold that wait, which few iterations run.
    """
    body = sass._main_loop(sass.parse(OUT_OF_LINE))
    assert sass._count(body)["mma"] == 1
    assert sass._spilled(body) == 0
    assert len(body) == 8


def test_limits_are_found():
    kernel = inspect.Compiled("k", 240_000, 16, 2, 1024, b"")
    binary = sass.Binary(255, 0, 8, 8, 100, 0, ("HMMA.16816.F32.BF16",), {"all": 10})
    problems = " ".join(inspect._problems(90, True, kernel, binary))
    for said in ("spills 8", "240000", "255 registers", "1024 columns", "to nothing", "misses HGMMA"):
        assert said in problems
    assert list(inspect._problems(90, False, kernel, binary)) != []
    healthy = sass.Binary(200, 0, 0, 0, 100, 1, ("HGMMA.64x64x16.F32.BF16",), {"all": 10})
    assert list(inspect._problems(90, True, inspect.Compiled("k", 1000, 8, 2, 0, b""), healthy)) == []
    without = sass.Binary(200, 0, 0, 0, 100, 1, (), {"all": 10})
    assert "no tensor-core" in " ".join(inspect._problems(80, True, inspect.Compiled("k", 0, 8, 2, 0, b""), without))


@jit
def writes_nothing(x, N: tl.constexpr):
    tl.load(x + tl.arange(0, N))


@jit
def needs_much_memory(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i[:, None] * N + i[None])
    tl.store(y + i[:, None] * N + i[None], tl.dot(a, tl.trans(a)))


def launch(kernel, count):
    x = torch.empty(1 << 20, dtype=torch.bfloat16, device="meta")
    return lambda: kernel[(1,)](x, *[torch.empty(1 << 20, device="meta")] * count, N=128)


def test_an_empty_kernel_is_a_problem():
    (record,) = inspect.inspect(90, Spec("empty", launch(writes_nothing, 0), 1.0, 1.0, tensor_cores=False))
    assert "to nothing" in record["problems"][0]


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
def test_tensor_core_kinds_by_target(arch):
    (record,) = inspect.inspect(arch, Spec("dot", launch(needs_much_memory, 1), 2.0 * 128**3, 1.0))
    kind = {90: "HGMMA", 100: "UTC"}.get(arch, "HMMA")
    assert all(mma.startswith(kind) for mma in record["mma"])
    assert record["mma"]
    assert record["registers"] > 0
    assert record["problems"] == []


def test_a_compiler_error_is_a_problem():
    def fails():
        raise RuntimeError("no such luck")

    (record,) = inspect.inspect(80, Spec("broken", fails, 1.0, 1.0))
    assert "no such luck" in record["problems"][0]


def test_command_line_writes_records(tmp_path):
    path = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "vito_kernels.inspect", "--only", "blur rows", "--json", str(path), "--jobs", "1"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    records = json.loads(path.read_text())["kernels"]
    assert [record["arch"] for record in records] == ["sm_80", "sm_89", "sm_90", "sm_100"]
    for record in records:
        assert record["spill_bytes"] == 0
        assert 0 < record["shared_limit"] < 1 << 18
        assert record["roofline_ms"] > 0
        assert record["loop"]["all"] > 0
    unknown = [*command[:4], "no such kernel"]
    assert subprocess.run(unknown, capture_output=True, env=environment).returncode == 2


def test_what_is_in_the_way_is_said_before_anything_is_compiled(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        inspect.main(["--json", str(tmp_path / "nowhere" / "kernels.json")])
    assert "--json: [Errno 2] No such file" in capsys.readouterr().err
    monkeypatch.setattr(inspect, "interpreting", lambda: True)
    assert inspect.main([]) == 2
    assert "unset it to inspect" in capsys.readouterr().err


def test_every_matrix_kernel_of_a_launch_must_use_the_tensor_cores(monkeypatch):
    """At D > 512 the first kernel is only one of three that multiply; what adds up need not."""
    without = sass.Binary(40, 0, 0, 0, 100, 1, (), {"all": 10})
    monkeypatch.setattr(sass, "read", lambda _: without)

    def problems(kernel, spec, arch=90):
        compiled = inspect.Compiled(kernel, 0, 4, 2, 0, b"")
        return inspect._record(arch, spec, compiled, "large_dim_weights_kernel", 0)["problems"]

    half = lse_spec(1024, torch.bfloat16, True, "none", rows=1)
    for kernel in ("large_dim_weights_kernel", "large_dim_weighted_sum_kernel", "similarity_lse_fwd_kernel"):
        assert problems(kernel, half) == ["has no tensor-core instruction"]
    assert problems("finalize_lse_kernel", half) == []
    in_parts, exact = (lse_spec(width, torch.float32, True, "none", rows=1) for width in (128, 512))
    assert problems("similarity_lse_fwd_kernel", in_parts) == ["has no tensor-core instruction"]
    assert (
        problems("similarity_lse_fwd_kernel", exact) == problems("similarity_lse_fwd_kernel", in_parts, arch=100) == []
    )


def test_the_kernels_that_multiply_are_known_by_name():
    found = {
        name
        for module in (forward, two_sided_forward, backward, large_dim)
        for name in vars(module)
        if name.endswith("_kernel")
    }
    assert found == inspect.MATRIX


@pytest.mark.parametrize(("arch", "width"), [(80, 128), (90, 256)])
def test_float32_runs_on_the_tensor_cores(arch, width):
    """The default set holds no float32. In three parts, so at six times the flops."""
    split, record = inspect.inspect(arch, lse_spec(width, torch.float32, True, "none"))
    assert record["problems"] == split["problems"] == []
    assert record["spill_bytes"] == 0
    assert record["mma"]
    assert (split["kernel"], split["flops"]) == ("split_bf16_kernel", 0)
    assert record["flops"] == 24 * 32768**2 * width


@pytest.mark.parametrize(("arch", "width"), [(80, 512), (90, 512), (100, 128)])
def test_other_float32_fits_the_registers(arch, width):
    """Its exact products once spilled 62 KB a thread on sm_90."""
    (record,) = inspect.inspect(arch, lse_spec(width, torch.float32, False, "none"))
    assert record["spill_bytes"] == 0
    assert record["mma"] == []


def test_the_names_of_launches_are_unique():
    names = [spec.name for spec in all_specs()]
    assert len(set(names)) == len(names) > 300


def test_flops_count_the_launches_of_each_gpu():
    """At D = 512 the mean fits one launch on sm_90, on sm_80 while nothing is masked; two repeat the logits. On sm_100
    exponentials go through memory.
    """
    flops = {}
    for arch in (80, 90, 100):
        for layout in ("none", "groups"):
            with inspect.stand_in(arch):
                flops[arch, layout] = lse_spec(512, torch.bfloat16, True, layout, rows=1).flops() / 512
    assert flops.pop((80, "groups")) == 6
    assert set(flops.values()) == {4}


@pytest.mark.parametrize("arch", [89, 120])
def test_tiles_for_99_kilobytes(arch):
    """Of GeForce and workstation cards, that of the tightest fit."""
    records = inspect.inspect(arch, two_sided_spec(256, torch.bfloat16, 0))
    assert [problem for record in records for problem in record["problems"]] == []
    assert max(record["shared_bytes"] for record in records) > 90_000


@pytest.mark.parametrize(
    ("capability", "family"),
    [(80, 80), (86, 89), (87, 80), (89, 89), (90, 90), (100, 100), (103, 100), (120, 89), (121, 89), (130, 89)],
)
def test_known_gpus_have_a_family(capability, family):
    with inspect.stand_in(89):
        assert tile_configs._family.__wrapped__(capability) == family


@pytest.mark.parametrize(("limit", "family"), [(101_376, 89), (166_912, 80), (232_448, 80)])
def test_an_unknown_gpu_takes_tiles_that_fit_its_memory(monkeypatch, limit, family):
    monkeypatch.setattr(tile_configs, "shared_limit", lambda: limit)
    assert tile_configs._family.__wrapped__(88) == family


def test_gpus_without_bfloat16_tensor_cores_take_the_cpu_path(monkeypatch):
    tensor = SimpleNamespace(dtype=torch.float32, is_cuda=True, device=torch.device("cuda", 0))
    for capability, expected in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        lazy_triton._has_bf16_tensor_cores.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert use_triton(tensor) is expected
    lazy_triton._has_bf16_tensor_cores.cache_clear()
