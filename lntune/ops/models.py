"""Hidden sizes that models use, by family, with where they are from: what default grids are made
of, and what `--grid NAME` stands for.

Sizes of a family are those of its norms, the most used first; those of a family of recurrent models
are of its cells. Where a family normalizes without subtracting a mean (RMSNorm) its sizes are those
that a layer norm in its place would have.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Family(NamedTuple):
    """Models of one kind: the hidden sizes of their norms or of their recurrent cells, and the
    source of these.
    """

    hidden: tuple[int, ...]
    summary: str
    source: str
    of: Literal["norms", "cells"] = "norms"


FAMILIES: dict[str, Family] = {
    "bert": Family(
        (768, 1024, 512, 256, 128),
        "BERT: base, large, and the smaller ones",
        "github.com/google-research/bert, README.md",
    ),
    "gpt2": Family(
        (768, 1024, 1280, 1600),
        "GPT-2: small, medium, large, XL",
        "github.com/karpathy/nanoGPT, model.py, from_pretrained",
    ),
    "vit": Family(
        (768, 384, 1024, 192, 1280, 1408),
        "ViT: base, small, large, tiny, huge, giant (DeiT, CLIP, MAE, DINO alike)",
        "github.com/huggingface/pytorch-image-models, timm/models/vision_transformer.py",
    ),
    "whisper": Family(
        (768, 512, 1280, 1024, 384),
        "Whisper: small, base, large, medium, tiny; an encoder has 1,500 rows a clip",
        "github.com/openai/whisper, model-card.md",
    ),
    "dit": Family(
        (1152, 1024, 768, 384),
        "DiT: XL, L, B, S, without affine vectors",
        "github.com/facebookresearch/DiT, models.py",
    ),
    "convnext": Family(
        (96, 192, 384, 768, 128, 256, 512, 1024, 1536, 2048),
        "ConvNeXt: stages of tiny to XL, channels last",
        "github.com/facebookresearch/ConvNeXt, models/convnext.py",
    ),
    "pythia": Family(
        (512, 768, 1024, 2048, 2560, 4096, 5120, 6144),
        "GPT-NeoX and Pythia: language models with layer norm",
        "github.com/Lightning-AI/litgpt, litgpt/config.py",
    ),
    "llama": Family(
        (4096, 2048, 3072, 5120, 8192, 2560, 3584, 896, 1536, 16384),
        "Llama-like widths (Llama, Mistral, Qwen, Gemma), whose norm is RMSNorm",
        "github.com/Lightning-AI/litgpt, litgpt/config.py",
    ),
    "heads": Family(
        (128, 64, 256),
        "heads, whose queries and keys are normalized (OLMo, Qwen3; Gemma)",
        "github.com/Lightning-AI/litgpt, litgpt/config.py",
    ),
    "rnnt": Family(
        (512, 640),
        "prediction networks of RNN-T speech recognizers (torchaudio, NeMo)",
        "github.com/pytorch/audio, torchaudio/models/rnnt.py; github.com/NVIDIA/NeMo",
        "cells",
    ),
    "policies": Family(
        (256, 128, 512),
        "policies of reinforcement learning with an LN-LSTM (Baselines and what is built on it)",
        "github.com/openai/baselines, baselines/common/models.py",
        "cells",
    ),
}
"""Families by the name that `--grid` takes."""

PAPER = (240, 256, 400, 1000, 1024, 2400)
"""Hidden sizes of the experiments of Ba, Kiros, Hinton 2016, section 6 and its supplement."""

NORMS = (1024, 768, 4096, 256, 512, 384, 2048, 1280, 1000, 16384)
"""The default grid of norms, the most valuable first: what most of the families have in common, a
size that no vector divides, and the longest rows. Sizes in between are served by the record of a
nearby one until they are tuned themselves.
"""
CELLS = (512, 1024, 256, 128, 640, 400)
"""The default grid of recurrent cells."""
