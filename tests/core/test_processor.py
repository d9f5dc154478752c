"""The processor's name and bf16 instructions, from Linux's description."""

from __future__ import annotations

import platform

import pytest

from fastflower.core import processor

DESCRIPTION = [
    "processor\t: 0",
    "model name\t: AMD EPYC 9654",
    "flags\t\t: fpu avx2{flag}",
    "flags\t\t: amx_bf16",
]


@pytest.mark.parametrize(
    ("flag", "multiplies"),
    [("", False), (" avx512_bf16", True), (" amx_bf16 sse", True), (" avx512_bf16x", False)],
)
def test_the_flags_of_the_first_core_say_whether_it_multiplies_bf16(monkeypatch, flag, multiplies):
    monkeypatch.setattr(processor, "_lines", lambda: [line.format(flag=flag) for line in DESCRIPTION])
    assert processor.multiplies_bf16() is multiplies
    assert processor.name() == "AMD EPYC 9654"


def test_without_a_description_there_is_no_bf16_and_the_architecture_is_the_name(monkeypatch):
    monkeypatch.setattr(processor, "_lines", list)
    assert not processor.multiplies_bf16()
    assert processor.name() == (platform.processor() or platform.machine())


def test_the_predictor_reads_the_same_from_this_machine(code):
    assert code.networks.multiplies_bf16() is processor.multiplies_bf16()
