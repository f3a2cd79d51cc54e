"""Random numbers by purpose, so that the parts of a training do not shift each other's draws.

Two runs of one seed have the same labelled images, initial weights, crops and augmentation, whichever losses they have
and whichever options of the contrast. Nothing has to be stored to resume: every draw starts from a seed of its own.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch


def seed_for(seed: int, purpose: str, *numbers: int) -> None:
    """Seed torch's global generators, of all devices, for the draws that follow. Waits for no device.

    Args:
        seed: that of the run, any integer.
        purpose: what is drawn, such as ``"dropout"``.
        numbers: which draw of that purpose, at least 0 each: step, rank, view.
    """
    key = np.random.SeedSequence([seed & 0xFFFFFFFFFFFFFFFF, zlib.crc32(purpose.encode()), *numbers])
    value = int(key.generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(value)  # torch.manual_seed would look at devices that were never used
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(value)
