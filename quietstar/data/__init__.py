"""Training text: read documents, cut them into blocks of tokens, and put the blocks into a seeded order.

Nothing here knows of models or trainers.
"""

from quietstar.data.order import BatchOrder
from quietstar.data.packing import PackedTexts, load_texts, pack, split
from quietstar.data.sources import Document, read_documents
from quietstar.data.tokenizer import check_vocabulary, load_tokenizer

__all__ = [
    "BatchOrder",
    "Document",
    "PackedTexts",
    "check_vocabulary",
    "load_texts",
    "load_tokenizer",
    "pack",
    "read_documents",
    "split",
]
