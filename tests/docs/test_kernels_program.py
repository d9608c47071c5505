"""What the table of the GPU's time says of known kernels; the names are of vLLM 0.26 on an H200."""

import pytest

from measurements.kernels import kind_of, shares

GEMM = "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT"
ATTENTION = "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::CollectiveMainloop"
CACHE = "void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16, __nv_bfloat16, (vllm::Fp8KVCacheDataType)0>("
NORM = "triton_per_fused_fused_add_rms_norm_2"
NORM_OF_ATTENTION = "triton_red_fused_attention_mean_mul_3"


def test_every_kernel_has_its_kind():
    kinds = [kind_of(name) for name in (GEMM, ATTENTION, CACHE, NORM, NORM_OF_ATTENTION, "Memcpy DtoD", "foo")]
    fused = "norm, rope, activation (fused by Inductor)"
    assert kinds == ["gemm", "attention", "kv cache", fused, fused, "copies", "other"]


def test_shares_are_of_the_kernels_and_busy_of_the_time():
    found = shares({GEMM: 0.3, GEMM + "_2": 0.1, ATTENTION: 0.1}, seconds=1.0)
    assert found["busy"] == pytest.approx(0.5)
    assert found["kinds"] == {"gemm": pytest.approx(0.8), "attention": pytest.approx(0.2)}
    assert next(iter(found["longest"])) == GEMM
