"""hflags: what a translator must know of the CPU's mode, in one word, as QEMU's streams carry it.

    bit  0-1 CPL      3 interrupt shadow   4 CS.D      5 SS.B      6 ADDSEG   7 CR0.PE
         9 CR0.MP    10 CR0.EM  11 CR0.TS  14 EFER.LMA 15 64-bit code         20 EFER.SVME
        22 CR4.OSFXSR 23 CR4.SMAP 24 I/O breakpoint    27 CR4.UMIP  28 AVX

Bits 8 TF, 12-13 IOPL, 16 RF, 17 VM and 18 AC are those of EFLAGS. TCG ORs them in where it needs
them and keeps them out of the stored word; a stored copy would stick for ever after the guest
has cleared the flag. KVM stores TF, IOPL and VM and computes everything again when it loads.

Everything here follows from other state but for the interrupt shadow; a wrong word breaks or kills
a guest under TCG, so it is computed when a stream is written and compared when one is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyvcpu.cpu.layout import CS, DS, ES, SS

if TYPE_CHECKING:
    from pyvcpu.cpu.state import CpuState

CPL = 0x3
SHADOW = 1 << 3
CS32, SS32, ADDSEG = 1 << 4, 1 << 5, 1 << 6
PE, MP, EM, TS = 1 << 7, 1 << 9, 1 << 10, 1 << 11
LMA, CS64 = 1 << 14, 1 << 15
SVME, OSFXSR, SMAP, IOBPT, UMIP, AVX = 1 << 20, 1 << 22, 1 << 23, 1 << 24, 1 << 27, 1 << 28

EFLAGS_COPY = 0x73100
"""TF, IOPL, RF, VM and AC: at the same places in EFLAGS."""

_CR0_PE, _CR0_MP_EM_TS = 1, 0xE
_EFER_LMA, _EFER_SVME = 1 << 10, 1 << 12
_CR4_OSFXSR, _CR4_UMIP, _CR4_OSXSAVE, _CR4_SMAP = 1 << 9, 1 << 11, 1 << 18, 1 << 21
_SEG_L, _SEG_B = 1 << 21, 1 << 22
_FLAGS_VM = 1 << 17
_XCR0_SSE_AVX = 6


def compute_hflags(
    *,
    cr0: int,
    cr4: int,
    efer: int,
    rflags: int,
    cs_flags: int,
    ss_flags: int,
    data_bases: int,
    dr7: int = 0,
    xcr0: int = 0,
    shadow: bool = False,
) -> int:
    """The word, without the copies of EFLAGS.

    ``cs_flags`` and ``ss_flags`` are descriptor bits 8 to 23 in place (as ``CpuState.seg_flags``); ``data_bases`` is
    the OR of the bases of DS, ES and SS.
    """
    word = (ss_flags >> 13) & CPL
    if shadow:
        word |= SHADOW
    if efer & _EFER_LMA:
        word |= LMA
    word |= SS32 if ss_flags & _SEG_B else 0
    if efer & _EFER_LMA and cs_flags & _SEG_L:
        word |= CS64 | CS32
    else:
        word |= CS32 if cs_flags & _SEG_B else 0
        if not cr0 & _CR0_PE or rflags & _FLAGS_VM or not cs_flags & _SEG_B or data_bases:
            word |= ADDSEG
    word |= PE if cr0 & _CR0_PE else 0
    word |= (cr0 & _CR0_MP_EM_TS) << 8
    word |= SVME if efer & _EFER_SVME else 0
    word |= OSFXSR if cr4 & _CR4_OSFXSR else 0
    word |= SMAP if cr4 & _CR4_SMAP else 0
    word |= UMIP if cr4 & _CR4_UMIP else 0
    if cr4 & _CR4_OSXSAVE and xcr0 & _XCR0_SSE_AVX == _XCR0_SSE_AVX:
        word |= AVX
    if any(dr7 >> (2 * i) & 3 and dr7 >> (16 + 4 * i) & 3 == 2 for i in range(4)):
        word |= IOBPT
    return word


def hflags_of(cpu: CpuState) -> int:
    """:func:`compute_hflags` of a whole state."""
    bases, flags = cpu.seg_base, cpu.seg_flags
    return compute_hflags(
        cr0=cpu.cr0,
        cr4=cpu.cr4,
        efer=cpu.efer,
        rflags=cpu.rflags,
        cs_flags=flags[CS],
        ss_flags=flags[SS],
        data_bases=bases[DS] | bases[ES] | bases[SS],
        dr7=cpu.dr[7],
        xcr0=cpu.xcr0,
        shadow=bool(cpu.interrupt_shadow),
    )


def hflags_difference(stored: int, computed: int, rflags: int) -> int:
    """The bits in which a stored word contradicts what follows from the rest of the state.

    Not a contradiction: bits that one QEMU accelerator keeps and the other does not (the EFLAGS copies,
    those that KVM leaves 0, and SS.B in 64-bit code, where it means nothing and KVM always sets it),
    and ADDSEG, which TCG may leave set; only its absence lets a segment base be forgotten.
    """
    difference = stored ^ computed
    difference &= ~(EFLAGS_COPY & ~(stored & ~rflags))
    difference &= ~(computed & ~stored & (SVME | SMAP | UMIP | AVX | IOBPT))
    if computed & CS64:
        difference &= ~SS32
    else:
        difference &= ~(stored & ADDSEG)
    return difference & 0xFFFFFFFF
