"""BLOOM in torch alone: the parts that nodes (blocks) and clients (embeddings, head) run."""

from __future__ import annotations

from compute.bloom.alibi import alibi_bias, slopes
from compute.bloom.block import BloomBlock, BloomSpan, SpanCache, Step, span_digest
from compute.bloom.config import BloomConfig
from compute.bloom.head import Embeddings, Head
from compute.bloom.quantized import quantize

__all__ = [
    "BloomBlock",
    "BloomConfig",
    "BloomSpan",
    "Embeddings",
    "Head",
    "SpanCache",
    "Step",
    "alibi_bias",
    "quantize",
    "slopes",
    "span_digest",
]
