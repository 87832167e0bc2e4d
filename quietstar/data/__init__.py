"""Training text: read documents, cut them into texts of tokens, and put the texts into a seeded order.

Nothing here knows of models or trainers.
"""

from typing import TYPE_CHECKING

from quietstar.lazy_names import lazy_names

if TYPE_CHECKING:
    from quietstar.data.bad_rows import BadRows
    from quietstar.data.batches import Batch, Batches, IndexedBatches
    from quietstar.data.loading import load_batches, load_texts
    from quietstar.data.order import BatchOrder
    from quietstar.data.packing import PackedTexts, pack, split
    from quietstar.data.sources import Document, read_documents
    from quietstar.data.streamed_batches import StreamedBatches
    from quietstar.data.tokenizer import check_vocabulary, load_tokenizer, tokenizer_fingerprint

__all__ = [
    "BadRows",
    "Batch",
    "BatchOrder",
    "Batches",
    "Document",
    "IndexedBatches",
    "PackedTexts",
    "StreamedBatches",
    "check_vocabulary",
    "load_batches",
    "load_texts",
    "load_tokenizer",
    "pack",
    "read_documents",
    "split",
    "tokenizer_fingerprint",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "quietstar.data.bad_rows": ("BadRows",),
        "quietstar.data.batches": ("Batch", "Batches", "IndexedBatches"),
        "quietstar.data.loading": ("load_batches", "load_texts"),
        "quietstar.data.order": ("BatchOrder",),
        "quietstar.data.packing": ("PackedTexts", "pack", "split"),
        "quietstar.data.sources": ("Document", "read_documents"),
        "quietstar.data.streamed_batches": ("StreamedBatches",),
        "quietstar.data.tokenizer": ("check_vocabulary", "load_tokenizer", "tokenizer_fingerprint"),
    },
)
