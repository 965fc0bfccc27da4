"""Exporting: a folder that others open, proof that it serves what was trained, a model card, and the upload."""

from vlmembed.export.exporter import Exporter, ModelInfo, PushError, SentenceTransformers, push, refuse_used
from vlmembed.export.verify import ExportError, Verification

__all__ = ["ExportError", "Exporter", "ModelInfo", "PushError", "SentenceTransformers", "Verification", "push"]
__all__ += ["refuse_used"]
