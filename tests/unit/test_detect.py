"""Parsing cpuinfo, meminfo and getprop."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from targets import catalog, detect

X86 = "\n\n".join(
    f"processor\t: {index}\nmodel name\t: Intel(R) Xeon(R) Platinum 8480+\n"
    f"physical id\t: 0\ncore id\t\t: {core}\n"
    "flags\t\t: fpu sse4_2 fma f16c avx2 avx512f avx512bw avx512vl avx512_vnni amx_bf16 amx_tile amx_int8"
    for index, core in enumerate([0, 0, 1, 1])
)
PHONE = "\n\n".join(
    f"processor\t: {index}\nBogoMIPS\t: 38.40\nFeatures\t: fp asimd fphp asimdhp asimddp {more}\n"
    f"CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: {part}\nCPU revision\t: 0"
    for index, (part, more) in enumerate(
        [("0xd46", "i8mm bf16")] * 4 + [("0xd47", "i8mm")] * 3 + [("0xd48", "i8mm")]
    )
)


def test_x86_flags_become_features_and_hyper_threads_count_once() -> None:
    chip = detect.from_cpuinfo(X86)
    assert chip.architecture == "x86_64"
    assert {"avx2", "avx512_vnni", "amx_int8"} <= {*chip.features}
    assert "sse2" not in chip.features
    assert (chip.cores, chip.clusters[0].name) == (2, "Intel(R) Xeon(R) Platinum 8480+")
    assert chip.runtimes[0].threads == 2


def test_arm_parts_become_clusters_and_a_feature_counts_only_where_every_core_has_it() -> None:
    chip = detect.from_cpuinfo(PHONE)
    assert chip.architecture == "arm64"
    assert [(c.name, c.cores) for c in chip.clusters] == [
        ("Cortex-A510", 4),
        ("Cortex-A710", 3),
        ("Cortex-X2", 1),
    ]
    assert {*chip.features} == {"neon", "fp16", "dotprod", "i8mm"}


def test_the_detected_runtimes_stand_in_order_with_the_multiples_of_the_architecture() -> None:
    def runtimes(text: str) -> list[tuple[str, int]]:
        return [(runtime.name, runtime.channel_multiple) for runtime in detect.from_cpuinfo(text).runtimes]

    assert runtimes(X86) == [("openvino", 16), ("onnxruntime", 16), ("executorch", 8), ("deepsparse", 1)]
    assert runtimes(PHONE) == [("openvino", 8), ("onnxruntime", 8), ("executorch", 8)]


def test_bfloat16_is_offered_only_where_the_cpu_has_it() -> None:
    assert "bfloat16" in detect.from_cpuinfo(X86).runtimes[0].precisions
    assert "bfloat16" not in detect.from_cpuinfo(X86.replace("amx_bf16", "")).runtimes[0].precisions


def test_a_container_with_fewer_cores_starts_with_fewer_threads() -> None:
    assert detect.from_cpuinfo(PHONE, cores=2).runtimes[0].threads == 2


def test_an_unknown_arm_core_is_named_by_its_numbers() -> None:
    chip = detect.from_cpuinfo(PHONE.replace("0xd48", "0xfff"))
    assert chip.clusters[-1].name == "Arm core 0x41/0xfff"


@pytest.mark.parametrize("text", ["", "\n\n", "processor : 0", "nonsense", "processor : 0\nflags :"])
def test_a_cpuinfo_that_says_little_promises_nothing(text: str) -> None:
    chip = detect.from_cpuinfo(text)
    assert chip.features == ()
    assert chip.runtimes[0].threads == 1


@given(st.text(alphabet="processor:flags CPU part0x41\n\t|avx2", max_size=200))
def test_no_cpuinfo_raises(text: str) -> None:
    assert detect.from_cpuinfo(text).runtimes


def test_memory_is_read_in_bytes_of_a_thousand() -> None:
    assert detect.memory_gb_from_meminfo("MemTotal:       16384000 kB\nMemFree: 1 kB") == pytest.approx(
        16.777216
    )
    assert detect.memory_gb_from_meminfo("MemFree: 1 kB") is None


def getprop(**values: str) -> str:
    return "".join(f"[{key.replace('_', '.')}]: [{value}]\r\n" for key, value in values.items())


@pytest.mark.parametrize(
    ("stated", "chip"),
    [
        (getprop(ro_product_model="SM-S901U", ro_soc_model="SM8450"), "sm8450"),
        (getprop(ro_product_model="SM-S901B", ro_soc_model="s5e9925"), "exynos-2200"),
        (getprop(ro_board_platform="taro"), "sm8450"),
    ],
)
def test_a_phone_says_which_of_its_two_chips_it_has(stated: str, chip: str) -> None:
    target = detect.from_getprop(stated, catalog.all_targets())
    assert target is not None
    assert (target.name, [found.name for found in target.chips]) == ("galaxy-s22", [chip])


@pytest.mark.parametrize("stated", ["", getprop(ro_soc_model=""), getprop(ro_soc_model="SM9999"), "[broken"])
def test_a_phone_the_catalogue_lacks_is_no_target(stated: str) -> None:
    assert detect.from_getprop(stated, catalog.all_targets()) is None


def test_this_machine_is_a_target_and_says_so() -> None:
    host = detect.detect_host()
    assert (host.name, host.is_this_machine) == ("host", True)
    names = [runtime.name for runtime in host.chips[0].runtimes]
    assert names[:3] == ["openvino", "onnxruntime", "executorch"]
    assert names[3:] == (["deepsparse"] if "avx2" in host.chips[0].features else [])
    assert host.chips[0].cores >= 1


def test_without_proc_only_what_holds_for_every_such_machine_is_stated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr(detect.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(detect.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(detect.platform, "processor", lambda: "arm")
    chip = detect.detect_host().chips[0]
    assert chip.architecture == "arm64"
    assert {*chip.features} == {"neon", "fp16", "dotprod"}
    monkeypatch.setattr(detect.platform, "machine", lambda: "AMD64")
    monkeypatch.setattr(detect.platform, "system", lambda: "Windows")
    assert detect.detect_host().chips[0].features == ()
