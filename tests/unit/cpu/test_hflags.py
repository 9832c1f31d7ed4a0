"""hflags: the words that real QEMUs store, and what counts as a contradiction."""

from __future__ import annotations

import pytest

from pyvcpu.cpu.hflags import (
    ADDSEG,
    AVX,
    CPL,
    CS64,
    EFLAGS_COPY,
    IOBPT,
    LMA,
    OSFXSR,
    PE,
    SHADOW,
    SMAP,
    SS32,
    SVME,
    TS,
    UMIP,
    compute_hflags,
    hflags_difference,
    hflags_of,
)
from pyvcpu.cpu.layout import CS, DS, SS
from pyvcpu.cpu.state import CpuState

REAL = {"cr0": 0x60000010, "cr4": 0, "efer": 0, "rflags": 2, "cs_flags": 0x9B00, "ss_flags": 0x9300, "data_bases": 0}
PROTECTED = REAL | {"cr0": 0x60000013, "cs_flags": 0xCF9B00, "ss_flags": 0xCF9300}
LONG = PROTECTED | {"cr0": 0xE0000013, "cr4": 0x620, "efer": 0xD00, "cs_flags": 0xAF9B00}
USER = {"cs_flags": 0xAFFB00, "ss_flags": 0xCFF300}


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (REAL, 0x40),
        (PROTECTED, 0x2B0),
        (PROTECTED | {"cs_flags": 0xCFFB00, "ss_flags": 0xCFF300}, 0x2B3),
        (LONG, 0x40C2B0),
        (LONG | USER, 0x40C2B3),
        (LONG | {"ss_flags": 0x9300}, 0x40C290),  # the captured counter guest under TCG
    ],
)
def test_words_seen_in_qemu(state, word):
    assert compute_hflags(**state) == word


@pytest.mark.parametrize(
    ("state", "change", "bits"),
    [
        (REAL, {"shadow": True}, SHADOW),
        (PROTECTED, {"data_bases": 0x10000}, ADDSEG),
        (PROTECTED, {"rflags": 0x20002}, ADDSEG),  # virtual-8086 mode
        (PROTECTED, {"cr0": 0x6000001B}, TS),
        (LONG, {"data_bases": 0x10000}, 0),  # bases are not looked at in 64-bit code
        (LONG, {"efer": 0x1D00}, SVME),
        (LONG, {"cr4": 0x200620}, SMAP),
        (LONG, {"cr4": 0xE20}, UMIP),
        (LONG, {"cr4": 0x420}, OSFXSR),
        (LONG, {"cr4": 0x40620, "xcr0": 7}, AVX),
        (LONG, {"cr4": 0x40620, "xcr0": 3}, 0),
        (LONG, {"cr4": 0x620, "xcr0": 7}, 0),
        (LONG, {"dr7": 0x20002}, IOBPT),  # breakpoint 0, global, I/O
        (LONG, {"dr7": 0x20000}, 0),  # not enabled
        (LONG, {"dr7": 0x10001}, 0),  # a data breakpoint
        (LONG, {"rflags": EFLAGS_COPY & ~0x20000 | 2}, 0),  # TF IOPL RF AC stay out of the word
    ],
)
def test_one_thing_changes_its_bits(state, change, bits):
    assert compute_hflags(**(state | change)) ^ compute_hflags(**state) == bits


def test_compatibility_mode_has_lma_without_cs64():
    word = compute_hflags(**(LONG | {"cs_flags": 0xCFFB00, "ss_flags": 0xCFF300}))
    assert word & LMA and not word & CS64 and word & CPL == 3


def test_of_a_state():
    cpu = CpuState()
    cpu.reset()
    assert hflags_of(cpu) == 0x40
    cpu.cr0 |= 1
    cpu.seg_flags[CS], cpu.seg_flags[SS], cpu.seg_base[DS] = 0xCF9B00, 0xCF9300, 0x1000
    cpu.interrupt_shadow = 1
    assert hflags_of(cpu) == 0xB0 | ADDSEG | SHADOW


@pytest.mark.parametrize(
    ("stored", "rflags", "difference"),
    [
        (0x40C2B0, 2, 0),
        (0x40C290, 2, 0),  # SS.B means nothing in 64-bit code
        (0x40C2B0 | ADDSEG, 2, ADDSEG),
        (0x40C2B0 & ~PE, 2, PE),
        (0x40C2B1, 2, 1),
        (0x40C2B0 | SVME, 2, SVME),
        (0x40C2B0 | 1 << 21, 2, 1 << 21),  # in a nested guest
        (0x40C2B0 | 1 << 19, 2, 1 << 19),  # in SMM
        (0x40C2B0 | 0x3000, 0x3002, 0),  # KVM's copy of IOPL
        (0x40C2B0, 0x3002, 0),  # TCG has none
        (0x40C2B0 | 0x3000, 2, 0x3000),  # a copy of what is not there
        (0x40C2B0 | 1 << 31, 2, 1 << 31),
    ],
)
def test_contradictions(stored, rflags, difference):
    assert hflags_difference(stored, compute_hflags(**LONG), rflags) == difference


def test_kvm_leaves_out_what_only_tcg_looks_at():
    computed = compute_hflags(**(LONG | {"efer": 0x1D00, "cr4": 0x240E20, "xcr0": 7, "dr7": 0x20002}))
    assert hflags_difference(computed & ~(SVME | SMAP | UMIP | AVX | IOBPT), computed, 2) == 0
    computed = compute_hflags(**LONG)
    assert hflags_difference(computed & ~OSFXSR, computed, 2) == OSFXSR


def test_addseg_may_be_more_than_needed_but_not_less():
    computed = compute_hflags(**PROTECTED)
    assert hflags_difference(computed | ADDSEG, computed, 2) == 0
    needed = compute_hflags(**(PROTECTED | {"data_bases": 4096}))
    assert hflags_difference(needed & ~ADDSEG, needed, 2) == ADDSEG
    assert hflags_difference(computed ^ SS32, computed, 2) == SS32
