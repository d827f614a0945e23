"""ragged: dispatch-aware ragged attention for pruned Vision Transformers."""

from .attention import pick_backend, varlen_attention, varlen_attention_ref
from .backends import BACKENDS, Backend
from .loading import load_deit
from .model import RaggedViT
from .packing import Packed, Padded, Selection, pack, repack, unpack
from .pruners import PRUNERS

__version__ = "0.1.0"
__all__ = [
    "BACKENDS", "PRUNERS", "Backend", "Packed", "Padded", "RaggedViT", "Selection", "load_deit", "pack",
    "pick_backend", "repack", "unpack", "varlen_attention", "varlen_attention_ref",
]  # fmt: skip
